import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recsys.data import HistoryDataModule, PromptTemplate, Table, plan_batches
from recsys.policy import byte_tokenizer
from recsys.types import Batch


@settings(deadline=None)
@given(
    n=st.integers(1, 40),
    batch_size=st.integers(1, 7),
    world_size=st.integers(1, 4),
    seed=st.none() | st.lists(st.integers(0, 9), min_size=1),
)
def test_plans_cover_all_rows_with_equal_numbers_of_batches(n, batch_size, world_size, seed):
    rows, lengths = np.arange(10, 10 + n), np.random.default_rng(n).integers(1, 50, n)
    plans = [plan_batches(rows, lengths, batch_size, seed, rank, world_size) for rank in range(world_size)]
    assert len({len(plan) for plan in plans}) == 1
    sizes = [len(batch) for plan in plans for batch in plan]
    assert min(sizes) >= 1
    assert max(sizes) <= min(batch_size, min(sizes) + 1)
    planned = np.concatenate([batch for plan in plans for batch in plan])
    assert len(planned) - n < world_size
    assert set(np.where(planned < 0, ~planned, planned)) == set(rows)
    if seed is None:
        assert sorted(planned[planned >= 0]) == rows.tolist()  # once each, for any number of processes


def test_plans_shuffle_by_seed_and_put_similar_lengths_together():
    rows = np.arange(4000)
    lengths = np.random.default_rng(0).integers(20, 200, len(rows))
    plan = plan_batches(rows, lengths, 8, [0, 1])
    assert np.array_equal(np.stack(plan), np.stack(plan_batches(rows, lengths, 8, [0, 1])))
    assert not np.array_equal(np.stack(plan), np.stack(plan_batches(rows, lengths, 8, [0, 2])))
    padded = sum(lengths[batch].max() * len(batch) for batch in plan)
    assert 1 - lengths.sum() / padded < 0.05
    longest = np.array([lengths[batch].max() for batch in plan])
    assert abs(np.corrcoef(longest, np.arange(len(plan)))[0, 1]) < 0.1  # steps do not go from short to long


def test_processes_get_similar_lengths_in_each_step():
    lengths = np.random.default_rng(0).integers(20, 200, 800)
    first, second = (plan_batches(np.arange(800), lengths, 8, [0], rank, 2) for rank in range(2))
    gap = [abs(lengths[a].max() - lengths[b].max()) for a, b in zip(first, second, strict=True)]
    assert np.mean(gap) < 10


def test_part_of_a_batch_keeps_its_rows_and_drops_their_common_padding():
    length = torch.tensor([5, 2, 3])
    tokens = torch.arange(15).view(3, 5) * (torch.arange(5) < length[:, None])
    titles = torch.arange(6).view(3, 2)
    batch = Batch(torch.tensor([7, 8, 9]), tokens, length, titles, titles + 1, titles + 2, torch.tensor([1, 2, 3]))
    for index in (torch.tensor([1, 2]), torch.tensor([False, True, True])):
        part = batch[index]
        assert (part.row.tolist(), part.length.tolist(), part.target.tolist()) == ([8, 9], [2, 3], [2, 3])
        assert torch.equal(part.tokens, tokens[1:, :3])
        assert torch.equal(part.titles, titles[1:])
        assert torch.equal(part.start, titles[1:] + 1)
        assert torch.equal(part.event, titles[1:] + 2)
    assert batch.tokens.shape == (3, 5)


def test_counts_of_a_plan_are_those_of_its_batches(tables):
    for max_tokens in (40, 128):  # titles that do not fit are in no prompt
        prompt = PromptTemplate("Seen:\n{history}", max_history=6, max_tokens=max_tokens)
        data = HistoryDataModule(Table(**tables), prompt, batch_size=5)
        data.tokenize(byte_tokenizer())
        for warm_start in (True, False):
            dataset = data.dataset(data.plan(1, warm_start), warm_start)
            batches = [dataset[i] for i in range(len(dataset))]
            counts = [[int((batch.titles >= 0).sum()), int((batch.event >= 0).sum())] for batch in batches]
            assert dataset.counts.tolist() == counts
