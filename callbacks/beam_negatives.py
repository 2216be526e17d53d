"""Finds the negatives that policy optimisation trains on: the best items of each row under the policy itself."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor

from callbacks.adapter_checkpoint import AdapterCheckpoint
from callbacks.progress import track
from recsys.functional import sample_outside
from recsys.groups import Groups, GroupSource
from recsys.module import Recommender
from recsys.objectives import GroupObjective
from recsys.phase import Phase
from recsys.search import Ranking, Wanted, best_first_search
from recsys.tree import Places
from recsys.trie import Trie
from recsys.types import Batch, UserError


class BeamNegatives(GroupSource):
    """Refreshes the group (the positive and n negatives) of each row that is about to be trained on.

    The positive is never among its own negatives, nor is an item with the same title. Groups are kept with their
    log-probabilities under the policy that made them, travel in checkpoints, and are made by all processes together.

    Args:
        count: n, negatives of a group; null takes so many that they reach beyond the window.
        mode: ``beam`` takes the policy's best items, ``random`` uniform ones, ``mixed`` half and half.
        every_n_epochs: Epochs between refreshes.
        every_n_steps: Optimiser steps between refreshes, each of the rows up to the next one; 1 has every step learn
            from the policy's own negatives of that moment. Null refreshes the rows of whole epochs.
        batch_size: Stretches searched together; every row in one is a search of its own.
    """

    def __init__(
        self,
        count: int | None = None,
        mode: Literal["beam", "random", "mixed"] = "beam",
        every_n_epochs: int = 1,
        every_n_steps: int | None = None,
        batch_size: int = 16,
    ) -> None:
        numbers = {"count": count, "every_n_epochs": every_n_epochs, "every_n_steps": every_n_steps}
        for name, value in (numbers | {"batch_size": batch_size}).items():
            if value is not None and value < 1:
                raise UserError(f"negatives.{name} must be at least 1, but it is {value}")
        if every_n_steps is not None and every_n_epochs != 1:
            raise UserError("negatives.every_n_epochs and every_n_steps: set one of them, and every_n_epochs back to 1")
        self.count = count
        self.best_share = {"beam": 1.0, "random": 0.0, "mixed": 0.5}[mode]
        self.every_n_epochs = every_n_epochs
        self.every_n_steps = every_n_steps
        self.batch_size = batch_size
        self.groups: Groups | None = None
        self.until = 0  # first epoch that they are not for
        self.begun: dict[str, Any] | None = None  # what an unfinished refresh has found
        self.start: dict[str, Tensor] | None = None  # trained weights at the first refresh: the KL term's reference

    # ---- when -------------------------------------------------------------------------------------------------

    def on_fit_start(self, trainer: Trainer, pl_module: Recommender) -> None:  # type: ignore[override]
        """Hand over the groups of a checkpoint, unless the objective has become one that needs more of them."""
        needed = isinstance(pl_module.objective, GroupObjective) and pl_module.objective.needs_reference
        if self.groups is not None and (self.groups.ref_logprobs is not None or not needed):
            self.groups = pl_module.groups = self.groups.to(pl_module.device)
        else:
            self.groups = None

    def on_train_batch_start(  # type: ignore[override]
        self, trainer: Trainer, pl_module: Recommender, batch: Batch, batch_idx: int
    ) -> None:
        """Refresh the rows of the batches up to the next refresh.

        Not at the epoch's start: Lightning leaves that out when it resumes from behind the last batch of an epoch.
        """
        epoch = trainer.current_epoch
        lacking = self.groups is None or epoch >= self.until  # as where a run goes on beyond the end that it had
        stretches = self.due(trainer, pl_module, epoch, batch_idx, lacking)
        if len(stretches):
            self.refresh(trainer, pl_module, stretches, batch_idx)
            self.until = self._until(pl_module.phase_at(epoch), epoch)

    def due(
        self, trainer: Trainer, module: Recommender, epoch: int, batch_idx: int, lacking: bool = False
    ) -> np.ndarray:
        """Return the stretches ``[S]`` whose rows are refreshed before a batch, none if it has its groups already.

        ``lacking`` tells that it has none, whatever the batch: a resumed run may have had to drop them.
        """
        phase, data = module.phase_at(epoch), module.data
        epoch -= phase.start
        every = (self.every_n_steps or 0) * trainer.accumulate_grad_batches
        done = batch_idx % every if every else batch_idx or epoch % self.every_n_epochs
        if phase.supervised or (done and not lacking):
            return np.empty(0, dtype=np.int64)
        if every:
            coming = slice(batch_idx, batch_idx - batch_idx % every + every)
            return data.coming(epoch, False, trainer.world_size, coming)
        epochs = range(epoch, self._until(phase, epoch + phase.start) - phase.start)
        return np.unique(np.concatenate([data.stretches(e, warm_start=False) for e in epochs]))

    def _until(self, phase: Phase, epoch: int) -> int:
        """Return the epoch of the next refresh, or the phase's end, if that is earlier."""
        until = epoch + self.every_n_epochs
        return until if phase.end is None else min(until, phase.end)

    # ---- what -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def refresh(self, trainer: Trainer, module: Recommender, stretches: np.ndarray, batch_idx: int) -> None:
        """Make the groups of ``stretches`` under the present policy, and log time, counts and overlap.

        ``batch_idx`` batches of the epoch are done; with the epoch's place in its phase it determines what is drawn.
        """
        began = time.perf_counter()
        phase = module.phase_at(trainer.current_epoch)
        module.check_weights()
        module.eval()
        place = [torch.initial_seed(), trainer.current_epoch - phase.start, batch_idx]
        found = self._search(trainer, module, stretches, place)
        columns = [(part.groups.row, part.groups.items, part.groups.old_logprobs) for part in found]
        row, items, logprobs = _gathered(trainer, columns)
        groups = Groups(row, items, logprobs, None)
        if isinstance(phase.objective, GroupObjective) and phase.objective.needs_reference:
            groups.ref_logprobs = self._reference(trainer, module, groups, stretches)
        module.train()

        rows, hits = _counts(trainer, found)
        log = {"seconds": time.perf_counter() - began, "rows": rows, "groups": len(groups.row)}
        if found[0].found is not None:
            log["positive_found"] = hits / rows
        if self.groups is not None and (overlap := _overlap(self.groups, groups)) is not None:
            log["overlap"] = overlap
        for logger in trainer.loggers:
            named = {f"negatives/{name}": float(value) for name, value in log.items()}
            logger.log_metrics(named, step=trainer.global_step)
        self.groups = module.groups = groups
        self.begun = None

    def _search(
        self, trainer: Trainer, module: Recommender, stretches: np.ndarray, place: list[int]
    ) -> list[FoundGroups]:
        """Find the groups of this process's stretches, those left where a checkpoint holds some of this ``place``."""
        key = [*place, len(stretches), self.batch_size, trainer.world_size]
        found, done = [], 0
        if self.begun is not None and self.begun["key"] == key:
            done = self.begun["done"]
            if trainer.is_global_zero:
                groups = Groups(**self.begun["groups"]).to(module.device)
                found = [FoundGroups(groups, self.begun["rows"], self.begun["found"])]
        generator = torch.Generator(module.device)
        for number, batch in enumerate(self._batches(trainer, module, stretches, "negatives")):
            if number < done:
                continue
            if number > done:
                self._save_if_due(trainer, found, key, number)
            seed = np.random.SeedSequence([*place, trainer.global_rank, number])
            generator.manual_seed(int(seed.generate_state(1)[0]))
            found.append(self.groups_of(module, batch, generator))
        return found

    def _save_if_due(self, trainer: Trainer, found: list[FoundGroups], key: list[int], done: int) -> None:
        """Save a checkpoint with what is found so far, if it is time or SIGTERM asks for the end."""
        callbacks = [c for c in trainer.checkpoint_callbacks if isinstance(c, AdapterCheckpoint)]
        stops = callbacks[0].stops(trainer) if callbacks else trainer.strategy.broadcast(trainer.received_sigterm)
        callbacks = [c for c in callbacks if c.due(trainer) or stops]
        if callbacks:
            columns = [(part.groups.row, part.groups.items, part.groups.old_logprobs) for part in found]
            row, items, logprobs = _gathered(trainer, columns)
            rows, hits = _counts(trainer, found)
            self.begun = {"key": key, "done": done, "groups": vars(Groups(row, items, logprobs, None)), "rows": rows}
            self.begun["found"] = None if found[-1].found is None else hits
            for callback in callbacks:
                callback.save(trainer)
        if stops:
            raise SIGTERMException

    def groups_of(self, module: Recommender, batch: Batch, generator: torch.Generator) -> FoundGroups:
        """Find the groups of a batch's rows that the module's objective trains.

        Raises:
            UserError: if the policy's scores are not numbers.
        """
        engine, objective, count = module.engine, module.objective, module.dial.group_negatives
        assert isinstance(objective, GroupObjective)
        at = ((batch.event >= 0) & (batch.row >= 0)[:, None]).nonzero(as_tuple=True)
        prompt, places = engine.prefill(batch.tokens), Places(at[0], batch.start[at])
        row, target = batch.event[at], batch.titles[at][:, None]
        positive = engine.head.title_logprobs(prompt.hidden, batch.titles, batch.start)[at][:, None]
        rows, found = len(row), None
        best, best_scores = target[:, :0], positive[:, :0]
        if most := math.ceil(count * self.best_share):
            limits = objective.trained_ranks(module.dial.window, count) if most == count else None
            wanted = None if limits is None else Wanted(positive[:, 0], *limits)
            ranking = best_first_search(engine, prompt, places, most + 1, wanted)
            kept = ranking.valid.any(1).nonzero()[:, 0]
            row, target, positive, places = row[kept], target[kept], positive[kept], places[kept]
            best, best_scores = best_others(engine.trie, ranking[kept], target, most)
            found = None if wanted else int((positive >= best_scores[:, -1:]).sum())
        drawn = target[:, :0]
        if best.shape[1] < count:
            excluded = torch.cat([engine.trie.same_title(target[:, 0]), best], 1)
            drawn = sample_outside(excluded, engine.trie.num_items, count - best.shape[1], generator)
        items = torch.cat([target, best, drawn], 1)
        logprobs = torch.cat([positive, best_scores, engine.score(prompt, places, drawn)], 1)
        module.check_scores(logprobs)
        return FoundGroups(
            Groups(row, items, logprobs, None)[objective.trains(logprobs, module.dial.window)], rows, found
        )

    def _reference(self, trainer: Trainer, module: Recommender, groups: Groups, stretches: np.ndarray) -> Tensor:
        """Return the groups' log-probabilities ``[R, G]`` under the policy at the first refresh."""
        if self.start is None:
            self.start = module.policy.snapshot()
            return groups.old_logprobs.clone()
        parts = []
        with module.policy.using(self.start):
            for batch in self._batches(trainer, module, stretches, "reference"):
                index, grouped = groups.find(batch.event)
                grouped &= (batch.event >= 0) & (batch.row >= 0)[:, None]
                places = Places.at(grouped, batch.start)
                scores = module.engine.score(module.engine.prefill(batch.tokens), places, groups.items[index[grouped]])
                parts.append((batch.event[grouped], scores))
        return _gathered(trainer, parts)[1]

    def _batches(self, trainer: Trainer, module: Recommender, stretches: np.ndarray, title: str) -> Iterable[Batch]:
        loader = module.data.batches(stretches, self.batch_size, False, trainer.global_rank, trainer.world_size)
        shown = trainer.is_global_zero and trainer.progress_bar_callback is not None
        for batch in track(loader, title, shown):
            yield batch.to(module.device)

    # ---- checkpoints ------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the groups and the KL reference, so that a resumed run trains on what it would have."""
        groups = self.groups and vars(self.groups)
        return {"groups": groups, "until": self.until, "start": self.start, "begun": self.begun}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        self.groups = state_dict["groups"] and Groups(**state_dict["groups"])
        self.begun = state_dict["begun"]
        self.start = state_dict["start"]
        self.until = state_dict.get("until", 0)  # earlier checkpoints have none: a new refresh


