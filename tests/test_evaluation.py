"""Metrics from one count of where positives stand: against loops, and that it is one count."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from recsys.evaluation import Evaluation, logged_names
from recsys.search import Ranking
from recsys.window import Dial, DialSettings, Window

M = 60


def dial(*cutoffs: int, window: Window = Window(k=4, half_width=2.5)) -> Dial:
    return DialSettings(window, cutoffs, num_beams=12).resolve(M, M - 1)


def lists(rows: int = 200, ties: bool = True) -> tuple[Ranking, torch.Tensor, torch.Tensor]:
    """Ranked lists, some shorter than the others; targets inside and outside of them; items seen before."""
    generator = torch.Generator().manual_seed(0)
    items = torch.stack([torch.randperm(M - 1, generator=generator)[:12] for _ in range(rows)])
    scores = torch.randint(20, (rows, 12), generator=generator) if ties else torch.randn(rows, 12, generator=generator)
    scores = scores.float().sort(dim=1, descending=True).values
    valid = torch.arange(12) < torch.randint(8, 13, (rows, 1), generator=generator)
    place = torch.randint(12, (rows,), generator=generator)
    target = items[torch.arange(rows), place].where(torch.rand(rows, generator=generator) < 0.8, M - 1)
    seen = torch.rand(rows, 12, generator=generator) < 0.3
    return Ranking(items.where(valid, 0), scores.masked_fill(~valid, -torch.inf), valid), target, seen


def by_hand(
    scores: dict[int, float], target: int, k: int, start: float, end: float
) -> tuple[float, float, float, float]:
    """Recall@k, NDCG@k, WPAUC and the rank, as means over the orders of ties."""
    if target not in scores:
        return 0.0, 0.0, 0.0, math.inf
    above = sum(score > scores[target] for score in scores.values())
    tied = sum(score == scores[target] for score in scores.values())
    places = range(above + 1, above + tied + 1)
    recall = sum(place <= k for place in places) / tied
    ndcg = sum(1 / math.log2(place + 1) for place in places if place <= k) / tied
    beaten = 0.0  # the share of the window's negatives below the positive, ties one half
    for j in range(1, M):
        inside = max(0.0, min(j, end) - max(j - 1, start)) / (end - start)
        beaten += inside * (0.0 if j <= above else 0.5 if j <= above + tied - 1 else 1.0)
    return recall, ndcg, beaten, sum(places) / tied


@pytest.mark.parametrize("ties", [True, False])
def test_every_value_is_that_of_a_loop_over_the_list(ties: bool) -> None:
    ranking, target, seen = lists(ties=ties)
    turned = dial(1, 3)
    evaluation = Evaluation("val", turned)
    found = evaluation.update(ranking, target, seen)
    for row in range(len(target)):
        listed = [(int(i), s.item()) for i, s, v in zip(*(x[row] for x in vars(ranking).values()), strict=True) if v]
        kept = {
            int(i) for i, hidden in zip(ranking.items[row], seen[row] | ~ranking.valid[row], strict=True) if not hidden
        }
        lists_of = {"": dict(listed), "filtered_": {i: s for i, s in listed if i in kept or i == target[row]}}
        for prefix, scores in lists_of.items():
            for k in (1, 3, 4):
                want = by_hand(scores, int(target[row]), k, turned.window.start, turned.window.end)
                assert found[f"{prefix}recall@{k}"][row].item() == pytest.approx(want[0])
                assert found[f"{prefix}ndcg@{k}"][row].item() == pytest.approx(want[1])
            if not prefix:
                assert found["wpauc"][row].item() == pytest.approx(want[2])
                assert found["rank"][row].item() == want[3]
    metrics = evaluation.metrics()
    assert metrics.keys() | {f"val_user_mean/{name[4:]}" for name in evaluation.full} == logged_names("val", (1, 3, 4))
    for name, metric in metrics.items():
        key = name.replace("val_filtered/", "filtered_").replace("val/", "")
        assert metric.compute().item() == pytest.approx(found[key].double().mean().item(), rel=1e-6)


def test_a_score_that_is_nan_is_refused() -> None:
    ranking, target, seen = lists(rows=3)
    ranking.scores[1, 0] = torch.nan
    with pytest.raises(ValueError, match="a score is NaN"):
        Evaluation("val", dial(1)).update(ranking, target, seen)


class Operations(TorchDispatchMode):
    """Counts what is done."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def test_more_cutoffs_count_the_positives_no_oftener() -> None:
    counts = []
    for cutoffs in ((1,), (1, 2, 3, 5, 6, 7, 8)):
        ranking, target, seen = lists()
        evaluation = Evaluation("val", dial(*cutoffs))
        with Operations() as operations:
            evaluation.update(ranking, target, seen)
        assert not {"sort", "searchsorted", "nonzero", "topk"} & operations.count.keys()
        counts.append({name: operations.count[name] for name in ("gt", "ge", "_local_scalar_dense")})
    assert counts[0] == counts[1]
    assert counts[0]["ge"] == 2  # of the full list, and of the one without seen items
