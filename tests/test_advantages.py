"""Advantages against worked arithmetic, loops over the window, and gradients by autograd."""

import math

import pytest
import torch
from torch import Tensor

from recsys.functional import gate_open, group_advantages, tawin_advantages, windowed_partial_auc


def groups(batch: int, n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Tie-free groups of one positive, at any position, and n negatives; every rank of the positive occurs."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.stack([torch.randperm(n + 1, generator=generator) for _ in range(batch)]).double()
    return scores, scores == (torch.arange(batch) % (n + 1))[:, None]


@pytest.mark.parametrize("n", [1, 3, 15, 63])
def test_one_positive_gives_sqrt_n(n: int) -> None:
    rewards = torch.zeros(2, n + 1, dtype=torch.double)
    rewards[0, 0] = rewards[1, n] = 1
    want = torch.full_like(rewards, -1 / math.sqrt(n))
    want[0, 0] = want[1, n] = math.sqrt(n)
    torch.testing.assert_close(group_advantages(rewards), want, rtol=1e-10, atol=0)


def test_group_advantages_standardise_any_rewards() -> None:
    torch.manual_seed(0)
    advantages = group_advantages(torch.randn(5, 8, dtype=torch.double) * 1e-6 + 3)
    torch.testing.assert_close(advantages.mean(dim=1), torch.zeros(5).double(), rtol=0, atol=1e-9)
    torch.testing.assert_close(advantages.square().mean(dim=1), torch.ones(5).double(), rtol=1e-8, atol=0)


@pytest.mark.parametrize("reward", [0.0, 1.0, 0.1, -1 / 3])  # the mean of equal 0.1s is not 0.1
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_group_without_signal_gives_zeros(reward: float, dtype: torch.dtype) -> None:
    rewards = torch.full((2, 7), reward, dtype=dtype)
    rewards[1, 0] = 5  # the neighbour is not touched
    advantages = group_advantages(rewards)
    assert advantages[0].tolist() == [0] * 7
    assert advantages[1].abs().min() > 0.1
    assert advantages.dtype == torch.promote_types(dtype, torch.float32)


def test_group_advantages_accept_marks_and_refuse_other_shapes() -> None:
    got = group_advantages(torch.tensor([[True, False, False, False, False]]))
    torch.testing.assert_close(got, torch.tensor([[2.0, -0.5, -0.5, -0.5, -0.5]]))
    assert group_advantages(torch.zeros(0, 3)).shape == (0, 3)
    for shape in [(3,), (2, 0), (1, 2, 3)]:
        with pytest.raises(ValueError, match=r"rewards must be \[B, G\]"):
            group_advantages(torch.zeros(shape))


def test_grpo_gradient_is_the_linear_surrogate_of_auc() -> None:
    torch.manual_seed(1)
    n = 7
    features, weight = torch.randn(4, 5).double(), torch.randn(5, 30).double().requires_grad_()
    items = torch.stack([torch.randperm(30)[: n + 1] for _ in range(4)])  # positive first
    s = (features @ weight).log_softmax(dim=1).gather(1, items)  # [B, G]
    rewards = torch.zeros_like(s)
    rewards[:, 0] = 1
    ratio = (s - s.detach()).exp()
    (got,) = torch.autograd.grad((group_advantages(rewards) * ratio).mean(dim=1).sum(), weight, retain_graph=True)
    surrogate = math.sqrt(n) / (n + 1) * (s[:, 0] - s[:, 1:].mean(dim=1))
    (want,) = torch.autograd.grad(surrogate.sum(), weight)
    assert ((got - want).norm() / want.norm()).item() < 1e-10


def test_full_window_without_gate_is_grpo() -> None:
    scores, relevance = groups(32, 15)
    scores[0, 1:] = scores[0, 0]  # ties as well
    want = group_advantages(relevance.double())
    for num_negatives in (None, 15, torch.full((32,), 15)):
        got = tawin_advantages(scores, relevance, 0, 1, num_negatives, gate="none")
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_beam_negatives_are_the_window_that_starts_at_zero() -> None:
    scores, relevance = groups(16, 15)
    got = tawin_advantages(scores, relevance, 0, 15 / 1000, 1000, gate="none")
    torch.testing.assert_close(got, group_advantages(relevance.double()), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("a", "b"), [(0, 6), (2, 5), (3, 4), (1.5, 4.25)])
@pytest.mark.parametrize("levels", [3, 1000])
def test_negatives_are_weighed_by_their_place_in_the_window(a: float, b: float, levels: int) -> None:
    torch.manual_seed(2)
    n, total = 9, 50
    scores = torch.randint(levels, (20, n + 1)).double()
    relevance = torch.nn.functional.one_hot(torch.randint(n + 1, (20,)), n + 1)
    got = tawin_advantages(scores, relevance, a / total, (b - a) / total, total, gate="none")
    for s, y, advantages in zip(scores.tolist(), relevance.tolist(), got.tolist(), strict=True):
        ranked = sorted((score for score, mark in zip(s, y, strict=True) if not mark), reverse=True)
        for score, mark, advantage in zip(s, y, advantages, strict=True):
            if mark:
                want = math.sqrt(n)
            else:
                places = [j for j, other in enumerate(ranked, start=1) if other == score]
                w = sum(max(0.0, min(j, b) - max(j - 1, a)) for j in places) / len(places) / (b - a) * n
                want = -w / math.sqrt(n)
            assert advantage == pytest.approx(want, abs=1e-9)


@pytest.mark.parametrize("gate", ["none", "sigmoid", "threshold"])
def test_groups_sum_to_zero(gate: str) -> None:
    scores, relevance = groups(60, 19)
    scores[::3] = (scores[::3] / 3).floor()  # ties in every third group
    advantages = tawin_advantages(scores, relevance, 0.031, 0.04, 200, gate=gate)
    torch.testing.assert_close(advantages.sum(dim=1), torch.zeros(60).double(), rtol=0, atol=1e-12)
    assert advantages.abs().sum() > 0


@pytest.mark.parametrize(("a", "b"), [(0, 3), (2, 5), (4, 5), (5, 12), (1.5, 3.5), (0.4, 0.6)])
def test_gate_is_open_where_one_rank_more_or_less_changes_wpauc(a: float, b: float) -> None:
    n, total = 12, 40
    alpha, d = a / total, (b - a) / total
    # Row c: the positive, first, scores below c of the negatives 0 .. n-1.
    negatives = torch.arange(n).double().flip(0).expand(n + 1, n)
    scores = torch.cat([n - 0.5 - torch.arange(n + 1).double()[:, None], negatives], dim=1)
    relevance = torch.zeros(n + 1, n + 1)
    relevance[:, 0] = 1
    step = windowed_partial_auc(scores, relevance, alpha, d, total).diff().abs() > 1e-9  # [n] from c to c + 1
    no = torch.tensor([False])
    want = torch.cat([step, no]) | torch.cat([no, step])
    assert gate_open(scores, relevance, alpha, d, total).tolist() == want.tolist()
    assert not want.all()


def test_gate_counts_a_tie_as_one_half() -> None:
    # (a, b] = (2, 3]: open for 2 < r <= 4
    negatives = [9.0, 8.0, 7.0, 6.0, 5.0]
    rows = [[9.0, *negatives], [8.0, *negatives], [7.0, *negatives], [6.0, *negatives]]  # r = 1.5, 2.5, 3.5, 4.5
    relevance = torch.tensor([[1, 0, 0, 0, 0, 0]] * 4)
    assert gate_open(torch.tensor(rows), relevance, 0.2, 0.1, 10).tolist() == [False, True, True, False]
    # (1.6, 2.6]: a tie with the best negative, r = 1.5, is halfway into the second's place: floor(a) < r
    assert gate_open(torch.tensor(rows), relevance, 0.16, 0.1, 10).tolist() == [True, True, True, False]


def test_gate_switches_whole_groups_and_leaves_the_others_alone() -> None:
    scores, relevance = groups(48, 15)
    window = (2 / 100, 4 / 100, 100)
    gated, free = (tawin_advantages(scores, relevance, *window, gate=g) for g in ("threshold", "none"))
    is_open = gate_open(scores, relevance, *window)
    assert torch.equal(gated, tawin_advantages(scores, relevance, *window))  # the default
    assert torch.equal(gated[is_open], free[is_open])
    assert not gated[~is_open].any()
    assert is_open.any()
    assert not is_open.all()


def test_a_step_along_gated_advantages_raises_wpauc_and_spares_shut_groups() -> None:
    scores, relevance = groups(160, 15)
    window = (2 / 100, 4 / 100, 100)
    is_open = gate_open(scores, relevance, *window)
    stepped = scores + 0.3 * tawin_advantages(scores, relevance, *window)
    before, after = (windowed_partial_auc(s, relevance, *window) for s in (scores, stepped))
    assert torch.equal(before[~is_open], after[~is_open])
    assert (after >= before).all()
    assert after[is_open].mean() > before[is_open].mean() + 0.1


@pytest.mark.parametrize("temperature", [0.1, 1.0, 7.0])
def test_sigmoid_gate_is_the_gradient_of_a_smoothed_wpauc(temperature: float) -> None:
    torch.manual_seed(4)
    n, total, a, b = 12, 300, 2.5, 7
    scores = torch.randn(30, n + 1).double().requires_grad_()
    relevance = torch.zeros(30, n + 1)
    relevance[:, 0] = 1
    smoothed = torch.zeros(())
    for row in range(30):
        ranked = scores[row, 1:].sort(descending=True).values
        for j, score in enumerate(ranked, start=1):
            weight = max(0.0, min(j, b) - max(j - 1, a)) / (b - a)
            smoothed = smoothed + weight * torch.sigmoid((scores[row, 0] - score) / temperature)
    (want,) = torch.autograd.grad(smoothed, scores)
    got = tawin_advantages(scores, relevance, a / total, (b - a) / total, total, "sigmoid", temperature)
    torch.testing.assert_close(got, want * 4 * temperature * math.sqrt(n), rtol=1e-9, atol=1e-12)


def test_sigmoid_gate_opens_with_the_temperature_and_shuts_without() -> None:
    scores, relevance = groups(48, 15)
    window = (2 / 100, 4 / 100, 100)
    hot = tawin_advantages(scores, relevance, *window, "sigmoid", 1e6)
    free = tawin_advantages(scores, relevance, *window, "none")
    torch.testing.assert_close(hot, free, rtol=1e-9, atol=1e-9)
    cold = tawin_advantages(scores, relevance, *window, "sigmoid", 0.05)  # whole scores: the nearest is 1 away
    assert cold.abs().max() < 1e-6


def test_position_of_the_items_does_not_matter() -> None:
    scores, relevance = groups(10, 15)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(3))
    want = tawin_advantages(scores, relevance, 0.02, 0.05, 100)
    assert torch.equal(tawin_advantages(scores[:, order], relevance[:, order], 0.02, 0.05, 100), want[:, order])
    want = tawin_advantages(scores, relevance, 0.02, 0.05, 100, "sigmoid")
    got = tawin_advantages(scores[:, order], relevance[:, order], 0.02, 0.05, 100, "sigmoid")
    torch.testing.assert_close(got, want[:, order], rtol=0, atol=1e-12)  # its sum runs in another order


