"""Groups for TAWin: every title of a stretch a row and lists only where they are wanted, against one row a prompt.

    recsys fit --config configs/small.yaml --trainer.max_epochs 5
    python benchmarks/groups.py --ckpt_path checkpoints/small/version_0/last.ckpt --config configs/small.yaml

All ways make and train the groups of the same rows under the same policy, each row with the history that precedes it
in its stretch. ``beam`` and ``exact`` search a whole list for every row, one row a prompt, by a beam that is as wide as
the group, or best first; ``shared`` is what ``BeamNegatives`` and ``TAWin`` do. What follows ``--config`` goes to
``recsys``: another policy, ``--data``, a window.

Prints for each, and for supervised training on the same stretches: seconds, token rows and titles learnt from; the open
groups trained per second and per million token rows; how far gates and negatives inside the window agree, with each
other and with the ranks of the whole catalogue; token rows against the least that the same lists and losses need; and
how often one refresh, one step and one metric update wait for the device.
"""

from __future__ import annotations

import argparse
import copy
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import Any

import torch
from checkpoint import load
from measure import timed
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from callbacks.beam_negatives import BeamNegatives, best_others
from recsys.data import HistoryDataModule
from recsys.functional import gate_open
from recsys.groups import Groups
from recsys.module import Recommender
from recsys.objectives import GroupObjective, StepContext, SupervisedFineTuning, TAWin
from recsys.search import beam_search
from recsys.tree import Places, TokenTree
from recsys.types import Batch

WAITS = ("_local_scalar_dense", "nonzero", "index", "repeat_interleave", "bincount", "_unique2", "masked_select")


Find = Callable[[Batch], Groups]


@dataclass
class Way:
    """What one way to train came to."""

    refresh: float = 0.0  # seconds
    training: float = 0.0  # seconds
    searched: int = 0  # token rows
    trained: int = 0  # token rows
    titles: int = 0  # titles with a loss
    groups: Groups | None = None

    @property
    def seconds(self) -> float:
        """Refresh and training."""
        return self.refresh + self.training


