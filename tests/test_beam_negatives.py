"""The negatives callback: who is in the groups, and what is logged."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch
from lightning.pytorch import Callback

from callbacks import BeamNegatives
from recsys.functional import sample_outside
from recsys.groups import Groups
from recsys.objectives import GRPO, TAWin
from recsys.tree import Places
from recsys.types import UserError
from tests.conftest import TITLES, Run
from tests.naive import all_logprobs


class Refreshes(Callback):
    """Keeps every set of groups."""

    def __init__(self) -> None:
        self.seen: list[Groups] = []
        self.clipped: list[float] = []

    def on_train_batch_start(self, trainer, module, batch, batch_idx) -> None:
        if module.groups is not None and (not self.seen or self.seen[-1] is not module.groups):
            self.seen.append(module.groups)

    def on_train_batch_end(self, trainer, *args) -> None:
        self.clipped.append(trainer.callback_metrics["train/clipped"].item())


def run_with(tables, folder: Path, mode: str, epochs: int = 2, **options) -> tuple[Run, list[Groups]]:
    refreshes = Refreshes()
    run = Run(
        tables,
        folder,
        model={"objective": GRPO(), "warm_start_epochs": 0},
        max_epochs=epochs,
        negatives={"mode": mode, **options},
        callbacks=[refreshes],
    )
    return run.fit(), refreshes.seen


def rows_of(run: Run, stretches: list[int] | np.ndarray) -> list[int]:
    """Every event of the stretches that is not the first of its prompt."""
    h, size = run.data.histories, run.data.prompt.max_history
    return sorted(e for row in stretches for e in range(h.history_start(np.array([row]), size)[0] + 1, row + 1))


def context(run: Run, row: int, stretches: np.ndarray) -> list[int]:
    """The tokens that precede a row in its stretch; the last one's are its prompt."""
    h, size = run.data.histories, run.data.prompt.max_history
    last = stretches[stretches >= row].min()
    first = h.history_start(np.array([last]), size)[0]
    prompt = run.data.encoder.encode(h.items[first:last]).tokens
    later = sum(len(run.data.item_tokens[h.items[e]]) for e in range(row, last))
    return prompt[: len(prompt) - later]


@pytest.mark.parametrize("mode", ["beam", "random", "mixed"])
def test_groups_hold_the_positive_first_and_different_negatives_with_other_titles(tables, tmp_path, mode) -> None:
    run, seen = run_with(tables, tmp_path, mode)
    assert len(seen) == 2
    for epoch, groups in enumerate(seen):
        assert groups.row.tolist() == rows_of(run, run.data.stretches(epoch, warm_start=False))
        for row, items in zip(groups.row.tolist(), groups.items.tolist(), strict=True):
            assert items[0] == run.data.histories.items[row]
            assert len(set(items)) == 9
            assert TITLES[items[0]] not in [TITLES[i] for i in items[1:]]


