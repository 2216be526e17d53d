"""Objectives on groups against group-relative advantages computed by hand, and which groups are trained at all."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from torch import Tensor

from recsys.objectives import (
    GRPO,
    LLPAUC,
    GroupObjective,
    ScoredGroups,
    SoftmaxAtK,
    SoftmaxDPO,
    StepContext,
    SupervisedFineTuning,
    TAWin,
)
from recsys.tree import Places
from recsys.types import Batch, UserError
from recsys.window import ResolvedWindow, Window
from tests.conftest import Run
from tests.naive import item_logprob


def random_groups(count: int = 200, size: int = 9) -> ScoredGroups:
    """Groups of 50 items each whose ``size - 1`` best negatives are listed, the positive anywhere."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(count, 50, generator=generator).double()
    negatives = scores[:, 1:].sort(descending=True).values[:, : size - 1]
    positive = negatives[:, :1] + torch.randn(count, 1, generator=generator).double()
    behaviour = torch.cat([positive, negatives], 1)
    return ScoredGroups(behaviour.clone(), behaviour, None, Window(alpha=2 / 49, d=3 / 49).resolve(49))


def test_grpo_without_injected_positives_is_grpo_on_the_beam() -> None:
    """ReRe: the group is the beam of ``size - 1`` items, reward 1 where it is the positive, standardised."""
    groups = random_groups()
    trains = GRPO(train_missed=False).trains(groups.old_logprobs, groups.window)
    assert 20 < trains.sum() < 190
    for row in range(len(trains)):
        beam = groups.old_logprobs[row].argsort(descending=True)[:-1]  # without the worst, which a beam would not hold
        rewards = (beam == 0).double()
        assert bool(trains[row]) == bool(rewards.std() > 0)
    assert bool(GRPO().trains(groups.old_logprobs, groups.window).all())


def test_trained_groups_are_those_whose_gates_are_open() -> None:
    """While the policy is the one that found the negatives, and they reach beyond the window."""
    groups = random_groups()
    is_open = TAWin().loss(groups)["gate_open"].bool()
    assert 10 < is_open.sum() < 190
    assert torch.equal(TAWin().trains(groups.old_logprobs, groups.window), is_open)
    assert bool(TAWin(train_missed=True).trains(groups.old_logprobs, groups.window).all())
    found = TAWin(gate="none").trains(groups.old_logprobs, groups.window)
    assert torch.equal(found, GRPO(train_missed=False).trains(groups.old_logprobs, groups.window))


@pytest.mark.parametrize("objective", [GRPO(train_missed=False), TAWin(), TAWin(gate="sigmoid")])
def test_no_group_beyond_the_trained_ranks_is_trained(objective: GroupObjective) -> None:
    groups = random_groups()
    fewest, most = objective.trained_ranks(groups.window, 8)
    above = (groups.old_logprobs[:, 1:] > groups.old_logprobs[:, :1]).sum(1)
    within = (above >= fewest) & (above <= most)
    assert torch.equal(objective.trains(groups.old_logprobs, groups.window), within)  # there are no ties


def by_hand(groups: ScoredGroups, row: int, advantages: list[float], clip: float) -> tuple[float, float, float]:
    """Policy loss, KL estimate and NLL of one group, item by item."""
    policy = kl = 0.0
    for j, a in enumerate(advantages):
        score, old, start = (x[row, j].item() for x in (groups.scores, groups.old_logprobs, groups.ref_logprobs))
        ratio = math.exp(score - old)
        policy -= min(ratio * a, min(max(ratio, 1 - clip), 1 + clip) * a) / len(advantages)
        kl += (math.exp(start - score) - (start - score) - 1) / len(advantages)
    return policy, kl, -groups.scores[row, 0].item()


def moved_groups() -> ScoredGroups:
    groups = random_groups()
    generator = torch.Generator().manual_seed(1)
    groups.scores += 0.3 * torch.randn(groups.scores.shape, generator=generator).double()
    groups.ref_logprobs = groups.old_logprobs + 0.3 * torch.randn(groups.scores.shape, generator=generator).double()
    return groups


