"""For published sets that are known to be dirty: what cannot be used is dropped and counted instead of refused."""

from __future__ import annotations

import html

import pandas as pd

from recsys.data.sources.source import Columns, is_missing

_MARKUP = r"(?i)getTime|</?(?:span|div|script|style|img|a|br|p|b)\b[^>]*>|<(?:span|div|script|style|img|a)\b|^\s*var "


def with_titles(log: pd.DataFrame, items: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame, dict[str, int]]:
    """Leave out items without a title, and interactions of an item that is not there or left out.

    Returns:
        The interactions, the items, and how many rows were dropped for each reason.
    """
    untitled = items[Columns.TITLE].fillna("").str.strip() == ""
    items = items[~untitled]
    unknown = ~log[Columns.ITEM].isin(items[Columns.ITEM])
    return log[~unknown], items, {"items_without_title": int(untitled.sum()), "rows_without_item": int(unknown.sum())}


def usable(log: pd.DataFrame, items: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame, dict[str, int]]:
    """Interactions and items without those that the checks of :class:`SourceData` would refuse.

    HTML entities in titles and categories become characters. Dropped are, in this order: items without id, later rows
    of an item, items whose title holds HTML or JavaScript or is empty, interactions of an item that is not there or is
    dropped, and items without interactions, as the items of these sets are the whole shop's.

    Args:
        log: Columns user, item, time and rating.
        items: Columns item, title and category.

    Returns:
        The interactions, the items, and how many rows were dropped for each reason.
    """
    dropped = {}

    def keep(frame: pd.DataFrame, bad: pd.Series, reason: str) -> pd.DataFrame:
        dropped[reason] = int(bad.sum())
        return frame[~bad]

    items = keep(items, is_missing(items[Columns.ITEM]), "items_without_id")
    items = keep(items, items[Columns.ITEM].duplicated(), "items_repeated")
    items = items.assign(
        **{name: items[name].fillna("").map(html.unescape) for name in (Columns.TITLE, Columns.CATEGORY)}
    )
    items = keep(items, items[Columns.TITLE].str.contains(_MARKUP), "items_with_markup")
    log, items, missing = with_titles(log, items)
    dropped |= missing
    items = keep(items, ~items[Columns.ITEM].isin(log[Columns.ITEM].unique()), "items_without_rows")
    return log, items, dropped
