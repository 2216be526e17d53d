"""Metrics of ranked lists: where a positive stands is counted once a batch, and everything comes from that count."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from recsys.functional import Place, place_positive
from recsys.metrics import NDCG, WPAUC, Recall
from recsys.metrics.ranking import RowMean
from recsys.search import Ranking
from recsys.window import Dial

FILTERED = "filtered_"  # begins the names of per-row values of lists without the items that a user has seen


def metrics_of(cutoffs: tuple[int, ...], alpha: float, d: float) -> dict[str, RowMean]:
    """Return every metric by name, for these cut-offs and a window of false positive rates."""
    metrics: dict[str, RowMean] = {f"recall@{k}": Recall(k) for k in cutoffs}
    metrics |= {f"ndcg@{k}": NDCG(k) for k in cutoffs}
    return metrics | {"wpauc": WPAUC(alpha, d)}


def logged_names(part: str, cutoffs: tuple[int, ...]) -> set[str]:
    """Return the names under which a part of the rows (``val``, ``test``) is logged with these cut-offs."""
    metrics = metrics_of(cutoffs, 0.0, 1.0)
    filtered = {f"{part}_filtered/{name}" for name, metric in metrics.items() if not metric.of_full_list}
    return filtered | {f"{prefix}/{name}" for prefix in (part, f"{part}_user_mean") for name in metrics}


class Evaluation(nn.Module):
    """The metrics of one part of the rows, of full lists and of lists without the items that the user has seen.

    Args:
        part: ``val`` or ``test``, the beginning of the logged names.
        dial: Cut-offs and window.
    """

    def __init__(self, part: str, dial: Dial) -> None:
        super().__init__()
        self.dial = dial
        full, filtered = (metrics_of(dial.cutoffs, dial.window.alpha, dial.window.d) for _ in range(2))
        self.full = nn.ModuleDict({f"{part}/{name}": metric for name, metric in full.items()})
        self.filtered = nn.ModuleDict(
            {f"{part}_filtered/{name}": metric for name, metric in filtered.items() if not metric.of_full_list}
        )

    def metrics(self) -> dict[str, RowMean]:
        """Return every metric by its logged name."""
        return {**self.full, **self.filtered}  # type: ignore[dict-item]

    def update(self, ranking: Ranking, target: Tensor, seen: Tensor) -> dict[str, Tensor]:
        """Count rows, add them to the metrics, and return what each row got.

        Args:
            ranking: Lists of B rows.
            target: ``[B]`` catalogue index of the positive.
            seen: ``[B, W]`` bool, items of the list that the row's user has chosen before.

        Returns:
            ``rank [B]`` (inf if not in the list), and the value ``[B]`` of each metric by its name, with ``filtered_``
            before those of the lists without seen items; the target stays in these.

        Raises:
            ValueError: if a score is NaN.
        """
        if bool(ranking.scores.isnan().any()):
            raise ValueError("a score is NaN: the policy's weights or its computation are not finite")
        relevance = (ranking.items == target[:, None]) & ranking.valid
        place = place_positive(ranking.scores, relevance)
        values = {"rank": place.rank.float()}
        values |= self._add(self.full, place, "")
        return values | self._add(self.filtered, place_positive(ranking.scores, relevance, ~seen), FILTERED)

    def _add(self, metrics: nn.ModuleDict, place: Place, prefix: str) -> dict[str, Tensor]:
        values = {}
        for name, metric in metrics.items():
            assert isinstance(metric, RowMean)
            value = metric.place_values(place, self.dial.window.num_negatives)
            metric.add(value)
            values[prefix + name.split("/", 1)[1]] = value.to(torch.float32)
        return values
