"""The contract of every source: data that is checked, and filters that are applied, in one place."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from bisect import bisect_right
from dataclasses import dataclass, field, replace

import numpy as np
import pandas as pd
import pyarrow as pa

from recsys.types import UserError

_SLICE = 1_000_000  # values converted at a time, so that millions of texts never become Python strings at once
_UNIX_TIME = (315_532_800, 4_102_444_800)  # seconds: 1980 to 2099; in another unit no such time looks like one


class Columns:
    """Column names of the interactions and the items."""

    USER = "user"
    ITEM = "item"
    TIME = "time"
    RATING = "rating"
    TITLE = "title"
    CATEGORY = "category"


@dataclass
class Filters:
    """Interactions to leave out, in this order: low ratings, other times, duplicates, and what a k-core lacks.

    Args:
        k_core: Drop users and items with fewer interactions than this, again and again until none is left; 0 keeps
            all, also items that nobody chose.
        min_rating: Keep interactions with at least this rating, so none without one; null keeps all.
        start: Keep interactions at this time or later: an ISO 8601 date (UTC) where the data has dates or Unix time,
            whose unit, seconds to nanoseconds, is told by the size of all times; or a number in the unit of the data,
            where the data has numbers.
        end: Keep interactions before this time, written as ``start``.
        drop_duplicates: Keep only each user's first interaction with an item, by time, then file order: no target is
            in its own history.

    Raises:
        UserError: ``k_core`` is negative, ``min_rating`` is not a number, ``start`` or ``end`` is neither a number nor
            a date, or ``start`` is not before ``end``.
    """

    k_core: int = 0
    min_rating: float | None = None
    start: int | float | str | None = None
    end: int | float | str | None = None
    drop_duplicates: bool = False

    def __post_init__(self) -> None:
        if self.k_core < 0:
            raise UserError(f"filters.k_core must be at least 0, but it is {self.k_core}")
        if self.min_rating is not None and not math.isfinite(self.min_rating):
            raise UserError(f"filters.min_rating must be a number, but it is {self.min_rating}")
        bounds = {"start": self.start, "end": self.end}
        for name, bound in bounds.items():
            if bound is not None and _number(bound) is None and _date(bound) is None:
                raise UserError(f"filters.{name} must be a number or an ISO 8601 date, but it is {bound!r}")
        for read in (_number, _date):
            start, end = (None if bound is None else read(bound) for bound in bounds.values())
            if start is not None and end is not None and start >= end:
                raise UserError(f"filters.start, {self.start}, must be before filters.end, {self.end}")


@dataclass(frozen=True)
class Origin:
    """The files that a table lies in, for messages.

    Args:
        name: What names all of them: a file, a folder or a pattern.
        files: Their paths.
        starts: The index of the first row of each in the frame, ascending.
        first_rows: The number of that row in the file.
    """

    name: str
    files: list[str]
    starts: list[int]
    first_rows: list[int]

    def __str__(self) -> str:
        return self.name

    def row(self, index: int) -> str:
        """Name one row of the frame."""
        file = bisect_right(self.starts, index) - 1
        return f"{self.files[file]}, row {index - self.starts[file] + self.first_rows[file]}"


@dataclass
class SourceData:
    """Checked interactions and items; building one normalises titles, categories, times and ratings.

    The index of each frame holds the row numbers that error messages name, so a source that drops rows keeps it.

    Args:
        interactions: Columns user, item, time and perhaps rating, in file order. User and item are strings and become
            categorical. Time is a number in any unit or ISO 8601 text; only its order matters, and it becomes a number
            (a date: microseconds of Unix time). A rating becomes a number, NaN where it is empty.
        items: Columns item (string, unique), title and perhaps category (several are joined by ``|``; none is ``""``).
            Runs of whitespace in a title or a category become one space.
        interactions_from: What messages call the interactions, usually the file's path, or the files that hold them.
        items_from: The same for the items.
        dropped: What the source or a filter left out, and how much of it, for the counts that are reported.
        has_dates: Whether the times were dates; known of dates that are given.

    Raises:
        UserError: An empty or repeated id or an empty title in the items; an empty user, an unknown item or an
            unreadable time or rating in the interactions. The message names the file, the first such row and how many
            there are.
    """

    interactions: pd.DataFrame
    items: pd.DataFrame
    interactions_from: str | Origin
    items_from: str | Origin
    dropped: dict[str, int] = field(default_factory=dict)
    has_dates: bool = False

    def __post_init__(self) -> None:
        empty = "is empty; fill it in or remove the row"
        ids = self.items[Columns.ITEM]
        texts = {
            name: pd.Series([" ".join(str(t).split()) for t in self.items[name].fillna("")], ids.index, dtype=object)
            for name in (Columns.TITLE, Columns.CATEGORY)
            if name in self.items
        }
        no_title = texts[Columns.TITLE] == ""
        _reject(self.items_from, is_missing(ids), "item id", ids, empty)
        _reject(self.items_from, ids.duplicated(), "item id", ids, "was seen before; keep one row for each id")
        _reject(self.items_from, no_title, "item id", ids, "has no title; add one, or remove it everywhere")
        self.items = self.items.assign(**texts)

        log = self.interactions
        users, items = (log[name].astype("category") for name in (Columns.USER, Columns.ITEM))
        unknown = f"is not in {self.items_from}; add it there or remove the row"
        _reject(self.interactions_from, is_missing(users), "user id", users, empty)
        _reject(self.interactions_from, ~items.isin(ids), "item id", items, unknown)
        self.has_dates = self.has_dates or are_dates(log[Columns.TIME])
        numbers = {Columns.TIME: to_times(log[Columns.TIME])}
        unreadable = "is not a number, or not an ISO 8601 date where the first row's is one; correct it"
        _reject(self.interactions_from, numbers[Columns.TIME].isna(), "time", log[Columns.TIME], unreadable)
        if Columns.RATING in log:
            numbers[Columns.RATING] = to_numbers(log[Columns.RATING]).astype(float)
            bad = numbers[Columns.RATING].isna() & ~is_missing(log[Columns.RATING])
            _reject(self.interactions_from, bad, "rating", log[Columns.RATING], "is not a number; correct it")
        self.interactions = log.assign(**{Columns.USER: users, Columns.ITEM: items}, **numbers)

    def filtered(self, filters: Filters | None) -> SourceData:
        """The data without what the filters leave out, which ``dropped`` counts.

        Raises:
            UserError: ``min_rating`` is set but there are no ratings, or no interaction is left.
        """
        filters = filters or Filters()
        log, items, dropped = self.interactions, self.items, dict(self.dropped)
        if filters.min_rating is not None:
            if Columns.RATING not in log:
                raise UserError(f"filters.min_rating is set, but {self.interactions_from} is read without ratings")
            low = ~(log[Columns.RATING] >= filters.min_rating)  # one without a rating as well
            log, dropped["rows_below_min_rating"] = log[~low], int(low.sum())
        if filters.start is not None or filters.end is not None:
            time, outside = log[Columns.TIME], pd.Series(False, log.index)
            if filters.start is not None:
                outside |= time < self._bound("start", filters.start)
            if filters.end is not None:
                outside |= time >= self._bound("end", filters.end)
            log, dropped["rows_outside_time"] = log[~outside], int(outside.sum())
        if filters.drop_duplicates:
            in_time = log.iloc[log[Columns.TIME].to_numpy().argsort(kind="stable")]
            repeated = in_time.duplicated([Columns.USER, Columns.ITEM]).reindex(log.index)
            log, dropped["rows_duplicate"] = log[~repeated], int(repeated.sum())
        if filters.k_core:
            rows = k_core(
                log[Columns.USER].cat.codes.to_numpy(), log[Columns.ITEM].cat.codes.to_numpy(), filters.k_core
            )
            dropped["rows_outside_k_core"] = len(log) - len(rows)
            log = log.iloc[rows]
            inside = items[Columns.ITEM].isin(log[Columns.ITEM].unique())
            items, dropped["items_outside_k_core"] = items[inside], int((~inside).sum())
        if log.empty:
            counts = ", ".join(f"{name} {n:,}" for name, n in dropped.items())
            raise UserError(
                f"{self.interactions_from}: no interaction is left ({counts}); relax the filters, or write item ids as "
                f"in {self.items_from}"
            )
        return replace(self, interactions=log, items=items, dropped=dropped)

    def _bound(self, name: str, value: float | str) -> float:
        """A bound in the unit of the times.

        Raises:
            UserError: It is a date but the times are none, or the reverse; or it is a number that no time exceeds.
        """
        time = self.interactions[Columns.TIME]
        date, number, what = _date(value), _number(value), f"filters.{name} is {value!r}, but {self.interactions_from}"
        if self.has_dates:
            if date is None:
                raise UserError(f"{what} has dates; write it as an ISO 8601 date")
            return date // 1000
        if number is not None:
            if number < time.min() if name == "start" else number > time.max():
                raise UserError(
                    f"{what} has times from {time.min()} to {time.max()}: it would leave out nothing; write it in "
                    "their unit, as a date where that is Unix time, or remove it"
                )
            return number
        early, late = _UNIX_TIME
        units = {n: (time < early * 10**9 // n) | (time >= late * 10**9 // n) for n in (10**9, 10**6, 10**3, 1)}
        nanoseconds, outside = min(units.items(), key=lambda unit: unit[1].sum())
        if outside.any():
            first = int(outside.to_numpy().argmax())
            raise UserError(
                f"filters.{name} is {value!r}, but {_row(self.interactions_from, time.index[first])}, has the time "
                f"{time.iloc[first]}, which is not Unix time of 1980 to "
                f"2099{'' if outside.all() else ' in the unit of the others'} ({outside.sum()} such rows in all); "
                "write the bound as a number in the unit of the times, or correct them"
            )
        assert date is not None
        return date // nanoseconds


class Source(ABC):
    """Loads interactions and items. To add one, subclass this in any module and name it in YAML by ``class_path``."""

    @abstractmethod
    def load(self) -> SourceData:
        """Read everything and return the checked data."""


def k_core(user: np.ndarray, item: np.ndarray, k: int) -> np.ndarray:
    """Largest set of interactions in which each user and each item that occurs has at least ``k``.

    Args:
        user: [E] user of each interaction, codes >= 0.
        item: [E] item of each interaction, codes >= 0.
        k: Fewest interactions.

    Returns:
        [R] int64, positions of the interactions kept, in order.
    """
    rows = np.arange(len(user))
    while True:
        users, items = user[rows], item[rows]
        enough = (np.bincount(users)[users] >= k) & (np.bincount(items)[items] >= k) if len(rows) else rows > 0
        if enough.all():
            return rows
        rows = rows[enough]


def is_missing(ids: pd.Series) -> pd.Series:
    """Whether each id is missing or empty."""
    return ids.isna() | (ids == "")


def _number(value: float | str) -> float | None:
    """A bound as a finite number, a whole one as it is written; None if it is none."""
    for kind in (float,) if isinstance(value, float) else (int, float):
        try:
            number = kind(value)
            return number if math.isfinite(number) else None
        except (ValueError, OverflowError):
            continue
    return None


def _date(value: float | str) -> int | None:
    """A bound as nanoseconds of Unix time; None if it is not an ISO 8601 date."""
    text = f"{value:.0f}" if isinstance(value, float) and value.is_integer() else str(value)
    date = pd.to_datetime(pd.Series([text]), errors="coerce", format="ISO8601", utc=True).dt.as_unit("us")
    return None if date.isna()[0] else int(date.astype("int64")[0]) * 1000


def are_dates(times: pd.Series) -> bool:
    """Whether times are dates; the first of texts decides."""
    if isinstance(times.dtype, pd.ArrowDtype):
        if pa.types.is_temporal(times.dtype.pyarrow_dtype):
            return True
    elif pd.api.types.is_datetime64_any_dtype(times):
        return True
    return len(times) > 0 and bool(np.isnan(to_numbers(times.iloc[:1]).astype(float).iloc[0]))


def to_times(times: pd.Series) -> pd.Series:
    """Times as numbers, those of dates microseconds, missing where they cannot be read."""
    if not are_dates(times):
        return to_numbers(times)
    arrays = []
    for part in _slices(times):
        dates = pd.to_datetime(part.astype(object), errors="coerce", format="ISO8601", utc=True).dt.as_unit("us")
        arrays.append(dates.astype("int64").where(dates.notna()).to_numpy())
    return pd.Series(np.concatenate(arrays), times.index)


def to_numbers(values: pd.Series) -> pd.Series:
    """Values as numbers, missing where they cannot be read."""
    numbers = pd.Series(_to_numbers(list(_slices(values))), values.index)
    return numbers.where(np.isfinite(numbers))


def _to_numbers(parts: list[pd.Series]) -> np.ndarray:
    for kind in (
        pa.int64(),
        pa.uint64(),
        pa.float64(),
    ):  # integers first: beyond 2 ** 53 a float would merge neighbours
        try:
            arrays = [pa.array(part).cast(kind) for part in parts]
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError, pa.ArrowTypeError):
            continue
        if not any(array.null_count for array in arrays):
            return np.concatenate([np.asarray(array) for array in arrays])
    return np.concatenate([pd.to_numeric(p.astype(object), errors="coerce").to_numpy(dtype=float) for p in parts])


def _slices(values: pd.Series) -> list[pd.Series]:
    return [values.iloc[start : start + _SLICE] for start in range(0, max(1, len(values)), _SLICE)]


def _row(table: str | Origin, index: int) -> str:
    return table.row(index) if isinstance(table, Origin) else f"{table}, row {index}"


def _reject(table: str | Origin, bad: pd.Series, name: str, values: pd.Series, problem: str) -> None:
    """Raise a UserError that names the first bad row and its value, if there is one."""
    if bad.any():
        first = int(bad.to_numpy().argmax())
        where = _row(table, values.index[first])
        raise UserError(f"{where}: {name} {values.iloc[first]!r} {problem} ({bad.sum()} such rows in all)")
