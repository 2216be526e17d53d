"""Losses of groups of scored items, and the divergence from the reference policy."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["kl_divergence", "llpauc_loss", "policy_loss", "softmax_at_k_loss", "softmax_dpo_loss"]

# exp() is used up to this log ratio, and its tangent from there on. The log-probability of a whole item is a sum over
# tokens, so one stale item can reach a log ratio of 89, where float32 overflows and the loss turns into inf or NaN. The
# tangent stays finite and, unlike clamping, keeps a gradient of the right sign.
MAX_LOG_RATIO = 20.0


def _expm1(x: Tensor) -> Tensor:
    return torch.expm1(x.clamp(max=MAX_LOG_RATIO)) + math.exp(MAX_LOG_RATIO) * (x - MAX_LOG_RATIO).relu()


def _log_ratio(name: str, numerator: Tensor, denominator: Tensor) -> Tensor:
    if numerator.ndim != 2 or numerator.shape != denominator.shape:
        raise ValueError(
            f"{name} needs log-probabilities of one shape [B, G], "
            f"got {list(numerator.shape)} and {list(denominator.shape)}"
        )
    # bfloat16 keeps 8 bits: at a log-probability of -100 its steps are 0.5, so differences need more
    dtype = torch.promote_types(torch.promote_types(numerator.dtype, denominator.dtype), torch.float32)
    return numerator.to(dtype) - denominator.to(dtype)


def policy_loss(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, clip_eps: float) -> Tensor:
    """Clipped surrogate loss of PPO (arXiv 1707.06347, eq. 7), averaged over the group as in GRPO (arXiv 2402.03300).

    loss = -mean_j min(ratio_j * A_j, clip(ratio_j, 1 - clip_eps, 1 + clip_eps) * A_j) with
    ratio_j = exp(logprobs_j - old_logprobs_j). One ratio per item: its log-probability is that of all its tokens.
    The old log-probabilities and the advantages are constants: the gradient reaches ``logprobs`` alone.

    Args:
        logprobs: [B, G], finite log-probabilities of the items under the current policy, in nats.
        old_logprobs: [B, G], the same under the policy that made the group.
        advantages: [B, G].
        clip_eps: how far the ratio may leave 1 and still earn, > 0.

    Returns:
        [B], float64 for float64 log-probabilities, else float32.

    Raises:
        ValueError: shapes differ or are not 2-D, or ``clip_eps`` <= 0.
    """
    if not clip_eps > 0:
        raise ValueError(f"clip_eps must be greater than 0, got {clip_eps}")
    if advantages.shape != logprobs.shape:
        raise ValueError(f"advantages must be {list(logprobs.shape)} as logprobs, got {list(advantages.shape)}")
    ratio = 1 + _expm1(_log_ratio("policy_loss", logprobs, old_logprobs.detach()))
    a = advantages.detach().to(ratio.dtype)
    return -torch.minimum(ratio * a, ratio.clamp(1 - clip_eps, 1 + clip_eps) * a).mean(dim=1)


def kl_divergence(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Estimate of KL(policy || reference) per item: exp(x) - x - 1 with x = ref_logprobs - logprobs.

    Never negative, 0 where the two agree, and unbiased for items sampled from the policy (estimator "k3" of
    J. Schulman, "Approximating KL divergence", http://joschu.net/blog/kl-approx.html; used by GRPO, arXiv 2402.03300).

    Args:
        logprobs: [B, G], finite log-probabilities of the items under the current policy, in nats.
        ref_logprobs: [B, G], the same under the reference, a constant.

    Returns:
        [B, G] in nats, float64 for float64 log-probabilities, else float32.

    Raises:
        ValueError: shapes differ or are not 2-D.
    """
    x = _log_ratio("kl_divergence", ref_logprobs.detach(), logprobs)
    return _expm1(x) - x  # expm1 keeps the digits that exp(x) - 1 loses near 0


