"""A trained model as an object that recommends."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from lightning.pytorch import Trainer

from recsys.data import HistoryDataModule, Requests
from recsys.module import Recommender
from recsys.recommendations import recommendations
from recsys.runs import read_checkpoint
from recsys.types import UserError

# One process on whatever this machine has, that neither logs nor seeds its caller.
_ALONE = ("accelerator=auto", "strategy=auto", "devices=1", "num_nodes=1", "logger=false")
_OPTIONS = (*(f"--trainer.{option}" for option in _ALONE), "--seed_everything=false")


class TrainedRecommender:
    """Recommends items for histories; :meth:`from_checkpoint` loads what ``recsys fit`` trained.

    Args:
        trainer: Knows the device, and the callbacks that the settings were checked with.
        model: The model, trained.
        data: The data whose catalogue it recommends from.
    """

    def __init__(self, trainer: Trainer, model: Recommender, data: HistoryDataModule) -> None:
        model.prepare(trainer, data)
        self.model, self.data = model.eval(), data

    @classmethod
    def from_checkpoint(cls, path: str | Path, *options: str) -> TrainedRecommender:
        """Load a checkpoint with the settings that it holds.

        Args:
            path: ``checkpoints/<name>/version_N/last.ckpt``, or one of the best.
            options: Settings to change, as on the command line, such as ``--data=elsewhere.yaml``.

        Raises:
            UserError: There is no such checkpoint, it holds no settings, or they do not fit it or what is here.
        """
        from recsys.cli import command_line  # which imports this module

        checkpoint = read_checkpoint(Path(path))
        cli = command_line([f"--config={saved_config(str(path), checkpoint)}", *_OPTIONS, *options], run=False)
        recommender = cls(cli.trainer, cli.model, cli.datamodule)
        cli.model.on_load_checkpoint(checkpoint)
        cli.model.load_state_dict(checkpoint["state_dict"], strict=False)
        return recommender

    def recommend(
        self,
        histories: Mapping[Any, Sequence[str]],
        k: int = 10,
        exclude_seen: bool = True,
        only_items: Sequence[str] | None = None,
    ) -> pd.DataFrame:
        """Return the best items after each history.

        Args:
            histories: For each user, ids or titles of items, oldest first.
            k: Items in each list.
            exclude_seen: Leave out what is in the history, and items of the same title.
            only_items: Ids of all items that may be recommended; None for all.

        Returns:
            A line for each item of each list, see :func:`recsys.recommendations.recommendations`.

        Raises:
            UserError: A history is empty, or an item unknown.
        """
        requests = Requests.of_histories(self.data, histories).asking(self.data, k, exclude_seen, only_items)
        allowed, frames = self.model.allowed(requests), []
        for batch in requests.batches(self.data.eval_batch_size):
            ranking = self.model.answer(batch.to(self.model.device), requests, allowed)
            frames.append(recommendations(self.data.catalog, requests, batch.row.numpy(), ranking))
        return pd.concat(frames).sort_index(kind="stable").reset_index(drop=True)


def saved_config(path: str, checkpoint: dict[str, Any]) -> str:
    """Return the settings of the run that made a checkpoint, as YAML.

    Raises:
        UserError: It holds none.
    """
    if "config" not in checkpoint:
        raise UserError(f"ckpt_path: {path} holds no settings, as `recsys fit` did not make it: give --config")
    return checkpoint["config"]
