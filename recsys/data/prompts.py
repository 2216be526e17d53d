"""From a history to prompt token ids."""

from __future__ import annotations

import datetime
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jinja2
import numpy as np
import pandas as pd

from recsys.data.histories import Histories
from recsys.data.sources import Columns, SourceData
from recsys.data.tokens import control_tokens, plain_tokens
from recsys.types import UserError

_HISTORY = "{history}"
_TITLE = "{title}"
_DATE = "2024-07-26"
_MOST = 1_000_000  # tokens or titles; more than any model reads
_DIRECTIVES = [f"%{pad}{letter}" for pad in ("", "-") for letter in "aAbBdmyYjHIMSpwuUWVGcxXDF"]  # of strftime
_FIELD = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True)
class PromptTemplate:
    """What the model reads before it names an item, and how much history it gets.

    Args:
        template: Text of the prompt. ``{history}`` stands for the entries of the history, oldest first.
        end: Text that ends every title, in the prompt and as the model's answer. No title may contain its tokens.
        entry: Text of one entry. ``{title}`` stands for the title and its ``end``; ``{rating}`` and ``{category}`` for
            those of the event, if the source has them. An event that lacks one of them is written as ``{title}``
            alone. Control tokens that it spells are text, as in titles. What follows the title is read before the next
            title is named, in training as in evaluation; what precedes it has no counterpart before the target.
        max_history: Most titles in a prompt; the newest are kept.
        max_tokens: Most tokens in a prompt; older entries are left out, whole entries only, until it fits.
        max_title_tokens: Tokens to which longer titles are cut, ``end`` not counted; a title keeps more where it needs
            them to differ from all others. Null cuts none.
        chat: Write the template as a user's message in the chat format of the model's tokenizer, followed by the start
            of the answer. For instruction-tuned models.
        system: System message that precedes the user's; only with ``chat``. Null leaves it to the chat format.
        date: The day, in ISO 8601, for chat formats that write today's; only with ``chat``. Null is 2024-07-26, the day
            of Llama's own examples: the prompts of a run do not change from day to day.

    Raises:
        UserError: ``template`` does not hold ``{history}`` exactly once, or ``entry`` not ``{title}``; ``entry`` has an
            unknown field; a number is below 1 or above 1,000,000; ``end`` is empty; ``date`` is none; there is a
            ``system`` or a ``date`` without ``chat``.
    """

    template: str = "The user watched these movies, one per line, oldest first:\n{history}"
    end: str = "\n"
    entry: str = _TITLE
    max_history: int = 20
    max_tokens: int = 512
    max_title_tokens: int | None = None
    chat: bool = False
    system: str | None = None
    date: str | None = None

    def __post_init__(self) -> None:
        if self.template.count(_HISTORY) != 1:
            raise UserError(f"the prompt template must contain {_HISTORY} exactly once, but it is {self.template!r}")
        if self.entry.count(_TITLE) != 1:
            raise UserError(f"the prompt's entry must contain {_TITLE} exactly once, but it is {self.entry!r}")
        if not self.end:
            raise UserError("the prompt's end is empty; it must tell where a title ends")
        for field in self.fields:
            if field not in (Columns.RATING, Columns.CATEGORY):
                raise UserError(
                    f"the prompt's entry has the unknown field {{{field}}}; it may have {{rating}}, {{category}}"
                )
        for name in ("max_history", "max_tokens", "max_title_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"the prompt's {name} must be at least 1, but it is {value}")
            if value is not None and value > _MOST:
                raise UserError(f"the prompt's {name} must be at most {_MOST:,}, but it is {value}")
        for name in ("system", "date"):
            if getattr(self, name) is not None and not self.chat:
                raise UserError(f"the prompt's {name} needs chat: true")
        try:
            datetime.date.fromisoformat(self.date or _DATE)
        except ValueError as error:
            raise UserError(f"the prompt's date must be one like {_DATE}, but it is {self.date!r}") from error

    @property
    def fields(self) -> list[str]:
        """Columns that ``entry`` shows, the title apart."""
        return [field for field in _FIELD.findall(self.entry) if field != Columns.TITLE]

    def text(self, tokenizer: Any) -> str:
        """Return the prompt with ``{history}`` in it, in the tokenizer's chat format where ``chat`` says so.

        Raises:
            UserError: The tokenizer has no chat format, or one that cannot hold these messages.
        """
        if not self.chat:
            return self.template
        if not getattr(tokenizer, "chat_template", None):
            raise UserError(
                "the prompt's chat is true, but the model's tokenizer has no chat template; set it to false"
            )
        messages = [] if self.system is None else [{"role": "system", "content": self.system}]
        messages.append({"role": "user", "content": self.template})
        try:
            chat_template = self._dated(tokenizer.get_chat_template())
            text: str = tokenizer.apply_chat_template(
                messages, chat_template=chat_template, tokenize=False, add_generation_prompt=True
            )
        except jinja2.TemplateError as error:  # some formats have no system message
            raise UserError(f"the prompt's messages do not fit the tokenizer's chat template: {error}") from error
        if text.count(_HISTORY) != 1:
            raise UserError(f"the chat prompt must contain {_HISTORY} exactly once, but it is {text!r}")
        return text

    def _dated(self, chat_template: str) -> str:
        """A chat template whose ``strftime_now``, by which templates get today's date, gives the prompt's."""
        if "strftime_now" not in chat_template:
            return chat_template
        day = datetime.date.fromisoformat(self.date or _DATE)
        written = "".join(f"|replace({part!r}, {day.strftime(part)!r})" for part in _DIRECTIVES)
        return f"{{% macro strftime_now(format) %}}{{{{ format{written} }}}}{{% endmacro %}}{chat_template}"


def write_entries(
    template: PromptTemplate, data: SourceData, item: np.ndarray
) -> tuple[np.ndarray, list[tuple[str, str]]]:
    """Write the different texts around the titles of the events.

    Args:
        template: Its ``entry`` is what is written.
        data: Provides the fields: the rating of each event, the category of each item.
        item: [E] catalogue index of each event.

    Returns:
        [E] int32, which text each event has; and the texts as pairs, before the title and after its end.

    Raises:
        UserError: The source lacks a field.
    """
    columns: dict[str, tuple[np.ndarray, list[str]]] = {}  # field -> [E] number of the value, -1 = none; the values
    for field in template.fields:
        table = data.items if field == Columns.CATEGORY else data.interactions
        if field not in table:
            raise UserError(
                f"data.prompt.entry uses {{{field}}}, but data.source provides no {field}; name its column there, or "
                "take the field out of the entry"
            )
        codes, values = pd.factorize(table[field].where(table[field] != ""))
        if field == Columns.CATEGORY:
            columns[field] = codes[item], list(values)
        else:  # 4.0 as 4, and no more digits than float32 has
            columns[field] = codes, [f"{value:.7g}" for value in values]
    if not columns:
        return np.zeros(len(item), dtype=np.int32), [_around_title(template.entry, {})]
    number = np.zeros(len(item), dtype=np.int64)  # [E] number of the event's combination of values, -1 = incomplete
    for codes, texts in columns.values():
        number = np.where((number < 0) | (codes < 0), -1, number * len(texts) + codes)
    _, examples, entry = np.unique(number, return_index=True, return_inverse=True)
    pairs = []
    for event in examples:
        complete = number[event] >= 0
        shown = {field: texts[codes[event]] for field, (codes, texts) in columns.items()} if complete else {}
        pairs.append(_around_title(template.entry if complete else _TITLE, shown))
    return entry.astype(np.int32), pairs


def _around_title(text: str, values: dict[str, str]) -> tuple[str, str]:
    before, after = (_fill(part, values) for part in text.split(_TITLE))
    return before, after


def _fill(text: str, values: dict[str, str]) -> str:
    return _FIELD.sub(lambda match: values[match[1]], text)


@dataclass
class EncodedPrompt:
    """One prompt, ready to be padded."""

    tokens: list[int]  # [L] token ids
    titles: list[int]  # [C] catalogue indices of the titles in `tokens`, oldest first
    starts: list[int]  # [C] position in `tokens` of each title's first token, >= 1


class PromptEncoder:
    """Joins the token ids of a prompt's fixed text and of the titles; nothing is tokenised twice or across a boundary.

    Args:
        tokenizer: A ``transformers`` tokenizer. If it starts texts with a BOS token, so does the prompt; a chat prompt
            starts as its format says.
        item_tokens: M lists of token ids as :meth:`recsys.data.Catalog.tokenize` returns them.
        template: The text and the limits.
        entries: The different texts before and after a title, as :func:`write_entries` returns them.

    Raises:
        UserError: No token precedes the history, or the longest entry may not fit into a prompt.
    """

    def __init__(
        self,
        tokenizer: Any,
        item_tokens: list[list[int]],
        template: PromptTemplate,
        entries: Sequence[tuple[str, str]] = (("", ""),),
    ) -> None:
        before, after = template.text(tokenizer).split(_HISTORY)
        self._head: list[int] = tokenizer(before, add_special_tokens=False).input_ids
        self._tail: list[int] = tokenizer(after, add_special_tokens=False).input_ids
        bos = tokenizer.bos_token_id
        if not template.chat and bos is not None and tokenizer(before).input_ids[:1] == [bos] != self._head[:1]:
            self._head = [bos, *self._head]
        if not self._head:
            raise UserError(
                f"the prompt template needs some text before {_HISTORY}: the model cannot start from nothing"
            )

        texts = plain_tokens(tokenizer, [text for pair in entries for text in pair])
        control = control_tokens(tokenizer)
        for text, tokens in zip((text for pair in entries for text in pair), texts, strict=True):
            if not control.isdisjoint(tokens):
                raise UserError(f"the entry text {text!r} contains a control token of the model; write it differently")
        self._around = list(zip(texts[::2], texts[1::2], strict=True))
        self._around_lengths = np.array([len(left) + len(right) for left, right in self._around])
        self.item_lengths = np.array([len(tokens) for tokens in item_tokens])
        self._offsets = np.concatenate([[0], np.cumsum(self.item_lengths)])
        self._item_tokens = np.concatenate(item_tokens)  # one array: worker processes share it without copying
        self.max_history = template.max_history
        self._budget = template.max_tokens - len(self._head) - len(self._tail)
        around = self._around_lengths.max()
        if self.item_lengths.max() + around > self._budget:
            longest = item_tokens[self.item_lengths.argmax()]
            raise UserError(
                f"a prompt of max_tokens={template.max_tokens} leaves {self._budget} tokens for titles, but the "
                f"longest has {len(longest)}{f' and {around} around it' if around else ''}: "
                f"{tokenizer.decode(longest)!r}; raise max_tokens, lower max_title_tokens, or shorten the template or "
                "the title"
            )

    def encode(self, history: np.ndarray, entry: np.ndarray | None = None, answer: int | None = None) -> EncodedPrompt:
        """Encode the newest titles of a history that fit the limits.

        Args:
            history: [any] catalogue indices, oldest first. An empty history gives the fixed text alone.
            entry: [any] which of the encoder's ``entries`` each title has; the first one by default.
            answer: Catalogue index of a title to stand behind the prompt, whose limits do not count it.

        Returns:
            The prompt, with at least one title unless the history is empty.
        """
        newest = history[-self.max_history :]
        kind = np.zeros(len(newest), dtype=np.int64) if entry is None else entry[-self.max_history :]
        lengths = self._entry_lengths(newest, kind)
        fitting = np.searchsorted(np.cumsum(lengths[::-1]), self._budget, side="right")
        first = len(newest) - fitting
        tokens, starts = list(self._head), []
        for item, text in zip(newest[first:], kind[first:], strict=True):
            before, after = self._around[text]
            tokens += before
            starts.append(len(tokens))
            tokens += self._item_tokens[self._offsets[item] : self._offsets[item + 1]].tolist()
            tokens += after
        tokens += self._tail
        titles = newest[first:].tolist()
        if answer is not None:
            starts.append(len(tokens))
            tokens += self._item_tokens[self._offsets[answer] : self._offsets[answer + 1]].tolist()
            titles.append(int(answer))
        return EncodedPrompt(tokens, titles, starts)

    def lengths(self, histories: Histories, rows: np.ndarray, answers: bool = False) -> np.ndarray:
        """Tokens of each row's prompt, as ``encode`` makes it, without encoding any.

        Args:
            histories: The events that rows point into.
            rows: [R] event indices.
            answers: Whether the rows' targets stand behind the prompts.

        Returns:
            [R] int64.
        """
        start = histories.history_start(rows, self.max_history)
        behind = self.item_lengths[histories.items[rows]] if answers else 0
        return self.slice_lengths(histories.items, histories.entry, start, rows) + behind

    def slice_lengths(self, items: np.ndarray, entry: np.ndarray, start: np.ndarray, end: np.ndarray) -> np.ndarray:
        """Tokens of the prompt of each history that is a slice of the same events, without encoding any.

        Args:
            items: [E] catalogue index of each event.
            entry: [E] which of the encoder's ``entries`` each has.
            start: [R] first event of each history, no more than ``max_history`` before its end.
            end: [R] the event after its last.

        Returns:
            [R] int64.
        """
        before, start = self._fitting(items, entry, start, end)
        return len(self._head) + before[end] - before[start] + len(self._tail)

    def first(self, histories: Histories, rows: np.ndarray) -> np.ndarray:
        """Return the first event in the prompt of each of ``rows [R]``, the row itself if its history is empty."""
        start = histories.history_start(rows, self.max_history)
        return self._fitting(histories.items, histories.entry, start, rows)[1]

    def _fitting(
        self, items: np.ndarray, entry: np.ndarray, start: np.ndarray, end: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the tokens ``[E + 1]`` of all entries before each event, and the first event ``[R]`` that fits."""
        before = np.concatenate([[0], np.cumsum(self._entry_lengths(items, entry))])
        return before, np.maximum(start, np.searchsorted(before, before[end] - self._budget))

    def _entry_lengths(self, items: np.ndarray, entry: np.ndarray) -> np.ndarray:
        return self.item_lengths[items] + self._around_lengths[entry]
