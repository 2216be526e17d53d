"""What is asked of a trained model: whose histories, how many items, and which of them it may name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import DataLoader, Dataset

from recsys.data.batches import plan_batches, to_batch
from recsys.data.prompts import PromptEncoder, write_entries
from recsys.data.sources import Columns, SourceData
from recsys.data.sources.files import DataFile
from recsys.data.sources.reading import TABLE_CACHE, read
from recsys.types import Batch, UserError

if TYPE_CHECKING:
    from recsys.data.datamodule import HistoryDataModule

PART = 256  # requests that are sorted by length, predicted and written together

_NAMES = {Columns.USER: "user_id", Columns.ITEM: "item_id", Columns.TIME: "timestamp", Columns.RATING: "rating"}


@dataclass
class Requests:
    """R histories, each a slice of one list of events, for which items are asked.

    Attributes:
        user_ids: [R] object, whose history each is.
        items: [E] integers, catalogue index of each event, oldest first within a history.
        entry: [E] which of the encoder's entries each has in a prompt.
        start: [R] int64, first event of each history.
        end: [R] int64, the event after its last.
        encoder: Makes the prompts, which hold the newest events.
        k: Items that are asked for.
        exclude_seen: Whether no item of the whole history may be named, nor one of the same title.
        only: [A] catalogue indices of the items that may be named; None for all.
        row: [R] int64, event index that names the row of a split; None where targets are not known.
        target: [R] int64, catalogue index of the target, -1 where it is not known.
        parts: Which parts of ``PART`` requests are to be predicted.
    """

    user_ids: np.ndarray
    items: np.ndarray
    entry: np.ndarray
    start: np.ndarray
    end: np.ndarray
    encoder: PromptEncoder
    k: int = 10
    exclude_seen: bool = True
    only: np.ndarray | None = None
    row: np.ndarray | None = None

    def __post_init__(self) -> None:
        known = self.row is not None
        self.target = self.items[self.row].astype(np.int64) if known else np.full(len(self), -1)
        self.parts = list(range(-(-len(self) // PART)))

    def __len__(self) -> int:
        return len(self.user_ids)

    def seen(self, row: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the items of the whole histories of requests ``row [B]``; none of -1, which fills up a batch.

        Returns:
            [S] place in ``row``, and [S] catalogue index, of each event, int64.
        """
        counts = np.where(row < 0, 0, self.end[row] - self.start[row])
        place = np.repeat(np.arange(len(row)), counts)
        event = np.arange(counts.sum()) + np.repeat(self.start[row] - (np.cumsum(counts) - counts), counts)
        return place, self.items[event].astype(np.int64)

    def of_part(self, part: int) -> np.ndarray:
        """Return the requests of one part."""
        return np.arange(part * PART, min((part + 1) * PART, len(self)))

    def batches(self, batch_size: int, rank: int = 0, world_size: int = 1, num_workers: int = 0) -> DataLoader[Batch]:
        """Loader of one process's share of the parts, one after another, each longest first.

        All processes get the same number of batches; one that only fills up has ``row`` -1.
        """
        start = np.maximum(self.start, self.end - self.encoder.max_history)
        lengths = self.encoder.slice_lengths(self.items, self.entry, start, self.end)
        plans: list[list[np.ndarray]] = [[] for _ in range(world_size)]
        for place, part in enumerate(self.parts):
            rows = self.of_part(part)
            plans[place % world_size] += plan_batches(rows, lengths[rows], batch_size)
        steps = max(map(len, plans))
        fillers = [~self.of_part(self.parts[0])[:1]] * (steps - len(plans[rank]))
        return DataLoader(RequestBatches(self, plans[rank] + fillers), batch_size=None, num_workers=num_workers)

    # ---- whose ------------------------------------------------------------------------------------------------

    @classmethod
    def of_users(cls, data: HistoryDataModule, users: Sequence[str] | None = None) -> Requests:
        """Ask for what comes after all events of users, of every user by default.

        Raises:
            UserError: One of ``users`` is unknown.
        """
        log = data.histories
        start = np.unique(log.user_start).astype(np.int64)
        end = np.append(start[1:], len(log.items))
        if users is None:
            user = log.users[start]
            return cls(data.user_ids.to_numpy()[user], log.items, log.entry, start, end, data.encoder)
        place = pd.Index(data.user_ids[log.users[start]]).get_indexer(pd.Index(np.array(users, dtype=object)))
        if (place < 0).any():
            first = users[int(place.argmin())]
            raise UserError(f"user {first!r} is not in the data ({(place < 0).sum()} such users in all)")
        ids = np.array(users, dtype=object)
        return cls(ids, log.items, log.entry, start[place], end[place], data.encoder)

    @classmethod
    def of_rows(cls, data: HistoryDataModule, part: Literal["val", "test"]) -> Requests:
        """Ask for the target of each row of a split."""
        log, row = data.histories, data.evaluation_rows(part)
        ids = data.user_ids.to_numpy()[log.users[row]]
        return cls(ids, log.items, log.entry, log.user_start[row].astype(np.int64), row, data.encoder, row=row)

    @classmethod
    def of_file(cls, data: HistoryDataModule, path: str) -> Requests:
        """Ask for what comes after the histories in a file, of users that the data need not know.

        Its columns have the names that the data's source gives to those of its interactions, else ``user_id``,
        ``item_id``, ``timestamp`` and, where the prompt or a filter needs ratings, ``rating``. The source's filters
        of duplicates and ratings hold for it. Events of unknown items are left out.

        Raises:
            UserError: The file cannot be read, lacks a column or holds no known item.
        """
        filters = getattr(data.source, "filters", None)
        rated = Columns.RATING in data.prompt.fields or (filters is not None and filters.min_rating is not None)
        names = getattr(data.source, "columns", {k: v for k, v in _NAMES.items() if k != Columns.RATING or rated})
        log = read(DataFile(path), names, TABLE_CACHE)
        known = log[Columns.ITEM].isin(data.catalog.item_ids)
        users = log[Columns.USER].nunique()
        if not known.all():
            first = log[Columns.ITEM][~known].iloc[0]
            rank_zero_info(
                f"{path}: {(~known).sum():,} of {len(log):,} events are left out: their items, first {first!r}, are "
                "not in the catalogue"
            )
        if not known.any():
            raise UserError(f"{path}: no item is in the catalogue; give the ids that the data's items have")
        source = SourceData(log[known], data.items, path, "the catalogue")
        source = source.filtered(filters and replace(filters, k_core=0, start=None, end=None))
        log = source.interactions
        user, ids = pd.factorize(log[Columns.USER])
        item = data.catalog.index_of(log[Columns.ITEM])
        entry, encoder = _entries(data, source, item)
        order = np.lexsort([log[Columns.TIME].to_numpy(), user])  # stable: equal times keep the order of the file
        end = np.bincount(user).cumsum()
        start = np.append(0, end[:-1])
        requests = cls(np.asarray(ids, dtype=object), item[order], entry[order], start, end, encoder)
        if len(requests) < users:
            rank_zero_info(f"{path}: {users - len(requests):,} of {users:,} users are left out: no event remains")
        return requests

    @classmethod
    def of_histories(cls, data: HistoryDataModule, histories: Mapping[Any, Sequence[str]]) -> Requests:
        """Ask for what comes after the histories of users, each a list of item ids or titles, oldest first.

        Raises:
            UserError: A history is empty, or an item is unknown; the message has the titles closest to it.
        """
        for user, history in histories.items():
            if not len(history):
                raise UserError(f"the history of {user!r} is empty")
        items = data.catalog.find(item for history in histories.values() for item in history)
        end = np.cumsum([len(history) for history in histories.values()])
        entry, encoder = np.zeros(len(items), dtype=np.int32), data.encoder
        if data.prompt.fields:  # categories are known, ratings are not
            ids = np.array(data.catalog.item_ids, dtype=object)[items]
            log = pd.DataFrame({Columns.USER: "any", Columns.ITEM: ids, Columns.TIME: 0, Columns.RATING: np.nan})
            entry, encoder = _entries(data, SourceData(log, data.items, "the histories", "the catalogue"), items)
        ids = np.fromiter(histories, dtype=object, count=len(histories))
        return cls(ids, items, entry, np.append(0, end[:-1]), end, encoder)

    # ---- which items ------------------------------------------------------------------------------------------

    def asking(self, data: HistoryDataModule, k: int, exclude_seen: bool, only_items: Sequence[str] | None) -> Requests:
        """Return the same with how many items are asked for, and which may be named.

        Args:
            data: Has the catalogue.
            k: How many.
            exclude_seen: Whether none of the whole history.
            only_items: Ids of those that may be named; the others are counted. None for all.

        Raises:
            UserError: Nobody asks, ``k`` is below 1, or no item may be named.
        """
        if not len(self):
            raise UserError("there is no history to recommend for")
        if k < 1:
            raise UserError(f"k, the items for each user, must be at least 1, but it is {k}")
        self.k, self.exclude_seen = k, exclude_seen
        if only_items is not None:
            index = pd.Index(data.catalog.item_ids).get_indexer(pd.Index(only_items, dtype=object))
            self.only = np.unique(index[index >= 0])
            if not len(self.only):
                raise UserError("only_items: none of the items is in the catalogue")
            if (index < 0).any():
                rank_zero_info(f"only_items: {(index < 0).sum():,} of {len(index):,} items are not in the catalogue")
        return self