def test_padding_of_a_group_gets_nothing_and_changes_nothing() -> None:
    scores, relevance = groups(10, 15)
    padded = torch.cat([scores, torch.full((10, 2), -torch.inf, dtype=torch.double)], dim=1)
    marks = torch.cat([relevance, torch.zeros(10, 2, dtype=torch.bool)], dim=1)
    for gate in ("none", "sigmoid", "threshold"):
        got = tawin_advantages(padded, marks, 0.02, 0.05, 100, gate=gate)
        assert torch.equal(got[:, :16], tawin_advantages(scores, relevance, 0.02, 0.05, 100, gate=gate))
        assert not got[:, 16:].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_no_gradient_and_dtype(dtype: torch.dtype) -> None:
    scores, relevance = groups(4, 7)
    got = tawin_advantages(scores.to(dtype).requires_grad_(), relevance, 0, 0.5, None)
    assert not got.requires_grad
    assert got.dtype == torch.promote_types(dtype, torch.float32)


def test_wrong_input_is_refused() -> None:
    scores, relevance = groups(4, 7)
    with pytest.raises(ValueError, match='gate must be "none", "sigmoid" or "threshold"'):
        tawin_advantages(scores, relevance, 0, 0.5, 7, gate="soft")
    with pytest.raises(ValueError, match="temperature must be greater than 0, got 0"):
        tawin_advantages(scores, relevance, 0, 0.5, 7, "sigmoid", 0)
    two = relevance.clone()
    two[2] = torch.tensor([1, 1, 0, 0, 0, 0, 0, 0])
    for function in (tawin_advantages, gate_open):
        with pytest.raises(ValueError, match="row 2: the row must have exactly one positive"):
            function(scores, two, 0, 0.5, 8)
        with pytest.raises(ValueError, match="row 0: the row must have exactly one positive"):
            function(scores, torch.zeros_like(relevance), 0, 0.5, 7)
        with pytest.raises(ValueError, match="ends at negative 8, but the row lists only 7 of its 80"):
            function(scores, relevance, 0, 0.1, 80)
        with pytest.raises(ValueError, match="a score is NaN"):
            function(scores.masked_fill(relevance, math.nan), relevance, 0, 0.5, 7)
