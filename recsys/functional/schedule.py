"""The learning rate within a phase of training."""

from __future__ import annotations

__all__ = ["linear_schedule"]


def linear_schedule(progress: float, warmup: float) -> float:
    """Share of the peak learning rate: a linear rise over the first ``warmup`` of a phase times a linear fall to 0.

    The rise starts at a tenth, so that the very first step moves something.

    Args:
        progress: share of the phase that is done, in [0, 1].
        warmup: share of the phase over which the rate rises, in [0, 1].

    Raises:
        ValueError: one of them leaves [0, 1].
    """
    if not (0 <= progress <= 1 and 0 <= warmup <= 1):
        raise ValueError(f"progress and warmup are shares of a phase, got {progress} and {warmup}")
    rise = min(1.0, progress / warmup + 0.1) if warmup else 1.0
    return rise * (1 - progress)
