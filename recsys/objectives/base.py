"""What a phase of training optimises: supervised fine-tuning, or a loss on groups (a positive and n negatives)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from recsys.engine import TreeEngine
from recsys.groups import Groups
from recsys.tree import Places
from recsys.types import Batch, UserError
from recsys.window import Reach, ResolvedWindow


@dataclass
class Counts:
    """What the means of a loss are over, so that each title and each row of an optimiser step weighs the same.

    Where a step takes several batches, one after another or in several processes, these are the means of its batches'
    counts: the mean of their losses is then that of one batch that holds them all.
    """

    titles: Tensor
    rows: Tensor

    @classmethod
    def of(cls, batch: Batch) -> Counts:
        """Return those of a batch that is a step of its own."""
        return cls((batch.titles >= 0).sum(), (batch.event >= 0).sum())


@dataclass
class StepContext:
    """What a step knows besides its batch.

    Args:
        groups: Of the batch's rows; None in a supervised phase.
        window: The window of WPAUC.
        progress: Share of the phase that is done, in [0, 1].
        counts: What the means are over; None is the batch.
    """

    groups: Groups | None
    window: ResolvedWindow
    progress: float = 0.0
    counts: Counts | None = None


class Objective:
    """Base of all objectives.

    Args:
        learning_rate: Peak learning rate of the phase.
    """

    supervised = False  # whether a phase trains without groups

    def __init__(self, learning_rate: float) -> None:
        self.learning_rate = learning_rate

    def step(self, engine: TreeEngine, batch: Batch, context: StepContext) -> dict[str, Tensor]:
        """Score a batch with gradients.

        Args:
            engine: Of the policy that is trained.
            batch: B stretches.
            context: What else the step knows.

        Returns:
            The ``loss``, and under other names what is to be logged, scalars all.
        """
        raise NotImplementedError

    @staticmethod
    def _positive(name: str, value: float) -> float:
        """Return ``value``; raise a UserError unless it is above 0 and finite."""
        if not 0 < value < math.inf:
            raise UserError(f"model.objective: {name} must be greater than 0 and finite, but it is {value:g}")
        return value

    @staticmethod
    def _not_negative(name: str, value: float) -> float:
        """Return ``value``; raise a UserError unless it is at least 0 and finite."""
        if not 0 <= value < math.inf:
            raise UserError(f"model.objective: {name} must be at least 0 and finite, but it is {value:g}")
        return value


class SupervisedFineTuning(Objective):
    """Negative log-likelihood of every title in a stretch, in one pass.

    Args:
        learning_rate: Peak learning rate of the phase.
    """

    supervised = True

    def __init__(self, learning_rate: float = 1e-3) -> None:
        super().__init__(learning_rate)

    def step(self, engine: TreeEngine, batch: Batch, context: StepContext) -> dict[str, Tensor]:
        """Return the mean negative log-likelihood per title."""
        hidden = engine.hidden(batch.tokens)
        logprobs = engine.head.title_logprobs(hidden, batch.titles, batch.start)  # 0 where there is no title
        return {"loss": -logprobs.sum() / (context.counts or Counts.of(batch)).titles}


@dataclass
class ScoredGroups:
    """R groups with their scores; the positive stands in the first column."""

    scores: Tensor  # [R, G] log-probabilities under the current policy; [R, 1] if the objective scores no negatives
    old_logprobs: Tensor  # [R, G] the same under the policy that made the groups
    ref_logprobs: Tensor | None  # [R, G] the same under the policy at the start of the phase, if the objective needs it
    window: ResolvedWindow

    @property
    def relevance(self) -> Tensor:
        """The positives, ``[R, G]`` bool."""
        return positives(self.scores)


def positives(scores: Tensor) -> Tensor:
    """Return which items of groups ``[R, G]`` are the positives: the first of each."""
    first = torch.zeros_like(scores, dtype=torch.bool)
    first[:, 0] = True
    return first


class GroupObjective(Objective):
    """Base of the objectives on groups, whose negatives the ``BeamNegatives`` callback finds.

    Args:
        learning_rate: Peak learning rate of the phase.
        train_missed: Train also the groups whose positive the search missed: it was below all of the negatives when
            these were found. Without, such a row has no part in the loss but the anchor's, and its search ends as soon
            as that is certain.
        anchor_coef: Weight of the anchor, the mean negative log-likelihood per title over all titles of the stretches;
            it keeps what supervised training learnt, from the pass that scores the groups.
        anchor_end: Weight of the anchor at the end of the phase, which it nears linearly; null keeps ``anchor_coef``.
    """

    reach: Reach = "none"  # which of the policy's best negatives a group must hold for `loss`
    needs_reference = False  # whether `loss` reads `ScoredGroups.ref_logprobs`
    scores_negatives = True  # whether `loss` reads the negatives' scores; without, it has their `old_logprobs` alone

    def __init__(
        self,
        learning_rate: float = 1e-4,
        train_missed: bool = True,
        anchor_coef: float = 0.0,
        anchor_end: float | None = None,
    ) -> None:
        super().__init__(learning_rate)
        self.train_missed = train_missed
        self.anchor_coef = self._not_negative("anchor_coef", anchor_coef)
        self.anchor_end = anchor_coef if anchor_end is None else self._not_negative("anchor_end", anchor_end)

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

    def step(self, engine: TreeEngine, batch: Batch, context: StepContext) -> dict[str, Tensor]:
        """Return means over the rows of the batch, to which one without a group adds nothing, and the anchor.

        One pass scores the titles in the stretches, the positives among them, and at each place of a positive the
        negatives of its group. Without an anchor a stretch that has no group is left out.
        """
        groups = context.groups
        assert groups is not None  # Recommender made sure of a GroupSource
        anchor = self.anchor_coef + context.progress * (self.anchor_end - self.anchor_coef)
        counts = context.counts or Counts.of(batch)
        index, grouped = groups.find(batch.event)
        grouped &= batch.event >= 0
        if not anchor:
            some = _at_least_one(grouped.any(1))
            batch, index, grouped = batch[some], index[some], grouped[some]
        at = grouped.nonzero(as_tuple=True)
        index = index[at]
        items = groups.items[index, 1:] if self.scores_negatives else groups.items[index, :0]
        negatives, hidden = engine.forward(batch.tokens, Places(at[0], batch.start[at]), items)
        titles = engine.head.title_logprobs(hidden, batch.titles, batch.start)
        scores = torch.cat([titles[at][:, None], negatives], 1)
        if bool(scores.isnan().any()):  # nothing to rank by, and so no loss: the module names the rows and stops
            return {"loss": scores.sum()}
        reference = None if groups.ref_logprobs is None else groups.ref_logprobs[index]
        parts = self.loss(ScoredGroups(scores, groups.old_logprobs[index], reference, context.window))
        means = {name: value.sum() / counts.rows for name, value in parts.items()}
        if anchor:
            means["anchor"] = -titles.sum() / counts.titles
            means["loss"] = means["loss"] + anchor * means["anchor"]
        return {**means, "groups": len(index) / counts.rows}


def _at_least_one(rows: Tensor) -> Tensor:
    """Return ``rows [B]`` bool, or the first row if there is none."""
    first = torch.arange(len(rows), device=rows.device) == 0
    return rows | (first & ~rows.any())