@pytest.mark.parametrize("objective", [GRPO, TAWin])
def test_the_terms_of_a_policy_loss_have_their_weights(objective: type[GRPO]) -> None:
    groups = moved_groups()
    found = objective(clip_eps=0.1, kl_coef=0.3).loss(groups)
    advantages = objective().advantages(groups)
    for row in range(len(groups.scores)):
        policy, kl, nll = by_hand(groups, row, advantages[row].tolist(), clip=0.1)
        assert found["loss"][row].item() == pytest.approx(policy + 0.3 * kl, rel=1e-9)
        assert found["nll"][row].item() == pytest.approx(nll, rel=1e-9)
        assert (found["policy_loss"][row].item(), found["kl"][row].item()) == pytest.approx((policy, kl), rel=1e-9)


def test_the_gate_alone_decides_which_groups_get_advantages() -> None:
    groups = moved_groups()
    gated, free = TAWin().loss(groups), TAWin(gate="none").loss(groups)
    rank = 1 + (groups.scores[:, 1:] > groups.scores[:, :1]).sum(1)
    at_window = (rank > 2) & (rank <= 6)  # of the negatives 3 to 5
    assert torch.equal(gated["signal"].bool(), at_window)
    assert torch.equal(gated["gate_open"].bool(), at_window)
    assert bool(free["signal"].all())
    assert torch.equal(free["gate_open"].bool(), at_window)
    assert 0 < at_window.sum() < len(rank)


def test_the_sigmoid_gate_has_the_temperature_that_was_given() -> None:
    groups = moved_groups()
    gap = groups.scores[:, :1] - groups.scores[:, 1:]
    found = TAWin(gate="sigmoid", temperature=0.3).advantages(groups)[:, 1:]
    free = TAWin(gate="none").advantages(groups)[:, 1:]
    torch.testing.assert_close(found, free / torch.cosh(gap / 0.6) ** 2)  # 4 p (1 - p) = 1 / cosh(x / 2)^2
    assert bool((found != 0).any())


@pytest.mark.parametrize(
    ("objective", "key"),
    [
        (TAWin, "temperature"),
        (TAWin, "clip_eps"),
        (GRPO, "clip_eps"),
        (SoftmaxDPO, "beta"),
        (SoftmaxAtK, "temperature"),
    ],
)
@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
def test_a_scale_that_is_not_positive_is_refused_before_anything_starts(objective, key: str, value: float) -> None:
    with pytest.raises(
        UserError, match=f"model.objective: {key} must be greater than 0 and finite, but it is {value:g}"
    ):
        objective(**{key: value})


def test_softmax_dpo_has_its_scale() -> None:
    groups = moved_groups()
    found = SoftmaxDPO(beta=0.4).loss(groups)["loss"]
    for row in range(len(found)):
        x = (0.4 * (groups.scores - groups.ref_logprobs)[row]).exp()
        want = -math.log(x[0] / x.sum())
        assert found[row].item() == pytest.approx(want, rel=1e-9)


class Steps(Callback):
    """Counts the rows that the model scores in training steps, and keeps what is logged."""

    def __init__(self) -> None:
        self.scored: list[int] = []
        self.logged: list[dict[str, float]] = []

    def on_train_start(self, trainer, module) -> None:
        forward = module.engine.forward

        def counted(tokens: Tensor, places: Places, items: Tensor) -> tuple[Tensor, Tensor]:
            self.scored.append(len(items))
            return forward(tokens, places, items)

        module.engine.forward = counted

    def on_train_batch_end(self, trainer, *args) -> None:
        self.logged.append({k: v.item() for k, v in trainer.callback_metrics.items()})


def run_with(tables, folder: Path, objective: GroupObjective, epochs: int = 1) -> tuple[Run, Steps]:
    steps = Steps()
    model = {"objective": objective, "warm_start_epochs": 0}
    run = Run(tables, folder, model=model, max_epochs=epochs, callbacks=[steps], negatives={"count": 10})
    return run.fit(), steps


