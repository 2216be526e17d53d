"""Windowed partial AUC (WPAUC) and the window that it looks through.

WPAUC(alpha, d) is the area under the ROC curve over the false positive rates [alpha, alpha + d], divided by d
(definition: arXiv 2604.22504). This module computes it exactly from ranks:

* Order the N negatives from best to worst. One positive that scores below c of them has a true positive rate of 0 up
  to the false positive rate c/N and of 1 from there on. In units of negatives the window is (a, b] with a = alpha*N
  and b = (alpha + d)*N, so the area over it is b - clamp(c, a, b), and WPAUC = 1 - F(c) with
  F(x) = clamp((x - a)/(b - a), 0, 1).
* Put the other way, the j-th best negative has weight |(j-1, j] ∩ (a, b]| / (b - a), and WPAUC is the weighted share of
  the negatives that the positive beats. A tie counts one half: with c_gt negatives strictly above the positive and
  c_ge at least as high, the tied ones weigh F(c_ge) - F(c_gt) together, and half of that is won. Hence
  WPAUC = 1 - F(c_ge) + (F(c_ge) - F(c_gt))/2 = 1 - (F(c_gt) + F(c_ge))/2.
* Several positives: the ROC curve is the mean of theirs, so WPAUC is the mean of their values.

For integers a < b and a positive without ties, each of the negatives a+1..b gives one Recall:
WPAUC[a/N, b/N] = mean of Recall@k over k = a+1..b. So WPAUC[(K-1)/N, K/N] is Recall@K and WPAUC[0, 1] is the AUC.

A list may be cut (a beam): the negatives that it lacks all rank below those it has. A window that ends inside the list
is exact nevertheless, one that ends beyond it is refused. As in :mod:`recsys.functional.ranking`, a candidate with
score -inf is not listed, and a mark on one is a positive that the list lacks: it beats nothing.
"""

from __future__ import annotations

from typing import NamedTuple, overload

import torch
from torch import Tensor

from recsys.functional.ranking import counts_above, read_candidates, reject_rows

__all__ = ["window_around", "window_bounds", "window_weights", "windowed_partial_auc", "won_share"]


@overload
def window_bounds(alpha: float, d: float, num_negatives: int) -> tuple[float, float]: ...
@overload
def window_bounds(alpha: float, d: float, num_negatives: Tensor) -> tuple[Tensor, Tensor]: ...
def window_bounds(alpha: float, d: float, num_negatives: int | Tensor) -> tuple[float | Tensor, float | Tensor]:
    """Window of false positive rates [alpha, alpha + d] in units of negatives.

    A bound within 1e-6 of an integer becomes that integer. So (K-1)/N and 1/N, which float64 cannot hold exactly, still
    give exactly the K-th negative, and the window neither reaches past the list nor leaks to a neighbour.

    Args:
        alpha: false positive rate at which the window starts, in [0, 1).
        d: width of the window, in (0, 1 - alpha].
        num_negatives: N, a number or one per row [B].

    Returns:
        (a, b) = (alpha * N, (alpha + d) * N) as floats for a number, as float64 tensors [B] for a tensor.

    Raises:
        ValueError: alpha < 0, d <= 0 or alpha + d > 1.
    """
    # alpha + d may exceed 1 by rounding alone, as in 0.7 + 0.2 + 0.1
    if not (alpha >= 0 and d > 0 and alpha + d <= 1 + 1e-9):
        raise ValueError(
            "the window needs 0 <= alpha, 0 < d and alpha + d <= 1 (false positive rates); "
            f"got alpha = {alpha} and d = {d}"
        )
    n = torch.as_tensor(num_negatives).double()
    a, b = _snap(alpha * n), _snap((alpha + d) * n).minimum(n)
    return (a, b) if isinstance(num_negatives, Tensor) else (a.item(), b.item())


def _snap(x: Tensor) -> Tensor:
    nearest = x.round()
    return torch.where((x - nearest).abs() < 1e-6, nearest, x)


def window_around(k: int, half_width: float, num_negatives: int) -> tuple[float, float]:
    """Window around a Top-K cut-off, for use as (alpha, d): the negatives from k - half_width to k + half_width.

    The lower end stops at 0: a half width of at least k gives the window [0, k + half_width].

    Args:
        k: cut-off K, in negatives, >= 1.
        half_width: how far the window reaches to either side, in negatives, > 0.
        num_negatives: N, the negatives of a user.

    Returns:
        (alpha, d), false positive rates.

    Raises:
        ValueError: k < 1, half_width <= 0, or the window ends beyond the N negatives.
    """
    if not (k >= 1 and half_width > 0):
        raise ValueError(f"the window needs k >= 1 and half_width > 0, got k = {k} and half_width = {half_width}")
    a, b = max(k - half_width, 0), k + half_width
    if b > num_negatives:
        raise ValueError(
            f"the window ends at negative {b} (k = {k}, half_width = {half_width}), but a user has only "
            f"{num_negatives} negatives: lower k or half_width"
        )
    return a / num_negatives, (b - a) / num_negatives


