"""Searches among some of the items, against exact scores of the whole catalogue without the others, sorted."""

import random

import pytest
import torch

from recsys.allowed import Allowed
from recsys.search import beam_search
from recsys.tree import Places
from recsys.trie import Trie
from tests.test_engine import random_catalogue


def chosen(rng: random.Random, trie: Trie, share: float) -> list[int]:
    return [item for item in range(trie.num_items) if rng.random() < share]


@pytest.mark.parametrize("normalization", ["trie", "vocab"])
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("stock", [None, 0.5])
def test_the_search_gives_the_sorted_catalogue_without_what_is_not_allowed(
    seed: int, normalization: str, stock: float | None
) -> None:
    engine, tokens, places, scores = random_catalogue(seed, normalization)
    trie, rng = engine.trie, random.Random(seed)
    items = None if stock is None else torch.tensor(chosen(rng, trie, stock))
    seen = [chosen(rng, trie, share) for share in (0.0, 0.2, 0.5, 0.9, 1.0) * len(places)][: len(places)]
    at = torch.tensor([p for p, some in enumerate(seen) for _ in some], dtype=torch.int64)
    excluded = torch.tensor([item for some in seen for item in some], dtype=torch.int64)
    allowed = Allowed(trie, items).without(at, excluded)
    for width in (3, trie.num_items):
        found = beam_search(engine, engine.prefill(tokens), places, width, allowed)
        for p, some in enumerate(seen):
            gone = set(trie.leaf[some].tolist())  # with the titles of what was seen
            there = [i for i in range(trie.num_items) if items is None or i in items.tolist()]
            there = [i for i in there if int(trie.leaf[i]) not in gone]
            listed = found.items[p][found.valid[p]].tolist()
            assert len(set(listed)) == len(listed) == min(width, len(there))  # of full length
            assert set(listed) <= set(there)
            torch.testing.assert_close(found.scores[p][found.valid[p]], scores[p, listed], atol=2e-5, rtol=1e-5)
            if width == trie.num_items:
                best = scores[p, there].sort(descending=True).values
                torch.testing.assert_close(found.scores[p][found.valid[p]], best, atol=2e-5, rtol=1e-5)
            assert (~allowed.excludes(len(places))[p]).nonzero()[:, 0].tolist() == there


def test_an_item_out_of_stock_is_not_listed_for_its_title() -> None:
    engine, tokens, _, _ = random_catalogue(0, "trie")
    twice = Trie.from_sequences([[1, 0], [1, 0], [2, 0], [2, 3, 0]])
    engine = type(engine)(engine.policy, twice, "trie")
    prompt, places = engine.prefill(tokens), Places.ends(torch.full((len(tokens),), 2))
    found = beam_search(engine, prompt, places, 4, Allowed(twice, torch.tensor([1, 3])))
    assert [sorted(row[valid].tolist()) for row, valid in zip(found.items, found.valid, strict=True)] == [[1, 3]] * 4
