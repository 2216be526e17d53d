"""WPAUC against a loop over the weights, scikit-learn's ROC curve, and Recall@k."""

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score, roc_curve
from torch import Tensor

from recsys.functional import recall_at_k, window_around, window_bounds, window_weights, windowed_partial_auc


def weight(j: int, a: float, b: float) -> float:
    """|(j-1, j] ∩ (a, b]|."""
    return max(0.0, min(j, b) - max(j - 1, a))


def loop_wpauc(scores: list[float], relevance: list[int], a: float, b: float) -> float:
    """The weighted share of negatives that a positive beats, averaged over positives; by loops."""
    negatives = sorted((s for s, r in zip(scores, relevance, strict=True) if not r), reverse=True)
    values = []
    for positive in (s for s, r in zip(scores, relevance, strict=True) if r):
        won = 0.0
        for j, negative in enumerate(negatives, start=1):
            won += weight(j, a, b) * (1.0 if positive > negative else 0.5 if positive == negative else 0.0)
        values.append(won / (b - a))
    return sum(values) / len(values)


def one_positive(batch: int, candidates: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Rows without ties whose one positive, at a random position, takes every rank."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.stack([torch.randperm(candidates, generator=generator) for _ in range(batch)]).double()
    relevance = torch.zeros(batch, candidates, dtype=torch.bool)
    relevance[torch.arange(batch), torch.randint(candidates, (batch,), generator=generator)] = True
    return scores, relevance


WINDOWS = [(0.0, 1.0), (0.0, 0.3), (0.25, 0.5), (0.13, 0.02), (0.61, 0.39), (0.9, 0.1)]


@pytest.mark.parametrize(("alpha", "d"), WINDOWS)
@pytest.mark.parametrize("levels", [3, 1000])  # few score levels make many ties
def test_equals_a_loop_over_the_weights(alpha: float, d: float, levels: int) -> None:
    torch.manual_seed(1)
    scores = torch.randint(levels, (40, 13)).double()
    relevance = torch.rand(40, 13) < 0.25
    relevance[:, 0], relevance[:, 1] = True, False
    got = windowed_partial_auc(scores, relevance, alpha, d)
    for row in range(40):
        n = int((~relevance[row]).sum())
        want = loop_wpauc(scores[row].tolist(), relevance[row].int().tolist(), alpha * n, (alpha + d) * n)
        assert got[row].item() == pytest.approx(want, abs=1e-12)


def test_full_window_is_sklearns_auc_with_ties_and_several_positives() -> None:
    torch.manual_seed(2)
    scores = torch.randint(5, (30, 20)).double()
    relevance = (torch.rand(30, 20) < 0.3).int()
    relevance[:, 0], relevance[:, 1] = 1, 0
    want = [roc_auc_score(y, s) for y, s in zip(relevance.numpy(), scores.numpy(), strict=True)]
    np.testing.assert_allclose(windowed_partial_auc(scores, relevance, 0, 1).numpy(), want, atol=1e-12)


# Bounds that are no multiples of 1/N: there the ROC curve is vertical and an interpolated height is ambiguous.
@pytest.mark.parametrize(("alpha", "d"), [(0.0, 0.07), (0.11, 0.33), (0.52, 0.41)])
def test_equals_the_trapezoid_under_sklearns_roc_curve(alpha: float, d: float) -> None:
    torch.manual_seed(3)
    for _ in range(20):
        scores = torch.randperm(25).double()
        relevance = torch.zeros(25, dtype=torch.bool)
        relevance[torch.randperm(25)[:4]] = True
        fpr, tpr, _ = roc_curve(relevance.numpy(), scores.numpy(), drop_intermediate=False)
        ends = np.array([alpha, alpha + d])
        inside = (fpr > ends[0]) & (fpr < ends[1])
        heights = np.interp(ends, fpr, tpr)
        if alpha == 0:
            heights[0] = tpr[fpr == 0].max()
        x = np.concatenate([ends[:1], fpr[inside], ends[1:]])
        y = np.concatenate([heights[:1], tpr[inside], heights[1:]])
        want = float((np.diff(x) * (y[1:] + y[:-1]) / 2).sum()) / d
        assert windowed_partial_auc(scores[None], relevance[None], alpha, d).item() == pytest.approx(want, abs=1e-12)


def test_integer_windows_are_the_mean_of_recall() -> None:
    scores, relevance = one_positive(50, 13)
    recall = torch.stack([recall_at_k(scores, relevance, k) for k in range(1, 13)])
    for a in range(12):
        for b in range(a + 1, 13):
            got = windowed_partial_auc(scores, relevance, a / 12, (b - a) / 12)
            torch.testing.assert_close(got, recall[a:b].mean(dim=0), rtol=0, atol=1e-12)


def test_window_of_one_negative_is_recall_exactly_at_every_cutoff() -> None:
    n = 1682  # no (K-1)/N + 1/N with this N is a binary fraction, so unsnapped bounds leak to the neighbours
    scores, relevance = one_positive(64, n + 1)
    for k in [*range(1, 30), 840, 1001, 1681, 1682]:
        wpauc = windowed_partial_auc(scores, relevance, (k - 1) / n, 1 / n)
        assert torch.equal(wpauc, recall_at_k(scores, relevance, k)), k


def test_cut_list_gives_the_value_of_the_complete_list() -> None:
    torch.manual_seed(4)
    n, listed = 200, 30
    scores, relevance = one_positive(100, n + 1)
    scores[:20] = scores[:20].where(~relevance[:20], n - 5.5)  # some positives within the list
    best = scores.masked_fill(relevance, -torch.inf).topk(listed, dim=1).values
    positive = scores[relevance][:, None]
    positive = positive.where(positive > best[:, -1:], -torch.inf)  # the beam lost the positives below it
    cut = torch.cat([best, positive], dim=1)
    marks = torch.zeros_like(cut, dtype=torch.bool)
    marks[:, -1] = True
    assert (positive == -torch.inf).any()
    assert (positive > -torch.inf).any()
    for alpha, d in [(0.0, listed / n), (4 / n, 3 / n), (0.021, 0.0777)]:
        want = windowed_partial_auc(scores, relevance, alpha, d)
        torch.testing.assert_close(windowed_partial_auc(cut, marks, alpha, d, n), want, rtol=0, atol=1e-12)
        per_row = torch.full((100,), n)
        torch.testing.assert_close(windowed_partial_auc(cut, marks, alpha, d, per_row), want, rtol=0, atol=1e-12)


def test_auc_of_beam_negatives_is_the_partial_auc_of_all_negatives() -> None:
    n, beam = 150, 20
    scores, relevance = one_positive(80, n + 1)
    scores = scores.masked_fill(relevance, n - 8.5)
    group = torch.cat([scores[relevance][:, None], scores.masked_fill(relevance, -1).topk(beam, dim=1).values], dim=1)
    marks = torch.zeros_like(group)
    marks[:, 0] = 1
    auc = windowed_partial_auc(group, marks, 0, 1)
    torch.testing.assert_close(windowed_partial_auc(scores, relevance, 0, beam / n), auc, rtol=0, atol=1e-12)
    assert ((auc > 0) & (auc < 1)).all()


def test_num_negatives_differs_by_row() -> None:
    scores = torch.tensor([[5.0, 6, 4, 3, 2], [5.0, 6, 4, 3, 2]])
    relevance = torch.tensor([[1, 0, 0, 0, 0]] * 2)
    # (a, b] = (0, 2] of 4 negatives, and (0, 4] of 8
    assert windowed_partial_auc(scores, relevance, 0, 0.5, torch.tensor([4, 8])).tolist() == [0.5, 0.75]


def test_rows_without_a_listed_positive_and_absent_positives_beat_nothing() -> None:
    scores = torch.tensor([[3.0, 2, 1, 0], [3.0, 2, 1, -torch.inf], [9.0, 2, 1, -torch.inf]])
    relevance = torch.tensor([[0, 0, 0, 0], [0, 0, 0, 1], [1, 0, 0, 1]])
    # third row: the mean of a perfect positive and one that the list lacks
    assert windowed_partial_auc(scores, relevance, 0, 1 / 3).tolist() == [0, 0, 0.5]


def test_padding_changes_nothing() -> None:
    torch.manual_seed(5)
    scores = torch.randint(6, (20, 10)).double()
    relevance = torch.rand(20, 10) < 0.3
    relevance[:, 0], relevance[:, 1] = True, False
    padded = torch.cat([torch.full((20, 2), -torch.inf, dtype=torch.double), scores], dim=1)
    marks = torch.cat([torch.zeros(20, 2, dtype=torch.bool), relevance], dim=1)
    assert torch.equal(windowed_partial_auc(padded, marks, 0.2, 0.5), windowed_partial_auc(scores, relevance, 0.2, 0.5))


@pytest.mark.parametrize(("alpha", "d"), WINDOWS)
def test_constant_scorer_gets_one_half(alpha: float, d: float) -> None:
    relevance = torch.eye(11)
    torch.testing.assert_close(windowed_partial_auc(torch.zeros(11, 11), relevance, alpha, d), torch.full((11,), 0.5))


def test_stays_within_0_and_1_whatever_the_rounding() -> None:
    scores, relevance = one_positive(4, 38)
    perfect, worst = scores.masked_fill(relevance, 99), scores.masked_fill(relevance, -99)
    for i in range(1, 200):
        alpha, d = i / 331, i / 500
        assert windowed_partial_auc(perfect, relevance, alpha, d).tolist() == [1] * 4
        assert windowed_partial_auc(worst, relevance, alpha, d).tolist() == [0] * 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("marks", [torch.bool, torch.int64, torch.float32])
def test_low_precision_scores_give_float32(dtype: torch.dtype, marks: torch.dtype) -> None:
    torch.manual_seed(6)
    scores = torch.randn(8, 30).to(dtype)
    relevance = torch.zeros(8, 30, dtype=marks)
    relevance[:, 7] = 1
    got = windowed_partial_auc(scores, relevance, 0.1, 0.4)
    want = windowed_partial_auc(scores.double(), relevance, 0.1, 0.4)
    assert (got.dtype, want.dtype) == (torch.float32, torch.float64)
    assert torch.equal(got, want.float())


def test_integer_scores_beyond_float32_are_not_tied() -> None:
    scores = torch.tensor([[2**24 + 1, 2**24]])
    assert windowed_partial_auc(scores, torch.tensor([[1, 0]]), 0, 1).item() == 1


def test_strided_input_and_empty_batch() -> None:
    scores, relevance = one_positive(6, 9)
    want = windowed_partial_auc(scores, relevance, 0.2, 0.5)
    assert torch.equal(windowed_partial_auc(scores.T.contiguous().T, relevance.T.contiguous().T, 0.2, 0.5), want)
    assert windowed_partial_auc(scores[:0], relevance[:0], 0.2, 0.5).shape == (0,)


def test_window_past_the_list_is_refused_with_the_numbers() -> None:
    scores, relevance = one_positive(3, 11)
    windowed_partial_auc(scores, relevance, 0.0, 0.1, 100)  # ends at the 10th of 10 listed negatives
    with pytest.raises(ValueError, match=r"row 0: .*ends at negative 11, .*only 10 of its 100 negatives.*longer list"):
        windowed_partial_auc(scores, relevance, 0.01, 0.1, 100)
    padded = scores.clone()
    padded[1, (~relevance[1]).nonzero()[0]] = -torch.inf
    with pytest.raises(ValueError, match=r"row 1: .*ends at negative 10, .*only 9 of"):
        windowed_partial_auc(padded, relevance, 0.0, 0.1, 100)


@pytest.mark.parametrize(
    ("scores", "relevance", "num_negatives", "message"),
    [
        ([[1.0, math.nan, 0.0]], [[1, 0, 0]], None, "row 0: a score is NaN"),
        ([[1.0, 2.0], [1.0, 2.0]], [[1, 0], [2, 0]], None, "row 1: relevance must be 0 or 1"),
        ([[1.0, 2.0]], [[-1, 0]], None, "relevance must be 0 or 1"),
        ([[1.0, 2.0, 0.0]], [[1, 0, 0]], 1, "num_negatives is 1, but the row lists 2"),
        ([[1.0, 2.0]], [[1, 1]], None, "of the row's 0 negatives is empty"),
        ([[1.0, 2.0]], [[1, 0]], [1, 1], r"one per row \[1\], got \[2\]"),
        ([1.0, 2.0], [1, 0], None, r"must both be \[B, C\]"),
        ([[[1.0, 2.0]]], [[[1, 0]]], None, r"must both be \[B, C\]"),
        ([[1.0, 2.0]], [[1, 0, 0]], None, r"got \[1, 2\] and \[1, 3\]"),
        ([[], []], [[], []], None, "C >= 1"),
    ],
)
def test_wrong_input_is_refused(scores: list, relevance: list, num_negatives: int | list | None, message: str) -> None:
    n = torch.tensor(num_negatives) if isinstance(num_negatives, list) else num_negatives
    with pytest.raises(ValueError, match=message):
        windowed_partial_auc(torch.tensor(scores), torch.tensor(relevance), 0, 1, n)


@pytest.mark.parametrize(
    ("alpha", "d"), [(-0.1, 0.5), (0.5, 0.0), (0.5, -0.1), (0.6, 0.5), (math.nan, 0.5), (0, math.nan)]
)
def test_no_window(alpha: float, d: float) -> None:
    with pytest.raises(ValueError, match="0 <= alpha, 0 < d and alpha"):
        window_bounds(alpha, d, 10)


def test_window_narrower_than_the_snapping_is_refused() -> None:
    with pytest.raises(ValueError, match="is empty"):
        windowed_partial_auc(torch.tensor([[1.0, 2.0, 0.0]]), torch.tensor([[1, 0, 0]]), 0.5, 1e-9)


def test_bounds_are_snapped_to_integers_and_end_at_n() -> None:
    for n in (7, 1682, 3_000_017):
        for k in (1, 2, 3, 5, 7):
            assert window_bounds((k - 1) / n, 1 / n, n) == (k - 1, k)
    assert window_bounds(0.25, 0.5, 10) == (2.5, 7.5)
    assert window_bounds(0.1, 0.9, 10) == (1, 10)
    n = 10**9  # alpha + d = 1 + 5e-10, within rounding of 1, would end half a negative past the list
    assert window_bounds(0.5, 0.5 + 5e-10, n)[1] == n
    a, b = window_bounds(0.1, 0.2, torch.tensor([10, 20]))
    assert (a.tolist(), b.tolist(), a.dtype) == ([1, 2], [3, 6], torch.float64)


@pytest.mark.parametrize(("a", "b"), [(0.0, 9.0), (0.0, 4.0), (2.0, 5.0), (1.3, 1.9), (0.4, 6.7)])
@pytest.mark.parametrize("levels", [3, 1000])
def test_weights_are_shared_by_ties(a: float, b: float, levels: int) -> None:
    torch.manual_seed(7)
    scores = torch.randint(levels, (30, 9)).float()
    got = window_weights(scores, a, b)
    for row, weights in zip(scores.tolist(), got.tolist(), strict=True):
        ranked = sorted(row, reverse=True)
        for score, w in zip(row, weights, strict=True):
            places = [j for j, s in enumerate(ranked, start=1) if s == score]
            assert w == pytest.approx(sum(weight(j, a, b) for j in places) / len(places), abs=1e-12)
    torch.testing.assert_close(got.sum(dim=1), torch.full((30,), b - a).double())


def test_weights_with_padding_and_bounds_by_row() -> None:
    scores = torch.tensor([[1.0, -torch.inf, 3.0, 2.0], [1.0, 4.0, 3.0, 2.0]])
    got = window_weights(scores, torch.tensor([1.0, 0.0]), torch.tensor([2.5, 1.0]))
    assert got.tolist() == [[0.5, 0, 0, 1], [0, 1, 0, 0]]


def test_window_around_a_cutoff() -> None:
    for k, half_width, bounds in [(10, 5, (5, 15)), (10, 1, (9, 11)), (3, 5, (0, 8)), (5, 0.5, (4.5, 5.5))]:
        assert window_bounds(*window_around(k, half_width, 1682), 1682) == bounds
    assert window_bounds(*window_around(10, 5, 15), 15) == (5, 15)
    with pytest.raises(ValueError, match=r"ends at negative 15 .* only 14 negatives"):
        window_around(10, 5, 14)
    for k, half_width in [(10, 0), (10, -1), (0, 5), (10, math.nan)]:
        with pytest.raises(ValueError, match="k >= 1 and half_width > 0"):
            window_around(k, half_width, 100)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_equals_cpu() -> None:
    scores, relevance = one_positive(16, 40)
    n = torch.full((16,), 100)
    want = windowed_partial_auc(scores, relevance, 0.05, 0.3, n)
    got = windowed_partial_auc(scores.cuda(), relevance.cuda(), 0.05, 0.3, n)
    assert torch.equal(got.cpu(), want)
