"""Finds the negatives that policy optimisation trains on: the best items of each train row under the policy itself."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor
from tqdm import tqdm

from recsys.functional import window_bounds
from recsys.module import Recommender
from recsys.objectives import GroupObjective, TAWin
from recsys.search import beam_search
from recsys.tree import PromptCache, TreeEngine
from recsys.trie import Trie
from recsys.types import Batch, Groups, UserError


class BeamNegatives(Callback):
    """Refreshes the group (the positive and n negatives) of each row that an epoch trains on.

    The positive is never among its own negatives, nor is an item with the same title. Groups are kept with their
    log-probabilities under the policy that made them, travel in checkpoints, and are made by all processes together.

    Args:
        num_negatives: n, negatives per row.
        mode: ``beam`` takes the policy's best items, ``random`` uniform ones, ``mixed`` half and half.
        every_n_epochs: Epochs between refreshes.
        every_n_steps: Refresh also within an epoch, after so many optimiser steps; null for never.
        batch_size: Rows searched together.
    """

    def __init__(
        self,
        num_negatives: int = 31,
        mode: Literal["beam", "random", "mixed"] = "beam",
        every_n_epochs: int = 1,
        every_n_steps: int | None = None,
        batch_size: int = 16,
    ) -> None:
        if num_negatives < 1 or every_n_epochs < 1 or batch_size < 1 or (every_n_steps or 1) < 1:
            raise UserError("BeamNegatives: its numbers must be at least 1")
        self.num_negatives = num_negatives
        self.num_beam = {"beam": num_negatives, "random": 0, "mixed": (num_negatives + 1) // 2}[mode]
        self.every_n_epochs = every_n_epochs
        self.every_n_steps = every_n_steps
        self.batch_size = batch_size
        self.groups: Groups | None = None
        self.start: dict[str, Tensor] | None = None  # trained weights at the first refresh: the KL term's reference

    # ---- when -------------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: Recommender, stage: str) -> None:  # type: ignore[override]
        """Announce that negatives will be there."""
        pl_module.finds_negatives = True

    def on_fit_start(self, trainer: Trainer, pl_module: Recommender) -> None:  # type: ignore[override]
        """Check the sizes, and hand over the groups of a checkpoint.

        Raises:
            UserError: if the catalogue is too small, or TAWin's window ends beyond the negatives.
        """
        trie = pl_module.engine.trie
        if self.num_negatives > trie.num_items - trie.max_duplicates:
            raise UserError(
                f"BeamNegatives: num_negatives is {self.num_negatives}, but the catalogue of {trie.num_items} items "
                "has too few that can be a negative"
            )
        _, end = window_bounds(pl_module.alpha, pl_module.d, pl_module.num_negatives)
        if isinstance(pl_module.objective, TAWin) and end > self.num_beam:
            raise UserError(
                f"BeamNegatives finds the best {self.num_beam} negatives of a row, but model.window ends at negative "
                f"{end:g}: raise num_negatives (beyond {end:g}, or the gate has no lower end) or lower the window"
            )
        if self.groups is not None:
            self.groups = pl_module.groups = self.groups.to(pl_module.device)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: Recommender) -> None:  # type: ignore[override]
        """Refresh the rows of the epochs up to the next refresh."""
        rows = self.due(pl_module, trainer.current_epoch)
        if len(rows):
            self.refresh(trainer, pl_module, rows)

    def due(self, module: Recommender, epoch: int) -> np.ndarray:
        """Return the rows ``[R]`` to refresh at the start of an epoch, none if it goes on with the groups it finds."""
        if module.trains_on_windows(epoch) or (epoch - module.warm_start_epochs) % self.every_n_epochs:
            return np.empty(0, dtype=np.int64)
        epochs = range(epoch, epoch + self.every_n_epochs)
        return np.unique(np.concatenate([module.data.train_rows(e) for e in epochs]))

    def on_train_batch_end(  # type: ignore[override]
        self, trainer: Trainer, pl_module: Recommender, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Refresh the present rows every n steps."""
        due = self.every_n_steps and (batch_idx + 1) % (self.every_n_steps * trainer.accumulate_grad_batches) == 0
        if due and self.groups is not None and batch_idx + 1 < trainer.num_training_batches:
            self.refresh(trainer, pl_module, self.groups.row.cpu().numpy())

    # ---- what -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def refresh(self, trainer: Trainer, module: Recommender, rows: np.ndarray) -> None:
        """Make the groups of ``rows`` under the present policy, and log time, recall of positives and overlap."""
        began = time.perf_counter()
        generator = torch.Generator(module.device)
        generator.manual_seed(torch.initial_seed() + 1_000_003 * trainer.global_step + trainer.global_rank)
        module.eval()
        parts = []
        for batch in self._batches(trainer, module, rows, "negatives"):
            parts.append((batch.row, *self.groups_of(module, batch, generator)))
        row, items, behaviour, found = _gathered(trainer, parts)
        groups = Groups(row, items, behaviour, None)
        objective = module.objective_at(trainer.current_epoch)
        if isinstance(objective, GroupObjective) and objective.needs_reference:
            groups.reference = self._reference(trainer, module, groups)
        module.train()

        log = {"seconds": time.perf_counter() - began, "rows": float(len(groups.row))}
        if self.num_beam:
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
        best, best_scores, found = self._best(engine, prompt, target)
        drawn = self._draw(engine.trie, target, best, generator)
        scores = engine.score(prompt, torch.cat([target, drawn], 1))  # the search has those of the best
        items = torch.cat([target, best, drawn], 1)
        return items, torch.cat([scores[:, :1], best_scores, scores[:, 1:]], 1), found

    def _best(self, engine: TreeEngine, prompt: PromptCache, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the policy's best negatives ``[B, num_beam]``, their scores, and whether it found the positive."""
        trie, none = engine.trie, target[:, :0]
        if not self.num_beam:
            return none, none.float(), none.any(1)
        ranking = beam_search(engine, prompt, self.num_beam + trie.max_duplicates)
        found = ((ranking.items == target) & ranking.valid).any(1)
        other = ranking.valid & (trie.leaf[ranking.items] != trie.leaf[target])
        place = other.int().argsort(dim=1, descending=True, stable=True)[:, : self.num_beam]
        return ranking.items.gather(1, place), ranking.scores.gather(1, place), found

    def _draw(self, trie: Trie, target: Tensor, best: Tensor, generator: torch.Generator) -> Tensor:
        """Return uniform negatives that are not among the best, ``[B, num_negatives - num_beam]``."""
        if self.num_beam == self.num_negatives:
            return target[:, :0]
        key = torch.rand(len(target), trie.num_items, device=target.device, generator=generator)
        key = key.masked_fill(trie.leaf == trie.leaf[target], -1).scatter(1, best, -1.0)
        return key.topk(self.num_negatives - self.num_beam).indices

    def _reference(self, trainer: Trainer, module: Recommender, groups: Groups) -> Tensor:
        """Return the groups' log-probabilities ``[R, G]`` under the policy at the first refresh."""
        if self.start is None:
            self.start = module.policy.snapshot()
            return groups.behaviour.clone()
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
