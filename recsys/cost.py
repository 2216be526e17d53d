"""What a run will cost, measured on its own largest batches: token rows, optimiser steps, time and memory.

The policy is loaded and does each kind of work of the run (a supervised step, a search for negatives, a policy step, a
validation) on the largest batch, so that one which does not fit into memory fails here, and on a few others. From these
follow the totals. Token rows are rows of the decoder's input, padding included, as ``TreeEngine.token_rows`` counts
them. What a search and a group cost depends on what the policy prefers; it is taken as it is at the start.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from lightning.pytorch import Trainer

from callbacks.beam_negatives import BeamNegatives
from recsys.data import HistoryDataModule, plan_batches
from recsys.groups import Groups
from recsys.module import Recommender
from recsys.objectives import Objective, StepContext
from recsys.types import Batch, UserError

SAMPLE = 3  # batches of each kind of work that are done, beside the largest


@dataclass
class Work:
    """Work of one kind, of all processes together."""

    warm_start: bool | None  # whether of the warm start or the objective; None for evaluation
    do: Callable[[Batch, Groups | None], object]
    grouped: bool = False  # whether it needs the batch's groups, which are found apart
    steps: int = 0  # of the optimiser, which all processes take together
    batches: list[np.ndarray] = field(default_factory=list)  # row ids of each; a batch done twice stands here twice
    token_rows: float = 0.0
    seconds: float = 0.0
    memory: int = 0  # bytes at the peak, on a device or, on a CPU, of the process so far


class RunCost:
    """Goes through what ``trainer.fit(model, data)`` would do from its beginning to ``max_epochs``.

    The trainer's ``max_steps``, ``max_time`` and ``val_check_interval`` are not considered.

    Args:
        trainer: Its callbacks, limits and numbers of devices and nodes are read.
        model: Its policy is built and stays as it is.
        data: The run's data.

    Raises:
        UserError: those of ``fit`` before training, or the run has no end.
    """

    def __init__(self, trainer: Trainer, model: Recommender, data: HistoryDataModule) -> None:
        if trainer.max_epochs is None or trainer.max_epochs < 1:
            raise UserError("the cost of a run needs its end: set trainer.max_epochs")
        model.prepare(trainer, data)
        self.trainer, self.model, self.data = trainer, model, data
        self.optimizer = model.configure_optimizers()
        found = (c for c in trainer.callbacks if isinstance(c, BeamNegatives))  # type: ignore[attr-defined]
        self.negatives = next(found, BeamNegatives())
        self.processes = trainer.num_devices * trainer.num_nodes
        self.work = {
            "supervised steps": Work(True, lambda *args: self._step(model.warm_start or model.objective, *args)),
            "search for negatives": Work(False, lambda batch, _: self._search(batch)),
            "policy steps": Work(False, lambda *args: self._step(model.objective, *args), grouped=True),
            "validation": Work(None, lambda batch, _: model.rank(batch)),
        }
        self._plan()
        for work in self.work.values():
            self._measure(work)

    def _batches(self, plan: Callable[[int], list[np.ndarray]], limit: float = 1.0) -> list[np.ndarray]:
        """Return the batches of all processes, as many as the trainer's limit leaves."""
        plans = [plan(rank) for rank in range(self.processes)]
        count = limit if isinstance(limit, int) else int(limit * len(plans[0]))
        return [batch for each in plans for batch in each[:count]]

    def _in_order(self, rows: np.ndarray, size: int, answers: bool) -> Callable[[int], list[np.ndarray]]:
        lengths = self.data.encoder.lengths(self.data.histories, rows, answers)
        return lambda rank: plan_batches(rows, lengths, size, None, rank, self.processes)

    def _plan(self) -> None:
        """Lay out the batches of all epochs."""
        trainer, data = self.trainer, self.data
        held_out = self._in_order(data.evaluation_rows("val"), data.eval_batch_size, False)
        validation = self._batches(held_out, trainer.limit_val_batches)
        checked = int(min(trainer.num_sanity_val_steps, len(validation) // self.processes)) * self.processes
        self.work["validation"].batches += validation[:checked]
        for epoch in range(trainer.max_epochs or 0):
            phase = self.model.phase_at(epoch)
            work = self.work["supervised steps" if phase.supervised else "policy steps"]
            within = epoch - phase.start
            plan = partial(data.plan, within, phase.warm_start, world_size=self.processes)
            batches = self._batches(plan, trainer.limit_train_batches)
            work.batches += batches
            each = len(batches) // self.processes
            work.steps += -(-each // trainer.accumulate_grad_batches)
            if (epoch + 1) % (trainer.check_val_every_n_epoch or 1) == 0 or epoch + 1 == trainer.max_epochs:
                self.work["validation"].batches += validation
            for batch in range(each):
                due = self.negatives.due(trainer, self.model, epoch, batch)
                if len(due):
                    searched = self._batches(self._in_order(due, self.negatives.batch_size, True))
                    self.work["search for negatives"].batches += searched

    def _measure(self, work: Work) -> None:
        """Do the largest batch and some others, and reckon from these by the tokens of their prompts."""
        if not work.batches:
            return
        device = self.trainer.strategy.root_device
        tokens = np.array([self._prompt_tokens(batch) for batch in work.batches])
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        self._do(work, int(tokens.argmax()))  # not counted: libraries warm up
        some = list(range(0, len(tokens), -(-len(tokens) // SAMPLE)))
        rows, seconds = np.sum([self._do(work, place) for place in some], axis=0)
        share = tokens[some].sum() / tokens.sum()
        work.token_rows, work.seconds = rows / share, seconds / share / self.processes
        work.memory = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _process_peak()

    def _do(self, work: Work, place: int) -> tuple[int, float]:
        """Do one batch; return its token rows and seconds."""
        device, engine = self.trainer.strategy.root_device, self.model.engine
        batch = self.data.dataset([work.batches[place]], work.warm_start)[0].to(device)
        groups = self._groups(batch) if work.grouped else None
        before, began = engine.token_rows, time.perf_counter()
        work.do(batch, groups)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return engine.token_rows - before, time.perf_counter() - began

    def _prompt_tokens(self, batch: np.ndarray) -> int:
        rows = np.where(batch < 0, ~batch, batch)  # a row below 0 fills up the batch, see :func:`plan_batches`
        return len(batch) * int(self.data.encoder.lengths(self.data.histories, rows).max())

    # ---- the work itself --------------------------------------------------------------------------------------

    @torch.no_grad()
    def _groups(self, batch: Batch) -> Groups:
        """Find the groups of a batch as a refresh does."""
        self.model.eval()
        found = self.negatives.groups_of(self.model, batch, torch.Generator(batch.row.device)).groups
        self.model.train()
        order = found.row.argsort()
        logprobs = found.old_logprobs[order]
        return Groups(found.row[order], found.items[order], logprobs, logprobs.clone())

    @torch.no_grad()
    def _search(self, batch: Batch) -> None:
        """Find groups, and run the prompts under the reference policy where the objective reads it."""
        self._groups(batch)
        if getattr(self.model.objective, "needs_reference", False):
            self.model.engine.prefill(batch.tokens)

    def _step(self, objective: Objective, batch: Batch, groups: Groups | None) -> None:
        """Take an optimiser step at a learning rate of 0."""
        objective.step(self.model.engine, batch, StepContext(groups, self.model.dial.window))["loss"].backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    # ---- the table --------------------------------------------------------------------------------------------

    def __str__(self) -> str:
        """Return a table of the work, and what it comes to."""
        lines = [["", "batches", "steps", "rows", "token rows", "minutes", "peak GiB"]]
        for name, work in self.work.items():
            if work.batches:
                numbers = [len(work.batches), work.steps, sum(map(len, work.batches)), round(work.token_rows)]
                cells = [f"{number:,}" for number in numbers]
                lines.append([name, *cells, f"{work.seconds / 60:.1f}", f"{work.memory / 2**30:.2f}"])
        works = self.work.values()
        steps, rows = sum(work.steps for work in works), round(sum(work.token_rows for work in works))
        minutes, peak = sum(work.seconds for work in works) / 60, max(work.memory for work in works) / 2**30
        lines.append(["the run", "", f"{steps:,}", "", f"{rows:,}", f"{minutes:.1f}", f"{peak:.2f}"])
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        text = [
            "  ".join(c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True)))
            for line in lines
        ]
        device = self.trainer.strategy.root_device
        memory = "of the device" if device.type == "cuda" else "of this process"
        text.append(
            f"Measured on {device}, the largest batch of each kind first; memory {memory}, token rows of "
            f"{self.processes} process(es). What a search finds, and so its cost, changes while the policy learns."
        )
        return "\n".join(text)


def _process_peak() -> int:
    """Return the most bytes of memory that this process has had so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
