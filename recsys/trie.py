"""The prefix tree of the catalogue's token sequences, as flat tensors built by sorting.

Nodes are numbered breadth first and, within a level, in the order of the sorted sequences. So the children of a
node are consecutive numbers, and one offsets tensor holds the whole structure (CSR whose targets are implicit).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Trie:
    """Prefix tree over M token sequences; node 0 is the root.

    Items with the same sequence share one leaf. 98 % of the inner nodes of a title trie have a single child, so
    ``branch`` stores for every node where the forced run below it ends.

    Attributes:
        offsets: ``[n + 1]`` int32; the children of node u are the nodes ``offsets[u] .. offsets[u + 1] - 1``.
        tokens: ``[n]`` int32; token on the edge into a node, -1 for the root.
        branch: ``[n]`` int32; first node at or below u that has not exactly one child (it branches or is a leaf).
        titles: ``[n]`` int32; leaves at or below u.
        leaf: ``[M]`` int32; leaf node of each item.
        leaf_nodes: ``[leaves]`` int32, ascending.
        leaf_offsets: ``[leaves + 1]`` int64 into ``leaf_items``.
        leaf_items: ``[M]`` int64; catalogue indices, grouped by leaf.
        lexical: ``[M]`` int64; catalogue indices in the order of their sequences, so that neighbours share prefixes.
        levels: ``[depth + 1]`` int64; first node of each level, so that ``levels[0] == 0`` is the root.
    """

    FIELDS = (
        "offsets",
        "tokens",
        "branch",
        "titles",
        "leaf",
        "leaf_nodes",
        "leaf_offsets",
        "leaf_items",
        "lexical",
        "levels",
    )

    offsets: Tensor
    tokens: Tensor
    branch: Tensor
    titles: Tensor
    leaf: Tensor
    leaf_nodes: Tensor
    leaf_offsets: Tensor
    leaf_items: Tensor
    lexical: Tensor
    levels: Tensor

    def __init__(self, **tensors: Tensor) -> None:
        for name in self.FIELDS:
            setattr(self, name, tensors[name])

    @classmethod
    def from_sequences(cls, sequences: Sequence[Sequence[int]]) -> Trie:
        """Build from one token sequence per item, see :meth:`from_padded`."""
        lengths = torch.tensor([len(s) for s in sequences], dtype=torch.int64)
        padded = torch.full((len(sequences), int(lengths.max()) if len(sequences) else 0), -1, dtype=torch.int32)
        flat = torch.tensor([token for s in sequences for token in s], dtype=torch.int32)
        padded[torch.arange(padded.shape[1]) < lengths[:, None]] = flat
        return cls.from_padded(padded)

    @classmethod
    def from_padded(cls, padded: Tensor) -> Trie:
        """Build from ``[M, T]`` token ids, each row filled up with -1.

        Raises:
            ValueError: if there is no item, an item has no token, or one sequence is a proper prefix of another
                (sequences must end with an end token that occurs nowhere else in them).
        """
        if padded.ndim != 2 or 0 in padded.shape or bool((padded[:, 0] < 0).any()):
            raise ValueError("the trie needs at least one item, and at least one token per item")
        device, (items, depth) = padded.device, padded.shape
        order = torch.arange(items, device=device)
        for column in range(depth - 1, -1, -1):  # least significant column first; stable sorts make it lexicographic
            order = order[padded[order, column].argsort(stable=True)]

        differs = torch.zeros(items, dtype=torch.bool, device=device)  # from the row before, in the columns so far
        differs[0] = True
        at = torch.zeros(items, dtype=torch.int32, device=device)  # node that each row has reached
        levels, total = [0], 1
        tokens = [torch.tensor([-1], dtype=torch.int32, device=device)]
        offsets: list[Tensor] = []
        for column in range(depth):
            token = padded[order, column]
            differs[1:] |= token[1:] != token[:-1]
            alive = token >= 0
            new = differs & alive
            children = torch.bincount(at[new].long() - levels[-1], minlength=total - levels[-1])
            offsets.append((total + children.cumsum(0) - children).to(torch.int32))
            levels.append(total)
            tokens.append(token[new])
            at = torch.where(alive, total - 1 + new.cumsum(0, dtype=torch.int32), at)
            total += len(tokens[-1])
        offsets.append(torch.full((total - levels[-1] + 1,), total, dtype=torch.int32, device=device))

        start = torch.cat(offsets)
        leaf = torch.empty_like(at)
        leaf[order] = at
        if bool((start[leaf.long() + 1] != start[leaf.long()]).any()):
            bad = int((start[leaf.long() + 1] != start[leaf.long()]).nonzero()[0])
            raise ValueError(f"the sequence of item {bad} is a prefix of another item's: it needs an end token")

        branch = torch.arange(total, dtype=torch.int32, device=device)
        titles, end = (start[1:] == start[:-1]).to(torch.int32), total  # 1 at a leaf; end of the level below
        for first, last in zip(levels[-2::-1], levels[:0:-1], strict=True):  # bottom up
            child = start[first:last]
            single = start[first + 1 : last + 1] - child == 1
            branch[first:last] = torch.where(single, branch[child.clamp(max=total - 1).long()], branch[first:last])
            below = torch.nn.functional.pad(titles[last:end].cumsum(0, dtype=torch.int32), (1, 0))
            titles[first:last] += below[(start[first : last + 1] - last).long()].diff()
            end = last

        leaf_items = leaf.argsort(stable=True)
        leaf_nodes, count = leaf[leaf_items].unique_consecutive(return_counts=True)
        return cls(
            offsets=start,
            tokens=torch.cat(tokens),
            branch=branch,
            titles=titles,
            leaf=leaf,
            leaf_nodes=leaf_nodes,
            leaf_offsets=torch.cat([count.new_zeros(1), count.cumsum(0)]),
            leaf_items=leaf_items,
            lexical=order,
            levels=torch.tensor(levels, dtype=torch.int64, device=device),
        )

    def to(self, device: torch.device | str) -> Trie:
        """Return the trie with every tensor on ``device``."""
        return Trie(**{name: getattr(self, name).to(device) for name in self.FIELDS})

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def num_items(self) -> int:
        """M, the number of items."""
        return len(self.leaf)

    @property
    def nbytes(self) -> int:
        """Memory of all tensors in bytes."""
        return sum(getattr(self, name).nbytes for name in self.FIELDS)

    @property
    def max_depth(self) -> int:
        """Tokens of the longest sequence."""
        return len(self.levels) - 1

    @property
    def max_duplicates(self) -> int:
        """Items at the fullest leaf: 1 if all sequences differ."""
        return int(self.leaf_offsets.diff().max())

    def items_at(self, leaf: Tensor) -> Tensor:
        """Return the number of items at each leaf, same shape; any number for a node that is none."""
        place = torch.searchsorted(self.leaf_nodes, leaf.to(torch.int32)).clamp(max=len(self.leaf_nodes) - 1)
        return self.leaf_offsets[place + 1] - self.leaf_offsets[place]

    def same_title(self, items: Tensor) -> Tensor:
        """Return the items that share the title of each of ``items [R]``, itself included: ``[R, most]``, -1 = none."""
        leaf = torch.searchsorted(self.leaf_nodes, self.leaf[items])
        place = self.leaf_offsets[leaf][:, None] + torch.arange(self.max_duplicates, device=items.device)
        inside = place < self.leaf_offsets[leaf + 1][:, None]
        return torch.where(inside, self.leaf_items[place.clamp(max=self.num_items - 1)], -1)

    def degree(self, node: Tensor) -> Tensor:
        """Return the number of children of each node, same shape."""
        node = node.long()
        return self.offsets[node + 1] - self.offsets[node]

    def children(self, node: Tensor) -> tuple[Tensor, Tensor]:
        """Return the children of R nodes in one flat list, node by node.

        A catalogue has nodes with thousands of children, and nearly all others have one: a padded table would be empty.

        Args:
            node: ``[R]`` nodes.

        Returns:
            ``[E]`` int64 children, and ``[E]`` the place in ``node`` of each's parent.
        """
        degree = self.degree(node).long()
        row = torch.repeat_interleave(degree)
        start = self.offsets[node].long() - (degree.cumsum(0) - degree)
        return start[row] + torch.arange(len(row), device=node.device), row

    def depth(self, node: Tensor) -> Tensor:
        """Return the distance from the root of each node, same shape, int64."""
        return torch.searchsorted(self.levels, node.long(), right=True) - 1

    def parent(self, node: Tensor) -> Tensor:
        """Return the parent of each node, same shape, int64; -1 for the root.

        ``offsets`` never falls, so the parent is the last node whose children start at or before this one.
        """
        return torch.searchsorted(self.offsets, node.to(torch.int32), right=True) - 1

    def paths(self, items: Tensor) -> Tensor:
        """Return the nodes from depth 1 down to the leaf of ``items [...]``: ``[..., max_depth]``, -1 past the leaf."""
        node = self.leaf[items].long()
        depth = self.depth(node)
        path = torch.full((*items.shape, self.max_depth), -1, dtype=torch.int64, device=node.device)
        for d in range(self.max_depth, 0, -1):
            reached = depth >= d
            path[..., d - 1] = torch.where(reached, node, path[..., d - 1])
            node = torch.where(reached, self.parent(node), node)
        return path
