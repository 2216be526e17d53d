"""Where interactions and titles come from: a source loads two tables, and ``Tables`` checks them for every source."""

from __future__ import annotations

import csv
import warnings
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from recsys.assets import CACHE_DIR, ML100K_INTERACTIONS, ML100K_ITEMS, fetch_all
from recsys.types import UserError

_SEPARATORS = {".csv": ",", ".tsv": "\t"}


class Columns:
    """Column names of the two tables."""

    USER = "user"
    ITEM = "item"
    TIME = "time"
    TITLE = "title"
    RATING = "rating"
    CATEGORY = "category"


@dataclass
class Tables:
    """Checked interactions and items; building one normalises the titles and the times.

    The index of each frame holds the row numbers that error messages name, so a source that drops rows keeps it.

    Args:
        interactions: Columns user, item and time, in file order. User and item are strings. Time is a number in any
            unit or ISO 8601 text; only its order matters, and it becomes a number.
        items: Columns item (string, unique) and title. Runs of whitespace in a title become one space.
        interactions_from: What messages call the interactions, usually the file's path.
        items_from: The same for the items.

    Raises:
        UserError: An empty or repeated id or an empty title in the items; an empty user, an unknown item or an
            unreadable time in the interactions. The message names the file, the first such row and how many there are.
    """

    interactions: pd.DataFrame
    items: pd.DataFrame
    interactions_from: str
    items_from: str

    def __post_init__(self) -> None:
        empty = "is empty; fill it in or remove the row"
        ids = self.items[Columns.ITEM]
        titles = pd.Series([" ".join(str(t).split()) for t in self.items[Columns.TITLE].fillna("")], index=ids.index)
        _reject(self.items_from, _is_missing(ids), "item id", ids, empty)
        _reject(self.items_from, ids.duplicated(), "item id", ids, "was seen before; keep one row for each id")
        _reject(self.items_from, titles == "", "item id", ids, "has no title; add one, or remove it everywhere")
        self.items = self.items.assign(**{Columns.TITLE: titles})

        users, items, times = (self.interactions[c] for c in (Columns.USER, Columns.ITEM, Columns.TIME))
        unknown = f"is not in {self.items_from}; add it there or remove the row"
        unreadable = "is not a number, or not an ISO 8601 date where the first row's is one; correct it"
        numbers = _to_numbers(times)
        _reject(self.interactions_from, _is_missing(users), "user id", users, empty)
        _reject(self.interactions_from, ~items.isin(ids), "item id", items, unknown)
        _reject(self.interactions_from, numbers.isna(), "time", times, unreadable)
        self.interactions = self.interactions.assign(**{Columns.TIME: numbers})


class Source(ABC):
    """Loads interactions and items. To add one, subclass this in any module and name it in YAML by ``class_path``."""

    @abstractmethod
    def load(self) -> Tables:
        """Read everything and return the checked tables."""


class MovieLens100K(Source):
    """MovieLens-100K: 100,000 ratings of 1,682 films by 943 users; downloaded on first use.

    Titles come without the year of release, so 22 of them stand for more than one film.

    Args:
        cache_dir: Folder that keeps downloaded files; ``~`` is the home folder.
    """

    def __init__(self, cache_dir: str = CACHE_DIR) -> None:
        self.cache_dir = cache_dir

    def load(self) -> Tables:
        """Fetch the two files if need be and read them; see :func:`recsys.assets.fetch_all` for the errors."""
        interactions, items = fetch_all([ML100K_INTERACTIONS, ML100K_ITEMS], self.cache_dir)
        columns = {"user_id:token": Columns.USER, "item_id:token": Columns.ITEM, "timestamp:float": Columns.TIME}
        item_columns = {"item_id:token": Columns.ITEM, "movie_title:token_seq": Columns.TITLE}
        return Tables(
            _read(interactions, columns, "\t", quoted=False),
            _read(items, item_columns, "\t", quoted=False),
            str(interactions),
            str(items),
        )


class Table(Source):
    """Two UTF-8 text files with a header line: ``.csv`` or ``.tsv``, either also as ``.gz``.

    Fields may be quoted as in CSV, in both formats. Ids are text, exactly as written: ``007`` and ``7`` differ.

    Args:
        interactions: Path of the interactions file: one row for each time a user chose an item.
        items: Path of the items file: one row for each item.
        user: Column of the user id in the interactions.
        item: Column of the item id, in both files.
        time: Column of the time: numbers or ISO 8601 dates. Only their order matters; ties keep the file's order.
        title: Column of the title in the items.
    """

    def __init__(
        self,
        interactions: str,
        items: str,
        user: str = "user_id",
        item: str = "item_id",
        time: str = "timestamp",
        title: str = "title",
    ) -> None:
        self.interactions = interactions
        self.items = items
        self.columns = {user: Columns.USER, item: Columns.ITEM, time: Columns.TIME}
        self.item_columns = {item: Columns.ITEM, title: Columns.TITLE}

    def load(self) -> Tables:
        """Read both files.

        Raises:
            UserError: A file or a column is missing, a file is not a table, or a check of :class:`Tables` fails.
        """
        return Tables(
            _read(Path(self.interactions), self.columns, _separator(self.interactions), quoted=True),
            _read(Path(self.items), self.item_columns, _separator(self.items), quoted=True),
            self.interactions,
            self.items,
        )


def _separator(path: str) -> str:
    suffix = Path(path.removesuffix(".gz")).suffix
    if suffix not in _SEPARATORS:
        raise UserError(f"{path}: the name should end in {' or '.join(_SEPARATORS)}, optionally followed by .gz")
    return _SEPARATORS[suffix]


def _read(path: Path, columns: dict[str, str], separator: str, quoted: bool) -> pd.DataFrame:
    """Read some columns as text and rename them; the index is the row number, where the header is row 1."""
    path = path.expanduser()
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", pd.errors.ParserWarning)  # rows with more fields than the header
            frame = pd.read_csv(
                path,
                sep=separator,
                dtype=str,  # "category" would need less memory but reads "007" as 7
                na_filter=False,  # the id "NA" is not a missing value
                index_col=False,
                quoting=csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE,
            )
    except (ValueError, pd.errors.ParserWarning, OSError, EOFError) as error:  # ValueError: no table, or not UTF-8
        raise UserError(f"{path}: not readable as a table: {str(error).strip()}") from error
    for name in columns:
        if name not in frame:
            raise UserError(f"{path}: column {name!r} is missing; the file has {', '.join(map(repr, frame))}")
    frame = frame[list(columns)].rename(columns=columns)
    frame.index = pd.RangeIndex(2, len(frame) + 2)
    return frame


def _to_numbers(times: pd.Series) -> pd.Series:
    """Times as numbers, missing where they cannot be read. The first row decides between numbers and dates."""
    numbers = pd.to_numeric(times, errors="coerce")
    if len(times) and pd.isna(numbers.iloc[0]):
        dates = pd.to_datetime(times, errors="coerce", format="ISO8601", utc=True)
        return dates.astype("int64").where(dates.notna())
    return numbers.where(np.isfinite(numbers))


def _is_missing(ids: pd.Series) -> pd.Series:
    return ids.isna() | (ids == "")


def _reject(table: str, bad: pd.Series, name: str, values: pd.Series, problem: str) -> None:
    """Raise a UserError that names the first bad row and its value, if there is one."""
    if bad.any():
        first = int(bad.to_numpy().argmax())
        where = f"{table}, row {values.index[first]}"
        raise UserError(f"{where}: {name} {values.iloc[first]!r} {problem} ({bad.sum()} such rows in all)")
