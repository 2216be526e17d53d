"""Stateful metrics: equal to the mean of the functions, whatever the batches and processes."""

import doctest
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchmetrics import Metric, MetricCollection

import recsys.metrics.ranking
import recsys.metrics.wpauc
from recsys.functional import ndcg_at_k, recall_at_k, windowed_partial_auc
from recsys.metrics import NDCG, WPAUC, Recall

N = 50  # negatives of a user, of which the rows list 19
CASES: dict[str, tuple[Callable[[], Metric], Callable[[Tensor, Tensor], Tensor]]] = {
    "wpauc": (lambda: WPAUC(0.04, 0.2), lambda s, y: windowed_partial_auc(s, y, 0.04, 0.2, N)),
    "recall": (lambda: Recall(5), lambda s, y: recall_at_k(s, y, 5)),
    "ndcg": (lambda: NDCG(5), lambda s, y: ndcg_at_k(s, y, 5)),
}


def rows(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(12, (count, 20), generator=generator).float()  # ties
    return scores, torch.nn.functional.one_hot(torch.randint(20, (count,), generator=generator), 20)


@pytest.mark.parametrize("name", CASES)
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), sizes=st.lists(st.integers(0, 7), min_size=1, max_size=6).filter(any))
def test_value_does_not_depend_on_the_batches(name: str, seed: int, sizes: list[int]) -> None:
    make, function = CASES[name]
    scores, relevance = rows(sum(sizes), seed)
    metric = make()
    for s, y in zip(scores.split(sizes), relevance.split(sizes), strict=True):
        metric.update(s, y, num_negatives=N)
    values = function(scores, relevance)
    alone = torch.cat([function(s[None], y[None]) for s, y in zip(scores, relevance, strict=True)])
    assert torch.equal(values, alone)
    assert metric.compute().item() == pytest.approx(values.double().mean().item(), abs=1e-14)


@pytest.mark.parametrize("name", CASES)
def test_memory_is_constant_and_states_are_sums(name: str) -> None:
    metric = CASES[name][0]()
    for seed in range(5):
        metric.update(*rows(40, seed), N)
    states = [getattr(metric, state) for state in metric._defaults]
    assert sorted((state.dtype for state in states), key=str) == [torch.float64, torch.int64]
    assert all(state.shape == () for state in states)
    assert metric.count == 200
    assert metric.total / 200 == metric.compute()
    metric.reset()
    assert metric.count == 0
    assert metric.total == 0


@pytest.mark.parametrize("name", CASES)
def test_forward_gives_the_batch_and_keeps_the_sum(name: str) -> None:
    make, function = CASES[name]
    metric = make()
    for seed in range(3):
        assert metric(*rows(4, seed), N).item() == pytest.approx(function(*rows(4, seed)).mean().item())
    every = torch.cat([function(*rows(4, seed)) for seed in range(3)])
    assert metric.compute().item() == pytest.approx(every.mean().item())


def test_a_collection_does_not_merge_metrics_that_start_equal() -> None:
    collection = MetricCollection(
        {"r1": Recall(1), "r2": Recall(2), "n1": NDCG(1), "n2": NDCG(2), "w1": WPAUC(0, 0.25), "w2": WPAUC(0.25, 0.25)}
    )
    relevance = torch.tensor([[1, 0, 0, 0, 0]])
    for rank in (5, 2, 2):  # all values are 0 in the first batch
        scores = torch.tensor([[4.5 - rank + 1, 4.0, 3.0, 2.0, 1.0]])
        collection.update(scores, relevance, num_negatives=4)
    got = {key: value.item() for key, value in collection.compute().items()}
    share = 2 / 3
    want = {"r1": 0, "r2": share, "n1": 0, "n2": share / math.log2(3), "w1": 0, "w2": share}
    assert got == pytest.approx(want)


@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric")
@pytest.mark.parametrize("name", CASES)
def test_no_rows_gives_nan(name: str) -> None:
    mean = CASES[name][0]().compute()
    assert mean.isnan()
    assert mean.dtype == torch.float64  # as that of a process which had rows


def test_conversion_of_the_model_to_bfloat16_costs_no_digits() -> None:
    model = torch.nn.Module()
    model.metric = Recall(1)
    model.to(torch.bfloat16)  # as the trainer's bf16-true does; a bfloat16 sum would stop at 256
    for _ in range(400):
        model.metric.update(torch.tensor([[1.0, 0.0]]), torch.tensor([[1, 0]]))
    assert model.metric.compute().item() == 1


def test_wrong_parameters_are_refused_at_once() -> None:
    for metric in (Recall, NDCG):
        with pytest.raises(ValueError, match="k must be at least 1"):
            metric(0)
    with pytest.raises(ValueError, match="0 <= alpha, 0 < d and alpha"):
        WPAUC(0.5, 0.6)


def test_wpauc_reads_num_negatives() -> None:
    scores, relevance = rows(3)
    with pytest.raises(ValueError, match="ends at negative 20, but the row lists only 19 of its 100"):
        WPAUC(0.0, 0.2).update(scores, relevance, torch.full((3,), 100))


@pytest.mark.parametrize("module", [recsys.metrics.ranking, recsys.metrics.wpauc])
def test_examples_in_docstrings(module) -> None:
    result = doctest.testmod(module)
    assert result.attempted > 0
    assert result.failed == 0


def _process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    scores, relevance = rows(11)
    mine = [slice(0, 5), slice(5, 8)] if rank == 0 else [slice(8, 11)]  # 8 rows in two batches, and 3 in one
    metrics = {name: make() for name, (make, _) in CASES.items()}
    for part in mine:
        for metric in metrics.values():
            metric.update(scores[part], relevance[part], N)
    torch.save({name: metric.compute() for name, metric in metrics.items()}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_with_uneven_rows_equal_one(tmp_path: Path) -> None:
    mp.spawn(_process, (str(tmp_path),), nprocs=2)
    scores, relevance = rows(11)
    for rank in range(2):
        got = torch.load(tmp_path / f"{rank}.pt")
        for name, (_, function) in CASES.items():
            assert got[name].item() == pytest.approx(function(scores, relevance).double().mean().item(), abs=1e-14)
