"""Constrained beam search over the catalogue, in the token tree."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from recsys.engine import PromptCache, TreeEngine
from recsys.trie import Trie


@dataclass
class Ranking:
    """The best items of B users, best first. W is the number of beams, or M in a smaller catalogue."""

    items: Tensor  # [B, W] int64 catalogue indices, 0 where not valid
    scores: Tensor  # [B, W] float32 s(x, y), -inf where not valid
    valid: Tensor  # [B, W] bool

    def __getitem__(self, rows: Tensor) -> Ranking:
        """Return the lists of some rows, ``[B]`` bool or ``[R]`` int64."""
        return Ranking(self.items[rows], self.scores[rows], self.valid[rows])


@dataclass
class _Paths:
    """Open paths of the beam: W' per user, best first. A score of -inf marks a place without a path."""

    node: Tensor  # [B, W'] trie node
    score: Tensor  # [B, W']
    hidden: Tensor  # [B, W', H] at the node
    sees: Tensor  # [B, W', rows in the cache's tree] which rows the path consists of


@torch.no_grad()
def beam_search(engine: TreeEngine, prompt: PromptCache, num_beams: int) -> Ranking:
    """Return up to ``num_beams`` items per user with the highest scores that a search of this width finds.

    Open paths and finished titles are kept apart, ``num_beams`` of each. Scores only fall, so an open path that is no
    better than the worst of ``num_beams`` finished titles is dropped, and the search ends when none is left. It walks
    the trie's children, so it can neither leave the catalogue nor repeat an item; with as many beams as items it is
    exact. Items that share a title share its score, and follow each other.
    """
    trie, users = engine.trie, len(prompt.last)
    prompt.rewind()
    paths = _Paths(
        node=prompt.length.new_zeros(users, 1),
        score=torch.zeros(users, 1, device=prompt.last.device),
        hidden=prompt.last[:, None],
        sees=torch.zeros(users, 1, 0, dtype=torch.bool, device=prompt.last.device),
    )
    leaf, leaf_score = paths.node[:, :0], paths.score[:, :0]
    while True:
        alive = paths.score > -torch.inf
        logprobs, children, row = engine.head.child_logprobs(paths.hidden[alive], paths.node[alive])
        user, path = (index[row] for index in alive.nonzero(as_tuple=True))
        count = user.bincount(minlength=users)  # a user's candidates stand one after another
        place = torch.arange(len(user), device=user.device) - (count.cumsum(0) - count)[user]
        child = children.new_zeros(users, int(count.max()))
        source, score = torch.zeros_like(child), logprobs.new_full(child.shape, -torch.inf)
        child[user, place], source[user, place] = children, path
        score[user, place] = logprobs + paths.score[user, path]

        # Under `trie` normalisation the forced tokens behind a child are free, to the title's end if it comes first.
        stop = trie.branch[child].long() if engine.normalization == "trie" else child
        ends = trie.degree(stop) == 0
        leaf_score, best = _top(torch.cat([leaf_score, score.masked_fill(~ends, -torch.inf)], 1), num_beams)
        leaf = torch.cat([leaf, stop], 1).gather(1, best)

        score, best = _top(score.masked_fill(ends, -torch.inf), num_beams)
        if leaf_score.shape[1] == num_beams:
            score = score.masked_fill(score <= leaf_score[:, -1:], -torch.inf)
        width = int((score > -torch.inf).sum(1).max())
        if width == 0:
            break
        score, best = score[:, :width], best[:, :width]
        sees = paths.sees.gather(1, source.gather(1, best)[..., None].expand(-1, -1, paths.sees.shape[2]))
        paths = _advance(engine, prompt, child.gather(1, best), score, sees)
    engine.wait()
    prompt.rewind()
    return _items_of(trie, leaf, leaf_score, min(num_beams, trie.num_items))


def _top(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the best k columns (all, if fewer), best first, and their indices."""
    return scores.topk(min(k, scores.shape[1]), dim=1)


def _advance(engine: TreeEngine, prompt: PromptCache, first: Tensor, score: Tensor, sees: Tensor) -> _Paths:
    """Append to the cache the next tokens of each path, in one chunk.

    The chunk of a path runs from ``first [B, W']`` over forced tokens: to the path's next branching (``trie``), or
    as far as every path is forced (``vocab``: the paths must stay at one length, for their scores to compare).
    """
    trie = engine.trie
    alive = score > -torch.inf
    first = first.where(alive, 1)  # places without a path fill up with any node that has a token
    branch = trie.branch[first].long()
    forced = trie.depth(branch) - trie.depth(first) - (trie.degree(branch) == 0).long()  # a leaf predicts nothing
    if engine.normalization == "vocab":
        forced = forced.where(alive, trie.max_depth).min().expand_as(forced)
    count = (forced + 1).where(alive, 0)  # [B, W'] rows of each path
    end = count.cumsum(1)
    size, longest = torch.stack([end[:, -1].max(), count.max()]).tolist()

    place = torch.arange(size, device=first.device).expand(len(first), -1)  # [B, N] rows of the chunk
    path = torch.searchsorted(end, place.contiguous(), right=True).clamp(max=first.shape[1] - 1)
    filled = place < end[:, -1:]
    step = place - (end - count).gather(1, path)
    node = first.gather(1, path)
    for t in range(longest - 1):  # down the single children
        node = torch.where(step > t, trie.offsets[node].long().clamp(max=len(trie) - 1), node)

    own = (path[:, :, None] == path[:, None]) & (step[:, :, None] >= step[:, None]) & filled[:, None]
    visible = torch.cat([sees.gather(1, path[..., None].expand(-1, -1, sees.shape[2])), own], 2)
    hidden = engine.append(prompt, node, visible)
    if engine.normalization == "vocab":  # forced tokens have a price
        inside = filled & (step < count.gather(1, path) - 1)
        logprobs, *_ = engine.head.child_logprobs(hidden[inside], node[inside])  # one child each
        user = inside.nonzero()[:, 0]
        score = score.index_put((user, path[inside]), logprobs, accumulate=True)
    last = (end - 1).clamp(min=0)[..., None]
    return _Paths(
        node=node.gather(1, last[..., 0]),
        score=score,
        hidden=hidden.gather(1, last.expand(-1, -1, hidden.shape[2])),
        sees=visible.gather(1, last.expand(-1, -1, visible.shape[2])),
    )


def _items_of(trie: Trie, leaf: Tensor, score: Tensor, width: int) -> Ranking:
    """Replace each leaf, best first, by the items that share it, and keep ``width`` items."""
    valid = score > -torch.inf
    index = torch.searchsorted(trie.leaf_nodes, leaf.to(torch.int32)).clamp(max=len(trie.leaf_nodes) - 1)
    start = trie.leaf_offsets[index]
    count = (trie.leaf_offsets[index + 1] - start).where(valid, 0)
    end = count.cumsum(1)
    place = torch.arange(width, device=leaf.device).expand(len(leaf), -1)
    source = torch.searchsorted(end, place.contiguous(), right=True).clamp(max=leaf.shape[1] - 1)
    valid = place < end[:, -1:]
    item = start.gather(1, source) + place - (end - count).gather(1, source)
    return Ranking(
        items=trie.leaf_items[item.where(valid, 0)].where(valid, 0),
        scores=score.gather(1, source).masked_fill(~valid, -torch.inf),
        valid=valid,
    )
