"""Token trees: the parts of the catalogue's trie that go through the model behind prompts.

Rows of a pass are ``[prompt | tree rows]``. Trees hang at :class:`Places`: behind a prompt, or before any title in it,
so that one prompt serves every title of a history as a row of its own. A row of a tree has the position of the token
that it stands for, and sees what precedes its place in the prompt, its ancestors and itself (:func:`row_mask`). Titles
that begin alike share the rows of their beginning, and the rows of all trees of a prompt lie side by side
(:class:`Packing`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from recsys.trie import Trie


@dataclass
class Places:
    """P places in B prompts, at which an item is asked for."""

    prompt: Tensor  # [P] int64, ascending: the prompt of each
    start: Tensor  # [P] int64, tokens of it that precede the item, >= 1

    @classmethod
    def ends(cls, length: Tensor) -> Places:
        """Return the end of each prompt, ``length [B]`` tokens long."""
        return cls(torch.arange(len(length), device=length.device), length)

    @classmethod
    def at(cls, chosen: Tensor, start: Tensor) -> Places:
        """Return the places before the ``chosen [B, C]`` titles of prompts, which start at ``start [B, C]``."""
        prompt, title = chosen.nonzero(as_tuple=True)
        return cls(prompt, start[prompt, title])

    def __len__(self) -> int:
        return len(self.prompt)

    def __getitem__(self, index: Tensor) -> Places:
        """Return some places, ``[P]`` bool or ``[R]`` int64 ascending."""
        return Places(self.prompt[index], self.start[index])

    def hidden(self, prompts: Tensor) -> Tensor:
        """Return what predicts the first token, ``[P, H]``, from the hidden states ``[B, L, H]`` of the prompts."""
        return prompts[self.prompt, self.start - 1]


@dataclass
class Packing:
    """Rows of S segments side by side behind their prompts: the tree of a place, or the next tokens of a path."""

    prompt: Tensor  # [S] int64, ascending: the prompt of each segment
    first: Tensor  # [S] int64, column of its first row
    segment: Tensor  # [B, N] int64, segment of each row; any for a row that only fills up
    step: Tensor  # [B, N] int64, place of each row in its segment
    longest: int  # rows of the longest segment

    @classmethod
    def of(cls, count: Tensor, prompt: Tensor, prompts: int) -> Packing:
        """Lay out segments of ``count [S]`` rows, whose ``prompt [S]`` ascends, behind B prompts."""
        end = count.cumsum(0)
        total = count.new_zeros(prompts).index_add(0, prompt, count)
        before = total.cumsum(0) - total
        size, longest = torch.stack([total.max(), count.max()]).tolist() if len(count) else (0, 0)
        column = torch.arange(size, device=count.device)
        filled = column < total[:, None]
        row = torch.where(filled, before[:, None] + column, 0)
        segment = torch.searchsorted(end, row, right=True)
        step = torch.where(filled, row - (end - count)[segment], -1)
        return cls(prompt, end - count - before[prompt], segment, step, longest)

    @property
    def filled(self) -> Tensor:
        """Which rows are part of a segment, ``[B, N]`` bool."""
        return self.step >= 0

    def take(self, rows: Tensor, step: Tensor) -> Tensor:
        """Return ``[S, ..., X]``, row ``step [S, ...]`` of each segment, from ``rows [B, N, X]``."""
        ahead = (...,) + (None,) * (step.ndim - 1)
        flat = self.prompt[ahead] * rows.shape[1] + self.first[ahead] + step
        return rows.flatten(0, 1)[flat.clamp(max=rows.shape[0] * rows.shape[1] - 1)]


@dataclass
class TokenTree:
    """Trie nodes that go through the model to score the items of P places, parents before children.

    Slots number what can predict: slot 0 is the token before the place (the trie's root), slot i + 1 is node i.
    """

    node: Tensor  # [P, N] int64, ascending trie nodes; rows are filled up with a number past the last trie node
    parent: Tensor  # [P, N] int64, slot of each node's parent
    depth: int  # of the deepest node
    path: Tensor  # [P, G, D] int64, trie nodes of the items that the tree scores, -1 past the leaf

    @classmethod
    def of(cls, items: Tensor, trie: Trie, predicts: Callable[[Tensor], Tensor]) -> TokenTree:
        """Return the trees of the nodes that must go through the model to score items.

        Args:
            items: ``[P, G]`` catalogue indices, P and G at least 1.
            trie: Of the catalogue.
            predicts: Tells of nodes of any shape whether the step to their child has a log-probability to compute.
        """
        path = trie.paths(items)  # [P, G, D]
        runs = predicts(path.clamp(min=0)) & (path >= 0)
        runs = runs.flip(-1).cumsum(-1).flip(-1) > 0  # a node is needed down to the last one that predicts
        past = len(trie)
        node = torch.where(runs, path, past).flatten(1).sort(1).values
        new = node < past
        new[:, 1:] &= node[:, 1:] != node[:, :-1]
        size, depth = torch.stack([new.sum(1).max(), runs.sum(-1).max()]).tolist()
        compact = torch.full((len(items), size + 1), past, device=items.device)  # the last column takes the rest
        compact.scatter_(1, torch.where(new, new.cumsum(1) - 1, size), node)
        tree = cls(compact[:, :size].contiguous(), torch.empty(0), depth, path)
        parent = trie.parent(tree.node.clamp(max=past - 1))
        tree.parent = torch.where(tree.node < past, tree.slot_of(parent), 0)
        return tree

    def slot_of(self, node: Tensor) -> Tensor:
        """Return the slots ``[P, X]`` of the trie nodes ``[P, X]``; each must be the root or in the tree."""
        return torch.where(node == 0, 0, torch.searchsorted(self.node, node.contiguous()) + 1)

    def lineage(self) -> Tensor:
        """Return ``[P, N, D]``: the node itself, its parent and so on, as numbers of nodes; -1 past the root."""
        up = torch.nn.functional.pad(self.parent, (1, 0))  # [P, 1 + N], the root is its own parent
        slot = torch.arange(1, self.node.shape[1] + 1, device=self.node.device).repeat(len(self.node), 1)
        line = []
        for _ in range(self.depth):
            line.append(slot - 1)
            slot = up.gather(1, slot)
        return torch.stack(line, 2)


def row_mask(start: Tensor, width: int, sees: Tensor, size: int) -> Tensor:
    """Return what tree rows see: the tokens before their place and the tree rows that ``sees`` names.

    Args:
        start: ``[B, N]`` tokens of the prompt before each row's place, >= 1: no row is empty.
        width: L, prompt tokens with padding.
        sees: ``[B, N, D]`` columns of the tree rows that each row sees, itself included; -1 for none.
        size: Tree rows behind each prompt, those of earlier passes in the cache included.

    Returns:
        ``[B, 1, N, L + size]`` bool.
    """
    prompt = torch.arange(width, device=start.device) < start[..., None]
    tree = torch.zeros(*start.shape, size + 1, dtype=torch.bool, device=start.device)  # the last column takes the rest
    tree.scatter_(2, torch.where(sees < 0, size, sees), True)
    return torch.cat([prompt, tree[..., :size]], 2)[:, None]


def pass_mask(width: int, rows: Tensor) -> Tensor:
    """Return the mask of a whole pass, whose prompts' tokens see themselves and what precedes them.

    Args:
        width: L, prompt tokens with padding, which is seen by padding alone.
        rows: ``[B, 1, N, L + N]`` of the tree rows, see :func:`row_mask`.

    Returns:
        ``[B, 1, L + N, L + N]`` bool.
    """
    place = torch.arange(width, device=rows.device)
    causal = torch.nn.functional.pad(place[:, None] >= place, (0, rows.shape[2]))  # [L, L + N]
    return torch.cat([causal.expand(len(rows), 1, -1, -1), rows], 2)
