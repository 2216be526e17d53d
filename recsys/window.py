"""The one dial: from the Top-K that a user wants to improve to all numbers that follow from it.

A user gives K. The window of WPAUC around it, the length of the ranked list that the window must end inside of, the
cut-offs that are measured, and the negatives of a group follow; each can be given too, and what contradicts is refused:
numbers that name negatives before anything is loaded, what depends on the catalogue as soon as that is known.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from recsys.functional import window_around, window_bounds
from recsys.types import UserError

Reach = Literal["none", "k", "window"]  # how far an objective relies on a group's negatives being the policy's best

DEFAULT_K = 10
DEFAULT_CUTOFFS = (1, 5, 10, 20)


@dataclass(frozen=True)
class Window:
    """Which Top-K to improve: ``k`` alone is enough. Or a window of false positive rates by ``alpha`` and ``d``.

    Args:
        k: Cut-off K of Recall@K to improve; null is 10, or the middle of the window that ``alpha`` and ``d`` give.
        half_width: Negatives on each side of ``k``: the window is (k - half_width, k + half_width]; null is k/2.
        alpha: False positive rate at which the window starts, in [0, 1), in place of ``k``.
        d: Width of the window in false positive rates, in (0, 1 - alpha].
    """

    k: int | None = None
    half_width: float | None = None
    alpha: float | None = None
    d: float | None = None

    def __post_init__(self) -> None:
        given = [name for name, value in vars(self).items() if value is not None]
        if self.alpha is None and self.d is None:
            if self.k is not None and self.k < 1:
                raise UserError(f"model.window.k must be at least 1, but it is {self.k}")
            if self.half_width is not None and not 0 < self.half_width < math.inf:
                raise UserError(f"model.window.half_width must be above 0 and finite, but it is {self.half_width:g}")
        elif given != ["alpha", "d"]:
            raise UserError(
                f"model.window has {' and '.join(given)}: give k (and perhaps half_width), or alpha and d, and set the "
                "others to null"
            )
        else:
            try:
                window_bounds(self.alpha or 0.0, self.d or 0.0, 1)
            except ValueError as error:
                raise UserError(f"model.window: {error}") from error

    def ends_at(self) -> float | None:
        """Return the last negative of the window where that does not depend on the catalogue, else None."""
        if self.alpha is not None:
            return None
        k = self.k or DEFAULT_K
        return k + (k / 2 if self.half_width is None else self.half_width)

    def resolve(self, num_negatives: int, reach: int | None = None) -> ResolvedWindow:
        """Return the window in one catalogue.

        Args:
            num_negatives: N, negatives of each row.
            reach: Negatives that a group can hold, beyond which no derived window ends; N by default.

        Raises:
            UserError: if it ends beyond them.
        """
        reach = num_negatives if reach is None else reach
        if self.alpha is not None and self.d is not None:
            start, end = window_bounds(self.alpha, self.d, num_negatives)
            k = max(1, math.floor((start + end) / 2 + 0.5))
            return ResolvedWindow(k, (end - start) / 2, start, end, self.alpha, self.d, num_negatives)
        k = self.k or DEFAULT_K
        half_width = min(k / 2, reach - k) if self.half_width is None else self.half_width
        end = k + half_width
        if half_width <= 0 or end > num_negatives:
            fits = reach - 1 if self.half_width is None else num_negatives - math.ceil(half_width)
            raise UserError(
                f"model.window is around negative {k} and ends at {max(end, k):g}, but in this catalogue there are "
                f"{reach:,} negatives: set model.window.k to {fits} or less"
            )
        alpha, d = window_around(k, half_width, num_negatives)
        start, end = window_bounds(alpha, d, num_negatives)
        return ResolvedWindow(k, half_width, start, end, alpha, d, num_negatives)


@dataclass(frozen=True)
class ResolvedWindow:
    """The window in one catalogue; everything that measures, trains or draws takes its numbers from here."""

    k: int  # K, the cut-off in its middle
    half_width: float
    start: float  # a: the window is (a, b], counted in negatives from the best
    end: float  # b
    alpha: float  # a / N
    d: float  # (b - a) / N
    num_negatives: int  # N, negatives of each row

    def __str__(self) -> str:
        bounds = f"negatives ({self.start:g}, {self.end:g}] of {self.num_negatives:,}"
        return f"{bounds}, alpha {self.alpha:.4g}, d {self.d:.4g}"

    @property
    def rates(self) -> tuple[float, float, int]:
        """alpha, d and N, in the order in which :mod:`recsys.functional` takes them."""
        return self.alpha, self.d, self.num_negatives


@dataclass(frozen=True)
class DialSettings:
    """What a user set around the window; None is derived.

    Args:
        window: The window.
        cutoffs: Values of K to measure.
        num_beams: Length of the ranked list.
        exact: Whether the list holds every item, whatever ``num_beams``.
        count: Negatives of a group.
        best_share: Share of them that are the policy's best, or None if there are no groups.
        reach: How far down the objective relies on a group's negatives being the policy's best.
    """

    window: Window
    cutoffs: tuple[int, ...] | None = None
    num_beams: int | None = None
    exact: bool = False
    count: int | None = None
    best_share: float | None = None
    reach: Reach = "none"

    def check(self, end: float | None) -> None:
        """Refuse settings that contradict each other.

        Args:
            end: b, the window's last negative, or None if it is not known yet.

        Raises:
            UserError: naming both options and a value that fits.
        """
        if self.cutoffs == ():
            raise UserError("model.cutoffs is empty: name a cut-off, or set it to null")
        for k in self.cutoffs or ():
            if k < 1:
                raise UserError(f"model.cutoffs must be at least 1, but one is {k}")
        ends = "" if end is None else f"model.window ends at negative {end:g}"
        if not self.exact:
            _at_least(1, "model.num_beams", self.num_beams, "a list needs an item")
            if self.cutoffs:
                _at_least(
                    max(self.cutoffs), "model.num_beams", self.num_beams, f"model.cutoffs has {max(self.cutoffs)}"
                )
            if end is not None:  # the list holds the positive too
                _at_least(math.ceil(end) + 1, "model.num_beams", self.num_beams, ends)
        if self.reach != "none" and self.best_share == 0:
            raise UserError(
                "negatives.mode is random, but model.objective weighs the policy's best negatives by their rank: set "
                "negatives.mode to beam, or model.objective to recsys.objectives.GRPO"
            )
        if self.best_share and self.reach == "k" and self.window.alpha is None:
            k = self.window.k or DEFAULT_K
            _at_least(math.ceil(k / self.best_share), "negatives.count", self.count, f"model.window has K {k}")
        if self.best_share and self.reach == "window" and end is not None:  # a negative behind is the gate's lower end
            _at_least(math.ceil((math.ceil(end) + 1) / self.best_share), "negatives.count", self.count, ends)

    def resolve(self, num_items: int, most_negatives: int) -> Dial:
        """Return the dial in one catalogue.

        Args:
            num_items: M.
            most_negatives: Items that can be a negative of every row: those with another title.

        Raises:
            UserError: as :meth:`check`, or if a number exceeds the catalogue.
        """
        window = self.window.resolve(num_items - 1, most_negatives)
        self.check(window.end)
        length = num_items if self.exact or self.num_beams is None else min(self.num_beams, num_items)
        cutoffs = self.cutoffs or tuple(k for k in DEFAULT_CUTOFFS if k <= length)
        cutoffs = tuple(sorted({*cutoffs, window.k}))
        if cutoffs[-1] > num_items:
            raise UserError(f"model.cutoffs has {cutoffs[-1]}, but the catalogue has {num_items} items: lower it")
        if self.num_beams is None and not self.exact:  # a search finds the worst of its list least surely
            length = min(math.ceil(1.5 * max(math.ceil(window.end) + 1, cutoffs[-1])), num_items)
        return Dial(window, cutoffs, length, self._group_negatives(window, most_negatives), self)

    def _group_negatives(self, window: ResolvedWindow, most: int) -> int:
        """Return n, negatives of a group, of which at most ``most`` can be had; 0 if there are no groups."""
        if self.best_share is None:
            return 0
        end = window.k if self.reach == "k" else window.end
        reach = math.ceil(end)
        if self.reach != "k":
            reach += max(4, round(reach / 3))  # ranks move while a list waits for its next refresh
        count = min(math.ceil(reach / (self.best_share or 1)), most) if self.count is None else self.count
        best = math.ceil(count * self.best_share)
        if count > most or (self.reach != "none" and end > best):
            raise UserError(
                f"negatives.count is {count}, model.objective relies on negative {end:g}, and only {most} items of "
                f"this catalogue can be a negative of every row: set negatives.count to {most} or less, or lower "
                "model.window.k"
            )
        return count


def _at_least(least: int, option: str, value: int | None, why: str) -> None:
    """Raise a UserError if a given value is too small."""
    if value is not None and value < least:
        raise UserError(f"{why}, but {option} is {value}: set {option} to {least} or more, or to null")


@dataclass(frozen=True)
class Dial:
    """What a run measures and trains with, in one catalogue."""

    window: ResolvedWindow
    cutoffs: tuple[int, ...]  # ascending, K among them
    list_length: int  # W, items in the ranked list: the width of the search, or M
    group_negatives: int  # n, negatives of a group; 0 if there are no groups
    given: DialSettings

    def __str__(self) -> str:
        """One line that says what was derived."""
        given, window = self.given, self.window
        derived = []
        if given.window.alpha is not None:
            derived.append(f"model.window.k {window.k}")
        elif given.window.half_width is None:
            derived.append(f"half_width {window.half_width:g}")
        if given.cutoffs is None or len(given.cutoffs) < len(self.cutoffs):
            derived.append(f"cutoffs {', '.join(map(str, self.cutoffs))}")
        if given.num_beams is None and not given.exact:
            derived.append(f"num_beams {self.list_length}")
        if given.count is None and self.group_negatives:
            derived.append(f"negatives.count {self.group_negatives}")
        return f"Dial: K {window.k}, {window}; derived: {'; '.join(derived) or 'nothing'}"
