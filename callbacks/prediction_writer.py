"""What ``recsys predict`` is asked, and the file that it writes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from lightning.pytorch import Callback, Trainer

from recsys.data import HistoryDataModule, Requests
from recsys.data.requests import PART, read_ids
from recsys.data.sources import Columns
from recsys.digest import digest
from recsys.module import Recommender
from recsys.paths import InputPath
from recsys.recommendations import SUFFIXES, recommendations, schema_of, whole, write
from recsys.search import Ranking
from recsys.types import Batch, UserError


class PredictionWriter(Callback):
    """Recommends the best items after all events of each user, and writes a line for each item of each list.

    The columns are ``user_id``, ``rank``, ``item_id``, ``title`` and ``logprob``: the score that ranks the items, the
    log-probability of the title after the user's prompt. They are those that the beam search finds, ``model.num_beams``
    wide, or exact with ``model.exact``.

    Every 256 lists are kept in the folder ``<path>.parts`` until all are there: the same command goes on where an
    interrupted one ended. Each process of several makes other parts.

    Args:
        users: Whom to recommend to: ids, or a file of them (``.txt``, one on each line, or a table with their column);
            null is every user of the data.
        histories: A table of the events of users that the data need not know, in place of the data's own.
        rows: Recommend for the rows of a split, given what preceded each, in place of users; writes the targets too.
        k: Items in each list.
        exclude_seen: Leave out what the user has chosen before, and items of the same title.
        only_items: File of the ids of all items that may be recommended, written as that of ``users``; null is all.
        path: File to write, ``.parquet``, ``.csv`` or ``.jsonl``; must not exist. Null is
            ``<checkpoint>.predictions.parquet`` beside the checkpoint.
    """

    def __init__(
        self,
        users: list[str | int] | InputPath | None = None,
        histories: InputPath | None = None,
        rows: Literal["val", "test"] | None = None,
        k: int = 10,
        exclude_seen: bool = True,
        only_items: InputPath | None = None,
        path: str | None = None,
    ) -> None:
        given = {"users": users, "histories": histories, "rows": rows}
        if len(both := [f"predictions.{name}" for name, value in given.items() if value is not None]) > 1:
            raise UserError(f"{' and '.join(both)} are set: give one of them")
        if k < 1:
            raise UserError(f"predictions.k must be at least 1, but it is {k}")
        if path is not None and Path(path).suffix not in SUFFIXES:
            raise UserError(f"predictions.path is {path}: the name should end in {' or '.join(SUFFIXES)}")
        self.users = users
        self.histories = histories
        self.rows = rows
        self.k = k
        self.exclude_seen = exclude_seen
        self.only_items = only_items
        self.path = path
        self.checkpoint: str | None = None  # whose predictions they are, where that is known
        self._frames: list[pd.DataFrame] = []  # of the present part
        self._missing = 0  # requests of it

    def setup(self, trainer: Trainer, pl_module: Recommender, stage: str) -> None:  # type: ignore[override]
        """Tell the data module what is asked, less the parts that are there already.

        Raises:
            UserError: The file exists, or an option cannot be used.
        """
        if stage != "predict":
            return
        file, data = self.file(trainer), pl_module.data
        if file.exists():
            raise UserError(f"{file} exists already: move it away or set predictions.path")
        columns = getattr(data.source, "columns", {})
        only = self.only_items and read_ids(self.only_items, columns.get(Columns.ITEM, "item_id"))
        requests = self._requests(data).asking(data, self.k, self.exclude_seen, only)
        left = [part for part in requests.parts if not self._part(trainer, part).exists()]
        # Where all that is left is to join them, one is made again: a loop without a batch has no end to do that at.
        requests.parts = left or requests.parts[-1:]
        data.requests = requests

    def _requests(self, data: HistoryDataModule) -> Requests:
        if self.histories is not None:
            return Requests.of_file(data, self.histories)
        if self.rows is not None:
            return Requests.of_rows(data, self.rows)
        if isinstance(self.users, str):
            column = getattr(data.source, "columns", {}).get(Columns.USER, "user_id")
            return Requests.of_users(data, read_ids(self.users, column))
        return Requests.of_users(data, None if self.users is None else [str(user) for user in self.users])

    def file(self, trainer: Trainer) -> Path:
        """Return the file to write."""
        if self.path is not None:
            return Path(self.path)
        if self.checkpoint is not None:
            return Path(self.checkpoint).with_suffix(".predictions.parquet")
        return Path(trainer.log_dir or trainer.default_root_dir) / "predictions.parquet"

    def _part(self, trainer: Trainer, part: int) -> Path:
        file = self.file(trainer)
        return file.with_name(f"{file.name}.parts") / f"{part:06d}.parquet"

    def on_predict_start(self, trainer: Trainer, pl_module: Recommender) -> None:  # type: ignore[override]
        """Make the folder of the parts, which says what they are parts of.

        Raises:
            UserError: It has those of something else, or cannot be made.
        """
        settings = self._part(trainer, 0).with_name("settings.json")
        asked = _fingerprint(pl_module)
        if settings.exists() and json.loads(settings.read_text()) != asked:
            raise UserError(
                f"{settings.parent} has parts of another prediction: remove the folder or set predictions.path"
            )
        trainer.strategy.barrier("prediction_settings")  # before any process has made it
        if trainer.is_global_zero:
            with whole(settings) as partial:
                partial.write_text(json.dumps(asked))
        trainer.strategy.barrier("prediction_parts")

    def on_predict_batch_end(  # type: ignore[override]
        self,
        trainer: Trainer,
        pl_module: Recommender,
        outputs: Ranking,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep the lists of a batch, and write their part when it is whole."""
        requests, row = pl_module.data.requests, batch.row.cpu().numpy()
        if row.max() < 0:
            return
        part = int(row.max()) // PART
        self._missing = (self._missing or len(requests.of_part(part))) - int((row >= 0).sum())
        self._frames.append(recommendations(pl_module.data.catalog, requests, row, outputs))
        if self._missing == 0:
            frame = pd.concat(self._frames).sort_index(kind="stable")
            self._frames = []
            with whole(self._part(trainer, part)) as partial:
                pq.write_table(pa.Table.from_pandas(frame, schema_of(requests), preserve_index=False), partial)

    def on_predict_end(self, trainer: Trainer, pl_module: Recommender) -> None:  # type: ignore[override]
        """Join the parts of all processes.

        Raises:
            UserError: Some are not there, or the file cannot be written.
        """
        trainer.strategy.barrier("predictions_written")
        if not trainer.is_global_zero:
            return
        requests, file = pl_module.data.requests, self.file(trainer)
        parts = [self._part(trainer, part) for part in range(-(-len(requests) // PART))]
        if missing := sum(not part.exists() for part in parts):
            raise UserError(
                f"{parts[0].parent} lacks {missing} of {len(parts)} parts: run the command again, on one file system "
                "and without trainer.limit_predict_batches"
            )
        lines = write(map(pq.read_table, parts), schema_of(requests), file)
        shutil.rmtree(parts[0].parent)
        fewer = ", some with fewer: no other item was allowed" if lines < len(requests) * self.k else ""
        print(f"wrote {file}: {lines:,} items in lists of {self.k} for {len(requests):,} histories{fewer}")


def _fingerprint(module: Recommender) -> dict[str, str]:
    """Return what the lists depend on, short enough to be kept beside them."""
    data, requests = module.data, module.data.requests
    weights = [p.detach().cpu().contiguous().view(torch.uint8).numpy() for p in module.policy.trainable().values()]
    whose = [requests.user_ids.tolist(), requests.items, requests.entry, requests.start, requests.end]
    which = [requests.k, requests.exclude_seen, requests.only, data.catalog.item_ids, data.catalog.titles]
    how = [module.policy.name, module.normalization, module.dial.list_length, module.exact, data.item_tokens]
    parts = {"weights": weights, "histories": [*whose, data.prompt], "items": which, "search": how}
    texts = {name: [v if isinstance(v, np.ndarray) else repr(v) for v in values] for name, values in parts.items()}
    return {name: digest(*values) for name, values in texts.items()}