@pytest.mark.parametrize(("mode", "beams"), [("beam", 8), ("mixed", 4), ("random", 0)])
def test_behaviour_is_the_policys_log_probability_and_beams_are_its_best(tables, tmp_path, mode, beams) -> None:
    """Against a full row through the model for every item of the catalogue, behind what precedes the row alone."""
    model = {"objective": GRPO(learning_rate=0.0), "warm_start_epochs": 0}
    run = Run(tables, tmp_path, model=model, max_epochs=1, negatives={"mode": mode}).fit()
    groups, policy, stretches = run.model.groups, run.model.policy.eval(), run.data.stretches(0, warm_start=False)
    for index in range(0, len(groups.row), 17):
        prompt = context(run, groups.row[index].item(), stretches)
        with torch.no_grad():
            scores = all_logprobs(policy, prompt, run.data.item_tokens, "trie")
        items = groups.items[index]
        torch.testing.assert_close(groups.old_logprobs[index], scores[items], atol=1e-4, rtol=1e-4)
        same_title = torch.tensor([title == TITLES[items[0]] for title in TITLES])
        best = scores.masked_fill(same_title, -torch.inf).topk(beams).values
        torch.testing.assert_close(scores[items[1 : 1 + beams]], best, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("objective", [GRPO(train_missed=False), TAWin(), TAWin(gate="none"), TAWin(gate="sigmoid")])
@pytest.mark.parametrize("normalization", ["trie", "vocab"])
def test_a_search_that_ends_early_leaves_out_no_group_that_is_trained(
    tables, tmp_path, objective, normalization
) -> None:
    """Against the exact scores of the whole catalogue: the same rows, and the same groups."""
    objective.learning_rate = 0.0
    model = {"objective": objective, "warm_start_epochs": 1, "normalization": normalization}
    run = Run(tables, tmp_path, model=model, negatives={"count": 6}).fit()
    engine, window, trie = run.model.engine, run.model.dial.window, run.model.engine.trie
    run.model.eval()
    rows, groups = [], []
    with torch.no_grad():
        for batch in run.data.batches(run.data.stretches(0, warm_start=False), 8, warm_start=False):
            chosen = batch.event >= 0
            scores = engine.score_all(engine.prefill(batch.tokens), Places.at(chosen, batch.start))
            target = batch.titles[chosen][:, None]
            best = scores.masked_fill(trie.leaf == trie.leaf[target], -torch.inf).topk(6).values
            rows.append(batch.event[chosen])
            groups.append(torch.cat([scores.gather(1, target), best], 1))
    row, logprobs = torch.cat(rows), torch.cat(groups)
    above = (logprobs[:, 1:] > logprobs[:, :1]).sum(1)
    if objective.reach == "window" and objective.gate == "threshold":
        expected = (above >= math.floor(window.start)) & (above <= math.ceil(window.end))
    else:
        expected = above < 6
    assert 0 < expected.sum() < len(row)
    found = run.model.groups
    assert found.row.tolist() == sorted(row[expected].tolist())
    order = row[expected].argsort()
    torch.testing.assert_close(found.old_logprobs, logprobs[expected][order], atol=1e-4, rtol=1e-4)


def test_found_counts_the_positives_among_the_best(tables, tmp_path) -> None:
    model = {"objective": GRPO(learning_rate=0.0), "warm_start_epochs": 0}
    run = Run(tables, tmp_path, model=model, max_epochs=1, negatives={"count": 4}).fit()
    policy, stretches = run.model.policy.eval(), run.data.stretches(0, warm_start=False)[:8]
    [batch] = run.data.batches(stretches, 32, warm_start=False)
    found = run.negatives.groups_of(run.model, batch, torch.Generator())
    expected = 0
    for row in rows_of(run, stretches):
        with torch.no_grad():
            scores = all_logprobs(policy, context(run, row, stretches), run.data.item_tokens, "trie")
        positive = run.data.histories.items[row]
        other = torch.tensor([title != TITLES[positive] for title in TITLES])
        expected += int((other & (scores > scores[positive] + 1e-4)).sum() < 4)
    assert (found.rows, found.found) == (len(rows_of(run, stretches)), expected)
    assert 0 < expected < found.rows
    run.model.objective = GRPO(train_missed=False)  # its searches end before they find every positive that they would
    assert run.negatives.groups_of(run.model, batch, torch.Generator()).found is None


def test_refresh_every_n_epochs_covers_the_epochs_between(tables, tmp_path) -> None:
    run, seen = run_with(tables, tmp_path, "beam", epochs=4, every_n_epochs=2)
    assert len(seen) == 2
    for groups, epochs in zip(seen, ((0, 1), (2, 3)), strict=True):
        stretches = {row for e in epochs for row in run.data.stretches(e, warm_start=False).tolist()}
        assert groups.row.tolist() == rows_of(run, stretches)


def test_a_refresh_ends_with_the_phase_and_one_is_made_where_training_goes_on(tables, tmp_path) -> None:
    model = {"objective": GRPO(learning_rate=1e-2), "warm_start_epochs": 0}
    rest = None
    for epochs in (1, 2):
        refreshes = Refreshes()
        run = Run(
            tables,
            tmp_path / str(epochs),
            model=model,
            max_epochs=epochs,
            negatives={"every_n_epochs": 10**20},
            callbacks=[refreshes],
        ).fit(ckpt_path=rest)
        [groups] = refreshes.seen[-1:]
        assert groups.row.tolist() == rows_of(run, run.data.stretches(epochs - 1, warm_start=False))
        rest = str(run.checkpoints / "last.ckpt")


@pytest.mark.parametrize("accumulate", [1, 2])
def test_refresh_every_n_steps_takes_the_rows_of_the_steps_to_come(tables, tmp_path, accumulate: int) -> None:
    refreshes = Refreshes()
    run = Run(
        tables,
        tmp_path,
        model={"objective": GRPO(learning_rate=1e-2), "warm_start_epochs": 0},
        max_epochs=1,
        accumulate_grad_batches=accumulate,
        negatives={"every_n_steps": 1},
        callbacks=[refreshes],
    ).fit()
    plan = run.data.plan(0, warm_start=False)  # 32 stretches in batches of 8
    batches = [np.concatenate(plan[i : i + accumulate]) for i in range(0, 4, accumulate)]
    assert [groups.row.tolist() for groups in refreshes.seen] == [rows_of(run, batch) for batch in batches]
    assert all(value == 0 for value in refreshes.clipped)  # the policy's own groups of that moment: every ratio is 1


def test_two_schedules_at_once_are_refused() -> None:
    with pytest.raises(UserError, match="every_n_epochs and every_n_steps: set one"):
        BeamNegatives(every_n_epochs=2, every_n_steps=4)


def test_random_negatives_change_with_the_epoch_and_repeat_with_the_seed(tables, tmp_path) -> None:
    _, first = run_with(tables, tmp_path / "a", "random", every_n_epochs=1)
    _, again = run_with(tables, tmp_path / "b", "random", every_n_epochs=1)
    assert all(torch.equal(a.items, b.items) for a, b in zip(first, again, strict=True))
    both = set(first[0].row.tolist()) & set(first[1].row.tolist())
    pairs = [(g.items[(g.row == row).nonzero()[0, 0], 1:].tolist() for g in first) for row in both]
    assert any(set(a) != set(b) for a, b in pairs)


def test_groups_tell_which_rows_they_hold() -> None:
    groups = Groups(torch.tensor([2, 5]), torch.zeros(2, 3), torch.zeros(2, 3), None)
    index, grouped = groups.find(torch.tensor([[5, 1], [2, 9]]))
    assert grouped.tolist() == [[True, False], [True, False]]
    assert index[grouped].tolist() == [1, 0]
    assert not groups[torch.zeros(2, dtype=torch.bool)].find(torch.tensor([2]))[1].any()


def test_drawn_negatives_are_uniform_over_what_is_not_excluded() -> None:
    generator = torch.Generator().manual_seed(0)
    excluded = torch.tensor([[3, -1, 0], [-1, -1, 9], [9, 7, 8]]).repeat(4000, 1)
    drawn = sample_outside(excluded, 10, 5, generator)
    assert ((drawn >= 0) & (drawn < 10)).all()
    assert not (drawn[:, :, None] == excluded[:, None]).any()
    assert (drawn.sort(1).values.diff(dim=1) > 0).all()
    for kind, left in enumerate((8, 9, 7)):
        count = drawn[kind::3].flatten().bincount(minlength=10).double()
        count = count[count > 0]
        assert len(count) == left
        assert scipy.stats.chisquare(count).pvalue > 1e-3
    everything = sample_outside(torch.tensor([[3, -1, 0]]), 10, 8, generator)
    assert everything.sort(1).values.tolist() == [[1, 2, 4, 5, 6, 7, 8, 9]]
