"""Token trees: the part of the catalogue's trie that goes through the model together with a prompt.

Rows of a pass are ``[prompt | tree nodes]``. A node's position is the prompt's length plus its depth, and it sees the
prompt and its own ancestors (:func:`tree_mask`), so titles that begin alike share the rows of their beginning.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from recsys.trie import Trie


@dataclass
class TokenTree:
    """Trie nodes that go through the model for B users, parents before children.

    Slots number the places that can predict: slot 0 is the prompt's last token (the trie's root), slot i + 1 is
    node i.
    """

    node: Tensor  # [B, N] int64, ascending trie nodes; rows are filled up with a number past the last trie node
    parent: Tensor  # [B, N] int64, slot of each node's parent
    depth: int  # of the deepest node
    path: Tensor  # [B, G, D] int64, trie nodes of the items that the tree scores, -1 past the leaf

    @classmethod
    def of(cls, items: Tensor, trie: Trie, predicts: Callable[[Tensor], Tensor]) -> TokenTree:
        """Return the tree of the nodes that must go through the model to score items.

        Args:
            items: ``[B, G]`` catalogue indices.
            trie: Of the catalogue.
            predicts: Tells of nodes of any shape whether the step to their child has a log-probability to compute.
        """
        path = trie.paths(items)  # [B, G, D]
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
        """Return the slots ``[B, X]`` of the trie nodes ``[B, X]``; each must be the root or in the tree."""
        return torch.where(node == 0, 0, torch.searchsorted(self.node, node.contiguous()) + 1)

    def ancestors(self) -> Tensor:
        """Return ``[B, N, N]`` bool: whether the second node is the first or an ancestor of it."""
        users, size = self.node.shape
        up = torch.cat([self.parent.new_zeros(users, 1), self.parent], 1)  # [B, 1 + N], the root is its own parent
        slot = torch.arange(1, size + 1, device=self.node.device).repeat(users, 1)
        seen = torch.zeros(users, size, size + 1, dtype=torch.bool, device=self.node.device)
        for _ in range(self.depth):
            seen.scatter_(2, slot[:, :, None], True)
            slot = up.gather(1, slot)
        return seen[:, :, 1:]


def tree_mask(length: Tensor, width: int, below: Tensor) -> Tensor:
    """Return what each row of a pass over ``[prompt | tree nodes]`` sees.

    A prompt's token sees itself and what precedes it; a node sees the real tokens of its prompt and the rows that
    ``below`` names: itself, its ancestors. So padding is seen by padding alone, and no row is empty.

    Args:
        length: ``[B]`` real prompt tokens.
        width: L, prompt tokens with padding.
        below: ``[B, N, N]`` bool, which nodes each node sees, see :meth:`TokenTree.ancestors`.

    Returns:
        ``[B, 1, L + N, L + N]`` bool.
    """
    place = torch.arange(width, device=length.device)
    causal = torch.nn.functional.pad(place[:, None] >= place, (0, below.shape[1]))  # [L, L + N]
    nodes = appended_mask(length, width, below)
    return torch.cat([causal.expand(len(length), 1, -1, -1), nodes], 2)


def appended_mask(length: Tensor, width: int, below: Tensor) -> Tensor:
    """Return the last rows of :func:`tree_mask` alone, for nodes that are appended to a cache.

    Args:
        length: ``[B]`` real prompt tokens.
        width: L, prompt tokens with padding.
        below: ``[B, N, A + N]`` bool, which of the A tree rows in the cache and of the N new ones each new row sees.

    Returns:
        ``[B, 1, N, L + A + N]`` bool.
    """
    prompt = torch.arange(width, device=length.device) < length[:, None]  # [B, L]
    return torch.cat([prompt[:, None].expand(-1, below.shape[1], -1), below], 2)[:, None]
