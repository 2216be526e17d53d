"""Cutting rows into batches of similar prompt length, and building those batches."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, SequentialSampler

from recsys.data.histories import Histories
from recsys.data.prompts import EncodedPrompt, PromptEncoder
from recsys.types import Batch, UserError

_CHUNK = 100  # batches of a rank whose rows are sorted by length together; more would pad less but mix rows less


def plan_batches(
    rows: np.ndarray,
    lengths: np.ndarray,
    batch_size: int,
    shuffle_seed: list[int] | None = None,
    rank: int = 0,
    world_size: int = 1,
) -> list[np.ndarray]:
    """Cut rows into batches of similar length for one process; every process gets the same number of batches.

    The batches differ in size by one row at most, so no row has to be repeated. Only where the processes outnumber the
    rows that are left, a row is repeated: as another row when shuffling, as a filler ``~row`` (below 0) otherwise.

    Args:
        rows: [R] int64 row ids, R >= 1.
        lengths: [R] tokens of each row's prompt.
        batch_size: Most rows in a batch.
        shuffle_seed: Integers that determine the order; None sorts all rows by length, longest first.
        rank: This process.
        world_size: Number of processes. In each step they get batches of similar length.

    Returns:
        Arrays of at most ``batch_size`` row ids.
    """
    steps = -(-len(rows) // (batch_size * world_size))
    batches = steps * world_size
    slots = max(len(rows), batches)
    edges = np.arange(batches + 1) * slots // batches
    if shuffle_seed is None:
        longest_first = np.argsort(-lengths, kind="stable")  # too large a batch fails at once, not after hours
        order = rows[longest_first]
        order = np.concatenate([order, ~np.resize(order, slots - len(rows))])
        step_order = np.arange(steps)
    else:
        rng = np.random.default_rng(shuffle_seed)
        order = np.resize(rng.permutation(len(rows)), slots)
        for step in range(0, steps, _CHUNK):
            chunk = slice(edges[step * world_size], edges[min(step + _CHUNK, steps) * world_size])
            order[chunk] = order[chunk][np.argsort(lengths[order[chunk]], kind="stable")]
        order = rows[order]
        step_order = rng.permutation(steps)
    return [order[edges[i] : edges[i + 1]] for i in step_order * world_size + rank]


class BatchDataset(Dataset[Batch]):
    """Builds the batches of a plan one at a time; the loader's items are batches, so it needs no collate function.

    Args:
        histories: The events that rows point into.
        encoder: Makes the prompts.
        plan: Row ids of each batch, as :func:`plan_batches` returns them.
        trained: [E] which events are rows to train on, and so to have their titles behind a prompt; None to evaluate.
    """

    def __init__(
        self,
        histories: Histories,
        encoder: PromptEncoder,
        plan: list[np.ndarray],
        trained: np.ndarray | None = None,
    ) -> None:
        self.histories = histories
        self.encoder = encoder
        self.plan = plan
        self.trained = trained

    def __len__(self) -> int:
        return len(self.plan)

    def __getitem__(self, index: int) -> Batch:
        rows, histories = self.plan[index], self.histories
        events = np.where(rows < 0, ~rows, rows)
        pasts = [histories.past(event, self.encoder.max_history) for event in events]
        targets = histories.items[events]
        answers = targets if self.trained is not None else [None] * len(rows)
        prompts = [
            self.encoder.encode(histories.items[past], histories.entry[past], answer)
            for past, answer in zip(pasts, answers, strict=True)
        ]
        trained = [self._events(event, len(p.titles)) for event, p in zip(events, prompts, strict=True)]
        return to_batch(np.maximum(rows, -1), prompts, trained, targets.astype(np.int64))

    @cached_property
    def counts(self) -> np.ndarray:
        """Titles, and rows to train on, in each batch of a training plan: [batches, 2] int64."""
        assert self.trained is not None
        rows = np.concatenate(self.plan)
        first = self.encoder.first(self.histories, rows)
        before = np.concatenate([[0], np.cumsum(self.trained)])  # [E + 1] rows to train on before event
        counts = np.stack([rows + 1 - first, before[rows + 1] - before[first + 1]], 1)
        return np.add.reduceat(counts, np.cumsum([0, *map(len, self.plan[:-1])]))

    def _events(self, row: int, titles: int) -> list[int]:
        """Return the event of each title of a prompt that ends with a row; -1 where it is no row or shows no history.

        A title without another before it has a history that its prompt does not show.
        """
        if self.trained is None:
            return [-1] * titles
        events = np.arange(row + 1 - titles, row + 1)
        return np.where(self.trained[events] & (events > events[:1]), events, -1).tolist()


def to_batch(row: np.ndarray, prompts: list[EncodedPrompt], events: list[list[int]], target: np.ndarray) -> Batch:
    """Put prompts together.

    Args:
        row: [B] int64, what names each row; -1 for one that only fills up.
        prompts: B prompts.
        events: The event of each title of each prompt, -1 where it is no row to train on.
        target: [B] int64, catalogue index of each positive.
    """
    return Batch(
        row=torch.from_numpy(row),
        tokens=_pad([prompt.tokens for prompt in prompts], 0),
        length=torch.tensor([len(prompt.tokens) for prompt in prompts]),
        titles=_pad([prompt.titles for prompt in prompts], -1),
        start=_pad([prompt.starts for prompt in prompts], -1),
        event=_pad(events, -1),
        target=torch.from_numpy(target),
    )


def _pad(lists: list[list[int]], value: int) -> torch.Tensor:
    """Stack lists into [B, longest] int64, padded on the right."""
    padded = np.full((len(lists), max(map(len, lists))), value, dtype=np.int64)
    for row, numbers in zip(padded, lists, strict=True):
        row[: len(numbers)] = numbers
    return torch.from_numpy(padded)


class _RemainingBatches(SequentialSampler):
    """Batch numbers from ``start`` on, while the length stays that of the whole epoch."""

    start = 0

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.start, len(self)))


class ResumableLoader(DataLoader[Batch]):
    """The batches of one training epoch; a run that resumes inside the epoch gets exactly those still to do.

    Lightning stores ``state_dict`` in checkpoints and hands it to the first loader of a resumed run. ``len`` counts the
    epoch's batches, those already done included, because Lightning adds these to the ones it fetches.

    Args:
        dataset: The epoch's batches, the same ones in every run.
        trainer: The Lightning trainer, which counts the batches done.
        kwargs: Further arguments of ``DataLoader``.
    """

    def __init__(self, dataset: BatchDataset, trainer: Any, **kwargs: Any) -> None:
        self.trainer = trainer
        self._remaining = _RemainingBatches(dataset)
        super().__init__(dataset, **{"batch_size": None, "sampler": self._remaining, **kwargs})

    def state_dict(self) -> dict[str, int]:
        """Number of batches that were trained on, and of all."""
        # `processed` is right wherever a checkpoint is saved: `completed` lags behind in `on_train_batch_end`, and a
        # failed step has only been counted as `ready`.
        return {"done": self.trainer.fit_loop.epoch_loop.batch_progress.current.processed, "all": len(self)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Skip the batches that were done.

        Raises:
            UserError: The epoch was left unfinished with another number of batches.
        """
        if state["done"] < state["all"] != len(self):
            raise UserError(
                f"the checkpoint was saved after batch {state['done']} of an epoch of {state['all']} batches, but the "
                f"epoch now has {len(self)}; resume with the same data, batch sizes and number of processes"
            )
        self._remaining.start = state["done"]
