"""Settings of a trainer that make no sense, or that this project cannot serve, found before any long work."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy

from recsys.evaluation import logged_names
from recsys.types import UserError


def check_trainer_settings(settings: Any) -> None:
    """Check what Lightning would take in silence, or end on with a traceback.

    Args:
        settings: The command line's group ``trainer``.

    Raises:
        UserError: naming the option and what it may be.
    """
    for name, most in (("accumulate_grad_batches", math.inf), ("num_nodes", 2**16)):
        if not 1 <= settings[name] <= most:
            limit = "" if most == math.inf else f" and at most {most:,}"
            raise UserError(f"trainer.{name} must be at least 1{limit}, but it is {settings[name]}")
    every, between = settings["check_val_every_n_epoch"], settings["val_check_interval"]
    if every is not None and every < 1:
        raise UserError(f"trainer.check_val_every_n_epoch must be at least 1, but it is {every}")
    if isinstance(between, int | float) and not between > 0:
        raise UserError(f"trainer.val_check_interval must be above 0, but it is {between}")
    if settings["max_epochs"] == -1 and settings["max_steps"] == -1 and settings["max_time"] is None:
        raise UserError("trainer.max_epochs is -1: training would never end; set it, max_steps or max_time")


def check_strategy(trainer: Any) -> None:
    """Check the strategy and the precision.

    Args:
        trainer: Lightning's.

    Raises:
        UserError: if the strategy neither averages the gradients of a pass through the decoder alone nor needs to, or
            the precision is not left to the policy.
    """
    if not isinstance(trainer.strategy, SingleDeviceStrategy | DDPStrategy):
        raise UserError(
            f"trainer.strategy: {type(trainer.strategy).__name__} is not supported; use ddp, or "
            "recsys.shard.ShardedStrategy to divide the base among the processes"
        )
    if trainer.precision != "32-true":  # would round the log-probabilities, or the adapter's weights
        raise UserError(
            f"trainer.precision is {trainer.precision}: leave it at 32-true, and set the compute type of an "
            "LLMPolicy by its dtype"
        )


def check_monitors(callbacks: Iterable[Any], cutoffs: tuple[int, ...]) -> None:
    """Check that what callbacks monitor is logged with these cut-offs.

    Raises:
        UserError: naming the callback and all metrics that there are.
    """
    names = logged_names("val", cutoffs)
    for callback in callbacks:
        monitor = getattr(callback, "monitor", None)
        if monitor is not None and not monitor.startswith("train/") and monitor not in names:
            raise UserError(
                f"{type(callback).__name__} monitors {monitor!r}, which no metric has with model.cutoffs "
                f"{sorted(set(cutoffs))}; there are {', '.join(sorted(names))}"
            )


def check_interval(trainer: Any, shortest_epoch: Callable[[], int]) -> None:
    """Check that a validation after so many batches happens.

    Args:
        trainer: Lightning's.
        shortest_epoch: Returns its batches; asked where it matters alone, as all rows are planned for it.

    Raises:
        UserError: if an epoch ends before it.
    """
    interval, limit = trainer.val_check_interval, trainer.limit_train_batches
    if not isinstance(interval, int) or trainer.check_val_every_n_epoch is None or not trainer.enable_validation:
        return
    batches = min(shortest_epoch(), limit) if isinstance(limit, int) else int(shortest_epoch() * limit)
    if interval > batches:
        raise UserError(
            f"trainer.val_check_interval is {interval}, but an epoch has {batches} batch{'es' * (batches != 1)}"
        )
