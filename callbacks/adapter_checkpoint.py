"""Checkpoints of megabytes: Lightning's own for resuming, and beside each the adapter in PEFT's format."""

from __future__ import annotations

import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.exceptions import SIGTERMException
from safetensors import SafetensorError

from recsys.atomic import AtomicCheckpointIO, replace_folder
from recsys.runs import LAST, NO_LOGGER, claim_version
from recsys.types import UserError


class AdapterCheckpoint(ModelCheckpoint):
    """Keeps the best checkpoint on validation and the last one, each run in a folder of its own.

    ``<dirpath>/<logger's name>/version_N/`` receives ``best-….ckpt`` and ``last.ckpt``, which resume training with
    ``--ckpt_path``, and for each a folder with the suffix ``.adapter``, which ``PeftModel.from_pretrained`` and
    ``policy.adapter`` load. The last is renewed before and after each validation, at the end of each epoch and of
    training, as often as ``every_n_minutes`` says (searches for negatives included), on SIGTERM and on errors. A file
    is replaced as a whole, and weights that are not finite are never saved.

    Args:
        dirpath: Root of the checkpoint folders.
        monitor: Validation metric that decides which is best.
        mode: Whether more (``max``) or less (``min``) of it is better.
        save_top_k: How many of the best to keep; -1 keeps all.
        save_last: Also keep the last.
        filename: Name of the best, with metrics in braces.
        save_on_exception: Save the last when training is interrupted.
        every_n_minutes: Most minutes between two saves of the last; null leaves it to the other occasions.
        every_n_train_steps: Save the last after every so many optimiser steps, too.
    """

    def __init__(
        self,
        dirpath: str = "checkpoints",
        monitor: str = "val/wpauc",
        mode: str = "max",
        save_top_k: int = 1,
        save_last: bool = True,
        filename: str = "best-epoch{epoch:02d}-step{step}",
        save_on_exception: bool = True,
        every_n_minutes: float | None = 15.0,
        every_n_train_steps: int | None = None,
    ) -> None:
        if mode not in ("max", "min"):
            raise UserError(f"checkpoint.mode must be max or min, but it is {mode!r}")
        if save_top_k < -1:
            raise UserError(f"checkpoint.save_top_k must be at least -1, but it is {save_top_k}")
        if every_n_minutes is not None and not every_n_minutes > 0:
            raise UserError(f"checkpoint.every_n_minutes must be above 0, but it is {every_n_minutes:g}")
        if every_n_train_steps is not None and every_n_train_steps < 1:
            raise UserError(f"checkpoint.every_n_train_steps must be at least 1, but it is {every_n_train_steps}")
        if filename == LAST:
            raise UserError(f"checkpoint.filename must not be {LAST!r}, the name of the last checkpoint")
        super().__init__(
            dirpath=dirpath,
            monitor=monitor,
            mode=mode,
            save_top_k=save_top_k,
            save_last=save_last,
            filename=filename,
            auto_insert_metric_name=False,
            save_on_exception=save_on_exception,
        )
        self.root = Path(dirpath)
        self.every_n_minutes = every_n_minutes
        self.every_n_steps = every_n_train_steps
        self._saved_at = time.monotonic()
        self._validating = False  # within a validation that is not finished
        self._asked = False  # SIGTERM was received

    def setup(self, trainer: Any, pl_module: LightningModule, stage: str) -> None:
        """Choose the run's folder, so that no run overwrites another's checkpoints, and have files replaced whole."""
        if stage == "fit" and not trainer.fast_dev_run:
            folder = self._claim(trainer) if trainer.is_global_zero else None
            self.dirpath = trainer.strategy.broadcast(folder)
            if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:  # not the user's own
                trainer.strategy.checkpoint_io = AtomicCheckpointIO()
        super().setup(trainer, pl_module, stage)

    def _claim(self, trainer: Trainer) -> str:
        logger, version = trainer.logger, None
        if logger is not None:
            version = f"version_{logger.version}" if isinstance(logger.version, int) else str(logger.version)
        root = self.root / ((logger.name if logger is not None else None) or NO_LOGGER)
        folder = claim_version(root, version)
        if version not in (None, folder.name):
            rank_zero_info(f"{root / str(version)} holds another run's checkpoints; this run's go to {folder}")
        return str(folder.absolute())

    # ---- when -------------------------------------------------------------------------------------------------

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen for SIGTERM."""
        self._listen(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen for SIGTERM, and start the clock."""
        self._listen(trainer)
        self._saved_at = time.monotonic()

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        """Save the last, if it is due, and end if SIGTERM asks for it."""
        if not trainer.fit_loop._should_accumulate():  # the gradients of an unfinished step are in no checkpoint
            if self.every_n_steps and trainer.global_step % self.every_n_steps == 0:
                self._renew_last(trainer)
            elif self.due(trainer):
                self.save(trainer)
        self._end_together(trainer)

    def on_validation_batch_end(self, trainer: Trainer, *args: Any) -> None:
        """End if SIGTERM asks for it."""
        self._end_together(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the last, as a validation may take long."""
        if trainer.state.fn != "fit":
            self._end_at_once(trainer)
        elif not trainer.sanity_checking:
            self._validating = True
            self._renew_last(trainer)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Have SIGTERM end the process, as there is nothing to save."""
        self._end_at_once(trainer)

    on_predict_start = on_test_start

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the best and the last."""
        self._validating = False
        if self._saves(trainer):
            self._renew_best(trainer)
            self.save(trainer)  # with what is the best now, and the validation's results

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the last."""
        self._renew_last(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the last."""
        self._renew_last(trainer)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say where the best and the last are."""
        if not self._saves(trainer) or not trainer.is_global_zero:
            return
        best = "" if self.best_model_score is None else f"best by {self.monitor} {self.best_model_score:.4f}"
        for name, path in ((best, self.best_model_path), ("last", self.last_model_path)):
            if path:
                print(f"{name}: {_shown(Path(path))}", flush=True)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Save the last, if the weights are worth it. What fails here must not hide the exception."""
        try:
            if self.save_on_exception:
                self._renew_last(trainer)
        except UserError as error:
            rank_zero_warn(str(error))

    def due(self, trainer: Trainer) -> bool:
        """Whether ``every_n_minutes`` have passed since the last was saved; all processes ask together."""
        if self.every_n_minutes is None or not self._saves(trainer):
            return False
        return trainer.strategy.broadcast(time.monotonic() - self._saved_at >= 60 * self.every_n_minutes)

    def stops(self, trainer: Trainer) -> bool:
        """Whether SIGTERM asks for the end; all processes ask together, and it counts for all if one received it."""
        if trainer.world_size == 1:
            return trainer.received_sigterm
        return trainer.strategy.reduce_boolean_decision(self._asked, all=False)

    def _listen(self, trainer: Trainer) -> None:
        """Only take note of SIGTERM. Lightning's handler broadcasts, also within another exchange of the processes."""
        if trainer.world_size > 1:
            _on_sigterm(self._ask)

    def _end_at_once(self, trainer: Any) -> None:
        """Have SIGTERM end this process and those that it started; a prediction does not heed Lightning's handler."""

        def end(number: int, frame: Any) -> None:
            launcher = trainer.strategy.launcher
            if launcher is not None:
                launcher.kill(number)
            raise SIGTERMException

        _on_sigterm(end)

    def _ask(self, *args: Any) -> None:
        self._asked = True

    def _end_together(self, trainer: Trainer) -> None:
        if trainer.world_size > 1 and trainer.state.fn == "fit" and self.stops(trainer):
            raise SIGTERMException

    def _renew_last(self, trainer: Trainer) -> None:
        """Save the last unless it is of this step."""
        if self._last_global_step_saved != trainer.global_step and self._saves(trainer):
            self.save(trainer)

    def _saves(self, trainer: Any) -> bool:
        return not trainer.fast_dev_run and trainer.state.fn == "fit" and not trainer.sanity_checking

    # ---- what -------------------------------------------------------------------------------------------------

    def save(self, trainer: Trainer) -> None:
        """Save the last now."""
        if self.save_last:
            self.last_model_path = self.format_checkpoint_name({}, LAST)
            self._save_checkpoint(trainer, self.last_model_path)
            self._saved_at = time.monotonic()

    def _renew_best(self, trainer: Trainer) -> None:
        candidates = self._monitor_candidates(trainer)
        if self.save_top_k == 0 or self.monitor is None:
            return
        if self.monitor not in candidates:
            raise UserError(f"checkpoint.monitor: nothing logs {self.monitor!r}; there are {', '.join(candidates)}")
        if bool(torch.isfinite(candidates[self.monitor])):
            self._save_monitor_checkpoint(trainer, candidates)

    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        module: Any = trainer.lightning_module
        module.check_weights()
        try:
            super()._save_checkpoint(trainer, filepath)
            if trainer.is_global_zero:
                replace_folder(_adapter_folder(filepath), module.policy.save_adapter)
        except (OSError, SafetensorError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UserError(f"{filepath} cannot be saved ({reason}); the one before it is kept") from error

    def _remove_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        super()._remove_checkpoint(trainer, filepath)
        if trainer.is_global_zero:
            shutil.rmtree(_adapter_folder(filepath), ignore_errors=True)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Have a run that resumes do again, as a whole, what is not finished: a validation, or an optimiser step."""
        loop: Any = trainer.fit_loop.epoch_loop
        state = checkpoint["loops"]["fit_loop"]
        batches, validation = state["epoch_loop.batch_progress"], state["epoch_loop.val_loop.batch_progress"]
        now = loop.batch_progress.current
        fetcher = trainer.fit_loop._data_fetcher
        ends_batch = now.ready == now.processed > now.completed  # a callback saves in on_train_batch_end
        if self._validating or (ends_batch and fetcher is not None and loop._should_check_val_fx(fetcher)):
            for part in ("total", "current"):
                batches[part]["completed"] = batches[part]["processed"]
                validation[part] |= {"ready": 1, "started": 1, "processed": 0, "completed": 0}
            validation["is_last_batch"] = False
        begun = now.processed % trainer.accumulate_grad_batches
        if begun and not (now.ready == now.processed and loop._num_ready_batches_reached()):
            for part in ("total", "current"):
                for count in batches[part]:
                    batches[part][count] -= begun
            for loader in state["state_dict"].get("combined_loader", []):
                loader["done"] -= begun

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the best ones so far, where they still are: in the folder of the run that is resumed."""
        best = {path: score for path, score in state_dict["best_k_models"].items() if Path(path).is_file()}
        ranked = sorted(best, key=lambda path: float(best[path]), reverse=self.mode == "max")
        ranked = ranked if self.save_top_k == -1 else ranked[: self.save_top_k]
        if ranked:
            self.best_k_models = {path: best[path] for path in ranked}
            self.best_model_path, self.kth_best_model_path = ranked[0], ranked[-1]
            self.best_model_score, self.kth_value = best[ranked[0]], best[ranked[-1]]


def _adapter_folder(filepath: str) -> Path:
    return Path(filepath).with_suffix(".adapter")


def _on_sigterm(handler: Callable[[int, Any], None]) -> None:
    if threading.current_thread() is threading.main_thread():  # no other may
        signal.signal(signal.SIGTERM, handler)


def _shown(path: Path) -> Path:
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
