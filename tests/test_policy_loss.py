"""The clipped loss and the KL estimate against loops, exact sums and gradients."""

import math

import pytest
import torch

from recsys.functional import (
    group_advantages,
    kl_divergence,
    llpauc_loss,
    policy_loss,
    softmax_at_k_loss,
    softmax_dpo_loss,
)


def test_equals_a_loop_over_the_group() -> None:
    torch.manual_seed(0)
    logprobs, behaviour, advantages = (torch.randn(30, 6).double() for _ in range(3))
    got = policy_loss(logprobs, behaviour, advantages, clip_eps=0.2)
    sides = set()
    for row in range(30):
        total = 0.0
        for lp, old, a in zip(logprobs[row].tolist(), behaviour[row].tolist(), advantages[row].tolist(), strict=True):
            ratio = math.exp(lp - old)
            sides.add((a > 0, ratio < 0.8, ratio > 1.2))
            total += min(ratio * a, min(max(ratio, 0.8), 1.2) * a)
        assert got[row].item() == pytest.approx(-total / 6, rel=1e-12)
    assert len(sides) == 6  # both signs of the advantage, below, inside and above the clip range


def test_on_policy_gradient_is_that_of_the_linear_surrogate() -> None:
    torch.manual_seed(1)
    n = 15
    logprobs = torch.randn(3, n + 1).double().requires_grad_()
    rewards = torch.zeros(3, n + 1).double()
    rewards[:, 0] = 1
    # The same tensor as behaviour: it must count as a constant, or the gradient vanishes.
    (got,) = torch.autograd.grad(policy_loss(logprobs, logprobs, group_advantages(rewards), 0.2).sum(), logprobs)
    surrogate = math.sqrt(n) / (n + 1) * (logprobs[:, 0] - logprobs[:, 1:].mean(dim=1))
    (want,) = torch.autograd.grad(-surrogate.sum(), logprobs)
    assert ((got - want).norm() / want.norm()).item() < 1e-10


def test_only_the_policy_gets_a_gradient() -> None:
    logprobs, behaviour, advantages = (torch.randn(2, 3).requires_grad_() for _ in range(3))
    (policy_loss(logprobs, behaviour, advantages, 0.2).sum() + kl_divergence(logprobs, behaviour).sum()).backward()
    assert logprobs.grad is not None
    assert behaviour.grad is None
    assert advantages.grad is None


def test_clipped_side_has_no_gradient() -> None:
    logprobs = torch.tensor([[0.5, -0.5, 0.5, -0.5]], requires_grad=True)
    advantages = torch.tensor([[1.0, 1.0, -1.0, -1.0]])
    policy_loss(logprobs, torch.zeros(1, 4), advantages, 0.2).sum().backward()
    assert logprobs.grad is not None
    assert (logprobs.grad != 0).tolist() == [[False, True, True, False]]


@pytest.mark.parametrize("log_ratio", [25.0, 90.0, 1000.0])
def test_huge_ratios_stay_finite_and_are_pushed_back(log_ratio: float) -> None:
    logprobs = torch.full((1, 2), log_ratio, requires_grad=True)
    loss = policy_loss(logprobs, torch.zeros(1, 2), torch.tensor([[1.0, -1.0]]), 0.2)
    loss.sum().backward()
    assert loss.isfinite().all()
    assert logprobs.grad is not None
    assert logprobs.grad.isfinite().all()
    assert logprobs.grad[0, 0] == 0
    assert logprobs.grad[0, 1] > 1e6  # descent lowers the negative
    low = torch.full((1, 2), -log_ratio, requires_grad=True)
    divergence = kl_divergence(low, torch.zeros(1, 2))
    divergence.sum().backward()
    assert divergence.isfinite().all()
    assert low.grad is not None
    assert low.grad.isfinite().all()
    assert (low.grad < -1e6).all()  # descent raises the policy to its reference


def test_group_without_signal_has_zero_loss() -> None:
    logprobs = torch.randn(2, 4, requires_grad=True)
    loss = policy_loss(logprobs, torch.randn(2, 4), group_advantages(torch.zeros(2, 4)), 0.2)
    loss.sum().backward()
    assert not loss.any()
    assert logprobs.grad is not None
    assert not logprobs.grad.any()