def softmax_dpo_loss(logprobs: Tensor, ref_logprobs: Tensor, relevance: Tensor, beta: float) -> Tensor:
    """Loss of softmax-DPO (S-DPO, arXiv 2406.09215): -log sigmoid(-log sum_j exp(beta * (x_j - x+))).

    The sum is over the group's negatives, x = logprobs - ref_logprobs. With one negative this is DPO's loss. It
    equals the cross-entropy of the positive under softmax(beta * x): log(n + 1) where the policy is the reference.

    Args:
        logprobs: [B, G], finite log-probabilities of the items under the current policy, in nats.
        ref_logprobs: [B, G], the same under the reference, a constant.
        relevance: [B, G], bool, exactly one positive per row.
        beta: scale of the log-ratios, > 0.

    Returns:
        [B] in nats, float64 for float64 log-probabilities, else float32.

    Raises:
        ValueError: shapes differ or are not 2-D, a row has not exactly one positive, or ``beta`` <= 0.
    """
    if not beta > 0:
        raise ValueError(f"beta must be greater than 0, got {beta}")
    x = beta * _log_ratio("softmax_dpo_loss", logprobs, ref_logprobs.detach())
    _check_relevance(relevance, x)
    return x.logsumexp(dim=1) - x[relevance]


def softmax_at_k_loss(logprobs: Tensor, threshold: Tensor, temperature: float) -> Tensor:
    """Loss of SL@K (arXiv 2508.05673, without the weights' denominator): sigmoid((s - beta_K) / temperature) * -s.

    -s is the softmax loss of a positive if its log-probability s is normalised over the catalogue, and beta_K the score
    of the K-th best item. Deviation: the weight is a constant. Cosine similarities, as in the paper, keep its gradient
    small; log-losses of several nats would turn the sign of the whole.

    Args:
        logprobs: [B], finite log-probabilities of the positives under the current policy, in nats.
        threshold: [B], beta_K, a constant.
        temperature: distance to the threshold over which the weight falls, > 0.

    Returns:
        [B] in nats, float64 for float64 log-probabilities, else float32.

    Raises:
        ValueError: shapes differ, or ``temperature`` <= 0.
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be greater than 0, got {temperature}")
    if logprobs.ndim != 1 or logprobs.shape != threshold.shape:
        raise ValueError(f"logprobs and threshold must be [B], got {list(logprobs.shape)}, {list(threshold.shape)}")
    distance = _log_ratio("softmax_at_k_loss", logprobs[:, None], threshold[:, None])[:, 0].detach()
    return torch.sigmoid(distance / temperature) * -logprobs.to(distance.dtype)


def llpauc_loss(logprobs: Tensor, relevance: Tensor, alpha: float) -> Tensor:
    """Squared surrogate of the lower-left partial AUC (LLPAUC, arXiv 2403.00844): mean_j (1 - (f+ - f_j))^2.

    Only the share ``alpha`` of groups counts whose positives have the highest f, ceil(alpha * B) of them; the others'
    losses are 0. The mean is over the group's negatives, the best of all, which bound the false positive rate. The
    paper samples negatives and learns the thresholds of both rates by a minimax problem; here both are known. f in
    [0, 1] is, as there, the sigmoid of a score. Deviation: log-probabilities are scores up to a constant of the row,
    which is chosen so that the group's negatives have a mean of 0.

    Args:
        logprobs: [B, G], finite log-probabilities of the items under the current policy, in nats.
        relevance: [B, G], bool, exactly one positive per row.
        alpha: bound of the true positive rate, in (0, 1].

    Returns:
        [B], float64 for float64 log-probabilities, else float32.

    Raises:
        ValueError: ``logprobs`` is not 2-D, a row has not exactly one positive, or ``alpha`` leaves (0, 1].
    """
    if not 0 < alpha <= 1:
        raise ValueError(f"alpha must be above 0 and at most 1, got {alpha}")
    scores = _log_ratio("llpauc_loss", logprobs, torch.zeros_like(logprobs))
    _check_relevance(relevance, scores)
    if not len(scores):
        return scores.sum(1)
    negatives = scores[~relevance].view(len(scores), -1)
    centre = negatives.detach().mean(1, keepdim=True)
    positive, negative = torch.sigmoid(scores[relevance] - centre[:, 0]), torch.sigmoid(negatives - centre)
    least = positive.detach().topk(math.ceil(alpha * len(positive))).values[-1]
    return (1 - (positive[:, None] - negative)).square().mean(1) * (positive.detach() >= least)


def _check_relevance(relevance: Tensor, scores: Tensor) -> None:
    if relevance.shape != scores.shape or bool((relevance.sum(dim=1) != 1).any()):
        raise ValueError(f"relevance must be {list(scores.shape)} with exactly one positive per row")
