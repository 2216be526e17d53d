"""What a phase of training optimises: supervised fine-tuning, or a loss on groups (a positive and n negatives)."""

from __future__ import annotations

import math
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
from recsys.tree import Places
from recsys.types import Batch, UserError
from recsys.window import ResolvedWindow


class Objective:
    """Base of all objectives.

    Args:
        learning_rate: Peak learning rate of the phase.
    """

    supervised = False  # whether a phase trains without groups

    def __init__(self, learning_rate: float) -> None:
        self.learning_rate = learning_rate

    def step(
        self, engine: TreeEngine, batch: Batch, groups: Groups | None, window: ResolvedWindow
    ) -> dict[str, Tensor]:
        """Score a batch with gradients.

        Args:
            engine: Of the policy that is trained.
            batch: B stretches.
            groups: Of the batch's rows; None in a supervised phase.
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
    """Negative log-likelihood of every title in a stretch, in one pass.

    Args:
        learning_rate: Peak learning rate of the phase.
    """

    supervised = True

    def __init__(self, learning_rate: float = 1e-3) -> None:
        super().__init__(learning_rate)

    def step(
        self, engine: TreeEngine, batch: Batch, groups: Groups | None, window: ResolvedWindow
    ) -> dict[str, Tensor]:
        """Return the mean negative log-likelihood per title."""
        hidden = engine.hidden(batch.tokens)
        return {"loss": _mean_nll(batch, engine.head.title_logprobs(hidden, batch.titles, batch.start))}


@dataclass
class ScoredGroups:
    """R groups with their scores; the positive stands in the first column."""

    scores: Tensor  # [R, G] log-probabilities under the current policy
    old_logprobs: Tensor  # [R, G] the same under the policy that made the groups
    ref_logprobs: Tensor | None  # [R, G] the same under the policy at the start of the phase, if the objective needs it
    window: ResolvedWindow

    @property
    def relevance(self) -> Tensor:
        """The positives, ``[R, G]`` bool."""
        return _positives(self.scores)


def _positives(scores: Tensor) -> Tensor:
    """Return which items of groups ``[R, G]`` are the positives: the first of each."""
    positives = torch.zeros_like(scores, dtype=torch.bool)
    positives[:, 0] = True
    return positives


class GroupObjective(Objective):
    """Base of the objectives on groups, whose negatives the ``BeamNegatives`` callback finds.

    Args:
        learning_rate: Peak learning rate of the phase.
        train_missed: Train also the groups whose positive the search missed: it was below all of the negatives when
            these were found. Without, such a row has no part in the loss but the anchor's, and its search ends as soon
            as that is certain.
        anchor_coef: Weight of the anchor, the mean negative log-likelihood per title over all titles of the stretches;
            it keeps what supervised training learnt, from the pass that scores the groups.
    """

    windowed = False  # whether `loss` weighs negatives by their place in the window, so that they must be the best
    needs_reference = False  # whether `loss` reads `ScoredGroups.ref_logprobs`

    def __init__(self, learning_rate: float = 1e-4, train_missed: bool = True, anchor_coef: float = 0.0) -> None:
        super().__init__(learning_rate)
        self.train_missed = train_missed
        self.anchor_coef = self._not_negative("anchor_coef", anchor_coef)

    def trains(self, old_logprobs: Tensor, window: ResolvedWindow) -> Tensor:
        """Return ``[R]`` bool: which groups are trained, from their ``old_logprobs [R, G]``."""
        found = old_logprobs[:, 0] >= old_logprobs[:, 1:].amin(1)
        return torch.ones_like(found) if self.train_missed else found

    def trained_ranks(self, window: ResolvedWindow, count: int) -> tuple[int, int] | None:
        """Return the fewest and the most negatives above the positive of a group that is trained; None for any.

        ``count`` negatives, the policy's best, are in a group. A group beyond these limits is none that :meth:`trains`
        would name.
        """
        return None if self.train_missed else (0, count - 1)

    def loss(self, groups: ScoredGroups) -> dict[str, Tensor]:
        """Return the ``loss`` of each group, and under other names what is to be logged, each ``[R]``."""
        raise NotImplementedError

    def step(
        self, engine: TreeEngine, batch: Batch, groups: Groups | None, window: ResolvedWindow
    ) -> dict[str, Tensor]:
        """Return means over the rows of the batch, to which one without a group adds nothing, and the anchor.

        One pass scores the titles in the stretches, the positives among them, and at each place of a positive the
        negatives of its group. Without an anchor a stretch that has no group is left out.
        """
        assert groups is not None  # Recommender made sure of a GroupSource
        rows = (batch.event >= 0).sum()
        index, grouped = groups.find(batch.event)
        grouped &= batch.event >= 0
        if not self.anchor_coef:
            some = _at_least_one(grouped.any(1))
            batch, index, grouped = batch[some], index[some], grouped[some]
        at = grouped.nonzero(as_tuple=True)
        index = index[at]
        negatives, hidden = engine.forward(batch.tokens, Places(at[0], batch.start[at]), groups.items[index, 1:])
        titles = engine.head.title_logprobs(hidden, batch.titles, batch.start)
        scores = torch.cat([titles[at][:, None], negatives], 1)
        reference = None if groups.ref_logprobs is None else groups.ref_logprobs[index]
        parts = self.loss(ScoredGroups(scores, groups.old_logprobs[index], reference, window))
        means = {name: value.sum() / rows for name, value in parts.items()}
        if self.anchor_coef:
            means["anchor"] = _mean_nll(batch, titles)
            means["loss"] = means["loss"] + self.anchor_coef * means["anchor"]
        return {**means, "groups": len(index) / rows}


def _at_least_one(rows: Tensor) -> Tensor:
    """Return ``rows [B]`` bool, or the first row if there is none."""
    first = torch.arange(len(rows), device=rows.device) == 0
    return rows | (first & ~rows.any())


def _mean_nll(batch: Batch, logprobs: Tensor) -> Tensor:
    """Return the mean negative log-likelihood per title from ``logprobs [B, C]``, 0 where there is none."""
    return -logprobs.sum() / (batch.titles >= 0).sum()


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

    windowed = True

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
            trained &= gate_open(old_logprobs, _positives(old_logprobs), *window.rates)
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
