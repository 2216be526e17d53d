"""What a phase of training optimises. All but supervised fine-tuning differ in their advantages alone."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from recsys.functional import group_advantages, tawin_advantages


class Objective:
    """Base of all objectives.

    Args:
        learning_rate: Peak learning rate of the phase.
    """

    def __init__(self, learning_rate: float) -> None:
        self.learning_rate = learning_rate


class SupervisedFineTuning(Objective):
    """Negative log-likelihood of every title in a window of a user's history, in one pass.

    Args:
        learning_rate: Peak learning rate of the phase.
    """

    def __init__(self, learning_rate: float = 1e-3) -> None:
        super().__init__(learning_rate)


class GRPO(Objective):
    """Group-relative policy optimisation with reward 1 for the positive and 0 for the negatives.

    On random negatives this maximises the AUC, on beam negatives a partial AUC (see the ``BeamNegatives`` callback).

    Args:
        learning_rate: Peak learning rate of the phase.
        clip: How far the importance ratio may leave 1 and still earn, > 0.
        kl_coef: Weight of the KL divergence to the policy at the start of this phase.
        nll_coef: Weight of the positive's negative log-likelihood.
    """

    def __init__(
        self, learning_rate: float = 1e-4, clip: float = 0.2, kl_coef: float = 0.0, nll_coef: float = 0.0
    ) -> None:
        super().__init__(learning_rate)
        self.clip = clip
        self.kl_coef = kl_coef
        self.nll_coef = nll_coef

    def advantages(self, scores: Tensor, relevance: Tensor, alpha: float, d: float, num_negatives: int) -> Tensor:
        """Return the advantages ``[B, G]`` of groups.

        Args:
            scores: ``[B, G]`` current log-probabilities of the items.
            relevance: ``[B, G]`` bool, one positive per group.
            alpha: Start of the window.
            d: Width of the window.
            num_negatives: N.
        """
        return group_advantages(relevance.to(scores.dtype))


class TAWin(GRPO):
    """Threshold-adjusted windowed reweighting: GRPO's advantages, moved into the window of WPAUC.

    Args:
        learning_rate: Peak learning rate of the phase.
        gate: ``threshold`` trains a group only where its positive lies at the window; ``none`` only reweights.
        clip: How far the importance ratio may leave 1 and still earn, > 0.
        kl_coef: Weight of the KL divergence to the policy at the start of this phase.
        nll_coef: Weight of the positive's negative log-likelihood.
    """

    def __init__(
        self,
        learning_rate: float = 1e-4,
        gate: Literal["threshold", "none"] = "threshold",
        clip: float = 0.2,
        kl_coef: float = 0.0,
        nll_coef: float = 0.0,
    ) -> None:
        super().__init__(learning_rate, clip, kl_coef, nll_coef)
        self.gate: Literal["threshold", "none"] = gate

    def advantages(self, scores: Tensor, relevance: Tensor, alpha: float, d: float, num_negatives: int) -> Tensor:
        """Return the advantages ``[B, G]``, see :func:`recsys.functional.tawin_advantages`."""
        return tawin_advantages(scores, relevance, alpha, d, num_negatives, self.gate)
