"""What a phase of training optimises: supervised fine-tuning, or a loss on groups (a positive and n negatives)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from recsys.engine import TreeEngine
from recsys.functional import (
    Gate,
    gate_open,
    group_advantages,
    kl_divergence,
    policy_loss,
    softmax_dpo_loss,
    tawin_advantages,
)
from recsys.groups import Groups
from recsys.types import Batch, UserError
from recsys.window import ResolvedWindow


class Objective:
    """Base of all objectives.

    Args:
        learning_rate: Peak learning rate of the phase.
    """

    supervised = False  # whether a phase trains on stretches of history, without groups

    def __init__(self, learning_rate: float) -> None:
        self.learning_rate = learning_rate

    def step(
        self, engine: TreeEngine, batch: Batch, groups: Groups | None, window: ResolvedWindow
    ) -> dict[str, Tensor]:
        """Score a batch with gradients.

        Args:
            engine: Of the policy that is trained.
            batch: B stretches, or B rows that have their groups.
            groups: None in a supervised phase.
            window: The window of WPAUC.

        Returns:
            The ``loss``, and under other names what is to be logged, scalars all.
        """
        raise NotImplementedError

    @staticmethod
    def _positive(name: str, value: float) -> float:
        """Return ``value``; raise a UserError unless it is above 0."""
        if not value > 0:
            raise UserError(f"model.objective: {name} must be greater than 0, but it is {value:g}")
        return value

    @staticmethod
    def _not_negative(name: str, value: float) -> float:
        """Return ``value``; raise a UserError if it is below 0."""
        if not value >= 0:
            raise UserError(f"model.objective: {name} must be at least 0, but it is {value:g}")
        return value


class SupervisedFineTuning(Objective):
    """Negative log-likelihood of every title in a stretch of a user's history, in one pass.

    Args:
        learning_rate: Peak learning rate of the phase.
    """

    supervised = True

    def __init__(self, learning_rate: float = 1e-3) -> None:
        super().__init__(learning_rate)

    def step(
        self, engine: TreeEngine, batch: Batch, groups: Groups | None, window: ResolvedWindow
    ) -> dict[str, Tensor]:
        """Return the mean negative log-likelihood per title: those in the prompts, and the targets."""
        scores, hidden = engine.forward(batch.tokens, batch.length, batch.target[:, None])
        return {"loss": _title_nll(engine, batch, scores, hidden) / _titles(batch)}


@dataclass
class ScoredGroups:
    """Groups of B users with their scores; the positive stands in the first column."""

    scores: Tensor  # [B, G] log-probabilities under the current policy
    old_logprobs: Tensor  # [B, G] the same under the policy that made the groups
    ref_logprobs: Tensor | None  # [B, G] the same under the policy at the start of the phase, if the objective needs it
    window: ResolvedWindow

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
        train_missed: Train also the groups whose positive the search missed: it was below all of the negatives when
            these were found. Without, such a group has no part in the loss but the anchor's, and its negatives cost
            no pass through the model.
        anchor_coef: Weight of the anchor, the mean negative log-likelihood per title over the titles in the prompt and
            the positive; it keeps what supervised training learnt, from the pass that scores the group.
    """

    windowed = False  # whether `loss` weighs negatives by their place in the window, so that they must be the best
    needs_reference = False  # whether `loss` reads `ScoredGroups.ref_logprobs`

    def __init__(self, learning_rate: float = 1e-4, train_missed: bool = True, anchor_coef: float = 0.0) -> None:
        super().__init__(learning_rate)
        self.train_missed = train_missed
        self.anchor_coef = self._not_negative("anchor_coef", anchor_coef)

    def trains(self, old_logprobs: Tensor) -> Tensor:
        """Return ``[B]`` bool: which groups are trained, from their ``old_logprobs [B, G]``."""
        found = old_logprobs[:, 0] >= old_logprobs[:, 1:].amin(1)
        return torch.ones_like(found) if self.train_missed else found

    def loss(self, groups: ScoredGroups) -> dict[str, Tensor]:
        """Return the ``loss`` of each group, and under other names what is to be logged, each ``[B]``."""
        raise NotImplementedError

    def step(
        self, engine: TreeEngine, batch: Batch, groups: Groups | None, window: ResolvedWindow
    ) -> dict[str, Tensor]:
        """Return means over the whole batch, to which a group that is not trained adds nothing, and the anchor.

        The negatives of such a group do not go through the model; with an anchor its prompt and positive do, in a
        second pass. How many passes there are depends on the settings alone: processes that share a base make each
        pass together, so a pass without rows of its own takes one of the others along, at a weight of 0.
        """
        assert groups is not None  # Recommender made sure of a GroupSource
        index = groups.find(batch.row)
        trains = self.trains(groups.old_logprobs[index])
        rows, anchored = len(batch), self.anchor_coef > 0
        chosen = _at_least_one(trains)
        part, weight, index = batch[chosen], trains[chosen].float(), index[chosen]
        scores, hidden = engine.forward(part.tokens, part.length, groups.items[index])
        reference = None if groups.ref_logprobs is None else groups.ref_logprobs[index]
        parts = self.loss(ScoredGroups(scores, groups.old_logprobs[index], reference, window))
        means = {name: (weight * value).sum() / rows for name, value in parts.items()}
        if anchored:
            nll = _title_nll(engine, part, scores[:, :1], hidden, weight)
            if not self.train_missed:
                chosen = _at_least_one(~trains)
                part, weight = batch[chosen], (~trains)[chosen].float()
                scores, hidden = engine.forward(part.tokens, part.length, part.target[:, None])
                nll = nll + _title_nll(engine, part, scores, hidden, weight)
            means["anchor"] = nll / _titles(batch)
            means["loss"] = means["loss"] + self.anchor_coef * means["anchor"]
        return {**means, "groups": trains.float().mean()}


