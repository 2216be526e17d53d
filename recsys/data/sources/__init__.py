"""Where interactions and titles come from: every source loads its own kind of data, and ``SourceData`` checks it."""

from recsys.data.sources.amazon import AmazonReviews
from recsys.data.sources.history_rows import HistoryRows
from recsys.data.sources.movielens import MovieLens, MovieLens100K
from recsys.data.sources.source import Columns, Filters, Source, SourceData
from recsys.data.sources.table import DataFrames, HubDataset, Table
from recsys.data.sources.yelp import Yelp

__all__ = [
    "AmazonReviews",
    "Columns",
    "DataFrames",
    "Filters",
    "HistoryRows",
    "HubDataset",
    "MovieLens",
    "MovieLens100K",
    "Source",
    "SourceData",
    "Table",
    "Yelp",
]
