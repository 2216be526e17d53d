"""What a run will cost, before it starts: token rows through the model, optimiser steps, and memory on each device.

Token rows are rows of the decoder's input, padding included, as ``TreeEngine.token_rows`` counts them. Those of prompts
and of supervised windows follow from the data. Those of the search and of groups depend on the policy too: they are
counted on a sample of batches, by the real engine with a small policy in place of the model that prefers popular items.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain, pairwise
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Trainer
from torch import Tensor
from transformers import Cache

from callbacks.beam_negatives import BeamNegatives
from recsys.data import BatchDataset, HistoryDataModule, plan_batches
from recsys.memory import META, Call, DecoderCall, HeadCall, peak_bytes, weight_bytes
from recsys.module import Recommender
from recsys.objectives import GroupObjective
from recsys.policy import TinyPolicy
from recsys.tree import Normalization, TreeEngine
from recsys.trie import Trie
from recsys.types import Batch, UserError

SAMPLE = 4  # batches of the search, and of validation, that are run at least
NOISE = 2.0  # standard deviation of the stand-in's logits around the logarithm of the items' popularity

WINDOWS, SEARCH, REFERENCE = "supervised windows", "search for negatives", "reference policy"
POLICY, VALIDATION = "policy optimisation", "validation"
WORK = (WINDOWS, SEARCH, REFERENCE, POLICY, VALIDATION)

Plan = list[list[np.ndarray]]  # row ids of each batch of each process


@dataclass
class Work:
    """Work of one kind in a run, of all processes together."""

    times: int = 0  # epochs, refreshes or validations
    batches: int = 0
    steps: int = 0  # of the optimiser, which all processes take together
    users: int = 0  # rows of the batches: a history with its target each
    prompts: int = 0  # token rows of prompts
    trees: int = 0  # token rows of tree nodes

    @property
    def token_rows(self) -> int:
        """Token rows through the model."""
        return self.prompts + self.trees


@dataclass
class Peak:
    """Memory that exists at once, apart from the weights, while the largest batch of a kind of work is done."""

    bytes: int
    cache: int  # bytes of keys and values among them
    users: int
    width: int  # tokens of the longest prompt


@dataclass
class Cost:
    """What a run costs."""

    work: dict[str, Work]  # what the run has of WORK
    weights: dict[str, int]  # bytes on each device throughout the run
    peaks: dict[str, Peak]  # by the names of ``work``
    processes: int
    sampled: int  # rows
    dtype: torch.dtype  # compute type


def run_cost(trainer: Trainer, model: Recommender, data: HistoryDataModule) -> Cost:
    """Compute what ``trainer.fit(model, data)`` costs from its beginning to ``max_epochs``.

    ``max_steps`` and ``max_time`` of the trainer are not considered. Policy optimisation counts every row of an epoch,
    also rows that an objective skips: an upper bound.

    Args:
        trainer: Its callbacks, limits and numbers of devices and nodes are read.
        model: Its policy is not built; afterwards its engine is a stand-in, and its policy has shapes alone.
        data: After ``tokenize``.

    Raises:
        UserError: Those of ``Recommender.setup`` and ``BeamNegatives.on_fit_start``, or the run has no end.
    """
    if trainer.max_epochs is None or trainer.max_epochs < 1:
        raise UserError("the cost of a run needs its end: set trainer.max_epochs")
    model.trainer = trainer
    trainer.datamodule = data  # type: ignore[attr-defined]
    negatives = next((c for c in trainer.callbacks if isinstance(c, BeamNegatives)), None)  # type: ignore[attr-defined]
    if negatives is not None:
        negatives.setup(trainer, model, "fit")
    model.setup("fit")
    standin = _StandIn(model.tokenizer)
    standin.build(torch.device("cpu"))
    counts = 1 + np.bincount(data.histories.items[data.histories.train], minlength=len(data.catalog))
    trie = Trie.from_sequences(data.item_tokens)
    model.engine = engine = _Engine(standin, trie, model.normalization, torch.from_numpy(counts))
    if negatives is not None:
        negatives.on_fit_start(trainer, model)
    return _Estimate(trainer, model, data, negatives, engine).cost()


class _StandIn(TinyPolicy):
    """A small random policy with another's tokenizer, which notes the shapes of what goes through it."""

    def __init__(self, tokenizer: Any) -> None:
        super().__init__(hidden_size=16, layers=1, heads=1)
        self.tokenizer = tokenizer
        self.calls: list[Call] = []

    def hidden(
        self,
        tokens: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        cached = 0 if cache is None else cache.get_seq_length()
        users, width = tokens.shape
        self.calls.append(DecoderCall(users, width, cached, attention_mask is not None))
        return super().hidden(tokens, attention_mask, position_ids, cache)


class _Engine(TreeEngine):
    """The engine over a stand-in, which chooses items about as often as ``counts [M]`` says, above 0.

    A policy without preferences would take titles that differ early from all others, and need few tree nodes.
    """

    policy: _StandIn

    def __init__(self, policy: _StandIn, trie: Trie, normalization: Normalization, counts: Tensor) -> None:
        super().__init__(policy, trie, normalization)
        mass = torch.zeros(len(trie)).index_add(0, trie.leaf, counts.float())
        parent = trie.parent(torch.arange(len(trie)))
        for first, last in reversed([*pairwise([*trie.levels[1:].tolist(), len(trie)])]):  # bottom up, not the root
            mass.index_add_(0, parent[first:last], mass[first:last].clone())
        self.log_mass = mass.log()

    def child_logprobs(self, hidden: Tensor, node: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        child, row = self.trie.children(node)
        self.policy.calls.append(HeadCall(node, len(child)))
        # The random head makes users differ: its product with a hidden state has a standard deviation of 0.02 sqrt(H).
        noise = (hidden[row] * self.policy.head.weight[self.trie.tokens[child].long()]).sum(1)
        logits = self.log_mass[child] - self.log_mass[node][row] + noise * (NOISE / 0.02 / hidden.shape[1] ** 0.5)
        # Over the children under `vocab` as well: what is forced is easily learnt, but not by a random policy.
        return logits - logits.new_zeros(len(node)).index_add(0, row, logits.exp()).log()[row], child, row


class _Estimate:
    """Goes through a run's epochs, see :func:`run_cost`."""

    def __init__(
        self,
        trainer: Trainer,
        model: Recommender,
        data: HistoryDataModule,
        negatives: BeamNegatives | None,
        engine: _Engine,
    ) -> None:
        self.trainer = trainer
        self.model = model
        self.data = data
        self.negatives = negatives
        self.engine = engine
        self.processes = trainer.num_devices * trainer.num_nodes
        self.lengths = data.encoder.lengths(data.histories, np.arange(len(data.histories.items)))  # [E]
        items = torch.arange(len(data.catalog))
        nodes = [(engine.tree_of(part[:, None]).node < len(engine.trie)).sum(1) for part in items.split(2**16)]
        self.item_nodes = torch.cat(nodes).numpy()  # [M] tree nodes of an item alone
        self.work = {name: Work() for name in WORK}
        self.largest: dict[str, np.ndarray] = {}  # rows of the batch with most prompt tokens
        self.refresh: Plan = []  # batches of the latest refresh of the negatives
        self.sampled = 0

    @torch.no_grad()
    def cost(self) -> Cost:
        trainer, data = self.trainer, self.data
        plan = self._plan(data.evaluation_rows("val"), data.eval_batch_size, None, trainer.limit_val_batches)
        checked = int(min(trainer.num_sanity_val_steps, len(plan[0])))
        self._add(VALIDATION, [batches[:checked] for batches in plan], times=int(checked > 0))
        for epoch in range(trainer.max_epochs or 0):
            batches = self._train(epoch)
            if plan[0] and (epoch + 1) % (trainer.check_val_every_n_epoch or 1) == 0:
                every = trainer.val_check_interval
                every = int(every * batches) if isinstance(every, float) else every
                self._add(VALIDATION, plan, times=batches // max(1, every))

        work = {name: work for name, work in self.work.items() if work.times}
        if VALIDATION in work:
            self._sample_validation(plan)
        if POLICY in work:
            self._sample_groups()
        policy = self.model.policy
        policy.model = policy.load(META)
        peaks = {name: self._peak(name) for name in work if name != REFERENCE}
        weights = weight_bytes(policy) | {"trie of the catalogue": self.engine.trie.nbytes}
        if REFERENCE in work:
            weights["reference policy"] = weights["trained weights"]
        return Cost(work, weights, peaks, self.processes, self.sampled, policy.head.weight.dtype)

    # ---- what follows from the data ---------------------------------------------------------------------------

    def _plan(self, rows: np.ndarray, size: int, seed: list[int] | None, limit: float = 1.0) -> Plan:
        """Return the batches of each process, as many as the trainer's limit leaves."""
        ranks = range(self.processes)
        plan = [plan_batches(rows, self.lengths[rows], size, seed, rank, self.processes) for rank in ranks]
        count = limit if isinstance(limit, int) else int(limit * len(plan[0]))
        return [batches[:count] for batches in plan]

    def _add(self, name: str, plan: Plan, times: int = 1) -> None:
        """Count so many passes over the batches of a plan."""
        work = self.work[name]
        work.times += times
        for batch in chain(*plan):
            work.batches += times
            work.users += times * len(batch)
            work.prompts += times * self._prompts(batch)
            if name not in self.largest or self._prompts(batch) > self._prompts(self.largest[name]):
                self.largest[name] = batch

    def _prompts(self, batch: np.ndarray) -> int:
        """Token rows of a batch's prompts; a row below 0 fills up the batch, see :func:`plan_batches`."""
        return len(batch) * int(self.lengths[np.where(batch < 0, ~batch, batch)].max())

    def _train(self, epoch: int) -> int:
        """Count an epoch's training and the refreshes of its negatives; return the batches of each process."""
        trainer, data = self.trainer, self.data
        windows = self.model.trains_on_windows(epoch)
        name = WINDOWS if windows else POLICY
        plan = self._plan(*data.training(epoch, windows), trainer.limit_train_batches)
        batches = len(plan[0])
        self._add(name, plan)
        self.work[name].steps += -(-batches // trainer.accumulate_grad_batches)
        if windows:
            targets = (data.histories.items[batch] for batch in chain(*plan))
            self.work[name].trees += sum(len(target) * int(self.item_nodes[target].max()) for target in targets)
            return batches
        assert self.negatives is not None  # Recommender.setup made sure
        due = self.negatives.due(self.model, epoch)
        refreshes = int(len(due) > 0)
        if refreshes:
            self.refresh = self._plan(due, self.negatives.batch_size, None)
        if self.negatives.every_n_steps:
            refreshes += (batches - 1) // (self.negatives.every_n_steps * trainer.accumulate_grad_batches)
        objective = self.model.objective
        if isinstance(objective, GroupObjective) and objective.needs_reference:  # the first refresh is the reference
            self._add(REFERENCE, self.refresh, refreshes - (self.work[SEARCH].times == 0))
        self._add(SEARCH, self.refresh, refreshes)
        return batches

    # ---- what depends on the policy ---------------------------------------------------------------------------

    def _batch(self, rows: np.ndarray) -> Batch:
        return BatchDataset(self.data.histories, self.data.encoder, [rows])[0]

    def _sample_validation(self, plan: Plan) -> None:
        sample, before = _spread(plan[0]), self.engine.token_rows
        for rows in sample:
            self.model.rank(self._batch(rows))
        users = sum(map(len, sample))
        trees = self.engine.token_rows - before - sum(map(self._prompts, sample))
        self.sampled += users
        self.work[VALIDATION].trees = round(trees / users * self.work[VALIDATION].users)

    def _sample_groups(self) -> None:
        """Find the negatives of some rows, and put those rows into batches of training at random."""
        size = self.data.batch_size
        sample = _spread(self.refresh[0], 2 * size)
        users = sum(map(len, sample))
        self.sampled += users
        groups = [self._group(rows) for rows in sample]
        searched = sum(group[1] for group in groups) / users
        scored = sum(group[2] for group in groups) / users
        items = torch.cat([group[0] for group in groups])
        items = items[torch.randperm(users, generator=torch.Generator().manual_seed(0))]
        trees = sum(len(part) * self.engine.tree_of(part).node.shape[1] for part in items.split(size)) / users
        self.work[SEARCH].trees = round((searched + scored) * self.work[SEARCH].users)
        self.work[REFERENCE].trees = round(scored * self.work[REFERENCE].users)
        self.work[POLICY].trees = round(trees * self.work[POLICY].users)

    def _group(self, rows: np.ndarray) -> tuple[Tensor, int, int]:
        """Return the items ``[B, G]`` of the groups that a refresh makes, and the tree rows of search and scoring."""
        assert self.negatives is not None
        batch, engine = self._batch(rows), self.engine
        before = engine.token_rows
        items, _, _ = self.negatives.groups_of(self.model, batch, torch.Generator().manual_seed(0))
        scored = engine.tree_of(items).node.numel()
        return items, engine.token_rows - before - batch.tokens.numel() - scored, scored

    def _peak(self, name: str) -> Peak:
        """Return the memory of a work's largest batch."""
        rows, calls = self.largest[name], self.engine.policy.calls
        batch = self._batch(rows)
        if name == POLICY:
            assert self.negatives is not None
            size = self.negatives.batch_size
            items = torch.cat([self._group(rows[i : i + size])[0] for i in range(0, len(rows), size)])
        calls.clear()
        if name == WINDOWS:
            _, hidden = self.engine.forward(batch.tokens, batch.length, batch.target[:, None])
            self.engine.history_logprobs(hidden, batch.history, batch.history_start)
        elif name == POLICY:
            self.engine.forward(batch.tokens, batch.length, items)
        elif name == SEARCH:
            self._group(rows)
        else:
            self.model.rank(batch)
        peak, cache = peak_bytes(self.model.policy, self.engine, calls, train=name in (WINDOWS, POLICY))
        return Peak(peak, cache, *batch.tokens.shape)


def _spread(batches: list[np.ndarray], rows: int = 0) -> list[np.ndarray]:
    """Return ``SAMPLE`` batches, or as many more as make about so many rows, spread evenly over the plan."""
    count = min(len(batches), max(SAMPLE, -(-rows // len(batches[0]))))
    return [batches[i * len(batches) // count] for i in range(count)]


def cost_text(cost: Cost) -> str:
    """Write a cost as two tables and a line that says how much memory a device needs."""
    table = [["token rows", "times", "batches", "steps", "prompts", "trees", "each time", "in all"]]
    for name, work in cost.work.items():
        numbers = [work.times, work.batches, work.steps, work.prompts, work.trees]
        numbers += [round(work.token_rows / work.times), work.token_rows]
        table.append([name, *(f"{n:,}" for n in numbers)])
    steps = sum(work.steps for work in cost.work.values())
    total = sum(work.token_rows for work in cost.work.values())
    table.append(["the run", "", "", f"{steps:,}", "", "", "", f"{total:,}"])
    if cost.processes > 1:
        table.append([f"each of {cost.processes} processes", *[""] * 6, f"{round(total / cost.processes):,}"])
    lines = _aligned(table)
    lines.append(f"Prompts, and trees of {WINDOWS}, are counted; other trees are estimated from {cost.sampled} rows.")
    if POLICY in cost.work:
        lines.append(f"For {POLICY} this is an upper bound: an objective may skip rows.")

    memory = [["GiB on each device", "", "", ""]]
    memory += [[name, _gib(size), "", ""] for name, size in cost.weights.items()]
    for name, peak in cost.peaks.items():
        cache = f"keys and values {_gib(peak.cache)}" if peak.cache else ""
        memory.append([f"peak of {name}", _gib(peak.bytes), f"{peak.users} prompts of {peak.width}", cache])
    name, worst = max(cost.peaks.items(), key=lambda named: named[1].bytes)
    dtype = str(cost.dtype).removeprefix("torch.")
    return "\n".join(
        [
            *lines,
            "",
            *_aligned(memory),
            f"Memory per device, computing in {dtype}: {_gib(sum(cost.weights.values()))} GiB of weights, "
            f"{_gib(worst.bytes)} GiB at the peak of {name};",
            "CUDA's context and allocator need about another GiB.",
        ]
    )


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f}"


def _aligned(table: list[list[str]]) -> list[str]:
    """Align the first column left, the others right."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    rows = (zip(row, widths, strict=True) for row in table)
    return ["  ".join(c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(row)).rstrip() for row in rows]