def test_skipping_groups_changes_nothing_where_their_gates_stay_shut(tables, tmp_path: Path) -> None:
    rate = {"learning_rate": 1e-6}  # the ranks hardly move within the epoch
    some, skipped = run_with(tables, tmp_path / "some", TAWin(**rate))
    every, _ = run_with(tables, tmp_path / "all", TAWin(**rate, train_missed=True))
    assert any(step["train/gate_open"] > 0 for step in skipped.logged)
    for name, weight in some.weights.items():
        torch.testing.assert_close(weight, every.weights[name], atol=1e-7, rtol=1e-4)
    rows = sum(int((batch.event >= 0).sum()) for batch in some.data.batches(some.data.stretches(0, False), 8, False))
    assert 0 < sum(skipped.scored) == len(some.model.groups.row) < rows / 2
    assert max(step["train/groups"] for step in skipped.logged) <= 1


def test_a_batch_without_a_trained_group_changes_no_weight(tables, tmp_path: Path) -> None:
    class NothingFound(GRPO):
        def trains(self, old_logprobs: Tensor, window: ResolvedWindow) -> Tensor:
            return torch.zeros(len(old_logprobs), dtype=torch.bool)

    before: dict[str, Tensor] = {}

    class Snapshot(Callback):
        def on_train_start(self, trainer, module) -> None:
            before.update(module.policy.snapshot())

    model = {"objective": NothingFound(learning_rate=0.1), "warm_start_epochs": 0}
    run = Run(tables, tmp_path, model=model, max_epochs=1, callbacks=[Snapshot()]).fit()
    assert len(run.model.groups.row) == 0
    assert all(torch.equal(weight, before[name]) for name, weight in run.weights.items())


def test_softmax_dpo_is_given_the_policy_of_its_start(tables, tmp_path: Path) -> None:
    _, steps = run_with(tables, tmp_path, SoftmaxDPO(learning_rate=1e-3), epochs=2)
    start = math.log(11)  # items of a group
    assert steps.logged[0]["train/loss"] == pytest.approx(start, rel=1e-5)
    assert steps.logged[-1]["train/loss"] < start - 0.02


def step_on_a_batch(tables, folder: Path, objective: GroupObjective) -> tuple[Run, dict[str, Tensor], list[int], Batch]:
    """One step on a batch of eight stretches, some of whose rows have no group; with the token rows of each pass."""
    model = {"objective": GRPO(learning_rate=0.0), "warm_start_epochs": 0}
    run = Run(tables, folder, model=model, max_epochs=1, negatives={"count": 10}).fit()
    engine, passes, groups = run.model.engine, [], run.model.groups
    [batch] = list(run.data.batches(run.data.stretches(0, False)[:8], 8, warm_start=False))
    groups.ref_logprobs = groups.old_logprobs.clone()
    run.model.groups = groups[objective.trains(groups.old_logprobs, run.model.dial.window)]
    hidden = run.model.policy.hidden

    def counted(tokens: Tensor, *args, **kwargs) -> Tensor:
        passes.append(tokens.numel())
        return hidden(tokens, *args, **kwargs)

    run.model.policy.hidden = counted
    parts = objective.step(engine, batch, StepContext(run.model.groups, run.model.dial.window))
    run.model.policy.hidden = hidden
    return run, parts, passes, batch


