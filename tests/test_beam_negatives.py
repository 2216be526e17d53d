"""The negatives callback: who is in the groups, and what is logged."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback

from recsys.groups import Groups
from recsys.objectives import GRPO
from tests.conftest import TITLES, Run
from tests.naive import all_logprobs


class Refreshes(Callback):
    """Keeps every set of groups."""

    def __init__(self) -> None:
        self.seen: list[Groups] = []

    def on_train_batch_start(self, trainer, module, batch, batch_idx) -> None:
        if module.groups is not None and (not self.seen or self.seen[-1] is not module.groups):
            self.seen.append(module.groups)


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


@pytest.mark.parametrize("mode", ["beam", "random", "mixed"])
def test_groups_hold_the_positive_first_and_different_negatives_with_other_titles(tables, tmp_path, mode) -> None:
    run, seen = run_with(tables, tmp_path, mode)
    assert len(seen) == 2
    for epoch, groups in enumerate(seen):
        assert groups.row.tolist() == sorted(run.data.train_rows(epoch).tolist())
        for row, items in zip(groups.row.tolist(), groups.items.tolist(), strict=True):
            assert items[0] == run.data.histories.items[row]
            assert len(set(items)) == 9
            assert TITLES[items[0]] not in [TITLES[i] for i in items[1:]]


@pytest.mark.parametrize(("mode", "beams"), [("beam", 8), ("mixed", 4), ("random", 0)])
def test_behaviour_is_the_policys_log_probability_and_beams_are_its_best(tables, tmp_path, mode, beams) -> None:
    """Against a full row through the model for every item of the catalogue."""
    model = {"objective": GRPO(learning_rate=0.0), "warm_start_epochs": 0}
    run = Run(tables, tmp_path, model=model, max_epochs=1, negatives={"mode": mode}).fit()
    groups, policy = run.model.groups, run.model.policy.eval()
    for index in range(0, len(groups.row), 8):
        row = groups.row[index].item()
        prompt = run.data.encoder.encode(run.data.histories.history(row, 4)).tokens
        with torch.no_grad():
            scores = all_logprobs(policy, prompt, run.data.item_tokens, "trie")
        items = groups.items[index]
        torch.testing.assert_close(groups.old_logprobs[index], scores[items], atol=1e-4, rtol=1e-4)
        same_title = torch.tensor([title == TITLES[items[0]] for title in TITLES])
        best = scores.masked_fill(same_title, -torch.inf).topk(beams).values
        torch.testing.assert_close(scores[items[1 : 1 + beams]], best, atol=1e-4, rtol=1e-4)


def test_found_says_whether_the_positive_is_among_the_best(tables, tmp_path) -> None:
    model = {"objective": GRPO(learning_rate=0.0), "warm_start_epochs": 0}
    run = Run(tables, tmp_path, model=model, max_epochs=1, negatives={"count": 4}).fit()
    policy, trie = run.model.policy.eval(), run.model.engine.trie
    [batch] = run.data.batches(run.data.train_rows(0), 32)
    _, _, found = run.negatives.groups_of(run.model, batch, torch.Generator())
    beams = 4 + trie.max_duplicates
    for tokens, length, target, was_found in zip(batch.tokens, batch.length, batch.target, found, strict=True):
        with torch.no_grad():
            scores = all_logprobs(policy, tokens[:length].tolist(), run.data.item_tokens, "trie")
        assert bool(was_found) == bool((scores > scores[target] + 1e-4).sum() < beams)
    assert 0 < found.sum() < 32


def test_refresh_every_n_epochs_covers_the_epochs_between(tables, tmp_path) -> None:
    run, seen = run_with(tables, tmp_path, "beam", epochs=4, every_n_epochs=2)
    assert len(seen) == 2
    for groups, epochs in zip(seen, ((0, 1), (2, 3)), strict=True):
        expected = {row for e in epochs for row in run.data.train_rows(e).tolist()}
        assert groups.row.tolist() == sorted(expected)


def test_refresh_every_n_steps(tables, tmp_path) -> None:
    _, seen = run_with(tables, tmp_path, "beam", epochs=1, every_n_steps=1)
    assert len(seen) == 4  # 32 rows in batches of 8
    assert all(torch.equal(a.row, seen[0].row) for a in seen)
    assert not torch.equal(seen[0].old_logprobs, seen[-1].old_logprobs)


def test_random_negatives_change_with_the_epoch_and_repeat_with_the_seed(tables, tmp_path) -> None:
    _, first = run_with(tables, tmp_path / "a", "random", every_n_epochs=1)
    _, again = run_with(tables, tmp_path / "b", "random", every_n_epochs=1)
    assert all(torch.equal(a.items, b.items) for a, b in zip(first, again, strict=True))
    both = set(first[0].row.tolist()) & set(first[1].row.tolist())
    pairs = [(g.items[(g.row == row).nonzero()[0, 0], 1:].tolist() for g in first) for row in both]
    assert any(set(a) != set(b) for a, b in pairs)


def test_a_row_without_a_group_is_an_error() -> None:
    groups = Groups(torch.tensor([2, 5]), torch.zeros(2, 3), torch.zeros(2, 3), None)
    assert groups.find(torch.tensor([5, 2])).tolist() == [1, 0]
    for row in (1, 3, 9):
        with pytest.raises(KeyError, match=f"row {row}"):
            groups.find(torch.tensor([2, row]))
