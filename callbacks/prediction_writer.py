"""Writes the rankings of ``recsys predict`` to Parquet."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter

from recsys.module import Recommender
from recsys.search import Ranking
from recsys.types import Batch, UserError


class PredictionWriter(BasePredictionWriter):
    """Writes a file per process with a line for each row: user, target, top items and their scores.

    Args:
        dirpath: Receives ``part-<process>.parquet``; must not hold such files yet.
    """

    def __init__(self, dirpath: str = "predictions") -> None:
        super().__init__(write_interval="batch")
        self.folder = Path(dirpath)
        self._frames: list[pd.DataFrame] = []

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse to overwrite."""
        if self._path(trainer).exists():
            raise UserError(f"{self._path(trainer)} exists already: move it away or set predictions.dirpath")

    def write_on_batch_end(  # type: ignore[override]
        self,
        trainer: Trainer,
        pl_module: Recommender,
        prediction: Ranking,
        batch_indices: Sequence[int] | None,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Translate a batch to the source's ids."""
        data = pl_module.data
        ids = np.array(data.catalog.item_ids)
        lines = []
        for i in np.flatnonzero(batch.row.cpu().numpy() >= 0):
            row, valid = int(batch.row[i]), prediction.valid[i].cpu().numpy()
            lines.append(
                {
                    "row": row,
                    "user_id": data.user_ids[data.histories.users[row]],
                    "target_item_id": ids[data.histories.items[row]],
                    "item_ids": ids[prediction.items[i].cpu().numpy()[valid]].tolist(),
                    "scores": prediction.scores[i].cpu().numpy()[valid].tolist(),
                }
            )
        self._frames.append(pd.DataFrame(lines))

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the file."""
        self.folder.mkdir(parents=True, exist_ok=True)
        pd.concat(self._frames, ignore_index=True).to_parquet(self._path(trainer))
        print(f"wrote {self._path(trainer)}")

    def _path(self, trainer: Trainer) -> Path:
        return self.folder / f"part-{trainer.global_rank:03d}.parquet"
