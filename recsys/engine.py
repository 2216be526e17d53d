"""The tree engine: passes of the policy over prompts and the token trees that hang on them.

Training scores the groups of all places of a prompt in one pass, beam search appends one level of its trees at a time
to the key/value cache, and exact scoring appends the whole catalogue in chunks.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache

from recsys.logprobs import Normalization, TrieHead, check_vocabulary
from recsys.policy import Policy
from recsys.tree import Packing, Places, TokenTree, pass_mask, row_mask
from recsys.trie import Trie


@dataclass
class PromptCache:
    """Keys, values and hidden states of B prompts, to which tree rows are appended."""

    cache: DynamicCache
    hidden: Tensor  # [B, L, H]
    appended: int = 0  # tree rows behind the prompts

    def rewind(self) -> None:
        """Drop the tree rows from the cache."""
        if self.appended:
            self.cache.crop(-self.appended)  # negative: rows to remove
            self.appended = 0

    def select(self, prompts: Tensor) -> PromptCache:
        """Return a copy with some prompts alone, ``prompts [R]`` int64, and their tree rows."""
        cache = copy.copy(self.cache)
        cache.layers = [copy.copy(layer) for layer in cache.layers]
        cache.batch_select_indices(prompts)
        return PromptCache(cache, self.hidden[prompts], self.appended)


class TreeEngine:
    """Scores of catalogue items under a policy.

    Args:
        policy: A built policy.
        trie: Of the catalogue, on the policy's device.
        normalization: Distribution over items, see :mod:`recsys.logprobs`.

    Raises:
        UserError: if a title has a token that is none of the model's.

    Attributes:
        head: The policy's output head along the trie.
        token_rows: Token rows sent through the model so far, padding included.
    """

    def __init__(self, policy: Policy, trie: Trie, normalization: Normalization) -> None:
        self.policy = policy
        self.trie = trie
        self.normalization = normalization
        check_vocabulary(policy, trie.tokens)
        self.head = TrieHead(policy, trie, normalization)
        self.token_rows = 0

    # ---- one pass with gradients ------------------------------------------------------------------------------

    def hidden(self, tokens: Tensor) -> Tensor:
        """Return the hidden states ``[B, L, H]`` of prompts alone, ``tokens [B, L]`` padded on the right."""
        self.token_rows += tokens.numel()
        return self.policy.hidden(tokens)

    def forward(self, tokens: Tensor, places: Places, items: Tensor) -> tuple[Tensor, Tensor]:
        """Score a group of items at each place, in one pass over prompts and trees.

        Args:
            tokens: ``[B, L]`` prompts, padded on the right.
            places: P places in them, perhaps none.
            items: ``[P, G]`` catalogue indices.

        Returns:
            Scores ``[P, G]`` (s(x, y): the sum over the item's tokens, end included) and the prompts' hidden states
            ``[B, L, H]``.
        """
        if not items.numel():
            hidden = self.hidden(tokens)
            return hidden.new_zeros(items.shape, dtype=torch.float32), hidden
        users, width = tokens.shape
        tree, packing, node, start, sees = self._rows(places, items, users)
        place = torch.arange(width, device=tokens.device)
        self.token_rows += tokens.numel() + node.numel()
        hidden = self.policy.hidden(
            torch.cat([tokens, self.trie.tokens[node].long()], 1),
            attention_mask=pass_mask(width, row_mask(start, width, sees, node.shape[1])),
            position_ids=torch.cat([place.expand(users, -1), start + self.trie.depth(node) - 1], 1),
        )
        prompts, rows = hidden.split([width, node.shape[1]], 1)
        return self._item_logprobs(tree, packing, places.hidden(prompts), rows), prompts

    # ---- steps over a cache, without gradients ----------------------------------------------------------------

    def prefill(self, tokens: Tensor) -> PromptCache:
        """Run the prompts ``[B, L]``, padded on the right, once and keep their keys, values and hidden states."""
        cache = DynamicCache()
        self.token_rows += tokens.numel()
        return PromptCache(cache, self.policy.hidden(tokens, cache=cache))

    def append(self, prompt: PromptCache, node: Tensor, start: Tensor, sees: Tensor) -> Tensor:
        """Run rows of trees behind cached prompts and keep their keys and values.

        Args:
            prompt: Cache, changed in place.
            node: ``[B, N]`` trie nodes.
            start: ``[B, N]`` prompt tokens before the place of each.
            sees: ``[B, N, D]`` columns of the tree rows that each sees, itself included, see
                :func:`recsys.tree.row_mask`.

        Returns:
            Hidden states ``[B, N, H]``.
        """
        prompt.appended += node.shape[1]
        self._any_process(True)
        self.token_rows += node.numel()
        return self.policy.hidden(
            self.trie.tokens[node].long(),
            attention_mask=row_mask(start, prompt.hidden.shape[1], sees, prompt.appended),
            position_ids=start + self.trie.depth(node) - 1,
            cache=prompt.cache,
        )

    def score(self, prompt: PromptCache, places: Places, items: Tensor) -> Tensor:
        """Score ``items [P, G]`` at places of cached prompts; the cache keeps the prompts alone. Returns ``[P, G]``."""
        scores = prompt.hidden.new_zeros(items.shape, dtype=torch.float32)
        if items.numel():
            tree, packing, node, start, sees = self._rows(places, items, len(prompt.hidden))
            prompt.rewind()
            rows = self.append(prompt, node, start, sees) if node.numel() else prompt.hidden[:, :0]
            prompt.rewind()
            scores = self._item_logprobs(tree, packing, places.hidden(prompt.hidden), rows)
        self.wait()
        return scores

    def score_all(self, prompt: PromptCache, places: Places, chunk: int = 256) -> Tensor:
        """Score the whole catalogue at places of cached prompts, ``chunk`` items at a time. Returns ``[P, M]``."""
        order = self.trie.lexical
        parts = [self.score(prompt, places, items.expand(len(places), -1)) for items in order.split(chunk)]
        scores = torch.empty(len(places), len(order), device=order.device)
        scores[:, order] = torch.cat(parts, 1)
        return scores

    # ---- trees of items ---------------------------------------------------------------------------------------

    def _rows(self, places: Places, items: Tensor, prompts: int) -> tuple[TokenTree, Packing, Tensor, Tensor, Tensor]:
        """Return the trees of ``items [P, G]``, and how their rows lie behind the prompts.

        Returns:
            The trees, their packing, and of the ``[B, N]`` rows the nodes, the tokens before the place, and the
            columns ``[B, N, D]`` that they see.
        """
        tree = TokenTree.of(items, self.trie, self.head.predicts)
        packing = Packing.of((tree.node < len(self.trie)).sum(1), places.prompt, prompts)
        segment, step = packing.segment, packing.step.clamp(min=0)
        if not segment.numel():
            return tree, packing, segment, segment, segment[..., None]
        line = tree.lineage()[segment, step]
        sees = torch.where(line < 0, -1, line + packing.first[segment][..., None])
        return tree, packing, tree.node[segment, step].clamp(max=len(self.trie) - 1), places.start[segment], sees

    def _item_logprobs(self, tree: TokenTree, packing: Packing, root: Tensor, rows: Tensor) -> Tensor:
        """Return the scores ``[P, G]`` of trees from the hidden states before their places and at their rows."""
        hidden = root[:, None]
        if rows.shape[1]:
            step = torch.arange(tree.node.shape[1], device=rows.device).expand(len(root), -1)
            hidden = torch.cat([hidden, packing.take(rows, step)], 1)
        return self.head.item_logprobs(tree, hidden)

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
