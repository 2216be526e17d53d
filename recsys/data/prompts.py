"""From a history to prompt token ids."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from recsys.data.histories import Histories
from recsys.types import UserError

_HISTORY = "{history}"


@dataclass(frozen=True)
class PromptTemplate:
    """What the model reads before it names an item, and how much history it gets.

    Args:
        template: Text of the prompt. ``{history}`` stands for the titles, oldest first, each followed by ``end``.
        end: Text that ends every title, in the prompt and as the model's answer. No title may contain its tokens.
        max_history: Most titles in a prompt; the newest are kept.
        max_tokens: Most tokens in a prompt; older titles are left out, whole titles only, until it fits.

    Raises:
        UserError: ``template`` does not hold ``{history}`` exactly once, or ``max_history`` is below 1.
    """

    template: str = "The user watched these movies, one per line, oldest first:\n{history}"
    end: str = "\n"
    max_history: int = 20
    max_tokens: int = 512

    def __post_init__(self) -> None:
        if self.template.count(_HISTORY) != 1:
            raise UserError(f"the prompt template must contain {_HISTORY} exactly once, but it is {self.template!r}")
        if self.max_history < 1:
            raise UserError(f"the prompt's max_history must be at least 1, but it is {self.max_history}")


@dataclass
class EncodedPrompt:
    """One prompt, ready to be padded."""

    tokens: list[int]  # [L] token ids
    history: list[int]  # [C] catalogue indices of the titles in the prompt, oldest first
    starts: list[int]  # [C] position in `tokens` of each title's first token, >= 1


class PromptEncoder:
    """Joins the token ids of a prompt's fixed text and of the titles; nothing is tokenised twice or across a boundary.

    Args:
        tokenizer: A ``transformers`` tokenizer. If it starts texts with a BOS token, so does the prompt.
        item_tokens: M lists of token ids as :meth:`recsys.data.Catalog.tokenize` returns them.
        template: The text and the limits.

    Raises:
        UserError: No token precedes the history, or the longest title does not fit into a prompt.
    """

    def __init__(self, tokenizer: Any, item_tokens: list[list[int]], template: PromptTemplate) -> None:
        before, after = template.template.split(_HISTORY)
        self._head: list[int] = tokenizer(before, add_special_tokens=False).input_ids
        self._tail: list[int] = tokenizer(after, add_special_tokens=False).input_ids
        bos = tokenizer.bos_token_id
        if bos is not None and tokenizer(before).input_ids[:1] == [bos] != self._head[:1]:
            self._head = [bos, *self._head]
        if not self._head:
            raise UserError(
                f"the prompt template needs some text before {_HISTORY}: the model cannot start from nothing"
            )

        self.item_lengths = np.array([len(tokens) for tokens in item_tokens])
        self._offsets = np.concatenate([[0], np.cumsum(self.item_lengths)])
        self._item_tokens = np.concatenate(item_tokens)  # one array: worker processes share it without copying
        self.max_history = template.max_history
        self._budget = template.max_tokens - len(self._head) - len(self._tail)
        if self.item_lengths.max() > self._budget:
            longest = item_tokens[self.item_lengths.argmax()]
            raise UserError(
                f"a prompt of max_tokens={template.max_tokens} leaves {self._budget} tokens for titles, but the "
                f"longest has {len(longest)}: {tokenizer.decode(longest)!r}; raise max_tokens or shorten the template "
                "or the title"
            )

    def encode(self, history: np.ndarray) -> EncodedPrompt:
        """Encode the newest titles of a history that fit the limits.

        Args:
            history: [any] catalogue indices, oldest first. An empty history gives the fixed text alone.

        Returns:
            The prompt, with at least one title unless the history is empty.
        """
        newest = history[-self.max_history :]
        fitting = np.searchsorted(np.cumsum(self.item_lengths[newest[::-1]]), self._budget, side="right")
        kept = newest[len(newest) - fitting :].tolist()
        tokens, starts = list(self._head), []
        for item in kept:
            starts.append(len(tokens))
            tokens += self._item_tokens[self._offsets[item] : self._offsets[item + 1]].tolist()
        return EncodedPrompt(tokens + self._tail, kept, starts)

    def lengths(self, histories: Histories, rows: np.ndarray) -> np.ndarray:
        """Tokens of each row's prompt, as ``encode`` makes it, without encoding any.

        Args:
            histories: The events that rows point into.
            rows: [R] event indices.

        Returns:
            [R] int64.
        """
        ends = np.concatenate([[0], np.cumsum(self.item_lengths[histories.items])])  # [E + 1] title tokens before event
        first_fitting = np.searchsorted(ends, ends[rows] - self._budget)
        start = np.maximum(histories.history_start(rows, self.max_history), first_fitting)
        return len(self._head) + ends[rows] - ends[start] + len(self._tail)
