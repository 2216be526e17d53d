"""One validation or test: what each row got."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from recsys.data import HistoryDataModule
from recsys.evaluation import FILTERED


@dataclass
class Validation:
    """One validation (or test) of the policy."""

    phase: str
    step: int
    row: np.ndarray  # [R] row ids, ascending
    user: np.ndarray  # [R] the user of each row
    values: dict[str, np.ndarray]  # each metric's [R], and the rank's
    train_seconds: float  # since the validation before
    seconds: float

    @property
    def metrics(self) -> list[str]:
        """Names of the metrics."""
        return [name for name in self.values if name != "rank"]

    def mean(self, metric: str) -> float:
        """Return the metric over all rows."""
        return float(self.values[metric].mean())

    def user_mean(self, metric: str) -> float:
        """Return the mean over users of the metric over a user's rows: active users count no more than others."""
        return float(pd.Series(self.values[metric]).groupby(self.user).mean().mean())

    def means(self, part: str) -> dict[str, float]:
        """Return the means over rows by the names under which the Lightning module logs them."""
        return {
            f"{part}_filtered/{name.removeprefix(FILTERED)}" if name.startswith(FILTERED) else f"{part}/{name}": (
                self.mean(name)
            )
            for name in self.metrics
        }

    def user_means(self, part: str) -> dict[str, float]:
        """Return the user means of the metrics of full lists, by the names that loggers get."""
        plain = [name for name in self.metrics if not name.startswith(FILTERED)]
        return {f"{part}_user_mean/{name}": self.user_mean(name) for name in plain}

    def write(self, data: HistoryDataModule, list_length: int, path: Path) -> None:
        """Write what each row got as Parquet, with the source's ids of its user and its target.

        The frame's ``attrs``, which pandas keeps in the file, say how long the lists are: what holds beyond, such as
        Recall at a larger K, is not known from ranks.
        """
        frame = pd.DataFrame(
            {
                "row": self.row,
                "user_id": data.user_ids[self.user],
                "item_id": np.array(data.catalog.item_ids)[data.histories.items[self.row]],
                **self.values,
            }
        )
        frame.attrs["list_length"] = list_length
        path.parent.mkdir(parents=True, exist_ok=True)
        frame.to_parquet(path)

    def to_state(self) -> dict[str, Any]:
        """Return this as tensors: Lightning loads checkpoints with ``weights_only``, which refuses arrays."""
        return _map_arrays(vars(self), torch.from_numpy)

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Validation:
        """Restore :meth:`to_state`."""
        return cls(**_map_arrays(state, Tensor.numpy))


def _map_arrays(fields: dict[str, Any], convert: Callable[[Any], Any]) -> dict[str, Any]:
    values = {name: convert(array) for name, array in fields["values"].items()}
    return {**fields, "row": convert(fields["row"]), "user": convert(fields["user"]), "values": values}