def _at_least_one(rows: Tensor) -> Tensor:
    """Return ``rows [B]`` bool, or the first row if there is none."""
    first = torch.arange(len(rows), device=rows.device) == 0
    return rows | (first & ~rows.any())


def _titles(batch: Batch) -> Tensor:
    """Return the number of titles in a batch, those in the prompts and the targets."""
    return len(batch) + (batch.history >= 0).sum()


def _title_nll(
    engine: TreeEngine, batch: Batch, target: Tensor, hidden: Tensor, weight: Tensor | None = None
) -> Tensor:
    """Return the negative log-likelihood of all titles in a batch, summed.

    Args:
        engine: Of the policy.
        batch: B rows.
        target: ``[B, 1]`` log-probabilities of the targets.
        hidden: ``[B, L, H]`` of the prompts.
        weight: ``[B]`` of each row; 1 by default.
    """
    each = target.sum(1) + engine.head.history_logprobs(hidden, batch.history, batch.history_start).sum(1)
    return -(each if weight is None else each * weight).sum()


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
        """Return the advantages ``[B, G]``."""
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
        train_missed: As for every objective on groups. The gates of most groups that the search missed are shut;
            without them an epoch costs a fraction.
        kwargs: As for GRPO.
    """

    windowed = True

    def __init__(
        self, gate: Gate = "threshold", temperature: float = 1.0, train_missed: bool = False, **kwargs: Any
    ) -> None:
        super().__init__(train_missed=train_missed, **kwargs)
        self.gate: Gate = gate
        self.temperature = self._positive("temperature", temperature)

    def advantages(self, groups: ScoredGroups) -> Tensor:
        """Return the advantages ``[B, G]``, see :func:`recsys.functional.tawin_advantages`."""
        scores = groups.scores.detach()
        return tawin_advantages(scores, groups.relevance, *groups.window.rates, self.gate, self.temperature)

    def loss(self, groups: ScoredGroups) -> dict[str, Tensor]:
        """As GRPO's, and whether the gates are open."""
        is_open = gate_open(groups.scores.detach(), groups.relevance, *groups.window.rates)
        return {**super().loss(groups), "gate_open": is_open.float()}


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
