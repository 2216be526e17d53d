"""Ranking metrics of scored candidate lists, and the reading of such lists that all metrics share.

A candidate list is one row of ``scores[B, C]`` with its marks ``relevance[B, C]`` (bool, or the numbers 0 and 1).

* A candidate with score -inf is padding: it is not listed, holds no rank, and no listed candidate ranks below it.
* A mark on a -inf candidate is a positive that the list lacks: it counts among the row's positives and is a miss.
* Ranks are among all listed candidates, 1 = best (full ranking). Candidates with one score share their positions:
  each metric is its expectation over the random orders of tied candidates, so a constant scorer gains nothing.

Results have the dtype of the scores, at least float32 (integer scores are read as float64).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Place", "expected_rank", "ndcg_at_k", "place_positive", "recall_at_k"]


class Place(NamedTuple):
    """The positions above+1 .. last that a candidate shares by ties; the two are equal where it is not listed."""

    above: Tensor  # [...] int64, listed candidates that score strictly higher
    last: Tensor  # [...] int64, listed candidates that score at least as high, itself included

    @property
    def rank(self) -> Tensor:
        """Mean of the shared positions, [...] float64: 1 = best, inf where not listed."""
        return ((self.above + self.last + 1).double() / 2).masked_fill(self.above == self.last, torch.inf)

    def recall(self, k: int) -> Tensor:
        """Share of the positions that is at most ``k``, [...] float64."""
        return (self.last.clamp(max=k) - self.above.clamp(max=k)) / (self.last - self.above).clamp(min=1).double()

    def gain(self, k: int) -> Tensor:
        """Mean over the positions of the discount 1/log2(position + 1), which is 0 beyond ``k``, [...] float64."""
        total = _discounts(k, self.above.device).cumsum(dim=0)  # DCG of a list whose first i positions are relevant
        return (total[self.last.clamp(max=k)] - total[self.above.clamp(max=k)]) / (self.last - self.above).clamp(min=1)


def _discounts(k: int, device: torch.device) -> Tensor:
    """Return 1/log2(i + 1) of the positions i = 0 .. k, [k + 1] float64; there is no position 0, so it has 0."""
    discount = torch.arange(1, k + 2, dtype=torch.float64, device=device).log2().reciprocal()
    return discount.masked_fill(discount.isinf(), 0)


def place_positive(scores: Tensor, relevance: Tensor, among: Tensor | None = None) -> Place:
    """Place the one positive of each row, by comparisons alone; what it is compared with may be a part of the list.

    Args:
        scores: [B, C] float without NaN, -inf = not listed.
        relevance: [B, C] bool, at most one positive per row.
        among: [B, C] bool, the candidates that count beside the positive; all by default.

    Returns:
        Two [B].
    """
    own = scores.masked_fill(~relevance, -torch.inf).amax(dim=1, keepdim=True)
    counted = scores > -torch.inf if among is None else (scores > -torch.inf) & (among | relevance)
    return Place(((scores > own) & counted).sum(dim=1), ((scores >= own) & counted).sum(dim=1))


def read_candidates(scores: Tensor, relevance: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Bring candidate lists to the form that the metrics use.

    Args:
        scores: [B, C], higher is better.
        relevance: [B, C], bool or 0/1.

    Returns:
        The scores [B, C], detached, as float32 or float64; the positives [B, C] as bool; and what can be wrong with a
        row, for :func:`reject_rows`.

    Raises:
        ValueError: the two are not 2-D, differ in shape, or hold no candidate column.
    """
    if scores.ndim != 2 or scores.shape != relevance.shape or scores.shape[1] == 0:
        raise ValueError(
            "scores and relevance must both be [B, C] with C >= 1 candidates per row; "
            f"got {list(scores.shape)} and {list(relevance.shape)}"
        )
    dtype = torch.promote_types(scores.dtype, torch.float32) if scores.is_floating_point() else torch.float64
    faults = {
        "a score is NaN": scores.isnan().any(dim=1),
        "relevance must be 0 or 1": ((relevance != 0) & (relevance != 1)).any(dim=1),
    }
    return scores.detach().to(dtype), relevance.bool(), faults


def reject_rows(faults: dict[str, Tensor], **numbers: Tensor) -> None:
    """Raise the first fault that any row shows, at the price of one device synchronisation for all of them.

    Args:
        faults: message -> [B] bool, true where the row has the fault. The message may name ``numbers`` in braces.
        numbers: name -> [B], what the messages tell of the faulty row.

    Raises:
        ValueError: a row has a fault.
    """
    found = torch.stack(list(faults.values())).nonzero()[:1].tolist()  # [[fault, row]] or []
    for fault, row in found:
        message = list(faults)[fault].format(**{name: values[row].item() for name, values in numbers.items()})
        raise ValueError(f"row {row}: {message}")