@pytest.mark.parametrize("make", [GRPO, TAWin, SoftmaxDPO, SoftmaxAtK, LLPAUC])
@pytest.mark.parametrize("train_missed", [True, False])
def test_the_anchor_is_the_mean_nll_of_every_title_in_the_batch(tables, tmp_path: Path, make, train_missed) -> None:
    """Against one full row through the model for each title, also of rows without a group."""
    objective = make(anchor_coef=0.3, train_missed=train_missed)
    run, parts, passes, batch = step_on_a_batch(tables, tmp_path, objective)
    context = StepContext(run.model.groups, run.model.dial.window)
    plain = make(train_missed=train_missed).step(run.model.engine, batch, context)
    policy, sequences = run.model.policy, run.data.item_tokens
    nll, titles = 0.0, 0
    with torch.no_grad():
        for b in range(len(batch)):
            tokens = batch.tokens[b, : batch.length[b]].tolist()
            for item, start in zip(batch.titles[b].tolist(), batch.start[b].tolist(), strict=True):
                if item >= 0:
                    nll -= item_logprob(policy, tokens[:start], sequences, item, "trie").item()
                    titles += 1
    assert parts["anchor"].item() == pytest.approx(nll / titles, rel=1e-4)
    assert parts["loss"].item() == pytest.approx(plain["loss"].item() + 0.3 * nll / titles, rel=1e-4)
    assert 0 < parts["groups"].item() < 1 or train_missed
    assert len(passes) == 1


@pytest.mark.parametrize("objective", [GRPO(), TAWin(), TAWin(anchor_coef=0.1)])
def test_a_step_scores_each_group_behind_what_precedes_its_row(tables, tmp_path: Path, objective) -> None:
    """Against a full row through the model for each item: the mean loss over the rows, those without a group at 0."""
    run, parts, _, batch = step_on_a_batch(tables, tmp_path, objective)
    groups, policy, sequences = run.model.groups, run.model.policy, run.data.item_tokens
    scores, index, rows = [], [], 0
    with torch.no_grad():
        for b in range(len(batch)):
            tokens = batch.tokens[b, : batch.length[b]].tolist()
            for event, start in zip(batch.event[b].tolist(), batch.start[b].tolist(), strict=True):
                rows += event >= 0
                if event in groups.row.tolist():
                    index.append(groups.row.tolist().index(event))
                    of_row = [
                        item_logprob(policy, tokens[:start], sequences, i, "trie") for i in groups.items[index[-1]]
                    ]
                    scores.append(torch.stack(of_row))
    assert 0 < len(scores) <= rows
    old, reference = groups.old_logprobs[index], groups.ref_logprobs[index]
    expected = objective.loss(ScoredGroups(torch.stack(scores), old, reference, run.model.dial.window))
    assert parts["nll"].item() == pytest.approx(expected["nll"].sum().item() / rows, rel=1e-4)
    assert parts["policy_loss"].item() == pytest.approx(expected["loss"].sum().item() / rows, rel=1e-3, abs=1e-5)
    assert parts["groups"].item() == pytest.approx(len(scores) / rows)


def test_without_an_anchor_a_stretch_without_a_group_costs_nothing(tables, tmp_path: Path) -> None:
    run, _, [anchored], batch = step_on_a_batch(tables, tmp_path / "a", TAWin(anchor_coef=0.1))
    kept = run.model.groups.find(batch.event)[1].any(1)
    assert 0 < kept.sum() < len(batch)
    assert anchored >= batch.tokens.numel()
    _, _, [plain], _ = step_on_a_batch(tables, tmp_path / "b", TAWin())
    assert plain < anchored


@pytest.mark.parametrize("key", ["anchor_coef", "anchor_end"])
def test_an_anchor_below_0_is_refused(key: str) -> None:
    with pytest.raises(UserError, match=f"{key} must be at least 0"):
        TAWin(**{key: -0.1})


@pytest.mark.parametrize("alpha", [0.0, 1.5])
def test_a_share_of_positives_beyond_all_of_them_is_refused(alpha: float) -> None:
    with pytest.raises(UserError, match=f"alpha must be above 0 and at most 1, but it is {alpha:g}"):
        LLPAUC(alpha=alpha)


def test_the_anchor_goes_from_its_first_weight_to_its_last(tables, tmp_path: Path) -> None:
    steps = Steps()
    objective = TAWin(learning_rate=0.0, anchor_coef=0.6, anchor_end=0.0)
    model = {"objective": objective, "warm_start_epochs": 1}
    Run(tables, tmp_path, model=model, max_epochs=3, callbacks=[steps], negatives={"count": 10}).fit()
    logged = [step for step in steps.logged if "train/anchor" in step]
    weights = [(step["train/loss"] - step["train/policy_loss"]) / step["train/anchor"] for step in logged]
    expected = [0.6 * (1 - step / len(weights)) for step in range(len(weights))]
    assert len(weights) > 4
    assert weights == pytest.approx(expected, abs=1e-4)


