"""Row means of ranking metrics as ``torchmetrics.Metric``; the formulas are in :mod:`recsys.functional`.

To add one, subclass :class:`RowMean` with its ``place_values``, and name it in :func:`recsys.evaluation.metrics_of`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric

from recsys.functional.ranking import (
    Place,
    check_cutoff,
    ndcg_at_k,
    place_positive,
    read_candidates,
    recall_at_k,
    reject_rows,
)

__all__ = ["NDCG", "Recall", "RowMean"]


class RowMean(Metric):
    """Mean of a per-row value over all rows seen, whatever the batches and processes that they came in.

    The states are a float64 sum and an int64 count: constant memory, and exact under data-parallel synchronisation with
    any number of rows per process. ``compute()`` gives a float64 scalar, NaN if there was no row.

    Args:
        name: says which value is summed; it must tell apart all metrics that differ in value.
        kwargs: as for ``torchmetrics.Metric``.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0
    of_full_list = False  # whether it counts all negatives, so that it says nothing of a list with items left out

    count: Tensor  # [] int64, rows seen

    def __init__(self, name: str, **kwargs: object) -> None:
        super().__init__(**kwargs)
        # MetricCollection merges, for good, metrics whose states have the same names and are equal after one batch. Two
        # cut-offs often have the same sum in the first batch (0, say), so the name of the sum keeps them apart.
        self._total_name = f"total[{name}]"
        self.add_state(self._total_name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    @property
    def total(self) -> Tensor:
        """Sum of the values of all rows seen, [] float64."""
        return getattr(self, self._total_name)

    def place_values(self, place: Place, num_negatives: int | Tensor | None) -> Tensor:
        """Value of each row from where its one positive stands, two [B]: [B] float64."""
        raise NotImplementedError

    def row_values(self, scores: Tensor, relevance: Tensor, num_negatives: int | Tensor | None) -> Tensor:
        """Value of each row, [B]; arguments as :meth:`update`. By default of rows with one positive at most."""
        scores, positive, faults = read_candidates(scores, relevance)
        faults["the row has more than one positive"] = positive.sum(dim=1) > 1
        reject_rows(faults)
        return self.place_values(place_positive(scores, positive), num_negatives)

    def add(self, values: Tensor) -> None:
        """Add the values ``[B]`` of rows, as :meth:`update` does."""
        self._add(values)
        self._update_count += 1  # torchmetrics counts calls of `update` alone, and warns where `compute` follows none
        self._computed = None

    def update(self, scores: Tensor, relevance: Tensor, num_negatives: int | Tensor | None = None) -> None:
        """Add rows.

        Args:
            scores: [B, C], higher is better, -inf = not listed.
            relevance: [B, C], bool or 0/1.
            num_negatives: N, one number or one per row [B]; None if the rows list all their negatives. Only WPAUC reads
                it; the others accept it so that all fit into one ``MetricCollection``.

        Raises:
            ValueError: as the metric's function in :mod:`recsys.functional`.
        """
        self._add(self.row_values(scores, relevance, num_negatives))

    def _add(self, values: Tensor) -> None:
        setattr(self, self._total_name, self.total + values.double().sum())
        self.count = self.count + len(values)

    def compute(self) -> Tensor:
        """Mean over the rows, [] float64."""
        return self.total / self.count


class Recall(RowMean):
    """Mean Recall@k over rows; see :func:`recsys.functional.ranking.recall_at_k`.

    Args:
        k: cut-off, >= 1.
        kwargs: as for ``torchmetrics.Metric``.

    Raises:
        ValueError: ``k`` < 1.

    Example:
        >>> recall = Recall(k=1)
        >>> recall.update(torch.tensor([[0.9, 0.5, 0.1], [0.2, 0.8, 0.1]]), torch.tensor([[1, 0, 0], [1, 0, 0]]))
        >>> recall.compute().item()
        0.5
    """

    def __init__(self, k: int, **kwargs: object) -> None:
        check_cutoff(k)
        super().__init__(f"Recall@{k}", **kwargs)
        self.k = k

    def place_values(self, place: Place, num_negatives: int | Tensor | None) -> Tensor:
        """Recall@k of each row, [B]; ``num_negatives`` is not read."""
        return place.recall(self.k)

    def row_values(self, scores: Tensor, relevance: Tensor, num_negatives: int | Tensor | None) -> Tensor:
        """Recall@k of each row, which may have several positives, [B]; ``num_negatives`` is not read."""
        return recall_at_k(scores, relevance, self.k)


class NDCG(RowMean):
    """Mean NDCG@k over rows; see :func:`recsys.functional.ranking.ndcg_at_k`.

    Args:
        k: cut-off, >= 1.
        kwargs: as for ``torchmetrics.Metric``.

    Raises:
        ValueError: ``k`` < 1.

    Example:
        >>> ndcg = NDCG(k=10)
        >>> ndcg.update(torch.tensor([[0.5, 0.9, 0.7, 0.1]]), torch.tensor([[1, 0, 0, 0]]))
        >>> ndcg.compute().item()
        0.5
    """

    def __init__(self, k: int, **kwargs: object) -> None:
        check_cutoff(k)
        super().__init__(f"NDCG@{k}", **kwargs)
        self.k = k

    def place_values(self, place: Place, num_negatives: int | Tensor | None) -> Tensor:
        """NDCG@k of each row, [B]; ``num_negatives`` is not read."""
        return place.gain(self.k)

    def row_values(self, scores: Tensor, relevance: Tensor, num_negatives: int | Tensor | None) -> Tensor:
        """NDCG@k of each row, which may have several positives, [B]; ``num_negatives`` is not read."""
        return ndcg_at_k(scores, relevance, self.k)
