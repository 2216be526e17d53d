"""The claims behind the objectives, each computed in float64 on random groups and printed with its error.

python benchmarks/theory.py
"""

from __future__ import annotations

from collections.abc import Callable

import jsonargparse
import torch
from torch import Tensor

from recsys.functional import (
    group_advantages,
    policy_loss,
    recall_at_k,
    tawin_advantages,
    window_around,
    window_bounds,
    window_weights,
    windowed_partial_auc,
)


def first_is_positive(scores: Tensor) -> Tensor:
    """Return the marks ``[B, C]`` of lists whose first candidate is the positive."""
    relevance = torch.zeros_like(scores, dtype=torch.bool)
    relevance[:, 0] = True
    return relevance


def surrogate_gradient(scores: Tensor, advantages: Tensor) -> Tensor:
    """Return the gradient ``[B, G]`` of what the policy loss maximises, at an importance ratio of 1."""
    scores = scores.clone().requires_grad_()
    (-policy_loss(scores, scores.detach(), advantages, clip_eps=0.2)).sum().backward()
    return scores.grad


def grpo_is_auc(groups: int, n: int) -> None:
    """GRPO's gradient against that of the linear surrogate of the AUC."""
    scores = torch.randn(groups, n + 1, dtype=torch.float64)
    found = surrogate_gradient(scores, group_advantages(first_is_positive(scores).double()))
    expected = torch.full_like(scores, -1 / n)
    expected[:, 0] = 1
    expected *= n**0.5 / (n + 1)
    print(
        f"1. GRPO with binary reward, {n} negatives: gradient = sqrt(n)/(n+1) * grad[s+ - mean s-], relative error "
        f"{((found - expected).norm() / expected.norm()).item():.0e}"
    )


def negatives_set_the_range(users: int, total: int, n: int) -> None:
    """False positive rates at which random and beam negatives stand, and what the share of won pairs then is."""
    scores = torch.randn(users, total + 1, dtype=torch.float64)
    scores[:, 0] += 2
    relevance = first_is_positive(scores)
    negatives = scores[:, 1:].sort(dim=1, descending=True).values
    drawn = torch.rand(users, total).argsort(dim=1)[:, :n]
    for name, index in {"random": drawn, "beam": torch.arange(n).expand(users, -1)}.items():
        won = (scores[:, :1] > negatives.gather(1, index)).double().mean().item()
        d = 1.0 if name == "random" else n / total
        area = windowed_partial_auc(scores, relevance, 0.0, d, total).mean().item()
        low, middle, high = (torch.quantile((index + 1).double() / total, q).item() for q in (0.025, 0.5, 0.975))
        print(
            f"2. {n} {name} negatives of {total}: false positive rates {low:.3f} / {middle:.3f} / {high:.3f} (2.5 %, "
            f"median, 97.5 %); share of pairs won {won:.4f}, AUC over [0, {d:g}] {area:.4f}"
        )


def wpauc_is_mean_recall(users: int, total: int) -> None:
    """WPAUC of integer windows against the mean of Recall@k."""
    scores = torch.randn(users, total + 1, dtype=torch.float64)
    scores[:, 0] += 2
    relevance = first_is_positive(scores)
    error = 0.0
    for a, b in ((0, 1), (0, 10), (5, 15), (9, 10), (30, total)):
        recall = torch.stack([recall_at_k(scores, relevance, k) for k in range(a + 1, b + 1)]).mean(0)
        found = windowed_partial_auc(scores, relevance, a / total, (b - a) / total, total)
        error = max(error, (found - recall).abs().max().item())
    print(f"3. WPAUC[a/N, b/N] = mean of Recall@k over k = a+1..b, five windows: largest error {error:.0e}")


def tawin_climbs_wpauc(groups: int, total: int, k: int, half_width: int, sigma: float) -> None:
    """The objectives' gradients on the weights of a linear scorer, against a finite difference of WPAUC.

    WPAUC is smoothed by normal noise of standard deviation sigma on s+ - s_j, the window's weights being those of the
    present ranks: sum_j w_j Phi((s+ - s_j) / sigma).
    """
    features = torch.randn(groups, total + 1, 16, dtype=torch.float64)
    theta = torch.randn(16, dtype=torch.float64)
    truth = theta + 0.8 * torch.randn(16, dtype=torch.float64)
    chosen = (features @ truth + torch.distributions.Gumbel(0.0, 1.0).sample((groups, total + 1))).argmax(1)
    swap = torch.arange(total + 1).repeat(groups, 1)
    swap[:, 0], swap[torch.arange(groups), chosen] = chosen, 0
    features = features.gather(1, swap[..., None].expand_as(features))  # the positive first
    alpha, d = window_around(k, half_width, total)
    a, b = window_bounds(alpha, d, total)

    def smoothed(weights: Tensor) -> Tensor:
        scores = features @ weights
        window = window_weights(scores[:, 1:], a, b) / (b - a)
        return (window * torch.special.ndtr((scores[:, :1] - scores[:, 1:]) / sigma)).sum(1).mean()

    step = 1e-4
    moves = torch.eye(16, dtype=torch.float64) * step
    target = torch.stack([(smoothed(theta + m) - smoothed(theta - m)) / (2 * step) for m in moves])

    scores = features @ theta
    relevance = first_is_positive(scores)
    beam = scores.masked_fill(relevance, torch.inf).topk(65, dim=1).indices  # the positive and its 64 best negatives
    objectives: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "TAWin": lambda s, r: tawin_advantages(s, r, alpha, d, total),
        "with the sigmoid gate": lambda s, r: tawin_advantages(s, r, alpha, d, total, "sigmoid", sigma / 1.7),
        "without a gate": lambda s, r: tawin_advantages(s, r, alpha, d, total, gate="none"),
        "GRPO on 64 beam negatives": lambda s, r: group_advantages(r.double()),
    }
    cosines = []
    for name, advantages in objectives.items():
        group = scores.gather(1, beam)
        gradient = surrogate_gradient(group, advantages(group, first_is_positive(group)))
        direction = (gradient[..., None] * features.gather(1, beam[..., None].expand(-1, -1, 16))).mean((0, 1))
        cosines.append(f"{name} {torch.cosine_similarity(direction, target, dim=0).item():.3f}")
    print(
        f"4. Cosine with the gradient of WPAUC at K = {k} ± {half_width}, smoothed over {sigma:g} of a score's unit: "
        + ", ".join(cosines)
    )


def main(groups: int = 4000, seed: int = 0) -> None:
    """Print all claims.

    Args:
        groups: Random groups of each check.
        seed: Of the random numbers.
    """
    torch.manual_seed(seed)
    grpo_is_auc(groups, 15)
    negatives_set_the_range(groups, 1000, 64)
    wpauc_is_mean_recall(groups, 200)
    for k, half_width in ((5, 3), (10, 5), (20, 10), (40, 14)):
        tawin_climbs_wpauc(groups, 300, k, half_width, sigma=0.3)


if __name__ == "__main__":
    jsonargparse.auto_cli(main)
