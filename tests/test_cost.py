"""The cost of a run against the run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback

from recsys.cost import RunCost
from recsys.objectives import GRPO, SupervisedFineTuning, TAWin
from recsys.types import UserError
from tests.conftest import Run

SUPERVISED, SEARCH, POLICY, VALIDATION = "supervised steps", "search for negatives", "policy steps", "validation"


class TokenRows(Callback):
    """Token rows of each kind of work in a real run, and its batches."""

    def __init__(self) -> None:
        self.rows = dict.fromkeys((SUPERVISED, POLICY, VALIDATION), 0)
        self.batches = dict.fromkeys((SUPERVISED, POLICY, VALIDATION), 0)

    def on_train_batch_start(self, trainer, module, batch, *args) -> None:
        self.name = SUPERVISED if module.phase_at(trainer.current_epoch).supervised else POLICY
        self.batches[self.name] += 1
        self.before = module.engine.token_rows

    def on_before_backward(self, trainer, module, loss) -> None:  # a refresh may follow before the batch's end
        self.rows[self.name] += module.engine.token_rows - self.before

    def on_validation_batch_start(self, trainer, module, *args) -> None:
        self.before = module.engine.token_rows

    def on_validation_batch_end(self, trainer, module, *args) -> None:
        self.rows[VALIDATION] += module.engine.token_rows - self.before
        self.batches[VALIDATION] += 1


def cost_of(run: Run) -> RunCost:
    return RunCost(run.trainer, run.model, run.data)


@pytest.mark.parametrize("normalization", ["trie", "vocab"])
def test_steps_batches_and_token_rows_are_those_of_a_fit(normalization: str, tables, tmp_path: Path) -> None:
    settings = {
        "model": {
            "objective": TAWin(learning_rate=1e-3, kl_coef=0.1, train_missed=True, anchor_coef=0.1),
            "normalization": normalization,
            "warm_start": SupervisedFineTuning(1e-3),
        },
        "negatives": {"every_n_steps": 1},
        "max_epochs": 3,
        "accumulate_grad_batches": 2,
    }
    cost, counted = cost_of(Run(tables, tmp_path / "cost", **settings)), TokenRows()
    run = Run(tables, tmp_path / "fit", **settings, callbacks=[counted]).fit()
    assert sum(work.steps for work in cost.work.values()) == run.trainer.global_step
    assert {name: len(cost.work[name].batches) for name in counted.batches} == counted.batches
    assert len(cost.work[SEARCH].batches) == 2 * 2  # 2 refreshes in each of 2 epochs, each of 16 stretches in one batch
    for name in counted.rows:
        assert cost.work[name].token_rows == pytest.approx(counted.rows[name], rel=0.25), name
    refreshes = run.model.engine.token_rows - sum(counted.rows.values())
    assert cost.work[SEARCH].token_rows == pytest.approx(refreshes, rel=0.35)  # the first needs no reference


def test_the_trainers_limits_and_processes_count(tables, tmp_path: Path) -> None:
    limits = {"limit_train_batches": 2, "limit_val_batches": 0.5, "num_sanity_val_steps": 1, "max_epochs": 5}
    settings = {"check_val_every_n_epoch": 2, **limits}
    cost, counted = cost_of(Run(tables, tmp_path / "cost", **settings)), TokenRows()
    run = Run(tables, tmp_path / "fit", **settings, callbacks=[counted]).fit()
    assert {name: len(cost.work[name].batches) for name in counted.batches} == counted.batches
    assert sum(work.steps for work in cost.work.values()) == run.trainer.global_step
    two = cost_of(Run(tables, tmp_path / "two", devices=2, **settings))
    assert two.work[POLICY].steps == cost.work[POLICY].steps
    assert len(two.work[POLICY].batches) == 2 * len(cost.work[POLICY].batches)


def test_the_policy_stays_as_it_is(tables, tmp_path: Path) -> None:
    run = Run(tables, tmp_path)
    run.model.policy.build(torch.device("cpu"))
    before = run.model.policy.snapshot()
    cost_of(run)
    assert all(torch.equal(weight, before[name]) for name, weight in run.weights.items())


def test_mistakes_are_those_of_the_fit(tables, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"max_epochs"):
        cost_of(Run(tables, tmp_path, max_epochs=-1))
    with pytest.raises(UserError, match=r"model\.cutoffs has 30"):
        cost_of(Run(tables, tmp_path, model={"cutoffs": (30,)}))
    with pytest.raises(UserError, match="only 18 items of this catalogue can be a negative"):
        cost_of(Run(tables, tmp_path, negatives={"count": 50}))


def test_the_text_adds_up(tables, tmp_path: Path) -> None:
    cost = cost_of(Run(tables, tmp_path, model={"objective": GRPO(learning_rate=1e-3)}))
    lines = [re.split(r"  +", line) for line in str(cost).splitlines()[1:-1]]
    assert [line[0] for line in lines] == [SUPERVISED, SEARCH, POLICY, VALIDATION, "the run"]
    number = {line[0]: int(line[-3].replace(",", "")) for line in lines}
    total = number.pop("the run")
    assert total == pytest.approx(sum(number.values()), abs=len(number))
    assert all(float(line[-1]) > 0 for line in lines)
