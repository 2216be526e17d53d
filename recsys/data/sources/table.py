"""A user's own interactions and items: in files, in frames, or in datasets on the Hugging Face hub."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pandas as pd

from recsys.data.sources.cleaning import with_titles
from recsys.data.sources.files import Delimited, data_files
from recsys.data.sources.reading import TABLE_CACHE, read_all, to_frame
from recsys.data.sources.source import Columns, Filters, Origin, Source, SourceData
from recsys.paths import InputPath, NameOrFolder
from recsys.types import UserError

Missing = Literal["refuse", "drop"]


class _Mapped(Source):
    """The names of the columns that interactions and items are taken from."""

    def __init__(
        self,
        user: str,
        item: str,
        time: str | None,
        title: str,
        rating: str | None,
        category: str | None,
        filters: Filters | None,
        missing: Missing,
    ) -> None:
        if filters and time is None and (filters.start is not None or filters.end is not None):
            raise UserError(
                "filters.start and filters.end need times: set the source's `time` to the name of their column"
            )
        if filters and filters.min_rating is not None and rating is None:
            raise UserError("filters.min_rating needs ratings: set the source's `rating` to the name of their column")
        self.columns = {Columns.USER: user, Columns.ITEM: item}
        if time is not None:
            self.columns[Columns.TIME] = time
        self.item_columns = {Columns.ITEM: item, Columns.TITLE: title}
        if rating is not None:
            self.columns[Columns.RATING] = rating
        if category is not None:
            self.item_columns[Columns.CATEGORY] = category
        self.filters = filters
        self.missing = missing

    def _checked(
        self, log: pd.DataFrame, items: pd.DataFrame, log_from: str | Origin, items_from: str | Origin
    ) -> SourceData:
        dropped: dict[str, int] = {}
        if Columns.TIME not in self.columns:
            log = log.assign(**{Columns.TIME: np.arange(len(log))})
        if self.missing == "drop":
            log, items, dropped = with_titles(log, items)
        return SourceData(log, items, log_from, items_from, dropped).filtered(self.filters)


class Table(_Mapped):
    """Two tables, each CSV (``.csv``), TSV (``.tsv``), JSON Lines (``.jsonl``, ``.json``) or Parquet (``.parquet``).

    A table is a file, or several in the order of their names: a folder (files that begin with ``_`` or ``.`` are left
    out, as those that Spark adds) or a pattern (``log-*.csv``). Each has its header, and the same columns.

    Text may be compressed (``.gz``). CSV, TSV and other files with a ``separator`` have a header line. Ids are text,
    exactly as written: ``007`` and ``7`` differ, and ``NA`` is an id; a number in JSON or Parquet becomes its text.

    A text file is converted to Parquet once, and again when it has changed, so it may be larger than memory.

    Args:
        interactions: Path of the interactions: one row for each time a user chose an item.
        items: Path of the items: one row for each item.
        user: Column of the user id in the interactions.
        item: Column of the item id, in both tables.
        time: Column of the time: numbers or ISO 8601 dates. Only their order matters; ties keep the file's order. Null
            takes the file's order as that in time.
        title: Column of the title in the items.
        rating: Column of the rating in the interactions; null reads none.
        category: Column of the category in the items; null reads none.
        filters: Interactions to leave out.
        cache_dir: Folder that keeps the converted files; ``~`` is the home folder.
        separator: What stands between fields; null takes the comma in ``.csv`` and the tabulator in ``.tsv``.
        quoted: Whether fields may be quoted as in CSV, quotes inside them doubled. Null as well, but refuses files that
            would have other rows if quotes were mere characters.
        encoding: Encoding of CSV and TSV, as Python names it.
        missing: What to do about items without a title and interactions of an item that has none or is not in the
            items: ``refuse`` the data, or ``drop`` and count them.

    Raises:
        UserError: The filters need ratings or times, but ``rating`` or ``time`` is null; or there is no such separator
            or encoding.
    """

    def __init__(
        self,
        interactions: InputPath,
        items: InputPath,
        user: str = "user_id",
        item: str = "item_id",
        time: str | None = "timestamp",
        title: str = "title",
        rating: str | None = None,
        category: str | None = None,
        filters: Filters | None = None,
        cache_dir: str = TABLE_CACHE,
        separator: str | None = None,
        quoted: bool | None = None,
        encoding: str = "utf-8",
        missing: Missing = "refuse",
    ) -> None:
        super().__init__(user, item, time, title, rating, category, filters, missing)
        self.interactions = interactions
        self.items = items
        self.form = Delimited(separator, quoted, encoding=encoding)
        self.cache_dir = cache_dir

    def load(self) -> SourceData:
        """Read both files.

        Raises:
            UserError: A file or a column is missing, a file is not a table, or a check of :class:`SourceData` fails.
        """
        logs = data_files(self.interactions, self.form, list(self.columns.values()))  # before anything is converted
        tables = data_files(self.items, self.form, list(self.item_columns.values()))
        items = read_all(tables, self.item_columns, self.items, self.cache_dir)  # first: short, so its faults show soon
        log = read_all(logs, self.columns, self.interactions, self.cache_dir)
        return self._checked(log[0], items[0], log[1], items[1])


class DataFrames(_Mapped):
    """Two frames in memory, for use from Python; the other arguments are those of :class:`Table`.

    Numbers become their text where ids are wanted. Rows in messages count from 0, whatever the index of the frame.

    Args:
        interactions: One row for each time a user chose an item.
        items: One row for each item.

    Raises:
        UserError: The filters need ratings or times, but ``rating`` or ``time`` is None.
    """

    def __init__(
        self,
        interactions: pd.DataFrame,
        items: pd.DataFrame,
        user: str = "user_id",
        item: str = "item_id",
        time: str | None = "timestamp",
        title: str = "title",
        rating: str | None = None,
        category: str | None = None,
        filters: Filters | None = None,
        missing: Missing = "refuse",
    ) -> None:
        super().__init__(user, item, time, title, rating, category, filters, missing)
        self.interactions = interactions
        self.items = items

    def load(self) -> SourceData:
        """Copy the columns from the frames, which stay as they are.

        Raises:
            UserError: A frame has no rows or lacks a column, or a check of :class:`SourceData` fails.
        """
        items = to_frame(self.items, self.item_columns, "items", first_row=0)
        log = to_frame(self.interactions, self.columns, "interactions", first_row=0)
        return self._checked(log, items, "interactions", "items")


class HubDataset(_Mapped):
    """Two datasets of the Hugging Face hub, or two configurations or splits of one.

    A dataset is what ``datasets.load_dataset`` makes of it; a local folder of data files will do. Numbers become their
    text where ids are wanted. Rows in messages count from 0, as in the ``datasets`` library.

    Args:
        interactions: Repository of the interactions: one row for each time a user chose an item.
        items: Repository of the items: one row for each item.
        interactions_name: Configuration of the interactions; null takes the default.
        items_name: Configuration of the items; null takes the default.
        interactions_split: Split of the interactions.
        items_split: Split of the items.
        user: Column of the user id in the interactions.
        item: Column of the item id, in both datasets.
        time: Column of the time: numbers or ISO 8601 dates. Only their order matters; ties keep the dataset's order.
            Null takes the dataset's order as that in time.
        title: Column of the title in the items.
        rating: Column of the rating in the interactions; null reads none.
        category: Column of the category in the items; null reads none.
        filters: Interactions to leave out.
        cache_dir: Folder that keeps the datasets; null takes the ``datasets`` library's own.
        missing: As for :class:`Table`.

    Raises:
        UserError: The filters need ratings or times, but ``rating`` or ``time`` is null.
    """

    def __init__(
        self,
        interactions: NameOrFolder,
        items: NameOrFolder,
        interactions_name: str | None = None,
        items_name: str | None = None,
        interactions_split: str = "train",
        items_split: str = "train",
        user: str = "user_id",
        item: str = "item_id",
        time: str | None = "timestamp",
        title: str = "title",
        rating: str | None = None,
        category: str | None = None,
        filters: Filters | None = None,
        cache_dir: str | None = None,
        missing: Missing = "refuse",
    ) -> None:
        super().__init__(user, item, time, title, rating, category, filters, missing)
        self.interactions = (interactions, interactions_name, interactions_split)
        self.items = (items, items_name, items_split)
        self.cache_dir = cache_dir

    def load(self) -> SourceData:
        """Load both datasets.

        Raises:
            UserError: A dataset cannot be loaded, has no rows or lacks a column, or a check of :class:`SourceData`
                fails.
        """
        items = self._frame(*self.items, self.item_columns)
        log = self._frame(*self.interactions, self.columns)
        return self._checked(log, items, self.interactions[0], self.items[0])

    def _frame(self, repository: str, name: str | None, split: str, columns: dict[str, str]) -> pd.DataFrame:
        import datasets

        try:
            dataset = datasets.load_dataset(repository, name, split=split, cache_dir=self.cache_dir)
        except Exception as error:  # the library raises what its builders, the hub's client and the network raise
            raise UserError(f"the dataset {repository!r} cannot be loaded: {' '.join(str(error).split())}") from error
        return to_frame(dataset, columns, repository, first_row=0)
