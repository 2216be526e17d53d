"""Checkpoints of megabytes: Lightning's own for resuming, and beside each the adapter in PEFT's format."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint


class AdapterCheckpoint(ModelCheckpoint):
    """Keeps the best checkpoint on validation and the last one, each run in a folder of its own.

    ``<dirpath>/<logger's name>/version_N/`` receives ``best-….ckpt`` and ``last.ckpt``, which resume training with
    ``--ckpt_path``, and for each a folder with the suffix ``.adapter``, which ``PeftModel.from_pretrained`` and
    ``policy.adapter`` load. Saves on SIGTERM and on errors too.

    Args:
        dirpath: Root of the checkpoint folders.
        monitor: Validation metric that decides which is best.
        mode: Whether more (``max``) or less (``min``) of it is better.
        save_top_k: How many of the best to keep.
        save_last: Also keep the last.
        filename: Name of the best, with metrics in braces.
        save_on_exception: Save when training is interrupted.
        kwargs: Further arguments of Lightning's ``ModelCheckpoint``.
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
        **kwargs: Any,
    ) -> None:
        super().__init__(
            dirpath=dirpath,
            monitor=monitor,
            mode=mode,
            save_top_k=save_top_k,
            save_last=save_last,
            filename=filename,
            auto_insert_metric_name=False,
            save_on_exception=save_on_exception,
            **kwargs,
        )
        self.root = Path(dirpath)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Choose the run's folder, so that no run overwrites another's checkpoints."""
        if trainer.logger is not None and stage == "fit":
            version = trainer.logger.version
            run = f"version_{version}" if isinstance(version, int) else str(version)
            folder = self.root / (trainer.logger.name or "run") / run
            self.dirpath = str(Path(trainer.strategy.broadcast(str(folder))).absolute())
        super().setup(trainer, pl_module, stage)

    # Lightning renews the last checkpoint only when it also saves a best one, so both hooks that save add it.

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the best and the last, if this is the hook that Lightning saves in."""
        super().on_train_epoch_end(trainer, pl_module)
        if self._should_save_on_train_epoch_end(trainer):
            self._renew_last(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the best and the last, if this is the hook that Lightning saves in."""
        super().on_validation_end(trainer, pl_module)
        if not self._should_save_on_train_epoch_end(trainer):
            self._renew_last(trainer)

    def _renew_last(self, trainer: Trainer) -> None:
        if not self._should_skip_saving_checkpoint(trainer):  # nothing to do if it was saved at this step
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))

    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        super()._save_checkpoint(trainer, filepath)
        if trainer.is_global_zero:
            module: Any = trainer.lightning_module
            module.policy.save_adapter(_adapter_folder(filepath))

    def _remove_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        super()._remove_checkpoint(trainer, filepath)
        if trainer.is_global_zero:
            shutil.rmtree(_adapter_folder(filepath), ignore_errors=True)


def _adapter_folder(filepath: str) -> Path:
    return Path(filepath).with_suffix(".adapter")
