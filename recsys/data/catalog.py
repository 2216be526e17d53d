"""The catalogue: items by index, and their titles as token ids."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from functools import cached_property
from operator import ne
from typing import Any

import numpy as np
import pandas as pd

from recsys.data.tokens import control_tokens, kept_tokens
from recsys.types import UserError


class Catalog:
    """The M items that can be recommended. An item's index is its position here; titles may repeat.

    Args:
        item_ids: M different ids.
        titles: M titles, not empty.

    Attributes:
        cut_titles: Number of titles that ``tokenize`` cut.
    """

    def __init__(self, item_ids: list[str], titles: list[str]) -> None:
        self.item_ids = item_ids
        self.titles = titles
        self.cut_titles = 0
        self._index = pd.Index(item_ids)

    def __len__(self) -> int:
        return len(self.item_ids)

    def index_of(self, ids: Any) -> np.ndarray:
        """Catalogue index of each id.

        Args:
            ids: [E] ids: a list, an array or a pandas column.

        Returns:
            [E] int64.

        Raises:
            UserError: An id is not in the catalogue.
        """
        codes, unique = pd.factorize(pd.Series(ids))  # look each different id up once, as there may be millions of ids
        index = self._index.get_indexer(unique)
        if (index < 0).any():
            raise UserError(f"item id {unique[index < 0][0]!r} is not in the catalogue")
        return index[codes]

    @cached_property
    def _by_title(self) -> dict[str, int]:
        """The first item of each title."""
        return {title: item for item, title in reversed(list(enumerate(self.titles)))}

    def find(self, names: Iterable[str]) -> np.ndarray:
        """Catalogue index of items that are given by id or by title; the first of several with the same title.

        Args:
            names: [E] ids or titles.

        Returns:
            [E] int64.

        Raises:
            UserError: One is unknown; the message has the titles closest to it.
        """
        texts = [str(name) for name in names]
        found = self._index.get_indexer(pd.Index(texts, dtype=object)).astype(np.int64)
        for place in np.flatnonzero(found < 0):
            item = self._by_title.get(" ".join(texts[place].split()))
            if item is None:
                lower = {title.lower(): title for title in self.titles}
                close = [repr(lower[title]) for title in get_close_matches(texts[place].lower(), lower, 3, 0.5)]
                hint = f"; the closest titles are {', '.join(close)}" if close else ""
                raise UserError(f"no item has the id or title {texts[place]!r}{hint}")
            found[place] = item
        return found

    def tokenize(
        self, tokenizer: Any, end: str, max_title_tokens: int | None = None, cache_dir: str | None = None
    ) -> list[list[int]]:
        """Token ids of every title, each followed by those of ``end``; both are tokenised apart and joined by ids.

        Items with equal titles, or with titles that the tokenizer does not tell apart, have equal token ids. A control
        token that a title spells is text like any other.

        Args:
            tokenizer: A ``transformers`` tokenizer.
            end: Text that ends every item. With it no item's tokens are a proper prefix of another's.
            max_title_tokens: Tokens to which longer titles are cut, see :func:`shorten`; None cuts none.
            cache_dir: Folder that keeps the titles' tokens, see :func:`recsys.data.tokens.kept_tokens`.

        Returns:
            M lists of token ids.

        Raises:
            UserError: ``end`` or a title has no tokens, or a title contains the tokens of ``end`` or a control token.
        """
        end_ids: list[int] = tokenizer(end, add_special_tokens=False).input_ids
        if not end_ids:
            raise UserError(f"the end of an item, {end!r}, has no tokens; choose another `end` in the prompt template")
        tokens = kept_tokens(tokenizer, self.titles, cache_dir)
        control = control_tokens(tokenizer)
        for item_id, title, ids in zip(self.item_ids, self.titles, tokens, strict=True):
            if not ids:
                raise UserError(f"item id {item_id!r}: the title {title!r} has no tokens; write it differently")
            if not control.isdisjoint(ids):
                raise UserError(
                    f"item id {item_id!r}: the title {title!r} contains a control token of the model; write it "
                    "differently"
                )
            if _ends_early(ids, end_ids):
                raise UserError(
                    f"item id {item_id!r}: the title {title!r} contains the end of an item, {end!r}; choose another "
                    "`end` in the prompt template"
                )
        if max_title_tokens is not None:
            whole, tokens = tokens, shorten(tokens, max_title_tokens, end_ids)
            self.cut_titles = sum(map(ne, whole, tokens))
        return [ids + end_ids for ids in tokens]


def shorten(titles: list[list[int]], limit: int, end: list[int]) -> list[list[int]]:
    """Cut titles to their first ``limit`` tokens, or as many more as tell each from all other titles.

    A cut title is no prefix of another title, cut or not; equal titles stay equal, and different ones different.

    Args:
        titles: M lists of token ids, none of which contains the end.
        limit: Tokens to keep, >= 1.
        end: Token ids that will follow each title. A cut that would make them appear too early keeps more tokens.

    Returns:
        M lists of token ids.
    """
    cut: dict[tuple[int, ...], list[int]] = {}
    groups: dict[Any, list[tuple[int, ...]]] = {}  # different titles whose first `size` tokens agree
    for title in dict.fromkeys(map(tuple, titles)):
        groups.setdefault(title[:limit], []).append(title)
    size = limit
    while groups:
        longer: dict[Any, list[tuple[int, ...]]] = {}
        for number, group in enumerate(groups.values()):
            for title in group:
                across = list(title[max(0, size - len(end) + 1) : size])  # where the end could begin too early
                if len(title) <= size or (len(group) == 1 and not _ends_early(across, end)):
                    cut[title] = list(title[:size])
                else:
                    longer.setdefault((number, title[size]), []).append(title)
        groups = longer
        size += 1
    return [cut[tuple(title)] for title in titles]


def _ends_early(title: list[int], end: list[int]) -> bool:
    """Whether the end appears in the title followed by the end before it should."""
    ended = title + end
    return any(ended[i : i + len(end)] == end for i in range(len(title)))
