"""Mean windowed partial AUC as ``torchmetrics.Metric``; the formula is in :mod:`recsys.functional.partial_auc`."""

from __future__ import annotations

from torch import Tensor

from recsys.functional.partial_auc import window_bounds, windowed_partial_auc, won_share
from recsys.functional.ranking import Place
from recsys.metrics.ranking import RowMean

__all__ = ["WPAUC"]


class WPAUC(RowMean):
    """Mean WPAUC(alpha, d) over rows; see :func:`recsys.functional.partial_auc.windowed_partial_auc`.

    Args:
        alpha: false positive rate at which the window starts, in [0, 1).
        d: width of the window in false positive rates, in (0, 1 - alpha].
        kwargs: as for ``torchmetrics.Metric``.

    Raises:
        ValueError: alpha and d are no window.

    Example:
        >>> import torch
        >>> wpauc = WPAUC(alpha=0.0, d=0.5)  # against the better two of four negatives
        >>> wpauc.update(torch.tensor([[0.6, 0.9, 0.5, 0.2, 0.1]]), torch.tensor([[1, 0, 0, 0, 0]]))
        >>> wpauc.compute().item()
        0.5
    """

    of_full_list = True

    def __init__(self, alpha: float, d: float, **kwargs: object) -> None:
        window_bounds(alpha, d, 1)  # refuse a wrong window now, not at the first batch
        super().__init__(f"WPAUC({alpha}, {d})", **kwargs)
        self.alpha = alpha
        self.d = d

    def place_values(self, place: Place, num_negatives: int | Tensor | None) -> Tensor:
        """WPAUC(alpha, d) of each row, [B]; the window must end inside each row's list, and N must be given."""
        assert num_negatives is not None
        a, b = window_bounds(self.alpha, self.d, num_negatives)
        return won_share(place.above, (place.last - 1).maximum(place.above), a, b)

    def row_values(self, scores: Tensor, relevance: Tensor, num_negatives: int | Tensor | None) -> Tensor:
        """WPAUC(alpha, d) of each row, which may have several positives, [B]."""
        return windowed_partial_auc(scores, relevance, self.alpha, self.d, num_negatives)
