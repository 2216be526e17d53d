"""The window of false positive rates that WPAUC measures and TAWin optimises, as the user states it."""

from __future__ import annotations

from dataclasses import dataclass

from recsys.functional import window_around, window_bounds
from recsys.types import UserError


@dataclass(frozen=True)
class Window:
    """Either ``alpha`` and ``d``, or ``k`` and ``half_width``.

    Args:
        alpha: False positive rate at which the window starts, in [0, 1).
        d: Width of the window in false positive rates, in (0, 1 - alpha].
        k: Top-K cut-off to improve; the window is [k - half_width, k + half_width] of the user's negatives.
        half_width: Negatives on each side of ``k``.
    """

    alpha: float | None = None
    d: float | None = None
    k: int | None = None
    half_width: float | None = None

    def rates(self, num_negatives: int) -> tuple[float, float]:
        """Return (alpha, d) for users with ``num_negatives`` negatives.

        Raises:
            UserError: if neither pair or parts of both are given, or the window leaves [0, 1].
        """
        rates, cut_off = (self.alpha, self.d), (self.k, self.half_width)
        try:
            if cut_off == (None, None) and self.alpha is not None and self.d is not None:
                window_bounds(self.alpha, self.d, num_negatives)
                return self.alpha, self.d
            if rates == (None, None) and self.k is not None and self.half_width is not None:
                return window_around(self.k, self.half_width, num_negatives)
        except ValueError as error:
            raise UserError(f"model.window: {error}") from error
        raise UserError("model.window: give either alpha and d, or k and half_width (set the other two to null)")