def _entries(data: HistoryDataModule, source: SourceData, item: np.ndarray) -> tuple[np.ndarray, PromptEncoder]:
    """Return which text each event of a source has in a prompt, and the encoder that has these texts."""
    entry, texts = write_entries(data.prompt, source, item)
    return entry, PromptEncoder(data.tokenizer, data.item_tokens, data.prompt, texts)


class RequestBatches(Dataset[Batch]):
    """Builds the batches of a plan of requests one at a time; ``row`` is the request's number."""

    def __init__(self, requests: Requests, plan: list[np.ndarray]) -> None:
        self.requests = requests
        self.plan = plan

    def __len__(self) -> int:
        return len(self.plan)

    def __getitem__(self, index: int) -> Batch:
        asked, rows = self.requests, self.plan[index]
        number = np.where(rows < 0, ~rows, rows)
        pasts = [slice(start, end) for start, end in zip(asked.start[number], asked.end[number], strict=True)]
        prompts = [asked.encoder.encode(asked.items[past], asked.entry[past]) for past in pasts]
        no_events = [[-1] * len(prompt.titles) for prompt in prompts]
        return to_batch(np.maximum(rows, -1), prompts, no_events, asked.target[number])


def read_ids(path: str, column: str) -> list[str]:
    """Read ids from a text file (``.txt``) with one on each line, or from a column of a table.

    Raises:
        UserError: The file cannot be read, lacks the column or holds no id.
    """
    file = Path(path).expanduser()
    if file.suffix != ".txt":
        return read(DataFile(path), {Columns.ITEM: column}, TABLE_CACHE)[Columns.ITEM].dropna().unique().tolist()
    try:
        ids = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not readable as text with an id on each line: {error}") from error
    if not any(ids):
        raise UserError(f"{path}: has no ids")
    return list(dict.fromkeys(filter(None, ids)))