def test_kl_is_zero_where_equal_and_never_negative() -> None:
    lp = torch.randn(4, 5)
    assert not kl_divergence(lp, lp.clone()).any()
    x = torch.cat([torch.logspace(-12, 1.5, 500), -torch.logspace(-12, 2, 500)])[None]
    for dtype in (torch.float32, torch.float64):
        assert (kl_divergence(torch.zeros_like(x, dtype=dtype), x.to(dtype)) >= 0).all()


def test_kl_is_accurate_near_zero_in_float32() -> None:
    x = torch.tensor([[1e-2, -1e-2, 1e-3, -1e-3]])
    want = x.double().square() / 2 + x.double() ** 3 / 6 + x.double() ** 4 / 24
    got = kl_divergence(torch.zeros(1, 4), x)
    torch.testing.assert_close(got.double(), want, rtol=1e-3, atol=0)


def test_expected_kl_estimate_is_the_kl_divergence() -> None:
    torch.manual_seed(2)
    logp, logq = (torch.randn(3, 9).double().log_softmax(dim=1) for _ in range(2))
    exact = (logp.exp() * (logp - logq)).sum(dim=1)
    torch.testing.assert_close((logp.exp() * kl_divergence(logp, logq)).sum(dim=1), exact, rtol=1e-12, atol=0)


def test_low_precision_is_widened_before_the_difference() -> None:
    logprobs, other = torch.tensor([[-100.0, -3.0]]).bfloat16(), torch.tensor([[-100.2, -3.0]])
    advantages = torch.tensor([[1.0, -1.0]])
    for got, want in [
        (policy_loss(logprobs, other, advantages, 0.5), policy_loss(logprobs.double(), other, advantages, 0.5)),
        (kl_divergence(logprobs, other.bfloat16()), kl_divergence(logprobs.float(), other.bfloat16().float())),
    ]:
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, want.float())
    assert kl_divergence(logprobs.double(), other).dtype == torch.float64


def test_wrong_input_is_refused() -> None:
    x = torch.zeros(2, 3)
    for clip in (0, -0.1, math.nan):
        with pytest.raises(ValueError, match="clip_eps must be greater than 0"):
            policy_loss(x, x, x, clip)
    with pytest.raises(ValueError, match=r"advantages must be \[2, 3\]"):
        policy_loss(x, x, x[:, :1], 0.2)
    with pytest.raises(ValueError, match=r"policy_loss needs .* got \[2, 3\] and \[2, 1\]"):
        policy_loss(x, x[:, :1], x, 0.2)
    with pytest.raises(ValueError, match=r"kl_divergence needs .* got \[3\] and \[3\]"):
        kl_divergence(x[0], x[0])


def first(groups: int, items: int) -> torch.Tensor:
    return torch.eye(items, dtype=torch.bool)[:1].expand(groups, -1)


def test_softmax_dpo_is_the_papers_formula_in_a_loop() -> None:
    torch.manual_seed(3)
    logprobs, reference = (torch.randn(20, 5).double() for _ in range(2))
    positive = torch.randint(5, (20,))
    got = softmax_dpo_loss(logprobs, reference, torch.eye(5, dtype=torch.bool)[positive], beta=0.7)
    for row in range(20):
        x = (logprobs - reference)[row].tolist()
        chosen = x.pop(positive[row])
        total = sum(math.exp(0.7 * (rejected - chosen)) for rejected in x)
        want = -math.log(1 / (1 + math.exp(math.log(total))))
        assert got[row].item() == pytest.approx(want, rel=1e-12)


def test_softmax_dpo_starts_at_log_group_size_and_leaves_the_reference_alone() -> None:
    logprobs, reference = torch.randn(3, 8).requires_grad_(), torch.randn(3, 8).requires_grad_()
    same = softmax_dpo_loss(logprobs, logprobs, first(3, 8), beta=2.0)
    torch.testing.assert_close(same, torch.full((3,), math.log(8)))
    softmax_dpo_loss(logprobs, reference, first(3, 8), beta=2.0).sum().backward()
    assert reference.grad is None
    assert (logprobs.grad[:, 0] < 0).all()
    assert (logprobs.grad[:, 1:] > 0).all()