class Waits(TorchDispatchMode):
    """Counts the operations after which the host waits for a device: a scalar is read, or a shape depends on values."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        masks = name == "index" and any(i is not None and i.dtype == torch.bool for i in args[1])
        fixed = name == "repeat_interleave" and (kwargs or {}).get("output_size") is not None
        if name in WAITS and (name != "index" or masks) and not fixed:
            self.count["boolean index" if masks else name] += 1
        return func(*args, **(kwargs or {}))

    def __str__(self) -> str:
        parts = ", ".join(f"{n} {name}" for name, n in sorted(self.count.items()))
        return f"{sum(self.count.values())} ({parts})"


class Passes:
    """Counts the passes through the decoder."""

    def __init__(self, model: Recommender) -> None:
        self.decoder = model.policy.causal_lm.base_model
        self.count = 0

    def _add(self, *args: object) -> None:
        self.count += 1

    def __enter__(self) -> Passes:
        self.handle = self.decoder.register_forward_hook(self._add)
        return self

    def __exit__(self, *args: object) -> None:
        self.handle.remove()


def prefixes(batch: Batch, rows: int) -> Iterator[Batch]:
    """Cut stretches into one row a prompt, so many together, the longest first."""
    prompt, title = (batch.event >= 0).nonzero(as_tuple=True)
    end = batch.start.roll(-1, 1)  # a title ends where the next begins; the last one at the prompt's end
    last = torch.where((batch.titles >= 0).sum(1)[prompt] == title + 1, batch.length[prompt], end[prompt, title])
    order = last.argsort(descending=True)
    column = torch.arange(batch.titles.shape[1])
    for part in order.split(rows):
        of, at, length = prompt[part], title[part], last[part]
        before, own = column <= at[:, None], column == at[:, None]
        yield Batch(
            row=batch.event[of, at],
            tokens=torch.where(torch.arange(int(length.max())) < length[:, None], batch.tokens[of, : length.max()], 0),
            length=length,
            titles=batch.titles[of].where(before, -1),
            start=batch.start[of].where(before, 0),
            event=batch.event[of].where(own, -1),
            target=batch.titles[of, at],
        )


def merged(parts: list[Groups]) -> Groups:
    """Join groups, ascending by row."""
    columns = [torch.cat([getattr(part, f.name) for part in parts]) for f in fields(Groups)[:3]]
    order = columns[0].argsort()
    return Groups(*(column[order] for column in columns), None)


class Comparison:
    """Trains a policy both ways, at a learning rate of 0."""

    def __init__(self, model: Recommender, data: HistoryDataModule, negatives: BeamNegatives) -> None:
        self.model, self.data, self.negatives = model, data, negatives
        self.optimizer = model.configure_optimizers()
        self.generator = torch.Generator(model.device)

    @torch.no_grad()
    def refresh(self, batches: list[Batch], find: Find) -> Groups:
        """Return the groups of all rows that TAWin trains."""
        self.model.eval()
        groups = merged([find(batch) for batch in batches])
        self.model.train()
        return groups

    def shared(self, batch: Batch) -> Groups:
        """Find groups as the callback does."""
        return self.negatives.groups_of(self.model, batch, self.generator).groups

    def exact(self, batch: Batch) -> Groups:
        """Find the group of every row as the callback does for an objective that trains all, then keep some."""
        objective = self.model.objective
        assert isinstance(objective, TAWin)
        self.model.objective = copy.copy(objective)
        self.model.objective.train_missed = True
        groups = self.shared(batch)
        self.model.objective = objective
        return groups[objective.trains(groups.old_logprobs, self.model.dial.window)]

    def beam(self, batch: Batch) -> Groups:
        """Find the group of every row by a beam search that is as wide as the group, then keep some."""
        engine, objective, count = self.model.engine, self.model.objective, self.model.dial.group_negatives
        assert isinstance(objective, GroupObjective)
        chosen = batch.event >= 0
        prompt, places = engine.prefill(batch.tokens), Places.at(chosen, batch.start)
        positive = engine.head.title_logprobs(prompt.hidden, batch.titles, batch.start)[chosen][:, None]
        ranking = beam_search(engine, prompt, places, count + engine.trie.max_duplicates)
        target = batch.titles[chosen][:, None]
        best, scores = best_others(engine.trie, ranking, target, count)
        groups = Groups(batch.event[chosen], torch.cat([target, best], 1), torch.cat([positive, scores], 1), None)
        return groups[objective.trains(groups.old_logprobs, self.model.dial.window)]

    def step(self, objective: Any, batch: Batch, groups: Groups | None) -> None:
        """Take an optimiser step."""
        objective.step(self.model.engine, batch, StepContext(groups, self.model.dial.window))["loss"].backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def run(self, objective: Any, searched: list[Batch], trained: list[Batch], find: Find | None = None) -> Way:
        """Refresh and train some batches."""
        way, engine = Way(), self.model.engine
        before = engine.token_rows
        if find is not None:
            way.refresh, way.groups = timed(self.refresh, searched, find)
        way.searched, before = engine.token_rows - before, engine.token_rows
        way.training, _ = timed(lambda: [self.step(objective, batch, way.groups) for batch in trained])
        way.trained = engine.token_rows - before
        return way


def opened(groups: Groups, window: Any) -> Tensor:
    """Return which gates are open, ``[R]``."""
    relevance = torch.zeros_like(groups.old_logprobs, dtype=torch.bool)
    relevance[:, 0] = True
    return gate_open(groups.old_logprobs, relevance, *window.rates)


def in_window(groups: Groups, window: Any) -> dict[int, set[int]]:
    """Return the negatives inside the window of each row whose gate is open."""
    chosen = opened(groups, window)
    places = slice(int(window.start) + 1, int(window.end) + 1)  # a group's negatives stand best first
    return dict(zip(groups.row[chosen].tolist(), map(set, groups.items[chosen, places].tolist()), strict=True))


def agreement(one: Groups, other: Groups, window: Any) -> str:
    """Compare gates, and negatives inside the window where both are open."""
    a, b = in_window(one, window), in_window(other, window)
    both = a.keys() & b.keys()
    same = sum(len(a[row] & b[row]) for row in both) / max(1, sum(len(a[row]) for row in both))
    alone = len(a.keys() - both), len(b.keys() - both)
    return f"open in both {len(both)}, in one alone {alone[0]} and {alone[1]}; {same:.2%} of the negatives are the same"


@torch.no_grad()
def truth(model: Recommender, batches: list[Batch], count: int) -> Groups:
    """Return the groups of every row from the scores of the whole catalogue."""
    parts, engine = [], model.engine
    model.eval()
    for batch in batches:
        chosen = batch.event >= 0
        scores = engine.score_all(engine.prefill(batch.tokens), Places.at(chosen, batch.start))
        target = batch.titles[chosen][:, None]
        positive = scores.gather(1, target)
        same = engine.trie.leaf[None] == engine.trie.leaf[target]
        best = scores.masked_fill(same, -torch.inf).topk(count)
        groups = torch.cat([target, best.indices], 1), torch.cat([positive, best.values], 1)
        parts.append(Groups(batch.event[chosen], *groups, None))
    return merged(parts)


def least_rows(model: Recommender, batch: Batch, groups: Groups) -> int:
    """Token rows without which neither the groups nor their loss can be: prompts and trees, without padding."""
    index, grouped = groups.find(batch.event)
    grouped &= batch.event >= 0
    items = groups.items[index[grouped]][:, 1:]
    rows = int(batch.length.sum())
    if len(items):
        trie = model.engine.trie
        rows += int((TokenTree.of(items, trie, model.engine.head.predicts).node < len(trie)).sum())
    return rows


def main() -> None:
    """Run the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt_path", required=True, help="checkpoint of a warm start of this config")
    parser.add_argument("--stretches", type=int, default=256, help="stretches that are trained on")
    parser.add_argument("--rows", type=int, default=64, help="rows in a batch of the other ways")
    parser.add_argument("--checked", type=int, default=32, help="stretches whose groups are compared with exact ranks")
    arguments, rest = parser.parse_known_args()
    model, negatives = load(arguments.ckpt_path, rest)
    data = model.data
    data.policy_stretches = arguments.stretches
    stretches, window = data.stretches(0, warm_start=False), model.dial.window
    searched = list(data.batches(stretches, negatives.batch_size, False))
    dataset = data.dataset(data.plan(0, False), False)
    trained = [dataset[i] for i in range(len(dataset))]
    rows = sum(int((batch.event >= 0).sum()) for batch in trained)
    titles = sum(int((batch.titles >= 0).sum()) for batch in trained)
    one_a_prompt = list(prefixes(data.dataset([stretches], False)[0], arguments.rows))
    print(f"{model.policy.name}, {len(data.catalog):,} items, {torch.get_num_threads()} threads, {model.dial}")
    print(f"{len(stretches)} stretches, {rows:,} rows, {titles:,} titles")

    compared = Comparison(model, data, negatives)
    assert isinstance(model.objective, TAWin)
    plain, anchored = (with_anchor(model.objective, coef) for coef in (0.0, 0.1))
    compared.run(anchored, searched[:1], trained[:1], compared.shared)  # libraries warm up
    ways = {
        "supervised": compared.run(SupervisedFineTuning(), [], trained),
        "beam": compared.run(plain, one_a_prompt, one_a_prompt, compared.beam),
        "beam, anchor": compared.run(anchored, one_a_prompt, one_a_prompt, compared.beam),
        "exact": compared.run(plain, one_a_prompt, one_a_prompt, compared.exact),
        "exact, anchor": compared.run(anchored, one_a_prompt, one_a_prompt, compared.exact),
        "shared": compared.run(plain, searched, trained, compared.shared),
        "shared, anchor": compared.run(anchored, searched, trained, compared.shared),
    }
    print(f"\n{'':20s} refresh s  train s  token rows of both  groups  open  open/s  open/M rows  ms/title")
    for name, way in ways.items():
        spent = way.searched + way.trained
        line = f"{name:20s} {way.refresh:9.1f} {way.training:8.1f} {way.searched:9,d} {way.trained:9,d}"
        if way.groups is not None:
            n = int(opened(way.groups, window).sum())
            line += f" {len(way.groups.row):7d} {n:5d} {n / way.seconds:7.1f} {1e6 * n / spent:12.0f}"
        else:
            line += " " * 34
        print(f"{line} {1e3 * way.seconds / titles:9.2f}")
    per_second = {name: int(opened(w.groups, window).sum()) / w.seconds for name, w in ways.items() if w.groups}
    for base in ("beam", "exact"):
        ratios = [per_second[f"shared{anchor}"] / per_second[f"{base}{anchor}"] for anchor in ("", ", anchor")]
        print(f"open groups per second, shared / {base}: {ratios[0]:.1f}, with the anchor {ratios[1]:.1f}")
    dearer = ways["shared, anchor"].seconds / ways["supervised"].seconds
    print(f"seconds per title that is learnt from, TAWin with anchor / supervised: {dearer:.2f}")
    found = {name: ways[name].groups for name in ("beam", "exact", "shared")}
    beam, exhaustive, shared = found.values()
    assert beam is not None
    assert exhaustive is not None
    assert shared is not None
    print(f"\nexact and shared: {agreement(exhaustive, shared, window)}")
    print(f"beam and shared: {agreement(beam, shared, window)}")
    part = searched[-max(1, arguments.checked // negatives.batch_size) :]
    exact = truth(model, part, model.dial.group_negatives)
    print(f"of {len(exact.row)} rows, with the exact ranks:")
    for name, groups in (("beam", beam), ("exact", exhaustive), ("shared", shared)):
        print(f"  {name}: {agreement(exact, groups[torch.isin(groups.row, exact.row)], window)}")

    print("\ntoken rows           spent      least  ratio")
    for name, spent, batches in (
        ("refresh", ways["shared"].searched, searched),
        ("step with anchor", ways["shared, anchor"].trained, trained),
    ):
        least = sum(least_rows(model, batch, shared) for batch in batches)
        print(f"{name:16s} {spent:10,d} {least:10,d} {spent / least:6.2f}")

    print("\nwaits for the device")
    for size in (max(1, len(trained[0]) // 2), len(trained[0])):
        batch = trained[0][torch.arange(size)]
        with Waits() as waits, Passes(model) as passes:
            compared.refresh([batch], compared.shared)
        print(f"  refresh of {size} stretches, {passes.count} passes: {waits}")
        with Waits() as waits:
            compared.step(anchored, batch, shared)
        print(f"  step on {size} stretches: {waits}")
    model.eval()
    rows = data.evaluation_rows("val")[: data.eval_batch_size]
    for size in (max(1, len(rows) // 2), len(rows)):
        [batch] = data.batches(rows[:size], size)
        with Waits() as waits, Passes(model) as passes:
            ranking = model.rank(batch)
        print(f"  ranking of {size} rows, {passes.count} passes: {waits}")
        with Waits() as waits:
            model.evaluations["val"].update(ranking, batch.target, torch.zeros_like(ranking.valid))
        print(f"  update of the metrics by {size} rows: {waits}")


def with_anchor(objective: TAWin, coef: float) -> TAWin:
    """Return the objective with another anchor."""
    changed = copy.copy(objective)
    changed.anchor_coef = coef
    return changed


if __name__ == "__main__":
    main()
