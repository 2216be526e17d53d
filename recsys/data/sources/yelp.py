"""The Yelp academic dataset."""

from __future__ import annotations

from pathlib import Path

from recsys.data.sources.cleaning import usable
from recsys.data.sources.files import DataFile
from recsys.data.sources.reading import TABLE_CACHE, read
from recsys.data.sources.source import Columns, Filters, Source, SourceData
from recsys.paths import InputPath


class Yelp(Source):
    """The unpacked Yelp academic dataset: reviews of businesses.

    A title is the business's name, and names repeat a lot: every branch of a chain has the same. Categories are joined
    by ``|``. Businesses without a name, reviews of unknown businesses and businesses without reviews are dropped and
    counted.

    Args:
        folder: Folder that holds ``yelp_academic_dataset_review.json`` and ``yelp_academic_dataset_business.json``.
        filters: Interactions to leave out.
        cache_dir: Folder that keeps the converted files; ``~`` is the home folder.
    """

    def __init__(self, folder: InputPath, filters: Filters | None = None, cache_dir: str = TABLE_CACHE) -> None:
        self.folder = folder
        self.filters = filters
        self.cache_dir = cache_dir

    def load(self) -> SourceData:
        """Read both files.

        Raises:
            UserError: A file is missing or cannot be read, or a check of :class:`SourceData` fails.
        """
        reviews = DataFile(Path(self.folder) / "yelp_academic_dataset_review.json")
        businesses = DataFile(Path(self.folder) / "yelp_academic_dataset_business.json")
        item_columns = {Columns.ITEM: "business_id", Columns.TITLE: "name", Columns.CATEGORY: "categories"}
        items = read(businesses, item_columns, self.cache_dir)
        items[Columns.CATEGORY] = items[Columns.CATEGORY].str.replace(r"\s*,\s*", "|", regex=True)
        columns = {Columns.USER: "user_id", Columns.ITEM: "business_id", Columns.TIME: "date", Columns.RATING: "stars"}
        log, items, dropped = usable(read(reviews, columns, self.cache_dir), items)
        return SourceData(log, items, str(reviews.path), str(businesses.path), dropped).filtered(self.filters)
