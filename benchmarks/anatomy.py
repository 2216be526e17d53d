"""Which rows and which loss: parts of TAWin and of SL@K by themselves, to see what brings each its gain.

    python benchmarks/compare.py --config benchmarks/window.yaml --config benchmarks/anatomy.yaml

Every variant trains for as many stretches, from one warm start.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor

from recsys.functional import tawin_advantages
from recsys.objectives import GRPO
from recsys.objectives.base import ScoredGroups
from recsys.window import ResolvedWindow

Rows = Literal["at", "above", "both"]
Form = Literal["linear", "logistic", "likelihood"]


class Anatomy(GRPO):
    """TAWin with other rows or another loss; ``at`` with ``linear`` is TAWin itself.

    Args:
        rows: Rows that are trained: whose positive is ``at`` the window, ``above`` it, or ``both``.
        form: ``linear`` is TAWin's loss, ``logistic`` has pairs fade where the positive is ahead, as the gradient of
            log(1 + exp(s_j - s+)) does, and ``likelihood`` is the positive's log-likelihood, without negatives.
        kwargs: As for GRPO.
    """

    reach = "window"

    def __init__(self, rows: Rows = "at", form: Form = "linear", **kwargs: Any) -> None:
        super().__init__(train_missed=False, **kwargs)
        self.rows = rows
        self.form = form
        self.scores_negatives = form != "likelihood"

    def trained_ranks(self, window: ResolvedWindow, count: int) -> tuple[int, int]:
        """Return the fewest and the most negatives above the positive of a row that is trained."""
        first, last = math.floor(window.start), min(math.ceil(window.end), count - 1)
        return {"at": (first, last), "above": (0, first - 1), "both": (0, last)}[self.rows]

    def trains(self, old_logprobs: Tensor, window: ResolvedWindow) -> Tensor:
        """Return which groups are trained, ``[R]``."""
        first, last = self.trained_ranks(window, old_logprobs.shape[1] - 1)
        above = (old_logprobs[:, 1:] > old_logprobs[:, :1]).sum(1)
        return (first <= above) & (above <= last)

    def advantages(self, groups: ScoredGroups) -> Tensor:
        """Return the advantages ``[R, G]``."""
        scores, window = groups.scores.detach(), groups.window
        advantages = tawin_advantages(scores, groups.relevance, *window.rates, gate="none")
        if self.form == "logistic":
            pairs = advantages[:, 1:] * 2 * torch.sigmoid(scores[:, 1:] - scores[:, :1])  # as linear at equal scores
            advantages = torch.cat([-pairs.sum(1, keepdim=True), pairs], 1)
        return advantages * self.trains(scores, window)[:, None]

    def loss(self, groups: ScoredGroups) -> dict[str, Tensor]:
        """Return the loss of each group."""
        if self.form == "likelihood":
            return {"loss": -groups.scores[:, 0]}
        return super().loss(groups)
