"""Finds the negatives that policy optimisation trains on: the best items of each train row under the policy itself."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch import Trainer
from torch import Tensor
from tqdm import tqdm

from recsys.engine import PromptCache, TreeEngine
from recsys.groups import Groups, GroupSource
from recsys.module import Recommender
from recsys.objectives import GroupObjective
from recsys.search import beam_search
from recsys.trie import Trie
from recsys.types import Batch, UserError


class BeamNegatives(GroupSource):
    """Refreshes the group (the positive and n negatives) of each row that an epoch trains on.

    The positive is never among its own negatives, nor is an item with the same title. Groups are kept with their
    log-probabilities under the policy that made them, travel in checkpoints, and are made by all processes together.

    Args:
        count: n, negatives of a group; null takes so many that they reach beyond the window.
        mode: ``beam`` takes the policy's best items, ``random`` uniform ones, ``mixed`` half and half.
        every_n_epochs: Epochs between refreshes.
        every_n_steps: Refresh also within an epoch, after so many optimiser steps; null for never.
        batch_size: Rows searched together.
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
        self.count = count
        self.best_share = {"beam": 1.0, "random": 0.0, "mixed": 0.5}[mode]
        self.every_n_epochs = every_n_epochs
        self.every_n_steps = every_n_steps
        self.batch_size = batch_size
        self.groups: Groups | None = None
        self.start: dict[str, Tensor] | None = None  # trained weights at the first refresh: the KL term's reference

    # ---- when -------------------------------------------------------------------------------------------------

    def on_fit_start(self, trainer: Trainer, pl_module: Recommender) -> None:  # type: ignore[override]
        """Hand over the groups of a checkpoint."""
        if self.groups is not None:
            self.groups = pl_module.groups = self.groups.to(pl_module.device)

    def on_train_batch_start(  # type: ignore[override]
        self, trainer: Trainer, pl_module: Recommender, batch: Batch, batch_idx: int
    ) -> None:
        """Refresh the rows of the epochs up to the next refresh, before an epoch's first batch.

        Not at the epoch's start: Lightning leaves that out when it resumes from behind the last batch of an epoch.
        """
        if batch_idx == 0 and len(rows := self.due(pl_module, trainer.current_epoch)):
            self.refresh(trainer, pl_module, rows, 0)

    def due(self, module: Recommender, epoch: int) -> np.ndarray:
        """Return the rows ``[R]`` to refresh at the start of an epoch, none if it goes on with the groups it finds."""
        phase = module.phase_at(epoch)
        if phase.supervised or (epoch - phase.start) % self.every_n_epochs:
            return np.empty(0, dtype=np.int64)
        epochs = range(epoch - phase.start, epoch - phase.start + self.every_n_epochs)
        return np.unique(np.concatenate([module.data.train_rows(e) for e in epochs]))

    def on_train_batch_end(  # type: ignore[override]
        self, trainer: Trainer, pl_module: Recommender, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Refresh the present rows every n steps."""
        due = self.every_n_steps and (batch_idx + 1) % (self.every_n_steps * trainer.accumulate_grad_batches) == 0
        if due and self.groups is not None and batch_idx + 1 < trainer.num_training_batches:
            self.refresh(trainer, pl_module, self.groups.row.cpu().numpy(), batch_idx + 1)

    # ---- what -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def refresh(self, trainer: Trainer, module: Recommender, rows: np.ndarray, batch_idx: int) -> None:
        """Make the groups of ``rows`` under the present policy, and log time, recall of positives and overlap.

        ``batch_idx`` batches of the epoch are done; with the epoch's place in its phase it determines what is drawn.
        """
        began = time.perf_counter()
        phase = module.phase_at(trainer.current_epoch)
        place = [torch.initial_seed(), trainer.current_epoch - phase.start, batch_idx, trainer.global_rank]
        generator = torch.Generator(module.device)
        generator.manual_seed(int(np.random.SeedSequence(place).generate_state(1)[0]))
        module.eval()
        parts = []
        for batch in self._batches(trainer, module, rows, "negatives"):
            parts.append((batch.row, *self.groups_of(module, batch, generator)))
        row, items, logprobs, found = _gathered(trainer, parts)
        groups = Groups(row, items, logprobs, None)
        if isinstance(phase.objective, GroupObjective) and phase.objective.needs_reference:
            groups.ref_logprobs = self._reference(trainer, module, groups)
        module.train()

        log = {"seconds": time.perf_counter() - began, "rows": float(len(groups.row))}
        if self.best_share:
            log["positive_found"] = found.float().mean().item()
        if self.groups is not None and (overlap := _overlap(self.groups, groups)) is not None:
            log["overlap"] = overlap
        for logger in trainer.loggers:
            logger.log_metrics({f"negatives/{name}": value for name, value in log.items()}, step=trainer.global_step)
        self.groups = module.groups = groups

    def groups_of(self, module: Recommender, batch: Batch, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Return the items and scores ``[B, G]`` of a batch's groups, and whether the search found the positive."""
        engine, target = module.engine, batch.target[:, None]
        prompt = engine.prefill(batch.tokens, batch.length)
        count = module.dial.group_negatives
        best, best_scores, found = self._best(engine, prompt, target, math.ceil(count * self.best_share))
        drawn = self._draw(engine.trie, target, best, count - best.shape[1], generator)
        scores = engine.score(prompt, torch.cat([target, drawn], 1))  # the search has those of the best
        items = torch.cat([target, best, drawn], 1)
        return items, torch.cat([scores[:, :1], best_scores, scores[:, 1:]], 1), found

    def _best(
        self, engine: TreeEngine, prompt: PromptCache, target: Tensor, count: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the policy's best negatives ``[B, count]``, their scores, and whether it found the positive."""
        trie, none = engine.trie, target[:, :0]
        if not count:
            return none, none.float(), none.any(1)
        ranking = beam_search(engine, prompt, count + trie.max_duplicates)
        found = ((ranking.items == target) & ranking.valid).any(1)
        other = ranking.valid & (trie.leaf[ranking.items] != trie.leaf[target])
        place = other.int().argsort(dim=1, descending=True, stable=True)[:, :count]
        return ranking.items.gather(1, place), ranking.scores.gather(1, place), found

    def _draw(self, trie: Trie, target: Tensor, best: Tensor, count: int, generator: torch.Generator) -> Tensor:
        """Return uniform negatives that are not among the best, ``[B, count]``."""
        if not count:
            return target[:, :0]
        key = torch.rand(len(target), trie.num_items, device=target.device, generator=generator)
        key = key.masked_fill(trie.leaf == trie.leaf[target], -1).scatter(1, best, -1.0)
        return key.topk(count).indices

    def _reference(self, trainer: Trainer, module: Recommender, groups: Groups) -> Tensor:
        """Return the groups' log-probabilities ``[R, G]`` under the policy at the first refresh."""
        if self.start is None:
            self.start = module.policy.snapshot()
            return groups.old_logprobs.clone()
        parts = []
        with module.policy.using(self.start):
            for batch in self._batches(trainer, module, groups.row.cpu().numpy(), "reference"):
                prompt = module.engine.prefill(batch.tokens, batch.length)
                scores = module.engine.score(prompt, groups.items[groups.find(batch.row.clamp(min=0))])
                parts.append((batch.row, scores))
        _, scores = _gathered(trainer, parts)
        return scores

    def _batches(self, trainer: Trainer, module: Recommender, rows: np.ndarray, title: str) -> Iterable[Batch]:
        loader = module.data.batches(rows, self.batch_size, None, trainer.global_rank, trainer.world_size)
        shown = trainer.is_global_zero and trainer.progress_bar_callback is not None
        for batch in tqdm(loader, desc=title, leave=False, disable=not shown):
            yield batch.to(module.device)

    # ---- checkpoints ------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the groups and the KL reference, so that a resumed run trains on what it would have."""
        return {"groups": self.groups and vars(self.groups), "start": self.start}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        self.groups = state_dict["groups"] and Groups(**state_dict["groups"])
        self.start = state_dict["start"]


def _gathered(trainer: Trainer, parts: Sequence[tuple[Tensor, ...]]) -> list[Tensor]:
    """Join the columns of batches, equally many on every process, and sort by the first, the row; drops fillers."""
    columns = [trainer.strategy.all_gather(torch.cat(column)) for column in zip(*parts, strict=True)]
    if trainer.world_size > 1:
        columns = [column.flatten(0, 1) for column in columns]
    order = columns[0].argsort()[(columns[0] < 0).sum() :]
    return [column[order] for column in columns]


def _overlap(old: Groups, new: Groups) -> float | None:
    """Return the share of negatives that the rows in both had before, or None if no row is in both."""
    index = torch.searchsorted(old.row, new.row).clamp(max=len(old.row) - 1)
    both = old.row[index] == new.row
    if not both.any() or old.items.shape[1] != new.items.shape[1]:
        return None
    before, after = old.items[index[both], 1:], new.items[both, 1:]
    return torch.stack([torch.isin(a, b).float().mean() for a, b in zip(after, before, strict=True)]).mean().item()
