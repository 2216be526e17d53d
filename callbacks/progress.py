"""How far a run is: a bar on a terminal, a line a minute where the output goes to a file."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from typing import Any, TypeVar

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from torch.utils.data import DataLoader
from tqdm import tqdm

SECONDS = 60  # between two lines, at least
T = TypeVar("T")


class Lines:
    """Lines that tell how far some work is.

    Args:
        title: What the work is.
        total: Its steps.
    """

    def __init__(self, title: str, total: float) -> None:
        self.title = title
        self.total = total
        self.began = self.told = time.monotonic()

    def tell(self, done: int, more: str = "") -> None:
        """Print a line to stderr, if it is time for one.

        Args:
            done: Steps that are done.
            more: What else it says.
        """
        now = time.monotonic()
        if now - self.told < SECONDS or not done:
            return
        self.told, spent = now, (now - self.began) / 60
        left = spent / done * (self.total - done)
        line = f"{self.title}: {done:,} of {self.total:,} batches in {spent:.1f} min, {left:.1f} min left{more}"
        print(line, file=sys.stderr, flush=True)


class LineProgress(ProgressBar):
    """Tells how far training, validation, test and prediction are, a line a minute."""

    def __init__(self) -> None:
        super().__init__()
        self.enabled = True

    def enable(self) -> None:
        """Print."""
        self.enabled = True

    def disable(self) -> None:
        """Do not print, as the trainer asks of all processes but one."""
        self.enabled = False

    def on_train_epoch_start(self, trainer: Trainer, *args: Any) -> None:
        """Begin with an epoch."""
        title = f"training, epoch {trainer.current_epoch + 1} of {trainer.max_epochs}"
        self.training = Lines(title, self.total_train_batches)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Tell, with the metrics that a bar would show."""
        if self.enabled:
            shown = self.get_metrics(trainer, pl_module)
            self.training.tell(batch_idx + 1, "".join(f", {n} {v}" for n, v in shown.items() if n != "v_num"))

    def on_validation_start(self, trainer: Trainer, *args: Any) -> None:
        """Begin with a validation."""
        counts = trainer.num_sanity_val_batches if trainer.sanity_checking else trainer.num_val_batches
        self._begin("validation", counts)

    def on_test_start(self, trainer: Trainer, *args: Any) -> None:
        """Begin with a test."""
        self._begin("test", trainer.num_test_batches)

    def on_predict_start(self, trainer: Trainer, *args: Any) -> None:
        """Begin with a prediction."""
        self._begin("prediction", trainer.num_predict_batches)

    def on_validation_batch_end(self, *args: Any) -> None:
        """Tell."""
        self._count()

    def on_test_batch_end(self, *args: Any) -> None:
        """Tell."""
        self._count()

    def on_predict_batch_end(self, *args: Any) -> None:
        """Tell."""
        self._count()

    def _begin(self, title: str, counts: Any) -> None:
        self.evaluation, self.evaluated = Lines(title, sum(counts)), 0

    def _count(self) -> None:
        self.evaluated += 1
        if self.enabled:
            self.evaluation.tell(self.evaluated)


def track(items: DataLoader[T], title: str, shown: bool) -> Iterator[T]:
    """Go through batches, and tell how far it is.

    Args:
        items: The batches.
        title: What is done with them.
        shown: Whether to tell.
    """
    if shown and not sys.stderr.isatty():
        lines = Lines(title, len(items))
        for done, item in enumerate(items):
            lines.tell(done)
            yield item
    else:
        yield from tqdm(items, desc=title, leave=False, disable=not shown or len(items) == 1)
