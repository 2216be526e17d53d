"""What a phase of training optimises: supervised fine-tuning, or a loss on groups (a positive and n negatives)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from recsys.functional import (
    Gate,
    gate_open,
    group_advantages,
    kl_divergence,
    policy_loss,
    softmax_dpo_loss,
    tawin_advantages,
)
from recsys.types import UserError


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


@dataclass
class ScoredGroups:
    """Groups of B users with their scores; the positive stands in the first column."""

    scores: Tensor  # [B, G] log-probabilities under the current policy
    behaviour: Tensor  # [B, G] the same under the policy that made the groups
    reference: Tensor | None  # [B, G] the same under the policy at the start of the phase, if the objective needs it
    window: tuple[float, float, int]  # alpha, d, N

    @property
    def relevance(self) -> Tensor:
        """The positives, ``[B, G]`` bool."""
        relevance = torch.zeros_like(self.scores, dtype=torch.bool)
        relevance[:, 0] = True
        return relevance


class GroupObjective(Objective):
    """Base of the objectives on groups, whose negatives the ``BeamNegatives`` callback finds.

    Args:
        learning_rate: Peak learning rate of the phase.
        inject_positive: Train also the groups whose positive was below all of the negatives when these were found.
            Without, such a group costs no pass through the model, and has no part in any term of the loss.
        nll_coef: Weight of the positive's negative log-likelihood.
    """

    needs_reference = False  # whether `loss` reads `ScoredGroups.reference`

    def __init__(self, learning_rate: float, inject_positive: bool, nll_coef: float) -> None:
        super().__init__(learning_rate)
        self.inject_positive = inject_positive
        self.nll_coef = nll_coef

    def _positive(self, name: str, value: float) -> float:
        """Return ``value``; raise a UserError unless it is above 0."""
        if not value > 0:
            raise UserError(f"{type(self).__name__}: {name} must be greater than 0, but it is {value:g}")
        return value

    def trains(self, behaviour: Tensor) -> Tensor:
        """Return ``[B]`` bool: which groups are trained, from their ``behaviour [B, G]``."""
        found = behaviour[:, 0] >= behaviour[:, 1:].amin(1)
        return torch.ones_like(found) if self.inject_positive else found

    def loss(self, groups: ScoredGroups) -> dict[str, Tensor]:
        """Return the ``loss`` of each group, and under other names what is to be logged, each ``[B]``."""
        raise NotImplementedError


class GRPO(GroupObjective):
    """Group-relative policy optimisation with reward 1 for the positive and 0 for the negatives.

    On random negatives this maximises the AUC, on beam negatives a partial AUC (see the ``BeamNegatives`` callback).
    On beam negatives with ``inject_positive: false`` it is ReRe's (arXiv 2510.12211, without its ranking reward): the
    group is the beam, and a beam without the positive has equal rewards, hence no signal.

    Args:
        learning_rate: Peak learning rate of the phase.
        inject_positive: Train also the groups whose positive was below all of the negatives when these were found.
            Without, such a group costs no pass through the model, and has no part in any term of the loss.
        clip: How far the importance ratio may leave 1 and still earn, > 0.
        kl_coef: Weight of the KL divergence to the policy at the start of this phase.
        nll_coef: Weight of the positive's negative log-likelihood.
    """

    def __init__(
        self,
        learning_rate: float = 1e-4,
        inject_positive: bool = True,
        clip: float = 0.2,
        kl_coef: float = 0.0,
        nll_coef: float = 0.0,
    ) -> None:
        super().__init__(learning_rate, inject_positive, nll_coef)
        self.clip = self._positive("clip", clip)
        self.kl_coef = kl_coef
        self.needs_reference = kl_coef != 0

    def advantages(self, groups: ScoredGroups) -> Tensor:
        """Return the advantages ``[B, G]``."""
        return group_advantages(groups.relevance.to(groups.scores.dtype))

    def loss(self, groups: ScoredGroups) -> dict[str, Tensor]:
        """Return the clipped policy loss with its KL and NLL terms, see :func:`recsys.functional.policy_loss`."""
        advantages = self.advantages(groups)
        policy = policy_loss(groups.scores, groups.behaviour, advantages, self.clip)
        nll = -groups.scores[:, 0]
        parts = {
            "loss": policy + self.nll_coef * nll,
            "policy_loss": policy,
            "nll": nll,
            "signal": (advantages != 0).any(1).float(),
            "clipped": ((groups.scores - groups.behaviour).exp() - 1).abs().gt(self.clip).float().mean(1),
        }
        if groups.reference is not None:
            parts["kl"] = kl_divergence(groups.scores, groups.reference).mean(1)
            parts["loss"] = parts["loss"] + self.kl_coef * parts["kl"]
        return parts


class TAWin(GRPO):
    """Threshold-adjusted windowed reweighting: GRPO's advantages, moved into the window of WPAUC.

    Args:
        learning_rate: Peak learning rate of the phase.
        gate: ``threshold`` trains a group only where its positive lies at the window; ``sigmoid`` gives each pair of
            the positive and a negative a weight that falls with their distance; ``none`` only reweights.
        temperature: Distance, in nats, over which the weights of ``sigmoid`` fall, > 0.
        inject_positive: Train also the groups whose positive was below all of the negatives when these were found.
            The gate of most of them is shut; without them an epoch costs a fraction.
        clip: How far the importance ratio may leave 1 and still earn, > 0.
        kl_coef: Weight of the KL divergence to the policy at the start of this phase.
        nll_coef: Weight of the positive's negative log-likelihood.
    """

    def __init__(
        self,
        learning_rate: float = 1e-4,
        gate: Gate = "threshold",
        temperature: float = 1.0,
        inject_positive: bool = False,
        clip: float = 0.2,
        kl_coef: float = 0.0,
        nll_coef: float = 0.0,
    ) -> None:
        super().__init__(learning_rate, inject_positive, clip, kl_coef, nll_coef)
        self.gate: Gate = gate
        self.temperature = self._positive("temperature", temperature)

    def advantages(self, groups: ScoredGroups) -> Tensor:
        """Return the advantages ``[B, G]``, see :func:`recsys.functional.tawin_advantages`."""
        scores = groups.scores.detach()
        return tawin_advantages(scores, groups.relevance, *groups.window, self.gate, self.temperature)

    def loss(self, groups: ScoredGroups) -> dict[str, Tensor]:
        """As GRPO's, and whether the gates are open."""
        is_open = gate_open(groups.scores.detach(), groups.relevance, *groups.window)
        return {**super().loss(groups), "gate_open": is_open.float()}


