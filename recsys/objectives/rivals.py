"""Published losses to compare with: softmax-DPO, and two others that aim at the top of the list, SL@K and LLPAUC."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from recsys.functional import llpauc_loss, softmax_at_k_loss, softmax_dpo_loss
from recsys.objectives.base import GroupObjective, ScoredGroups
from recsys.types import UserError


class SoftmaxDPO(GroupObjective):
    """Softmax-DPO (S-DPO, arXiv 2406.09215): the positive preferred to all negatives, relative to the phase's start.

    The paper draws its negatives at random (``negatives.mode: random``).

    Args:
        beta: Scale of the log-ratios to the reference, > 0; the larger, the nearer the policy stays to it.
        kwargs: As for every objective on groups.
    """

    needs_reference = True

    def __init__(self, beta: float = 1.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.beta = self._positive("beta", beta)

    def loss(self, groups: ScoredGroups) -> dict[str, Tensor]:
        """Return the loss and the positive's NLL, see :func:`recsys.functional.softmax_dpo_loss`."""
        assert groups.ref_logprobs is not None
        preference = softmax_dpo_loss(groups.scores, groups.ref_logprobs, groups.relevance, self.beta)
        return {"loss": preference, "policy_loss": preference, "nll": -groups.scores[:, 0]}


class SoftmaxAtK(GroupObjective):
    """SL@K (arXiv 2508.05673): each positive's log-loss, weighed by a sigmoid of its distance to the K-th best score.

    K is the window's. The log-loss under ``normalization: trie`` is the softmax loss over the whole catalogue. The K-th
    best score is that of the last refresh, from the policy's best items (``negatives.mode: beam``).

    Args:
        temperature: Distance, in nats, over which the weights fall, > 0.
        kwargs: As for every objective on groups.
    """

    reach = "k"
    scores_negatives = False

    def __init__(self, temperature: float = 1.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.temperature = self._positive("temperature", temperature)

    def loss(self, groups: ScoredGroups) -> dict[str, Tensor]:
        """Return the loss and the positive's NLL, see :func:`recsys.functional.softmax_at_k_loss`."""
        threshold = groups.old_logprobs.topk(groups.window.k, dim=1).values[:, -1]
        weighed = softmax_at_k_loss(groups.scores[:, 0], threshold, self.temperature)
        return {"loss": weighed, "policy_loss": weighed, "nll": -groups.scores[:, 0]}


class LLPAUC(GroupObjective):
    """Lower-left partial AUC (arXiv 2403.00844): the area where true and false positive rates are both low.

    The false positive rate is bounded by the group: with ``negatives.mode: beam`` the n best of N negatives are those
    up to a rate of n/N.

    Args:
        alpha: Bound of the true positive rate, in (0, 1]: the share of a batch's groups that count, those whose
            positives score highest.
        kwargs: As for every objective on groups.
    """

    def __init__(self, alpha: float = 0.7, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not 0 < alpha <= 1:
            raise UserError(f"model.objective: alpha must be above 0 and at most 1, but it is {alpha:g}")
        self.alpha = alpha

    def loss(self, groups: ScoredGroups) -> dict[str, Tensor]:
        """Return the loss and the positive's NLL, see :func:`recsys.functional.llpauc_loss`."""
        area = llpauc_loss(groups.scores, groups.relevance, self.alpha)
        return {"loss": area, "policy_loss": area, "nll": -groups.scores[:, 0]}