class PlacedCandidates(NamedTuple):
    """Candidate lists against a window of their negatives."""

    scores: Tensor  # [B, C] float32 or float64, detached
    positive: Tensor  # [B, C] bool
    above: Tensor  # [B, C] int64, c_gt: listed negatives that score strictly greater
    at_least: Tensor  # [B, C] int64, c_ge: listed negatives that score greater or equal
    listed: Tensor  # [B] int64, listed negatives
    a: Tensor  # [B] float64, start of the window in negatives
    b: Tensor  # [B] float64, end of the window in negatives, a < b <= listed


def place_candidates(
    scores: Tensor,
    relevance: Tensor,
    alpha: float,
    d: float,
    num_negatives: int | Tensor | None,
    one_positive: bool = False,
) -> PlacedCandidates:
    """Check candidate lists and place them against the window; arguments as :func:`windowed_partial_auc`.

    Args:
        one_positive: each row must have exactly one positive.

    Raises:
        ValueError: as :func:`windowed_partial_auc`; or ``one_positive`` does not hold.
    """
    scores, positive, faults = read_candidates(scores, relevance)
    negative = ~positive
    listed = (negative & (scores > -torch.inf)).sum(dim=1)
    n = listed if num_negatives is None else torch.as_tensor(num_negatives, device=scores.device)
    if n.shape not in ((), listed.shape):
        raise ValueError(f"num_negatives must be one number or one per row [{len(listed)}], got {list(n.shape)}")
    n = n.expand_as(listed)
    a, b = window_bounds(alpha, d, n)
    if one_positive:
        faults["the row must have exactly one positive"] = positive.sum(dim=1) != 1
    faults |= {
        "num_negatives is {n}, but the row lists {listed} negatives": listed > n,
        "the window ends at negative {b:.9g}, but the row lists only {listed} of its {n} negatives, so its value "
        "cannot be known: give a longer list or a window with a smaller alpha + d": b > listed,
        "the window from {a:.9g} to {b:.9g} of the row's {n} negatives is empty": b <= a,
    }
    reject_rows(faults, n=n, listed=listed, a=a, b=b)
    return PlacedCandidates(scores, positive, *counts_above(scores, negative), listed, a, b)


def windowed_partial_auc(
    scores: Tensor, relevance: Tensor, alpha: float, d: float, num_negatives: int | Tensor | None = None
) -> Tensor:
    """WPAUC(alpha, d) of each row: the share of the window's negatives that the positive beats, ties one half.

    Symbols, source and derivation stand at the top of this module. Several positives are averaged; a positive that the
    list lacks, marked at a score of -inf, takes part in that average with 0.

    Args:
        scores: [B, C], higher is better, -inf = not listed.
        relevance: [B, C], bool or 0/1.
        alpha: false positive rate at which the window starts, in [0, 1).
        d: width of the window in false positive rates, in (0, 1 - alpha].
        num_negatives: N, one number or one per row [B]: the negatives of the user, listed or not. By default the list
            is complete, and N is the number of negatives in the row.

    Returns:
        [B] in [0, 1], float64 for float64 or integer scores, else float32; 0 for a row without a positive.

    Raises:
        ValueError: shapes differ or are not 2-D; a score is NaN; relevance is not 0/1; alpha and d are no window;
            the row lists more negatives than N; the window ends beyond the listed negatives, or holds none.
    """
    placed = place_candidates(scores, relevance, alpha, d, num_negatives)
    a, b = placed.a[:, None], placed.b[:, None]
    value = won_share(placed.above, placed.at_least, a, b) * placed.positive  # [B, C]
    return (value.sum(dim=1) / placed.positive.sum(dim=1).clamp(min=1)).to(placed.scores.dtype)


def won_share(above: Tensor, at_least: Tensor, a: float | Tensor, b: float | Tensor) -> Tensor:
    """WPAUC of a positive from the negatives above it: 1 - (F(c_gt) + F(c_ge))/2, see the module's docstring.

    Args:
        above: [...] int64, c_gt, negatives that score strictly greater.
        at_least: [...] int64, c_ge, negatives that score greater or equal.
        a: start of the window in negatives, broadcastable to these.
        b: end of the window, at most the listed negatives.

    Returns:
        [...] float64 in [0, 1].
    """
    lost = (_clamp(above, a, b) - a) + (_clamp(at_least, a, b) - a)  # twice, in negatives
    return 1 - lost / (2 * (b - a))


def window_weights(scores: Tensor, a: float | Tensor, b: float | Tensor) -> Tensor:
    """Weight |(j-1, j] ∩ (a, b]| of each negative in the window, j its rank among the row's negatives.

    Negatives with one score share the weight of their ranks equally. The weights of a row sum to b - a if it lists at
    least b negatives.

    Args:
        scores: [B, n], scores of negatives without NaN, -inf = not listed.
        a: start of the window in negatives, one number or one per row [B].
        b: end of the window in negatives, likewise.

    Returns:
        [B, n] float64 in [0, 1]; 0 for negatives that are not listed.
    """
    above, at_least = counts_above(scores, torch.ones_like(scores, dtype=torch.bool))
    lower, upper = (torch.as_tensor(x, dtype=torch.float64, device=scores.device).reshape(-1, 1) for x in (a, b))
    return (_clamp(at_least, lower, upper) - _clamp(above, lower, upper)) / (at_least - above).clamp(min=1)


def _clamp(count: Tensor, a: float | Tensor, b: float | Tensor) -> Tensor:
    return count.double().clamp(a, b)  # type: ignore[arg-type]  # two numbers or two tensors
