"""Amazon Reviews in the layouts of 2018 and 2023."""

from __future__ import annotations

from dataclasses import replace

from recsys.data.sources.cleaning import usable
from recsys.data.sources.files import DataFile
from recsys.data.sources.reading import TABLE_CACHE, read
from recsys.data.sources.source import Columns, Filters, Source, SourceData
from recsys.paths import InputPath
from recsys.types import UserError

_REVIEWS = (  # user, item, time and rating: 2018 and 2023
    ("reviewerID", "asin", "unixReviewTime", "overall"),
    ("user_id", "parent_asin", "timestamp", "rating"),
)
_METADATA = (("asin", "category"), ("parent_asin", "categories"))


class AmazonReviews(Source):
    """One category of Amazon Reviews: the reviews and the metadata, as of 2018 or 2023, told by their columns.

    2018: ``Office_Products_5.json.gz`` and ``meta_Office_Products.json.gz``. 2023: ``Office_Products.jsonl.gz``, or the
    5-core ``Office_Products.csv.gz``, and ``meta_Office_Products.jsonl.gz``. Each may be unpacked. An item of 2023 is a
    ``parent_asin``; its category is ``categories``.

    These sets are dirty, so what cannot be used is dropped and counted: later metadata of an item, items whose title is
    missing, empty or holds HTML or JavaScript (a known fault of 2018), reviews of an item without usable metadata, a
    user's later reviews of the same item, and items without reviews. HTML entities become characters.

    Args:
        reviews: Path of the reviews.
        metadata: Path of the metadata.
        filters: Interactions to leave out; duplicates always are.
        cache_dir: Folder that keeps the converted files; ``~`` is the home folder.
    """

    def __init__(
        self, reviews: InputPath, metadata: InputPath, filters: Filters | None = None, cache_dir: str = TABLE_CACHE
    ) -> None:
        self.reviews = reviews
        self.metadata = metadata
        self.filters = replace(filters or Filters(), drop_duplicates=True)
        self.cache_dir = cache_dir

    def load(self) -> SourceData:
        """Read both files.

        Raises:
            UserError: A file cannot be read or is of neither layout, or a check of :class:`SourceData` fails.
        """
        reviews, metadata = DataFile(self.reviews), DataFile(self.metadata)
        user, item, time, rating = _layout(reviews, _REVIEWS)
        meta_item, category = _layout(metadata, _METADATA)
        item_columns = {Columns.ITEM: meta_item, Columns.TITLE: "title", Columns.CATEGORY: category}
        columns = {Columns.USER: user, Columns.ITEM: item, Columns.TIME: time, Columns.RATING: rating}
        items = read(metadata, item_columns, self.cache_dir)
        log, items, dropped = usable(read(reviews, columns, self.cache_dir), items)
        return SourceData(log, items, self.reviews, self.metadata, dropped).filtered(self.filters)


def _layout(file: DataFile, layouts: tuple[tuple[str, ...], ...]) -> tuple[str, ...]:
    """The columns of the first layout that the file has."""
    names = file.column_names()
    for layout in layouts:
        if set(layout) <= set(names):
            return layout
    wanted = " or ".join(", ".join(layout) for layout in layouts)
    raise UserError(f"{file.path}: should have the columns {wanted}; it has {', '.join(names)}")
