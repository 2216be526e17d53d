"""Recall, NDCG and ranks against permutations, scikit-learn and torchmetrics."""

import itertools
import math

import pytest
import torch
from sklearn.metrics import ndcg_score
from torch import Tensor
from torchmetrics.functional.retrieval import (
    retrieval_hit_rate,
    retrieval_normalized_dcg,
    retrieval_recall,
)
from torchmetrics.retrieval import RetrievalRecall

from recsys.functional import expected_rank, ndcg_at_k, recall_at_k


def distinct(batch: int, candidates: int, positives: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    # from 1 up: torchmetrics takes scores of 0 and below for items that were not retrieved
    scores = torch.stack([torch.randperm(candidates) for _ in range(batch)]).double() + 1
    relevance = torch.zeros(batch, candidates, dtype=torch.bool)
    for row in relevance:
        row[torch.randperm(candidates)[:positives]] = True
    return scores, relevance


@pytest.mark.parametrize("positives", [1, 4])
@pytest.mark.parametrize("k", [1, 3, 12])
def test_equal_torchmetrics_without_ties(positives: int, k: int) -> None:
    scores, relevance = distinct(25, 12, positives)
    recall, ndcg = recall_at_k(scores, relevance, k), ndcg_at_k(scores, relevance, k)
    for row in range(25):
        s, y = scores[row], relevance[row]
        assert recall[row].item() == pytest.approx(retrieval_recall(s, y, top_k=k).item(), abs=1e-6)
        assert ndcg[row].item() == pytest.approx(retrieval_normalized_dcg(s, y, top_k=k).item(), abs=1e-6)
        if positives == 1:
            assert recall[row].item() == retrieval_hit_rate(s, y, top_k=k).item()
    reference = RetrievalRecall(top_k=k)
    reference.update(scores.flatten(), relevance.flatten(), torch.arange(25).repeat_interleave(12))
    assert recall.mean().item() == pytest.approx(reference.compute().item(), abs=1e-6)


@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_ties_are_the_mean_over_all_orders(k: int) -> None:
    torch.manual_seed(1)
    for _ in range(12):
        scores, relevance = torch.randint(3, (1, 5)).double(), (torch.rand(1, 5) < 0.5).int()
        relevance[0, 0] = 1
        recalls, dcgs = [], []
        for order in itertools.permutations(range(5)):
            if any(scores[0, i] < scores[0, j] for i, j in itertools.pairwise(order)):
                continue  # not a ranking by score
            hits = [int(relevance[0, i]) for i in order[:k]]
            recalls.append(sum(hits) / int(relevance.sum()))
            dcgs.append(sum(h / math.log2(p + 2) for p, h in enumerate(hits)))
        ideal = sum(1 / math.log2(p + 2) for p in range(min(k, int(relevance.sum()))))
        assert recall_at_k(scores, relevance, k).item() == pytest.approx(sum(recalls) / len(recalls), abs=1e-12)
        assert ndcg_at_k(scores, relevance, k).item() == pytest.approx(sum(dcgs) / len(dcgs) / ideal, abs=1e-12)


@pytest.mark.parametrize("k", [1, 4, 20, 50])
def test_ndcg_equals_sklearn_with_ties(k: int) -> None:
    torch.manual_seed(2)
    scores, relevance = torch.randint(6, (30, 20)).double(), (torch.rand(30, 20) < 0.3).int()
    relevance[:, 3] = 1
    want = [ndcg_score(y[None], s[None], k=k) for s, y in zip(scores.numpy(), relevance.numpy(), strict=True)]
    torch.testing.assert_close(ndcg_at_k(scores, relevance, k), torch.tensor(want, dtype=torch.double))


def test_worked_numbers_for_one_positive() -> None:
    scores, relevance = torch.tensor([[5.0, 9, 7, 1, 0]]), torch.tensor([[1, 0, 0, 0, 0]])  # rank 3
    assert expected_rank(scores, relevance).tolist() == [3]
    assert [recall_at_k(scores, relevance, k).item() for k in (1, 2, 3, 4)] == [0, 0, 1, 1]
    assert [ndcg_at_k(scores, relevance, k).item() for k in (2, 3, 10)] == [0, 0.5, 0.5]


def test_constant_scorer_gets_chance() -> None:
    scores, relevance = torch.zeros(8, 8), torch.eye(8)
    torch.testing.assert_close(recall_at_k(scores, relevance, 3), torch.full((8,), 3 / 8))
    assert expected_rank(scores, relevance).tolist() == [4.5] * 8
    chance = sum(1 / math.log2(p + 1) for p in (1, 2, 3)) / 8
    torch.testing.assert_close(ndcg_at_k(scores, relevance, 3), torch.full((8,), chance))


def test_cutoff_beyond_the_list_counts_misses() -> None:
    scores = torch.tensor([[3.0, 2, 1], [3.0, 2, -torch.inf], [3.0, 2, 1]])
    relevance = torch.tensor([[0, 0, 1], [1, 0, 1], [0, 0, 0]])
    assert recall_at_k(scores, relevance, 100).tolist() == [1, 0.5, 0]
    ideal = 1 + 1 / math.log2(3)
    torch.testing.assert_close(ndcg_at_k(scores, relevance, 100), torch.tensor([0.5, 1 / ideal, 0]))


def test_duplicates_are_not_credited_twice() -> None:
    scores, relevance = torch.tensor([[4.0, 4.0, 1.0]]), torch.tensor([[1, 1, 0]])
    assert recall_at_k(scores, relevance, 1).item() == 0.5
    assert recall_at_k(scores, relevance, 2).item() == 1
    assert recall_at_k(scores, relevance, 9).item() == 1
    assert ndcg_at_k(scores, relevance, 9).item() == 1


def test_never_above_one_whatever_the_rounding() -> None:
    for positives in range(1, 60):
        scores = torch.arange(60).double()[None]
        relevance = scores >= 60 - positives
        for k in (1, 7, 31, 60):
            assert ndcg_at_k(scores, relevance, k).item() <= 1
            assert ndcg_at_k(scores, relevance, k).item() == pytest.approx(1)
            assert recall_at_k(torch.zeros_like(scores), relevance, k).item() <= 1
    torch.manual_seed(5)
    scores = torch.randint(7, (30, 60)).double()  # ties add up the discounts in another order than the ideal list
    assert (ndcg_at_k(scores, torch.ones(30, 60), 60) <= 1).all()


def test_padding_changes_nothing() -> None:
    torch.manual_seed(3)
    scores = torch.randint(4, (20, 9)).double()
    relevance = torch.nn.functional.one_hot(torch.randint(9, (20,)), 9)
    padded = torch.cat([torch.full((20, 3), -torch.inf, dtype=torch.double), scores], dim=1)
    marks = torch.cat([torch.zeros(20, 3, dtype=torch.int64), relevance], dim=1)
    for function in (lambda s, y: recall_at_k(s, y, 3), lambda s, y: ndcg_at_k(s, y, 3), expected_rank):
        assert torch.equal(function(padded, marks), function(scores, relevance))


def test_expected_rank() -> None:
    scores = torch.tensor([[4.0, 4, 4, 9, 1], [1.0, 2, 3, 4, 5], [1.0, 2, 3, 4, 5], [-torch.inf, 2, 3, 4, 5]])
    relevance = torch.tensor([[0, 1, 0, 0, 0], [0, 0, 0, 0, 1], [0, 0, 0, 0, 0], [1, 0, 0, 0, 0]])
    # first row: 1 + one above + half of two ties
    assert expected_rank(scores, relevance).tolist() == [3, 1, math.inf, math.inf]
    with pytest.raises(ValueError, match="row 1: there are 2 positives"):
        expected_rank(scores[:2], torch.tensor([[0, 1, 0, 0, 0], [0, 1, 0, 0, 1]]))


@pytest.mark.parametrize(
    ("dtype", "out"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
        (torch.int64, torch.float64),
    ],
)
def test_dtypes(dtype: torch.dtype, out: torch.dtype) -> None:
    torch.manual_seed(4)
    scores = torch.randint(100, (6, 20)).to(dtype)
    relevance = torch.nn.functional.one_hot(torch.arange(6), 20).bool()
    for function in (lambda s, y: recall_at_k(s, y, 3), lambda s, y: ndcg_at_k(s, y, 3), expected_rank):
        got = function(scores, relevance)
        assert got.dtype == out
        assert torch.equal(got, function(scores.double(), relevance).to(out))


@pytest.mark.parametrize("function", [recall_at_k, ndcg_at_k, lambda s, y, k: expected_rank(s, y)])
def test_wrong_input_is_refused(function) -> None:
    ok = torch.tensor([[1.0, 2.0]])
    with pytest.raises(ValueError, match="row 0: a score is NaN"):
        function(torch.tensor([[1.0, math.nan]]), torch.tensor([[1, 0]]), 1)
    with pytest.raises(ValueError, match="row 0: relevance must be 0 or 1"):
        function(ok, torch.tensor([[3, 0]]), 1)
    with pytest.raises(ValueError, match=r"must both be \[B, C\]"):
        function(ok[0], torch.tensor([1, 0]), 1)
    with pytest.raises(ValueError, match=r"got \[1, 2\] and \[2, 1\]"):
        function(ok, torch.tensor([[1], [0]]), 1)


@pytest.mark.parametrize("function", [recall_at_k, ndcg_at_k])
@pytest.mark.parametrize("k", [0, -3])
def test_cutoff_below_one_is_refused(function, k: int) -> None:
    with pytest.raises(ValueError, match="k must be at least 1"):
        function(torch.tensor([[1.0, 2.0]]), torch.tensor([[1, 0]]), k)
