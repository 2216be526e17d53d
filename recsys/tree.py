"""The tree engine: one forward pass over prompts and the token trees that hang on them.

A token tree holds nodes of the catalogue's trie; siblings share their prefix. Rows of the pass are
``[prompt | tree nodes]``, a node's position is the prompt's length plus its depth, and it sees the prompt and its
own ancestors. Training scores a group of items with one tree, beam search appends one level of a tree at a time to
the key/value cache, and exact scoring appends the whole catalogue in chunks.

Two distributions over items:
    ``vocab``: every token's log-softmax runs over the vocabulary, so the mass of illegal tokens is lost.
    ``trie``: it runs over the legal children only: what constrained decoding samples from. The exponentials of the
        scores sum to 1 over the titles, a forced token costs nothing, and the forced run that ends a title need not
        go through the model at all.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache

from recsys.policy import Policy
from recsys.trie import Trie

Normalization = Literal["trie", "vocab"]

MAX_LOGITS = 2**25  # float32 logits that the output head computes at once: 128 MiB


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


@dataclass
class PromptCache:
    """Keys and values of B prompts, to which tree nodes are appended."""

    cache: DynamicCache
    length: Tensor  # [B] real prompt tokens
    width: int  # prompt tokens with padding
    last: Tensor  # [B, H] hidden state of the prompt's last token
    appended: int = 0  # tree rows behind the prompt


class TreeEngine:
    """Scores of catalogue items under a policy.

    Args:
        policy: A built policy.
        trie: Of the catalogue, on the policy's device.
        normalization: Distribution over items, see the module's docstring.

    Attributes:
        token_rows: Token rows sent through the model so far, padding included.
    """

    def __init__(self, policy: Policy, trie: Trie, normalization: Normalization) -> None:
        self.policy = policy
        self.trie = trie
        self.normalization = normalization
        self.token_rows = 0
        if normalization == "trie":  # the output head is needed only for tokens that compete somewhere
            degree = self.trie.offsets.diff()
            competes = degree.repeat_interleave(degree) > 1  # of nodes 1 .. n - 1, by their parent
            competes[: degree[0]] = True  # the search always asks the root
            self.legal = self.trie.tokens[1:][competes].unique().long()
            self.column = torch.zeros(policy.head.weight.shape[0], dtype=torch.int64, device=self.legal.device)
            self.column[self.legal] = torch.arange(len(self.legal), device=self.legal.device)

    # ---- log-probabilities from hidden states -----------------------------------------------------------------

    def predicts(self, node: Tensor) -> Tensor:
        """Return whether the step from each node to its child has a log-probability to compute, same shape."""
        return self.trie.degree(node) > (1 if self.normalization == "trie" else 0)

    def child_logprobs(self, hidden: Tensor, node: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return log-probabilities of the children of R trie nodes, in the flat list of :meth:`Trie.children`.

        Args:
            hidden: ``[R, H]`` hidden states at the nodes.
            node: ``[R]`` trie nodes.

        Returns:
            ``[E]`` float32 log-probabilities, ``[E]`` child nodes, and ``[E]`` the row in ``node`` of each's parent.
        """
        child, row = self.trie.children(node)
        column = self.trie.tokens[child].long()
        if self.normalization == "trie":
            column = self.column[column]
        return self.head_logprobs(self.policy.head, hidden, node, column, row), child, row

    def head_logprobs(self, head: nn.Linear, hidden: Tensor, node: Tensor, column: Tensor, row: Tensor) -> Tensor:
        """Return the ``[E]`` log-probabilities of :meth:`child_logprobs`.

        Args:
            head: The output head. It, and all that follows but ``node``, may be on the ``meta`` device.
            hidden: ``[R, H]`` hidden states at the nodes.
            node: ``[R]`` trie nodes.
            column: ``[E]`` each child's column among those of the head that compete.
            row: ``[E]`` the row in ``node`` of each child's parent, ascending.
        """
        # Float32 whatever the model computes in: bfloat16 rounds a logit of 20 to steps of 1/8.
        weight: Tensor = head.weight
        bias: Tensor | None = head.bias
        if self.normalization == "trie":
            legal = self.legal.to(weight.device)
            weight, bias = weight[legal], None if bias is None else bias[legal]
        whole = (weight.float(), None if bias is None else bias.float())
        rows = max(1, MAX_LOGITS // len(weight))
        if len(node) <= rows:
            return self._logprobs(hidden, column, row, *whole)
        # The logits of a chunk are computed again in the backward pass: those of all rows would not fit into memory.
        edges = [int(part.sum()) for part in self.trie.degree(node).split(rows)]
        chunks = zip(hidden.split(rows), column.split(edges), (row % rows).split(edges), strict=True)
        return torch.cat([checkpoint(self._logprobs, *chunk, *whole, use_reentrant=False) for chunk in chunks])

    def _logprobs(self, hidden: Tensor, column: Tensor, row: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return ``[E]`` log-probabilities of the columns of the output head at the rows of ``hidden [R, H]``."""
        logits = torch.nn.functional.linear(hidden.float(), weight, bias)
        legal = logits[row, column]
        if self.normalization == "vocab":
            return legal - logits.logsumexp(1)[row]
        top = legal.new_full((len(hidden),), -torch.inf).scatter_reduce(0, row, legal.detach(), "amax")[row]
        return legal - top - legal.new_zeros(len(hidden)).index_add(0, row, (legal - top).exp()).log()[row]

    def _edge_logprobs(self, hidden: Tensor, node: Tensor, row: Tensor, child: Tensor) -> Tensor:
        """Return ``[E]`` log-probabilities of the edges from ``node[row]`` to ``child``."""
        logprobs, _, parent = self.child_logprobs(hidden, node)
        first = torch.searchsorted(parent, row)  # of each node's children in the flat list
        return logprobs[first + child - self.trie.offsets[node[row]].long()]

    # ---- trees ------------------------------------------------------------------------------------------------

    def tree_of(self, items: Tensor) -> TokenTree:
        """Return the tree of the nodes that must go through the model to score ``items [B, G]``."""
        path = self.trie.paths(items)  # [B, G, D]
        runs = self.predicts(path.clamp(min=0)) & (path >= 0)
        runs = runs.flip(-1).cumsum(-1).flip(-1) > 0  # a node is needed down to the last one that predicts
        past = len(self.trie)
        node = torch.where(runs, path, past).flatten(1).sort(1).values
        new = node < past
        new[:, 1:] &= node[:, 1:] != node[:, :-1]
        size, depth = torch.stack([new.sum(1).max(), runs.sum(-1).max()]).tolist()
        compact = torch.full((len(items), size + 1), past, device=items.device)  # the last column takes the rest
        compact.scatter_(1, torch.where(new, new.cumsum(1) - 1, size), node)
        tree = TokenTree(compact[:, :size].contiguous(), torch.empty(0), depth, path)
        parent = self.trie.parent(tree.node.clamp(max=past - 1))
        tree.parent = torch.where(tree.node < past, tree.slot_of(parent), 0)
        return tree

    def _edges(self, path: Tensor) -> tuple[Tensor, Tensor]:
        """Return for each node of paths ``[..., D]`` its parent, and whether the step to it has a log-probability."""
        before = torch.nn.functional.pad(path[..., :-1], (1, 0))
        return before, (path >= 0) & self.predicts(before.clamp(min=0))

    def item_logprobs(self, tree: TokenTree, hidden: Tensor) -> Tensor:
        """Return the scores ``[B, G]`` of the tree's items from the hidden states ``[B, 1 + N, H]`` at its slots."""
        before, edge = self._edges(tree.path)
        slot = tree.slot_of(torch.where(edge, before, 0).flatten(1))  # [B, G * D]

        node = torch.nn.functional.pad(tree.node, (1, 0))  # [B, 1 + N], trie node of each slot
        used = (node < len(self.trie)) & self.predicts(node.clamp(max=len(self.trie) - 1))
        row = used.flatten().cumsum(0).view(used.shape) - 1  # rows of the head, only where something is predicted
        user, item, _ = edge.nonzero(as_tuple=True)
        flat = edge.flatten(1)
        logprobs = self._edge_logprobs(hidden[used], node[used], row.gather(1, slot)[flat], tree.path[edge])
        scores = logprobs.new_zeros(tree.path.shape[:2])
        return scores.index_put((user, item), logprobs, accumulate=True)

    # ---- one pass with gradients ------------------------------------------------------------------------------

    def forward(self, tokens: Tensor, length: Tensor, items: Tensor) -> tuple[Tensor, Tensor]:
        """Score a group of items after each prompt, in one pass.

        Args:
            tokens: ``[B, L]`` prompts, padded on the right.
            length: ``[B]`` real tokens.
            items: ``[B, G]`` catalogue indices.

        Returns:
            Scores ``[B, G]`` (s(x, y): the sum over the item's tokens, end included) and the prompts' hidden states
            ``[B, L, H]``.
        """
        users, width = tokens.shape
        tree = self.tree_of(items)
        node = tree.node.clamp(max=len(self.trie) - 1)
        place = torch.arange(width, device=tokens.device)
        prompt = (place < length[:, None])[:, None]  # [B, 1, L]
        size = node.shape[1]
        # Padding of a prompt sees what precedes it, so that no row is empty; nothing sees the padding.
        causal = torch.nn.functional.pad(place[:, None] >= place, (0, size))
        below = torch.cat([prompt.expand(-1, size, -1), tree.ancestors()], 2)
        mask = torch.cat([causal.expand(users, -1, -1), below], 1)[:, None]  # [B, 1, L + N, L + N]
        positions = torch.cat([place.expand(users, -1), length[:, None] + self.trie.depth(node) - 1], 1)
        self.token_rows += mask.shape[0] * mask.shape[2]
        hidden = self.policy.hidden(
            torch.cat([tokens, self.trie.tokens[node].long()], 1), attention_mask=mask, position_ids=positions
        )
        scores = self.item_logprobs(tree, torch.cat([_last(hidden, length)[:, None], hidden[:, width:]], 1))
        return scores, hidden[:, :width]

    def history_logprobs(self, hidden: Tensor, history: Tensor, start: Tensor) -> Tensor:
        """Score the titles inside the prompts, each given all that precedes it.

        Args:
            hidden: ``[B, L, H]`` of the prompts.
            history: ``[B, C]`` catalogue indices, -1 = none.
            start: ``[B, C]`` position of each title's first token.

        Returns:
            Scores ``[B, C]``, 0 where there is no title.
        """
        path = self.trie.paths(history.clamp(min=0))  # [B, C, D]
        before, edge = self._edges(path)
        edge &= (history >= 0)[..., None]
        user, title, step = edge.nonzero(as_tuple=True)
        row = torch.arange(len(user), device=user.device)
        logprobs = self._edge_logprobs(hidden[user, start[user, title] - 1 + step], before[edge], row, path[edge])
        return logprobs.new_zeros(history.shape).index_put((user, title), logprobs, accumulate=True)

    # ---- steps over a cache, without gradients ----------------------------------------------------------------

    def prefill(self, tokens: Tensor, length: Tensor) -> PromptCache:
        """Run the prompts ``[B, L]`` once and keep their keys and values."""
        cache = DynamicCache()
        self.token_rows += tokens.numel()
        hidden = self.policy.hidden(tokens, cache=cache)
        return PromptCache(cache, length, tokens.shape[1], _last(hidden, length))

    def append(self, prompt: PromptCache, node: Tensor, visible: Tensor) -> Tensor:
        """Append tree rows to the cache.

        Args:
            prompt: Cache, changed in place.
            node: ``[B, N]`` trie nodes.
            visible: ``[B, N, appended + N]`` bool: which tree rows each new row sees, itself included.

        Returns:
            Hidden states ``[B, N, H]``.
        """
        sees = torch.arange(prompt.width, device=node.device) < prompt.length[:, None]
        mask = torch.cat([sees[:, None].expand(-1, node.shape[1], -1), visible], 2)[:, None]
        prompt.appended += node.shape[1]
        self._any_process(True)
        self.token_rows += node.numel()
        return self.policy.hidden(
            self.trie.tokens[node].long(),
            attention_mask=mask,
            position_ids=prompt.length[:, None] + self.trie.depth(node) - 1,
            cache=prompt.cache,
        )

    def score(self, prompt: PromptCache, items: Tensor) -> Tensor:
        """Score ``items [B, G]`` after cached prompts; the cache keeps the prompts alone. Returns ``[B, G]``."""
        tree = self.tree_of(items)
        self.rewind(prompt)
        hidden = prompt.last[:, None]
        if tree.node.shape[1]:
            node = tree.node.clamp(max=len(self.trie) - 1)
            hidden = torch.cat([hidden, self.append(prompt, node, tree.ancestors())], 1)
            self.rewind(prompt)
        self.wait()
        return self.item_logprobs(tree, hidden)

    def score_all(self, prompt: PromptCache, chunk: int = 256) -> Tensor:
        """Score the whole catalogue after cached prompts, ``chunk`` items at a time. Returns ``[B, M]``."""
        order = self.trie.lexical
        users = len(prompt.last)
        parts = [self.score(prompt, items.expand(users, -1)) for items in order.split(chunk)]
        scores = torch.empty(users, len(order), device=order.device)
        scores[:, order] = torch.cat(parts, 1)
        return scores

    def rewind(self, prompt: PromptCache) -> None:
        """Drop the tree rows from the cache."""
        if prompt.appended:
            prompt.cache.crop(-prompt.appended)  # negative: rows to remove
            prompt.appended = 0

    def wait(self) -> None:
        """Take part in the passes of processes that append more, until none does; nothing to do if not sharded.

        The layers of a sharded policy are put together by all processes in each pass, but a beam search ends earlier
        on some than on others.
        """
        while self._any_process(False):
            self.policy.hidden(self.trie.tokens[1:2].long()[None])

    def _any_process(self, appends: bool) -> bool:
        """Return whether any process is about to append; each process asks this once a pass."""
        if not self.policy.sharded:
            return False
        answer = torch.tensor(int(appends), device=self.trie.tokens.device)
        torch.distributed.all_reduce(answer, torch.distributed.ReduceOp.MAX)
        return bool(answer)


def _last(hidden: Tensor, length: Tensor) -> Tensor:
    """Return the hidden states ``[B, H]`` at the last real token of each prompt."""
    return hidden[torch.arange(len(length), device=length.device), length - 1]
