"""Which items of a catalogue may be recommended, at each place that asks for some."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from recsys.trie import Trie


class Allowed:
    """Some items of a catalogue, less some at each place.

    The policy's distribution stays that over the whole catalogue: a search leaves out paths that end in no allowed
    title, and scores are what they are without limits. Titles below a node follow one another in lexical order, so how
    many of them are left is a difference of two counts: nothing has the size of places times the catalogue.

    Args:
        trie: Of the catalogue.
        items: ``[A]`` catalogue indices of the items that may be recommended anywhere; all by default.

    Attributes:
        trie: The same nodes, but leaves list allowed items alone.
    """

    def __init__(self, trie: Trie, items: Tensor | None = None) -> None:
        self.items = torch.full_like(trie.leaf, items is None, dtype=torch.bool)  # [M]
        if items is not None:
            self.items[items] = True
        kept = self.items[trie.leaf_items]
        leaf = torch.arange(len(trie.leaf_nodes), device=kept.device).repeat_interleave(trie.leaf_offsets.diff())
        count = torch.bincount(leaf[kept], minlength=len(trie.leaf_nodes))
        self.trie = copy.copy(trie)
        self.trie.leaf_offsets = torch.nn.functional.pad(count.cumsum(0), (1, 0))
        self.trie.leaf_items = trie.leaf_items[kept]

        leaves = trie.leaf[trie.lexical].unique_consecutive().long()  # in lexical order
        self._first = torch.zeros(len(trie), dtype=torch.int64, device=kept.device)  # [n] first leaf at or below
        self._first[leaves] = torch.arange(len(leaves), device=kept.device)
        ends = [*trie.levels[1:].tolist(), len(trie)]
        for start, end in zip(trie.levels.tolist()[::-1], ends[::-1], strict=True):  # bottom up
            child = trie.offsets[start:end].long().clamp(max=len(trie) - 1)
            inner = trie.offsets[start + 1 : end + 1] > trie.offsets[start:end]
            self._first[start:end] = torch.where(inner, self._first[child], self._first[start:end])
        there = count[torch.searchsorted(trie.leaf_nodes, leaves.int())] > 0
        self._before = torch.nn.functional.pad(there.cumsum(0), (1, 0))  # [leaves + 1] allowed titles before each leaf
        self._gone = self._before[:0]  # ascending: place * leaves + leaf of each title that is excluded there

    def without(self, place: Tensor, items: Tensor) -> Allowed:
        """Return what is left without ``items [S]``, and those with the same titles, at ``place [S]``."""
        leaf = self._first[self.trie.leaf[items].long()]
        there = self._before[leaf + 1] > self._before[leaf]
        left = copy.copy(self)
        left._gone = (place * len(self.trie.leaf_nodes) + leaf)[there].unique()
        return left

    def closed(self, node: Tensor) -> Tensor:
        """Return which of the trie nodes ``[P, E]`` have no allowed title at or below them, same shape."""
        first = self._first[node]
        end = first + self.trie.titles[node]
        place = torch.arange(len(node), device=node.device)[:, None] * len(self.trie.leaf_nodes)
        gone = torch.searchsorted(self._gone, place + end) - torch.searchsorted(self._gone, place + first)
        return self._before[end] - self._before[first] == gone

    def excludes(self, places: int) -> Tensor:
        """Return which items may not be recommended at each place, ``[places, M]``."""
        return ~self.items | self.closed(self.trie.leaf.long().expand(places, -1))