class SoftmaxDPO(GroupObjective):
    """Softmax-DPO (S-DPO, arXiv 2406.09215): the positive preferred to all negatives, relative to the phase's start.

    The paper draws its negatives at random (``BeamNegatives.mode: random``).

    Args:
        learning_rate: Peak learning rate of the phase.
        inject_positive: Train also the groups whose positive was below all of the negatives when these were found.
            Without, such a group costs no pass through the model, and has no part in any term of the loss.
        beta: Scale of the log-ratios to the reference, > 0; the larger, the nearer the policy stays to it.
        nll_coef: Weight of the positive's negative log-likelihood.
    """

    needs_reference = True

    def __init__(
        self, learning_rate: float = 1e-4, inject_positive: bool = True, beta: float = 1.0, nll_coef: float = 0.0
    ) -> None:
        super().__init__(learning_rate, inject_positive, nll_coef)
        self.beta = self._positive("beta", beta)

    def loss(self, groups: ScoredGroups) -> dict[str, Tensor]:
        """Return the loss and its NLL term, see :func:`recsys.functional.softmax_dpo_loss`."""
        assert groups.reference is not None
        preference = softmax_dpo_loss(groups.scores, groups.reference, groups.relevance, self.beta)
        nll = -groups.scores[:, 0]
        return {"loss": preference + self.nll_coef * nll, "policy_loss": preference, "nll": nll}
