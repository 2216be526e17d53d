"""Where interactions and titles come from: a source loads two tables, and ``Tables`` checks them for every source."""

from recsys.data.sources.amazon import AmazonReviews
from recsys.data.sources.history_rows import HistoryRows
from recsys.data.sources.movielens import MovieLens, MovieLens100K
from recsys.data.sources.table import Hub, Table
from recsys.data.sources.tables import Columns, Filters, Source, Tables
from recsys.data.sources.yelp import Yelp

__all__ = [
    "AmazonReviews",
    "Columns",
    "Filters",
    "HistoryRows",
    "Hub",
    "MovieLens",
    "MovieLens100K",
    "Source",
    "Table",
    "Tables",
    "Yelp",
]
