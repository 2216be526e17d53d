"""Log-probabilities of items from hidden states: the output head, read along the catalogue's trie.

Two distributions over items:
    ``vocab``: every token's log-softmax runs over the vocabulary, so the mass of illegal tokens is lost.
    ``trie``: it runs over the legal children only: what constrained decoding samples from. The exponentials of the
        scores sum to 1 over the titles, a forced token costs nothing, and the forced run that ends a title need not
        go through the model at all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding, linear
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


def _logsumexp(value: Tensor, row: Tensor, rows: int) -> Tensor:
    """Return ``[rows]`` the log-sum-exp of the values ``[E]`` of each row ``[E]``."""
    top = value.new_full((rows,), -torch.inf).scatter_reduce(0, row, value.detach(), "amax")
    return top + value.new_zeros(rows).index_add(0, row, (value - top[row]).exp()).log()


class _Head(NamedTuple):
    """Rows of an output head, one for each of V tokens."""

    weight: Tensor  # [V, H]
    bias: Tensor | None  # [V]

    def of(self, tokens: Tensor) -> _Head:
        """Return some of the rows."""
        return _Head(self.weight[tokens], None if self.bias is None else self.bias[tokens])

    def logits(self, hidden: Tensor) -> Tensor:
        """Return logits ``[R, V]``, not in bfloat16, which would round one of 20 to steps of 1/8."""
        return linear(hidden.float(), *self)

    @property
    def rows(self) -> int:
        """Rows of hidden states whose logits fit into memory."""
        return max(1, MAX_LOGITS // len(self.weight))


def _in_chunks(function: Callable[..., Tensor], size: int, *rows: Tensor) -> Tensor:
    """Return a function of rows, ``size`` at a time; what it makes of a chunk is made again in the backward pass."""
    if len(rows[0]) <= size:
        return function(*rows)
    chunks = zip(*(part.split(size) for part in rows), strict=True)
    return torch.cat([checkpoint(function, *chunk, use_reentrant=False) for chunk in chunks])


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
        tokens, known = trie.tokens[1:].long(), policy.head.weight.shape[0]
        degree = trie.offsets.diff()
        self.legal = torch.arange(known, device=tokens.device)
        if normalization == "trie":  # the head is needed only for tokens that compete somewhere
            competes = degree.repeat_interleave(degree) > 1  # of nodes 1 .. n - 1, by their parent
            competes[: degree[0]] = True  # the search always asks the root
            self.legal = tokens[competes].unique()
        self.column = torch.zeros(known, dtype=torch.int64, device=tokens.device)
        self.column[self.legal] = torch.arange(len(self.legal), device=tokens.device)
        self.roots = self.column[tokens[: degree[0]]]  # columns of the root's children

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
        head = self._head()
        size = head.rows
        parts = zip(hidden.split(size), node.split(size), strict=True)
        found = [self._children(head, *part) for part in parts]
        if len(found) == 1:
            return found[0]
        logprobs, child, row = zip(*found, strict=True)
        return torch.cat(logprobs), torch.cat(child), torch.cat([part + i * size for i, part in enumerate(row)])

    def first_logprobs(self, hidden: Tensor) -> Tensor:
        """Return log-probabilities ``[P, D]`` of the root's D children, nodes 1 to D, from hidden states ``[P, H]``."""
        head = self._head()
        if self.normalization == "vocab":
            return torch.cat([head.logits(part).log_softmax(1)[:, self.roots] for part in hidden.split(head.rows)])
        head = head.of(self.roots)
        return torch.cat([head.logits(part).log_softmax(1) for part in hidden.split(head.rows)])

    def edge_logprobs(self, hidden: Tensor, node: Tensor, row: Tensor, child: Tensor) -> Tensor:
        """Return log-probabilities of single edges, for training.

        Most titles begin with one of thousands of tokens, and each is scored by one: the logits of the others are
        needed for their sum alone, which the root's children make without being picked one by one.

        Args:
            hidden: ``[R, H]`` hidden states at the nodes.
            node: ``[R]`` trie nodes.
            row: ``[E]`` where in ``node`` each edge starts.
            child: ``[E]`` the node that it leads to.

        Returns:
            ``[E]`` float32 log-probabilities.
        """
        head = self._head()
        column = self._columns(child)
        logits = (hidden[row].float() * embedding(column, head.weight)).sum(1)
        if head.bias is not None:
            logits = logits + head.bias[column]
        return logits - self._log_total(head, hidden, node)[row]

    def _head(self) -> _Head:
        """Return the output head, for the tokens that are needed."""
        head = _Head(self.policy.head.weight, self.policy.head.bias)
        if len(self.legal) < len(head.weight):
            head = head.of(self.legal)
        return _Head(head.weight.float(), None if head.bias is None else head.bias.float())

    def _children(self, head: _Head, hidden: Tensor, node: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return what :meth:`child_logprobs` does, for rows whose logits fit into memory."""
        logits = head.logits(hidden)
        legal, child, row = self._legal(logits, node)
        total = logits.logsumexp(1) if self.normalization == "vocab" else _logsumexp(legal, row, len(node))
        return legal - total[row], child, row

    def _legal(self, logits: Tensor, node: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return of ``logits [R, V]`` those of each node's children, and the two lists of :meth:`Trie.children`."""
        child, row = self.trie.children(node)
        return logits[row, self._columns(child)], child, row

    def _columns(self, child: Tensor) -> Tensor:
        """Return where in the output head the token of each node stands, same shape."""
        return self.column[self.trie.tokens[child].long()]

    def _log_total(self, head: _Head, hidden: Tensor, node: Tensor) -> Tensor:
        """Return ``[R]`` the logarithm of what the exponentials of all logits that compete at each node add up to."""

        def among_children(states: Tensor, nodes: Tensor) -> Tensor:
            legal, _, row = self._legal(head.logits(states), nodes)
            return _logsumexp(legal, row, len(nodes))

        if self.normalization == "vocab":
            return _in_chunks(lambda states: head.logits(states).logsumexp(1), head.rows, hidden)
        [first], [below] = (node == 0).nonzero(as_tuple=True), node.nonzero(as_tuple=True)
        roots = head.of(self.roots)
        firsts = _in_chunks(lambda states: roots.logits(states).logsumexp(1), roots.rows, hidden[first])
        others = _in_chunks(among_children, head.rows, hidden[below], node[below])
        return firsts.new_zeros(len(node)).index_put((first,), firsts).index_put((below,), others)

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
        logprobs = self.edge_logprobs(hidden[at], node[at], row[place, item, step], tree.path[place, item, step])
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
        logprobs = self.edge_logprobs(hidden[user, start[user, title] - 1 + step], before[at], row, path[at])
        return logprobs.new_zeros(titles.shape).index_put((user, title), logprobs, accumulate=True)
