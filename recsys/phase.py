"""A phase of training: epochs that optimise one objective, from a fresh optimiser on."""

from __future__ import annotations

from dataclasses import dataclass

from recsys.functional import linear_schedule
from recsys.objectives import Objective


@dataclass(frozen=True)
class Phase:
    """Epochs with one objective."""

    objective: Objective
    warm_start: bool  # whether it is the warm start
    start: int  # first epoch
    end: int | None  # epoch after the last; None if the trainer has no end

    @property
    def supervised(self) -> bool:
        """Whether it trains without groups."""
        return self.objective.supervised

    def progress(self, epoch: float) -> float | None:
        """Return the share of the phase that is done at an epoch of the run; None in or beyond one without an end."""
        if self.end is None or not self.start <= epoch < self.end:
            return None
        return (epoch - self.start) / (self.end - self.start)

    def learning_rate(self, epoch: float, warmup: float) -> float:
        """Return the rate at a place in the phase, in epochs of the run: see :func:`recsys.functional.linear_schedule`.

        It stays at its peak in a phase without an end, and in an epoch beyond it.
        """
        peak, progress = self.objective.learning_rate, self.progress(epoch)
        return peak if progress is None else peak * linear_schedule(progress, warmup)
