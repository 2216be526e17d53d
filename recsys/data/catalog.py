"""The catalogue: items by index, and their titles as token ids."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from recsys.types import UserError


class Catalog:
    """The M items that can be recommended. An item's index is its position here; titles may repeat.

    Args:
        item_ids: M different ids.
        titles: M titles, not empty.
    """

    def __init__(self, item_ids: list[str], titles: list[str]) -> None:
        self.item_ids = item_ids
        self.titles = titles
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

    def tokenize(self, tokenizer: Any, end: str) -> list[list[int]]:
        """Token ids of every title, each followed by those of ``end``; both are tokenised apart and joined by ids.

        Items with equal titles, or with titles that the tokenizer does not tell apart, have equal token ids.

        Args:
            tokenizer: A ``transformers`` tokenizer.
            end: Text that ends every item. With it no item's tokens are a proper prefix of another's.

        Returns:
            M lists of token ids.

        Raises:
            UserError: ``end`` or a title has no tokens, or a title contains the tokens of ``end``.
        """
        end_ids: list[int] = tokenizer(end, add_special_tokens=False).input_ids
        if not end_ids:
            raise UserError(f"the end of an item, {end!r}, has no tokens; choose another `end` in the prompt template")
        tokens = []
        for item_id, title, ids in zip(
            self.item_ids, self.titles, tokenizer(self.titles, add_special_tokens=False).input_ids, strict=True
        ):
            if not ids:
                raise UserError(f"item id {item_id!r}: the title {title!r} has no tokens; write it differently")
            ended = ids + end_ids
            if any(ended[i : i + len(end_ids)] == end_ids for i in range(len(ids))):
                raise UserError(
                    f"item id {item_id!r}: the title {title!r} contains the end of an item, {end!r}; choose another "
                    "`end` in the prompt template"
                )
            tokens.append(ended)
        return tokens
