"""A phase of training: epochs that optimise one objective, from a fresh optimiser on."""

from __future__ import annotations

from dataclasses import dataclass

from recsys.functional import linear_schedule
from recsys.objectives import Objective


@dataclass(frozen=True)
class Phase:
    """Epochs with one objective."""

    objective: Objective
    start: int  # first epoch
    end: int | None  # epoch after the last; None if the trainer has no end

    @property
    def supervised(self) -> bool:
        """Whether it trains without groups."""
        return self.objective.supervised

    def learning_rate(self, epoch: float, warmup: float) -> float:
        """Return the rate at a place in the phase, in epochs of the run: see :func:`recsys.functional.linear_schedule`.

        It stays at its peak in a phase without an end, and in an epoch beyond it.
        """
        peak = self.objective.learning_rate
        if self.end is None or not self.start <= epoch < self.end:
            return peak
        return peak * linear_schedule((epoch - self.start) / (self.end - self.start), warmup)
