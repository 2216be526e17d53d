"""A user's own interactions and items: in files, in frames, or in datasets on the Hugging Face hub."""

from __future__ import annotations

import pandas as pd

from recsys.data.sources.files import DataFile, Delimited
from recsys.data.sources.reading import TABLE_CACHE, read, to_frame
from recsys.data.sources.source import Columns, Filters, Source, SourceData
from recsys.paths import InputPath, NameOrFolder
from recsys.types import UserError


class _Mapped(Source):
    """The names of the columns that interactions and items are taken from."""

    def __init__(
        self,
        user: str,
        item: str,
        time: str,
        title: str,
        rating: str | None,
        category: str | None,
        filters: Filters | None,
    ) -> None:
        if filters and filters.min_rating is not None and rating is None:
            raise UserError("filters.min_rating needs ratings: set the source's `rating` to the name of their column")
        self.columns = {Columns.USER: user, Columns.ITEM: item, Columns.TIME: time}
        self.item_columns = {Columns.ITEM: item, Columns.TITLE: title}
        if rating is not None:
            self.columns[Columns.RATING] = rating
        if category is not None:
            self.item_columns[Columns.CATEGORY] = category
        self.filters = filters


class Table(_Mapped):
    """Two files, each CSV (``.csv``), TSV (``.tsv``), JSON Lines (``.jsonl``, ``.json``) or Parquet (``.parquet``).

    Text may be compressed (``.gz``). CSV, TSV and other files with a ``separator`` have a header line. Ids are text,
    exactly as written: ``007`` and ``7`` differ, and ``NA`` is an id; a number in JSON or Parquet becomes its text.

    A text file is converted to Parquet once, and again when it has changed, so it may be larger than memory.

    Args:
        interactions: Path of the interactions file: one row for each time a user chose an item.
        items: Path of the items file: one row for each item.
        user: Column of the user id in the interactions.
        item: Column of the item id, in both files.
        time: Column of the time: numbers or ISO 8601 dates. Only their order matters; ties keep the file's order.
        title: Column of the title in the items.
        rating: Column of the rating in the interactions; null reads none.
        category: Column of the category in the items; null reads none.
        filters: Interactions to leave out.
        cache_dir: Folder that keeps the converted files; ``~`` is the home folder.
        separator: What stands between fields; null takes the comma in ``.csv`` and the tabulator in ``.tsv``.
        quoted: Whether fields may be quoted as in CSV, quotes inside them doubled. Null as well, but refuses files that
            would have other rows if quotes were mere characters.
        encoding: Encoding of CSV and TSV, as Python names it.

    Raises:
        UserError: The filters need ratings, but ``rating`` is null; or there is no such separator or encoding.
    """

    def __init__(
        self,
        interactions: InputPath,
        items: InputPath,
        user: str = "user_id",
        item: str = "item_id",
        time: str = "timestamp",
        title: str = "title",
        rating: str | None = None,
        category: str | None = None,
        filters: Filters | None = None,
        cache_dir: str = TABLE_CACHE,
        separator: str | None = None,
        quoted: bool | None = None,
        encoding: str = "utf-8",
    ) -> None:
        super().__init__(user, item, time, title, rating, category, filters)
        self.interactions = interactions
        self.items = items
        self.form = Delimited(separator, quoted, encoding=encoding)
        self.cache_dir = cache_dir

    def load(self) -> SourceData:
        """Read both files.

        Raises:
            UserError: A file or a column is missing, a file is not a table, or a check of :class:`SourceData` fails.
        """
        log, items = DataFile(self.interactions, self.form), DataFile(self.items, self.form)
        log.schema(list(self.columns.values()))  # a missing column shows before anything is converted
        item_frame = read(items, self.item_columns, self.cache_dir)  # first, as it is short: its faults show soon
        log_frame = read(log, self.columns, self.cache_dir)
        return SourceData(log_frame, item_frame, self.interactions, self.items).filtered(self.filters)


class DataFrames(_Mapped):
    """Two frames in memory, for use from Python; the other arguments are those of :class:`Table`.

    Numbers become their text where ids are wanted. Rows in messages count from 0, whatever the index of the frame.

    Args:
        interactions: One row for each time a user chose an item.
        items: One row for each item.

    Raises:
        UserError: The filters need ratings, but ``rating`` is None.
    """

    def __init__(
        self,
        interactions: pd.DataFrame,
        items: pd.DataFrame,
        user: str = "user_id",
        item: str = "item_id",
        time: str = "timestamp",
        title: str = "title",
        rating: str | None = None,
        category: str | None = None,
        filters: Filters | None = None,
    ) -> None:
        super().__init__(user, item, time, title, rating, category, filters)
        self.interactions = interactions
        self.items = items

    def load(self) -> SourceData:
        """Copy the columns from the frames, which stay as they are.

        Raises:
            UserError: A frame has no rows or lacks a column, or a check of :class:`SourceData` fails.
        """
        items = to_frame(self.items, self.item_columns, "items", first_row=0)
        log = to_frame(self.interactions, self.columns, "interactions", first_row=0)
        return SourceData(log, items, "interactions", "items").filtered(self.filters)


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
        title: Column of the title in the items.
        rating: Column of the rating in the interactions; null reads none.
        category: Column of the category in the items; null reads none.
        filters: Interactions to leave out.
        cache_dir: Folder that keeps the datasets; null takes the ``datasets`` library's own.

    Raises:
        UserError: The filters need ratings, but ``rating`` is null.
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
        time: str = "timestamp",
        title: str = "title",
        rating: str | None = None,
        category: str | None = None,
        filters: Filters | None = None,
        cache_dir: str | None = None,
    ) -> None:
        super().__init__(user, item, time, title, rating, category, filters)
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
        return SourceData(log, items, self.interactions[0], self.items[0]).filtered(self.filters)

    def _frame(self, repository: str, name: str | None, split: str, columns: dict[str, str]) -> pd.DataFrame:
        import datasets

        try:
            dataset = datasets.load_dataset(repository, name, split=split, cache_dir=self.cache_dir)
        except Exception as error:  # the library raises what its builders, the hub's client and the network raise
            raise UserError(f"the dataset {repository!r} cannot be loaded: {error}") from error
        return to_frame(dataset, columns, repository, first_row=0)
