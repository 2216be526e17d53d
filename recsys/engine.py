"""The tree engine: passes of the policy over prompts and the token trees that hang on them.

Training scores a group of items with one tree in one pass, beam search appends one level of a tree at a time to the
key/value cache, and exact scoring appends the whole catalogue in chunks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache

from recsys.logprobs import Normalization, TrieHead
from recsys.policy import Policy
from recsys.tree import TokenTree, appended_mask, tree_mask
from recsys.trie import Trie


@dataclass
class PromptCache:
    """Keys and values of B prompts, to which tree nodes are appended."""

    cache: DynamicCache
    length: Tensor  # [B] real prompt tokens
    width: int  # prompt tokens with padding
    last: Tensor  # [B, H] hidden state of the prompt's last token
    appended: int = 0  # tree rows behind the prompt

    def rewind(self) -> None:
        """Drop the tree rows from the cache."""
        if self.appended:
            self.cache.crop(-self.appended)  # negative: rows to remove
            self.appended = 0


class TreeEngine:
    """Scores of catalogue items under a policy.

    Args:
        policy: A built policy.
        trie: Of the catalogue, on the policy's device.
        normalization: Distribution over items, see :mod:`recsys.logprobs`.

    Attributes:
        head: The policy's output head along the trie.
        token_rows: Token rows sent through the model so far, padding included.
    """

    def __init__(self, policy: Policy, trie: Trie, normalization: Normalization) -> None:
        self.policy = policy
        self.trie = trie
        self.normalization = normalization
        self.head = TrieHead(policy, trie, normalization)
        self.token_rows = 0

    def tree_of(self, items: Tensor) -> TokenTree:
        """Return the tree of the nodes that must go through the model to score ``items [B, G]``."""
        return TokenTree.of(items, self.trie, self.head.predicts)

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
        mask = tree_mask(length, width, tree.ancestors())
        place = torch.arange(width, device=tokens.device)
        positions = torch.cat([place.expand(users, -1), length[:, None] + self.trie.depth(node) - 1], 1)
        self.token_rows += positions.numel()
        hidden = self.policy.hidden(
            torch.cat([tokens, self.trie.tokens[node].long()], 1), attention_mask=mask, position_ids=positions
        )
        scores = self.head.item_logprobs(tree, torch.cat([_last(hidden, length)[:, None], hidden[:, width:]], 1))
        return scores, hidden[:, :width]

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
        prompt.appended += node.shape[1]
        self._any_process(True)
        self.token_rows += node.numel()
        return self.policy.hidden(
            self.trie.tokens[node].long(),
            attention_mask=appended_mask(prompt.length, prompt.width, visible),
            position_ids=prompt.length[:, None] + self.trie.depth(node) - 1,
            cache=prompt.cache,
        )

    def score(self, prompt: PromptCache, items: Tensor) -> Tensor:
        """Score ``items [B, G]`` after cached prompts; the cache keeps the prompts alone. Returns ``[B, G]``."""
        tree = self.tree_of(items)
        prompt.rewind()
        hidden = prompt.last[:, None]
        if tree.node.shape[1]:
            node = tree.node.clamp(max=len(self.trie) - 1)
            hidden = torch.cat([hidden, self.append(prompt, node, tree.ancestors())], 1)
            prompt.rewind()
        self.wait()
        return self.head.item_logprobs(tree, hidden)

    def score_all(self, prompt: PromptCache, chunk: int = 256) -> Tensor:
        """Score the whole catalogue after cached prompts, ``chunk`` items at a time. Returns ``[B, M]``."""
        order = self.trie.lexical
        users = len(prompt.last)
        parts = [self.score(prompt, items.expand(users, -1)) for items in order.split(chunk)]
        scores = torch.empty(users, len(order), device=order.device)
        scores[:, order] = torch.cat(parts, 1)
        return scores

    # ---- processes that share a base --------------------------------------------------------------------------

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
