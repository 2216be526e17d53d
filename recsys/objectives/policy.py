"""Policy optimisation: GRPO, and TAWin, which moves its advantages into the window of WPAUC."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from recsys.functional import Gate, gate_open, group_advantages, kl_divergence, policy_loss, tawin_advantages
from recsys.objectives.base import GroupObjective, ScoredGroups, positives
from recsys.window import ResolvedWindow


class GRPO(GroupObjective):
    """Group-relative policy optimisation with reward 1 for the positive and 0 for the negatives.

    On random negatives this maximises the AUC, on beam negatives a partial AUC (see the ``BeamNegatives`` callback).
    On beam negatives with ``train_missed: false`` it is ReRe's (arXiv 2510.12211, without its ranking reward): the
    group is the beam, and a beam without the positive has equal rewards, hence no signal.

    Args:
        clip_eps: How far the importance ratio may leave 1 and still earn, > 0.
        kl_coef: Weight of the KL divergence to the policy at the start of this phase.
        kwargs: As for every objective on groups.
    """

    def __init__(self, clip_eps: float = 0.2, kl_coef: float = 0.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.clip_eps = self._positive("clip_eps", clip_eps)
        self.kl_coef = self._not_negative("kl_coef", kl_coef)
        self.needs_reference = kl_coef != 0

    def advantages(self, groups: ScoredGroups) -> Tensor:
        """Return the advantages ``[R, G]``."""
        return group_advantages(groups.relevance.to(groups.scores.dtype))

    def loss(self, groups: ScoredGroups) -> dict[str, Tensor]:
        """Return the clipped policy loss with its KL term, see :func:`recsys.functional.policy_loss`."""
        advantages = self.advantages(groups)
        policy = policy_loss(groups.scores, groups.old_logprobs, advantages, self.clip_eps)
        parts = {
            "loss": policy,
            "policy_loss": policy,
            "nll": -groups.scores[:, 0],
            "signal": (advantages != 0).any(1).float(),
            "clipped": ((groups.scores - groups.old_logprobs).exp() - 1).abs().gt(self.clip_eps).float().mean(1),
        }
        if groups.ref_logprobs is not None:
            parts["kl"] = kl_divergence(groups.scores, groups.ref_logprobs).mean(1)
            parts["loss"] = parts["loss"] + self.kl_coef * parts["kl"]
        return parts


class TAWin(GRPO):
    """Threshold-adjusted windowed reweighting: GRPO's advantages, moved into the window of WPAUC.

    Args:
        gate: ``threshold`` trains a group only where its positive lies at the window; ``sigmoid`` gives each pair of
            the positive and a negative a weight that falls with their distance; ``none`` only reweights.
        temperature: Distance, in nats, over which the weights of ``sigmoid`` fall, > 0.
        train_missed: As for every objective on groups. Without, ``gate: threshold`` also leaves out the groups whose
            gates are shut when they are found.
        kwargs: As for GRPO.
    """

    reach = "window"

    def __init__(
        self, gate: Gate = "threshold", temperature: float = 1.0, train_missed: bool = False, **kwargs: Any
    ) -> None:
        super().__init__(train_missed=train_missed, **kwargs)
        self.gate: Gate = gate
        self.temperature = self._positive("temperature", temperature)

    def advantages(self, groups: ScoredGroups) -> Tensor:
        """Return the advantages ``[R, G]``, see :func:`recsys.functional.tawin_advantages`."""
        scores = groups.scores.detach()
        return tawin_advantages(scores, groups.relevance, *groups.window.rates, self.gate, self.temperature)

    def trains(self, old_logprobs: Tensor, window: ResolvedWindow) -> Tensor:
        """As for every objective; with ``gate: threshold`` only groups whose gates are open when they are found."""
        trained = super().trains(old_logprobs, window)
        if self.gate == "threshold" and not self.train_missed:
            trained &= gate_open(old_logprobs, positives(old_logprobs), *window.rates)
        return trained

    def trained_ranks(self, window: ResolvedWindow, count: int) -> tuple[int, int] | None:
        """As for every objective; with ``gate: threshold`` those at which the gate is open."""
        if self.gate == "threshold" and not self.train_missed:
            return math.floor(window.start), min(math.ceil(window.end), count - 1)
        return super().trained_ranks(window, count)

    def loss(self, groups: ScoredGroups) -> dict[str, Tensor]:
        """As GRPO's, and whether the gates are open."""
        is_open = gate_open(groups.scores.detach(), groups.relevance, *groups.window.rates)
        return {**super().loss(groups), "gate_open": is_open.float()}
