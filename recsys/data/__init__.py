"""From interactions and titles to batches: sources -> catalogue and histories -> prompts -> data module."""

from recsys.data.batches import BatchDataset, ResumableLoader, plan_batches
from recsys.data.card import card_markdown, card_text, data_card
from recsys.data.catalog import Catalog
from recsys.data.datamodule import HistoryDataModule
from recsys.data.histories import Histories
from recsys.data.prompts import EncodedPrompt, PromptEncoder, PromptTemplate
from recsys.data.requests import Requests
from recsys.data.sources import (
    AmazonReviews,
    Columns,
    DataFrames,
    Filters,
    HistoryRows,
    HubDataset,
    MovieLens,
    MovieLens100K,
    Source,
    SourceData,
    Table,
    Yelp,
)

__all__ = [
    "AmazonReviews",
    "BatchDataset",
    "Catalog",
    "Columns",
    "DataFrames",
    "EncodedPrompt",
    "Filters",
    "Histories",
    "HistoryDataModule",
    "HistoryRows",
    "HubDataset",
    "MovieLens",
    "MovieLens100K",
    "PromptEncoder",
    "PromptTemplate",
    "Requests",
    "ResumableLoader",
    "Source",
    "SourceData",
    "Table",
    "Yelp",
    "card_markdown",
    "card_text",
    "data_card",
    "plan_batches",
]
