"""Advantages of a group of items: GRPO, and its windowed form TAWin.

A group is one user's positive and n = G-1 negatives. GRPO standardises the rewards (1 for the positive, 0 for the
negatives) with the group's mean and population standard deviation (arXiv 2402.03300), which gives A+ = sqrt(n) and
A- = -1/sqrt(n). At an importance ratio of 1 the group mean of A*s then has the gradient of
sqrt(n)/(n+1) * (s+ - mean_j s_j): the linear surrogate of the AUC. With the policy's best negatives in place of random
ones it is the surrogate of a partial AUC that starts at a false positive rate of 0.

TAWin moves the start: it weighs each negative by its place in the window of WPAUC(alpha, d)
(see :mod:`recsys.functional.partial_auc`).

Deviations: only the definitions in arXiv 2604.22504 were at hand, so these choices are this project's own. The
thresholds are order statistics of the current negative scores, not of those when the negatives were found; ties share
their weight; and the gate below is derived from where WPAUC can change.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from recsys.functional.partial_auc import PlacedCandidates, place_candidates, window_weights

__all__ = ["Gate", "gate_open", "group_advantages", "tawin_advantages"]

Gate = Literal["threshold", "sigmoid", "none"]


def group_advantages(rewards: Tensor) -> Tensor:
    """GRPO's advantages: (reward - mean) / population standard deviation of the group (arXiv 2402.03300).

    Args:
        rewards: [B, G].

    Returns:
        [B, G], float64 for float64 rewards, else float32. All zero, not NaN, where a group's rewards are all equal.

    Raises:
        ValueError: rewards are not [B, G] with G >= 1.
    """
    if rewards.ndim != 2 or rewards.shape[1] == 0:
        raise ValueError(f"rewards must be [B, G] with G >= 1 items per group, got {list(rewards.shape)}")
    r = rewards.double()
    # Asked of the rewards themselves: the deviation of equal rewards rounds to tiny numbers that are not 0.
    constant = (r.amax(dim=1) == r.amin(dim=1))[:, None]
    centred = r - r.mean(dim=1, keepdim=True)
    std = centred.square().mean(dim=1, keepdim=True).sqrt()
    advantages = centred / std.masked_fill(constant, 1)  # an epsilon would bias the other groups
    return advantages.masked_fill(constant, 0).to(torch.promote_types(rewards.dtype, torch.float32))


def gate_open(scores: Tensor, relevance: Tensor, alpha: float, d: float, num_negatives: int | Tensor | None) -> Tensor:
    """Whether each group's positive lies at the window, where a small change of the scores can change WPAUC.

    With r the positive's rank among itself and the group's negatives (1 = best, ties one half) and the window (a, b] in
    negatives: floor(a) < r <= ceil(b) + 1. Above it the positive already beats the whole window, below it none of it.
    A positive below the whole list has r = n + 1, wherever the unlisted negatives put it: the gate's lower end takes
    effect only if the group lists more than ceil(b) negatives.

    Args:
        scores: [B, G], higher is better, -inf = padding of the group.
        relevance: [B, G], bool or 0/1, exactly one positive per row, at any position.
        alpha: false positive rate at which the window starts, in [0, 1).
        d: width of the window in false positive rates, in (0, 1 - alpha].
        num_negatives: N, one number or one per row [B]; None if the group lists all negatives.

    Returns:
        [B] bool.

    Raises:
        ValueError: a row has not exactly one positive, or as
            :func:`~recsys.functional.partial_auc.windowed_partial_auc`.
    """
    return _at_window(place_candidates(scores, relevance, alpha, d, num_negatives, one_positive=True))


def _at_window(group: PlacedCandidates) -> Tensor:
    rank = 1 + ((group.above + group.at_least) * group.positive).sum(dim=1).double() / 2  # [B]
    return (group.a.floor() < rank) & (rank <= group.b.ceil() + 1)


def tawin_advantages(
    scores: Tensor,
    relevance: Tensor,
    alpha: float,
    d: float,
    num_negatives: int | Tensor | None,
    gate: Gate = "threshold",
    temperature: float = 1.0,
) -> Tensor:
    """TAWin's advantages: GRPO's, with each negative weighed by its place in the window (definition: arXiv 2604.22504).

    The group's n negatives are the best of N. Negative j has the weight w_j of its *current* rank in the window,
    rescaled to a mean of 1 over the n negatives; A_j = -w_j/sqrt(n) and A+ = sqrt(n), which sum to zero. With the full
    window and all negatives listed this is GRPO.

    The linear surrogate pushes pairs that are already right or hopelessly wrong as hard as those at the cut-off.
    ``gate="threshold"`` therefore sets all advantages of a group to 0 unless its positive lies at the window (see
    :func:`gate_open`); ``gate="none"`` leaves the reweighting alone. From a cold start the gate is almost always shut.
    ``gate="sigmoid"`` gives each pair a gate of its own, which closes gradually: w_j times 4 p (1 - p) with
    p = sigmoid((s+ - s_j) / temperature), and A+ = -sum_j A_j. That is the gradient of sum_j w_j p, a smoothed WPAUC,
    scaled so that a pair of equal scores has the weight it has without a gate, as all pairs have at high temperatures.

    Args:
        scores: [B, G], the current log-probabilities of the items, -inf = padding of the group; no gradient is taken.
        relevance: [B, G], bool or 0/1, exactly one positive per row, at any position.
        alpha: false positive rate at which the window starts, in [0, 1).
        d: width of the window in false positive rates, in (0, 1 - alpha].
        num_negatives: N, one number or one per row [B]; None if the group lists all negatives.
        gate: "threshold", "sigmoid" or "none".
        temperature: scale of score differences for "sigmoid", > 0.

    Returns:
        [B, G], float64 for float64 scores, else float32; padding has 0.

    Raises:
        ValueError: ``gate`` is none of these; ``temperature`` <= 0; a row has not exactly one positive; or as
            :func:`~recsys.functional.partial_auc.windowed_partial_auc`.
    """
    if gate not in ("none", "sigmoid", "threshold"):
        raise ValueError(f'gate must be "none", "sigmoid" or "threshold", got {gate!r}')
    if not temperature > 0:
        raise ValueError(f"temperature must be greater than 0, got {temperature}")
    group = place_candidates(scores, relevance, alpha, d, num_negatives, one_positive=True)
    weights = window_weights(group.scores.masked_fill(group.positive, -torch.inf), group.a, group.b)  # [B, G]
    n = group.listed.double()  # [B]
    pairs, total = weights * (n / (group.b - group.a))[:, None], n[:, None]  # pairs: mean 1 over the negatives
    if gate == "sigmoid":
        own = group.scores.masked_fill(~group.positive, 0).sum(dim=1, keepdim=True)  # [B, 1] s+
        p = torch.sigmoid((own - group.scores).double() / temperature)
        pairs = pairs * 4 * p * (1 - p)
        total = pairs.sum(dim=1, keepdim=True)
    advantages = torch.where(group.positive, total, -pairs) / n.sqrt()[:, None]
    if gate == "threshold":
        advantages = advantages * _at_window(group)[:, None]
    return advantages.to(group.scores.dtype)
