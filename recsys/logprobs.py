"""Log-probabilities of items from hidden states: the output head, read along the catalogue's trie.

Two distributions over items:
    ``vocab``: every token's log-softmax runs over the vocabulary, so the mass of illegal tokens is lost.
    ``trie``: it runs over the legal children only: what constrained decoding samples from. The exponentials of the
        scores sum to 1 over the titles, a forced token costs nothing, and the forced run that ends a title need not
        go through the model at all.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from recsys.policy import Policy
from recsys.tree import TokenTree
from recsys.trie import Trie
from recsys.types import UserError

Normalization = Literal["trie", "vocab"]

MAX_LOGITS = 2**25  # float32 logits that the output head computes at once: 128 MiB


def check_vocabulary(policy: Policy, tokens: Tensor) -> None:
    """Raise a UserError if a token of a title or a prompt is none of the model's."""
    known = min(len(policy.head.weight), policy.causal_lm.get_input_embeddings().weight.shape[0])
    if (most := int(tokens.max())) >= known:
        raise UserError(
            f"{policy.name}: its tokenizer has a token {most}, but the model knows {known:,}: the tokenizer is not the "
            "model's"
        )


class TrieHead:
    """The output head of a policy, asked for the children of trie nodes alone.

    Args:
        policy: A built policy.
        trie: Of the catalogue, on the policy's device.
        normalization: Distribution over items, see the module's docstring.
    """

    def __init__(self, policy: Policy, trie: Trie, normalization: Normalization) -> None:
        self.policy = policy
        self.trie = trie
        self.normalization = normalization
        if normalization == "trie":  # the head is needed only for tokens that compete somewhere
            degree = trie.offsets.diff()
            competes = degree.repeat_interleave(degree) > 1  # of nodes 1 .. n - 1, by their parent
            competes[: degree[0]] = True  # the search always asks the root
            self.legal = trie.tokens[1:][competes].unique().long()
            self.column = torch.zeros(policy.head.weight.shape[0], dtype=torch.int64, device=self.legal.device)
            self.column[self.legal] = torch.arange(len(self.legal), device=self.legal.device)

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
        weight: Tensor = self.policy.head.weight
        bias: Tensor | None = self.policy.head.bias
        if self.normalization == "trie":
            column, weight, bias = self.column[column], weight[self.legal], None if bias is None else bias[self.legal]
        # Float32 whatever the model computes in: bfloat16 rounds a logit of 20 to steps of 1/8.
        whole = (weight.float(), None if bias is None else bias.float())
        rows = max(1, MAX_LOGITS // len(weight))
        if len(node) <= rows:
            return self._logprobs(hidden, column, row, *whole), child, row
        # The logits of a chunk are computed again in the backward pass: those of all rows would not fit into memory.
        edges = [int(part.sum()) for part in self.trie.degree(node).split(rows)]
        chunks = zip(hidden.split(rows), column.split(edges), (row % rows).split(edges), strict=True)
        parts = [checkpoint(self._logprobs, *chunk, *whole, use_reentrant=False) for chunk in chunks]
        return torch.cat(parts), child, row

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

    def _edges(self, path: Tensor) -> tuple[Tensor, Tensor]:
        """Return for each node of paths ``[..., D]`` its parent, and whether the step to it has a log-probability."""
        before = torch.nn.functional.pad(path[..., :-1], (1, 0))
        return before, (path >= 0) & self.predicts(before.clamp(min=0))

    def item_logprobs(self, tree: TokenTree, hidden: Tensor) -> Tensor:
        """Return the scores ``[P, G]`` of the trees' items from the hidden states ``[P, 1 + N, H]`` at their slots."""
        before, edge = self._edges(tree.path)
        slot = tree.slot_of(torch.where(edge, before, 0).flatten(1))  # [P, G * D]

        node = torch.nn.functional.pad(tree.node, (1, 0))  # [P, 1 + N], trie node of each slot
        used = (node < len(self.trie)) & self.predicts(node.clamp(max=len(self.trie) - 1))
        row = used.flatten().cumsum(0).view(used.shape) - 1  # rows of the head, only where something is predicted
        place, item, step = edge.nonzero(as_tuple=True)
        at = used.nonzero(as_tuple=True)
        row = row.gather(1, slot).view(edge.shape)
        logprobs = self._edge_logprobs(hidden[at], node[at], row[place, item, step], tree.path[place, item, step])
        scores = logprobs.new_zeros(tree.path.shape[:2])
        return scores.index_put((place, item), logprobs, accumulate=True)

    def title_logprobs(self, hidden: Tensor, titles: Tensor, start: Tensor) -> Tensor:
        """Score the titles inside the prompts, each given all that precedes it.

        Args:
            hidden: ``[B, L, H]`` of the prompts.
            titles: ``[B, C]`` catalogue indices, -1 = none.
            start: ``[B, C]`` position of each title's first token.

        Returns:
            Scores ``[B, C]``, 0 where there is no title.
        """
        path = self.trie.paths(titles.clamp(min=0))  # [B, C, D]
        before, edge = self._edges(path)
        edge &= (titles >= 0)[..., None]
        user, title, step = at = edge.nonzero(as_tuple=True)
        row = torch.arange(len(user), device=user.device)
        logprobs = self._edge_logprobs(hidden[user, start[user, title] - 1 + step], before[at], row, path[at])
        return logprobs.new_zeros(titles.shape).index_put((user, title), logprobs, accumulate=True)