@dataclass
class FoundGroups:
    """What the search among a batch's rows gave."""

    groups: Groups  # of the rows whose groups are trained
    rows: int
    found: int | None  # rows whose positive is not below all of the best; None if not searched for to the end


def best_others(trie: Trie, ranking: Ranking, target: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the best negatives ``[R, count]`` of lists, and their scores."""
    other = ranking.valid & (trie.leaf[ranking.items] != trie.leaf[target])
    place = other.int().argsort(dim=1, descending=True, stable=True)[:, :count]
    return ranking.items.gather(1, place), ranking.scores.gather(1, place)


def _gathered(trainer: Trainer, parts: Sequence[tuple[Tensor, ...]]) -> list[Tensor]:
    """Join the columns of batches, those of all processes, and sort by the first, the row."""
    columns = [torch.cat(column) for column in zip(*parts, strict=True)]
    if trainer.world_size > 1:  # processes find unequally many
        gather = trainer.strategy.all_gather
        count = gather(torch.tensor(len(columns[0]), device=columns[0].device)).tolist()
        for place, column in enumerate(columns):
            padding = column.new_zeros(max(count) - len(column), *column.shape[1:])
            every = gather(torch.cat([column, padding]))
            columns[place] = torch.cat([part[:n] for part, n in zip(every, count, strict=True)])
    order = columns[0].argsort()
    return [column[order] for column in columns]


def _counts(trainer: Trainer, found: list[FoundGroups]) -> list[int]:
    """Return the rows of all processes, and those whose positive was found."""
    counts = torch.tensor([(part.rows, part.found or 0) for part in found], device=trainer.strategy.root_device).sum(0)
    return trainer.strategy.reduce(counts, reduce_op="sum").tolist()


def _overlap(old: Groups, new: Groups) -> float | None:
    """Return the share of negatives that the rows in both had before, or None if no row is in both."""
    index, both = old.find(new.row)
    if not both.any() or old.items.shape[1] != new.items.shape[1]:
        return None
    before, after = old.items[index[both], 1:], new.items[both, 1:]
    return (after[:, :, None] == before[:, None]).any(2).float().mean().item()