def test_softmax_dpo_refuses_wrong_input() -> None:
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="beta must be greater than 0"):
        softmax_dpo_loss(x, x, first(2, 3), 0)
    for relevance in (first(2, 4), torch.zeros(2, 3, dtype=torch.bool), torch.ones(2, 3, dtype=torch.bool)):
        with pytest.raises(ValueError, match="exactly one positive"):
            softmax_dpo_loss(x, x, relevance, 1.0)


def test_softmax_at_k_is_the_papers_formula_with_the_weight_as_a_constant() -> None:
    """The K-th best score by sorting the whole catalogue, the softmax loss from logits that are not normalised."""
    torch.manual_seed(4)
    logits, k, temperature = (3 * torch.randn(40, 30)).double().requires_grad_(), 6, 0.7
    logprobs = logits.log_softmax(1)
    positive = torch.randint(30, (40,))
    threshold = logprobs.detach().topk(k).values[:, -1]
    own = logprobs.gather(1, positive[:, None])[:, 0]
    got = softmax_at_k_loss(own, threshold, temperature)
    weights = []
    for row in range(40):
        values = logits[row].tolist()
        chosen = values[positive[row]]
        kth = sorted(values, reverse=True)[k - 1]
        weights.append(1 / (1 + math.exp(-(chosen - kth) / temperature)))
        softmax = math.log(sum(math.exp(value - chosen) for value in values))
        assert got[row].item() == pytest.approx(weights[-1] * softmax, rel=1e-10)
    assert min(weights) < 0.05
    assert max(weights) > 0.5
    (gradient,) = torch.autograd.grad(got.sum(), own)
    torch.testing.assert_close(gradient, -torch.tensor(weights).double())


@pytest.mark.parametrize("alpha", [0.1, 0.35, 1.0])
def test_llpauc_is_the_squared_surrogate_over_the_pairs_in_the_corner(alpha: float) -> None:
    torch.manual_seed(5)
    logprobs = torch.randn(20, 7).double() - 4
    positive = torch.randint(7, (20,))
    got = llpauc_loss(logprobs, torch.eye(7, dtype=torch.bool)[positive], alpha)
    expected, own = [], []
    for row in range(20):
        values = logprobs[row].tolist()
        chosen = values.pop(positive[row])
        centre = sum(values) / len(values)
        f = [1 / (1 + math.exp(centre - value)) for value in (chosen, *values)]
        own.append(f[0])
        expected.append(sum((1 - (f[0] - other)) ** 2 for other in f[1:]) / len(values))
    for row in range(20):
        counts = sum(other > own[row] for other in own) < math.ceil(20 * alpha)
        assert got[row].item() == pytest.approx(expected[row] if counts else 0.0, rel=1e-10)


def test_llpauc_raises_positives_and_lowers_negatives_whatever_the_scale_of_the_row() -> None:
    logprobs = (torch.randn(3, 8) - torch.tensor([[0.0], [10.0], [30.0]])).requires_grad_()
    llpauc_loss(logprobs, first(3, 8), 1.0).sum().backward()
    assert logprobs.grad is not None
    assert (logprobs.grad[:, 0] < 0).all()
    assert (logprobs.grad[:, 1:] > 0).all()
    assert llpauc_loss(logprobs[:0], first(0, 8), 0.5).shape == (0,)


def test_the_losses_that_aim_at_the_top_refuse_wrong_input() -> None:
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="temperature must be greater than 0"):
        softmax_at_k_loss(x[0], x[0], 0)
    with pytest.raises(ValueError, match=r"must be \[B\], got \[3\], \[2\]"):
        softmax_at_k_loss(x[0], x[:, 0], 1.0)
    for alpha in (0.0, 1.1):
        with pytest.raises(ValueError, match="alpha must be above 0 and at most 1"):
            llpauc_loss(x, first(2, 3), alpha)
    with pytest.raises(ValueError, match="exactly one positive per row"):
        llpauc_loss(x, torch.zeros(2, 3, dtype=torch.bool), 0.5)
