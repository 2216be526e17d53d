"""CSV files with a row for each (history -> target), as ReRe, MiniOneRec and D3 publish their data."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from typing import Any

import pandas as pd

from recsys.data.sources.files import DataFile
from recsys.data.sources.reading import TABLE_CACHE, read
from recsys.data.sources.source import Columns, Filters, Source, SourceData, to_times
from recsys.paths import InputPath
from recsys.types import UserError

_PAIRS = {  # the column of the histories and that of the targets
    Columns.ITEM: ("history_item_id", "item_id"),
    Columns.TITLE: ("history_item_title", "item_title"),
    Columns.TIME: ("history_timestamp", "timestamp"),
    Columns.RATING: ("history_rating", "rating"),
}


class HistoryRows(Source):
    """Interactions rebuilt from files whose rows each hold a target and the user's events before it.

    Columns: ``user_id``; ``item_id`` and ``item_title`` of the target; ``history_item_id`` and ``history_item_title``,
    lists written as in Python. ``timestamp`` with ``history_timestamp``, and ``rating`` with ``history_rating``, are
    read where all files have both. Items are told by their id; the first title of an item counts. Ids, times and
    ratings may be written as ``3`` or ``3.0``: pandas makes floats of a column that has missing values.

    Each row adds its target, and before it the part of its history that does not continue the user's events so far. So
    overlapping histories are counted once, and events that are no row's target are found in the histories. Events that
    no row shows, as when a file is missing, are lost.

    Without time stamps an event's time is the number of the row that adds it.

    Args:
        files: Paths of the files, for instance of train, validation and test, from the oldest to the newest. They may
            have any of the formats of :class:`Table`.
        filters: Interactions to leave out.
        cache_dir: Folder that keeps the converted files; ``~`` is the home folder.

    Raises:
        UserError: No file is given.
    """

    def __init__(self, files: list[InputPath], filters: Filters | None = None, cache_dir: str = TABLE_CACHE) -> None:
        if not files:
            raise UserError("the source's `files` is empty; name at least one file")
        self.files = files
        self.filters = filters
        self.cache_dir = cache_dir

    def load(self) -> SourceData:
        """Read the files and join their rows.

        Raises:
            UserError: A file cannot be read or lacks a column, a list is not one or has the wrong length, the rows of
                a user are not in order, or a check of :class:`SourceData` fails.
        """
        files = [DataFile(path) for path in self.files]
        there = set.intersection(*(set(file.column_names()) for file in files))
        pairs = {
            target: pair
            for target, pair in _PAIRS.items()
            if target in (Columns.ITEM, Columns.TITLE) or there.issuperset(pair)
        }
        columns = ["user_id", *(name for pair in pairs.values() for name in pair)]
        frames = [read(file, {name: name for name in columns}, self.cache_dir) for file in files]
        rows = pd.concat([frame.assign(file=str(f.path)) for f, frame in zip(files, frames, strict=True)])
        if Columns.TIME in pairs:
            rows = rows.iloc[to_times(rows["timestamp"]).argsort(kind="stable")]

        titles: dict[str, str] = {}
        events: dict[str, list[tuple[str, ...]]] = defaultdict(list)  # of each user, oldest first
        longest: dict[str, int] = defaultdict(int)  # row of each user
        added: list[tuple[str, ...]] = []
        numbers: list[int] = []
        told = [name for name in (Columns.ITEM, Columns.TIME, Columns.RATING) if name in pairs]
        for order, (number, row) in enumerate(zip(rows.index, rows.to_dict("records"), strict=True)):
            user, where = _plain(row["user_id"]), f"{row['file']}, row {number}"
            fields = {name: [*_elements(row[many], where, many), row[one]] for name, (many, one) in pairs.items()}
            fields |= {name: [_plain(value) for value in fields[name]] for name in told}
            length = len(fields[Columns.ITEM])
            if any(len(values) != length for values in fields.values()):
                raise UserError(f"{where}: the lists differ in length; each needs one element for each event")
            if length < longest[user]:
                raise UserError(
                    f"{where}: the history of user {user!r} is shorter than in an earlier row; list the files from the "
                    "oldest to the newest, each in the order of time"
                )
            longest[user] = length
            for item, title in zip(fields[Columns.ITEM], fields[Columns.TITLE], strict=True):
                titles.setdefault(item, title)
            shown = list(zip(*(fields[name] for name in told), strict=True))
            new = shown[_overlap(events[user], shown[:-1]) :]
            events[user] += new
            added += [(user, *event, str(order)) for event in new]
            numbers += [number] * len(new)

        log = pd.DataFrame(added, numbers, [Columns.USER, *told, "order"], dtype=object)
        if Columns.TIME not in pairs:
            log[Columns.TIME] = log["order"]
        log = log.drop(columns="order")
        items = pd.DataFrame({Columns.ITEM: list(titles), Columns.TITLE: list(titles.values())}, dtype=object)
        name = ", ".join(self.files)
        return SourceData(log, items, name, name).filtered(self.filters)


def _elements(cell: str, where: str, column: str) -> list[str]:
    """Elements of a list in a cell as texts."""
    try:
        elements = ast.literal_eval(cell)  # unlike eval it runs no code
    except (ValueError, SyntaxError, MemoryError, RecursionError) as error:
        raise UserError(f"{where}: {column} is not a list as Python writes it: {error}") from error
    if not isinstance(elements, list):
        raise UserError(f"{where}: {column} is {cell!r}, not a list")
    return [str(element) for element in elements]


def _plain(value: Any) -> Any:
    """A number as its text, a whole one without decimals; what is missing stays."""
    return value if pd.isna(value) else re.sub(r"^(-?\d+)\.0$", r"\1", str(value))


def _overlap(events: list[tuple[str, ...]], history: list[tuple[str, ...]]) -> int:
    """Length of the longest beginning of the history with which the events end."""
    return next(n for n in range(min(len(events), len(history)), -1, -1) if events[len(events) - n :] == history[:n])