def counts_above(scores: Tensor, among: Tensor) -> tuple[Tensor, Tensor]:
    """Count, for every candidate, the candidates of ``among`` that score above it, and at least as high.

    Args:
        scores: [B, C] float without NaN.
        among: [B, C] bool, the candidates that count; those with score -inf never do.

    Returns:
        Two [B, C] int64: how many score strictly greater, and how many score greater or equal (a counted candidate
        includes itself). Both are the number of counted candidates where the score is -inf.
    """
    scores = scores.contiguous()
    ascending = scores.masked_fill(~among, -torch.inf).contiguous().sort(dim=1).values
    listed = (ascending > -torch.inf).sum(dim=1, keepdim=True)  # [B, 1]
    above = scores.shape[1] - torch.searchsorted(ascending, scores, right=True)
    at_least = scores.shape[1] - torch.searchsorted(ascending, scores)
    return above, at_least.minimum(listed)


def check_cutoff(k: int) -> None:
    """Raise ValueError unless the cut-off ``k`` is at least 1."""
    if k < 1:
        raise ValueError(f"the cut-off k must be at least 1, got {k}")


def recall_at_k(scores: Tensor, relevance: Tensor, k: int) -> Tensor:
    """Recall@k: the share of a row's positives that rank among its ``k`` best candidates.

    With one positive per row this is full recall, and the same number as the hit ratio. The denominator is the number
    of marked positives, whatever ``k``: a ``k`` larger than the list counts what the list lacks as misses. Each
    positive earns at most 1, so Recall never exceeds 1. A candidate that shares the positions g+1..e by ties earns
    the share of these positions that is at most ``k``.

    Args:
        scores: [B, C], higher is better, -inf = not listed.
        relevance: [B, C], bool or 0/1.
        k: cut-off, >= 1.

    Returns:
        [B] in [0, 1]; 0 for a row without a positive.

    Raises:
        ValueError: shapes differ or are not 2-D, a score is NaN, relevance is not 0/1, or ``k`` < 1.
    """
    check_cutoff(k)
    scores, positive, faults = read_candidates(scores, relevance)
    reject_rows(faults)
    credit = Place(*counts_above(scores, torch.ones_like(positive))).recall(k)
    return ((credit * positive).sum(dim=1) / positive.sum(dim=1).clamp(min=1)).to(scores.dtype)


def ndcg_at_k(scores: Tensor, relevance: Tensor, k: int) -> Tensor:
    """NDCG@k with binary gains and the discount 1/log2(rank + 1) (Järvelin and Kekäläinen, 2002).

    The ideal list has its min(P, k) best positions filled by the row's P marked positives. With one positive NDCG@k is
    1/log2(r + 1) where its rank r is at most ``k``, else 0. A candidate that shares its position with others earns
    the mean discount of the shared positions.

    Args:
        scores: [B, C], higher is better, -inf = not listed.
        relevance: [B, C], bool or 0/1.
        k: cut-off, >= 1.

    Returns:
        [B] in [0, 1]; 0 for a row without a positive.

    Raises:
        ValueError: shapes differ or are not 2-D, a score is NaN, relevance is not 0/1, or ``k`` < 1.
    """
    check_cutoff(k)
    scores, positive, faults = read_candidates(scores, relevance)
    reject_rows(faults)
    dcg = Place(*counts_above(scores, torch.ones_like(positive))).gain(k)
    ideal = _discounts(k, scores.device).cumsum(dim=0)[positive.sum(dim=1).clamp(min=1, max=k)]
    ndcg = (dcg * positive).sum(dim=1) / ideal
    return ndcg.clamp(max=1).to(scores.dtype)  # a sum of differences can round to just above its whole


def expected_rank(scores: Tensor, relevance: Tensor) -> Tensor:
    """Rank r of the one positive of each row among the listed candidates: 1 = best, a tie counts one half.

    Args:
        scores: [B, C], higher is better, -inf = not listed.
        relevance: [B, C], bool or 0/1, at most one positive per row.

    Returns:
        [B], r >= 1; inf where the list lacks the positive.

    Raises:
        ValueError: shapes differ or are not 2-D, a score is NaN, relevance is not 0/1, or a row has several positives.
    """
    scores, positive, faults = read_candidates(scores, relevance)
    marked = positive.sum(dim=1)
    faults["there are {marked} positives, and a row's rank is defined for one"] = marked > 1
    reject_rows(faults, marked=marked)
    return place_positive(scores, positive).rank.to(scores.dtype)
