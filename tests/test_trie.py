import random

import pytest
import torch

from recsys.trie import Trie


def random_sequences(seed: int, count: int = 30) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randint(1, 4) for _ in range(rng.randint(0, 5))] + [0] for _ in range(rng.randint(1, count))]


@pytest.mark.parametrize("seed", range(20))
def test_against_a_dictionary_of_prefixes(seed: int) -> None:
    sequences = random_sequences(seed)
    trie = Trie.from_sequences(sequences)
    prefixes = {tuple(s[:i]) for s in sequences for i in range(len(s) + 1)}
    assert len(trie) == len(prefixes)

    prefix_of = {0: ()}
    for node in range(len(trie)):
        start, end = trie.offsets[node].item(), trie.offsets[node + 1].item()
        for child in range(start, end):
            prefix_of[child] = (*prefix_of[node], trie.tokens[child].item())
    assert set(prefix_of.values()) == prefixes

    nodes = torch.arange(len(trie))
    assert trie.depth(nodes).tolist() == [len(prefix_of[n]) for n in range(len(trie))]
    node_of = {prefix: node for node, prefix in prefix_of.items()}
    assert trie.parent(nodes).tolist() == [node_of[p[:-1]] if p else -1 for _, p in sorted(prefix_of.items())]

    asked = torch.cat([nodes.flip(0), nodes[:2]])  # any order, leaves and repetitions too
    children, row = trie.children(asked)
    found = sorted((r, prefix_of[c]) for r, c in zip(row.tolist(), children.tolist(), strict=True))
    below = {p: [q for q in prefixes if q and q[:-1] == p] for p in prefixes}
    assert found == sorted((r, q) for r, node in enumerate(asked.tolist()) for q in below[prefix_of[node]])
    assert row.tolist() == sorted(row.tolist())

    for node, prefix in prefix_of.items():
        end = prefix
        while len(below := [p for p in prefixes if len(p) == len(end) + 1 and p[: len(end)] == end]) == 1:
            end = below[0]
        assert prefix_of[trie.branch[node].item()] == end
        assert trie.titles[node].item() == len({tuple(s) for s in sequences if tuple(s[: len(prefix)]) == prefix})

    for item, (sequence, path) in enumerate(zip(sequences, trie.paths(torch.arange(len(sequences))), strict=True)):
        nodes_of_item = [n for n in path.tolist() if n >= 0]
        assert [prefix_of[n] for n in nodes_of_item] == [tuple(sequence[: i + 1]) for i in range(len(sequence))]
        assert nodes_of_item[-1] == trie.leaf[item]


def test_same_titles_share_a_leaf_that_lists_them_all() -> None:
    trie = Trie.from_sequences([[5, 0], [7, 8, 0], [5, 0], [5, 6, 0]])
    listed = {}
    for i, leaf in enumerate(trie.leaf_nodes.tolist()):
        listed[leaf] = trie.leaf_items[trie.leaf_offsets[i] : trie.leaf_offsets[i + 1]].tolist()
    assert trie.leaf[0] == trie.leaf[2]
    assert sorted(map(sorted, listed.values())) == [[0, 2], [1], [3]]
    assert trie.max_duplicates == 2
    assert [sorted(row) for row in trie.same_title(torch.tensor([1, 2, 0])).tolist()] == [[-1, 1], [0, 2], [0, 2]]
    assert trie.items_at(trie.leaf).tolist() == [2, 1, 2, 1]


@pytest.mark.parametrize("sequences", [[], [[]], [[1, 0], []]])
def test_an_empty_sequence_is_refused(sequences: list[list[int]]) -> None:
    with pytest.raises(ValueError, match="at least one"):
        Trie.from_sequences(sequences)


def test_a_sequence_that_ends_inside_another_is_refused() -> None:
    with pytest.raises(ValueError, match="item 1 is a prefix"):
        Trie.from_sequences([[1, 2, 3], [1, 2]])