def test_softmax_at_k_takes_the_kth_best_score_of_the_last_search(tables, tmp_path: Path) -> None:
    """Against the scores of the whole catalogue by a full row each; a step scores no negatives."""
    window = {"window": Window(k=4), "objective": SoftmaxAtK(learning_rate=0.0), "warm_start_epochs": 0}
    run = Run(tables, tmp_path, model=window, max_epochs=1, negatives={"count": 4}).fit()
    groups, policy, sequences = run.model.groups, run.model.policy, run.data.item_tokens
    [batch] = run.data.batches(run.data.stretches(0, False)[:3], 3, warm_start=False)
    prompts, passes = batch.tokens.numel(), []
    hidden = policy.hidden

    def counted(tokens: Tensor, *args, **kwargs) -> Tensor:
        passes.append(tokens.numel())
        return hidden(tokens, *args, **kwargs)

    policy.hidden = counted
    parts = run.model.objective.step(run.model.engine, batch, StepContext(groups, run.model.dial.window))
    policy.hidden = hidden
    assert passes == [prompts]
    losses = []
    with torch.no_grad():
        for b in range(len(batch)):
            tokens = batch.tokens[b].tolist()
            for event, item, start in zip(
                *(x[b].tolist() for x in (batch.event, batch.titles, batch.start)), strict=True
            ):
                if event >= 0:
                    every = [
                        item_logprob(policy, tokens[:start], sequences, i, "trie").item() for i in range(len(sequences))
                    ]
                    weight = 1 / (1 + math.exp(sorted(every)[-4] - every[item]))
                    losses.append(-weight * every[item])
    assert parts["loss"].item() == pytest.approx(sum(losses) / len(losses), rel=1e-4)


class Gradients(Callback):
    """Writes the gradient of each optimiser step to a file."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_before_optimizer_step(self, trainer, module, optimizer) -> None:
        if trainer.is_global_zero:
            gradients = {name: p.grad.clone() for name, p in module.policy.trainable().items()}
            torch.save(gradients, self.folder / f"{trainer.global_step}.pt")


def step_gradients(tables, folder: Path, **settings) -> list[dict[str, Tensor]]:
    """The gradients of a supervised step and of two on groups, all with a learning rate of 0."""
    folder.mkdir()
    data, trainer = {"warm_start_stretches": 7, "policy_stretches": 7, **settings.pop("data")}, settings
    model = {
        "objective": GRPO(learning_rate=0.0, anchor_coef=0.3, train_missed=False),
        "warm_start": SupervisedFineTuning(learning_rate=0.0),
    }
    callbacks = [Gradients(folder)]
    Run(tables, folder, model=model, data=data, max_epochs=3, callbacks=callbacks, **trainer).fit()
    return [torch.load(folder / f"{step}.pt") for step in range(3)]


@pytest.mark.parametrize(
    "settings",
    [
        {"data": {"batch_size": 2}, "accumulate_grad_batches": 4},
        {"data": {"batch_size": 2}, "accumulate_grad_batches": 6},  # the epoch ends before there are so many
        {"data": {"batch_size": 2}, "accumulate_grad_batches": 2, "strategy": "ddp_spawn", "devices": 2},
    ],
)
def test_a_step_in_parts_has_the_gradient_of_one_batch(tables, tmp_path: Path, settings) -> None:
    """Whatever the stretches of a part hold: each title and each row weighs the same."""
    whole = step_gradients(tables, tmp_path / "whole", data={"batch_size": 7})
    parts = step_gradients(tables, tmp_path / "parts", **settings)
    for expected, found in zip(whole, parts, strict=True):
        assert any(bool(gradient.any()) for gradient in expected.values())
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, atol=1e-6, rtol=1e-4)
