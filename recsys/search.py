"""Constrained beam search over the catalogue, in the token tree."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from recsys.allowed import Allowed
from recsys.engine import PromptCache, TreeEngine
from recsys.tree import Packing, Places
from recsys.trie import Trie


@dataclass
class Ranking:
    """The best items at P places, best first. W is the number of beams, or M in a smaller catalogue."""

    items: Tensor  # [P, W] int64 catalogue indices, 0 where not valid
    scores: Tensor  # [P, W] float32 s(x, y), -inf where not valid
    valid: Tensor  # [P, W] bool

    def __getitem__(self, rows: Tensor) -> Ranking:
        """Return the lists of some places, ``[P]`` bool or ``[R]`` int64."""
        return Ranking(self.items[rows], self.scores[rows], self.valid[rows])


@dataclass
class Wanted:
    """Which lists are wanted: those with no fewer than ``fewest`` and no more than ``most`` items above a bar.

    Under ``trie`` normalisation a path's probability is that of all titles behind it together. Where the mean of these
    is above the bar, so is one of them at least: most lists turn out unwanted long before their titles are known, half
    of them before any row has gone through the model.
    """

    bar: Tensor  # [P] log-probability of the title that each list is wanted for
    fewest: int
    most: int

    MARGIN = 1e-4  # nats between a score and the bar that count as equal: two passes round differently


@dataclass
class _Paths:
    """Open paths of the beam: W' at each place, best first. A score of -inf marks a gap."""

    node: Tensor  # [P, W'] trie node
    score: Tensor  # [P, W']
    hidden: Tensor  # [P, W', H] at the node
    sees: Tensor  # [P, W', T] columns of the tree rows that the path consists of, by depth, -1 = none


@torch.no_grad()
def beam_search(
    engine: TreeEngine, prompt: PromptCache, places: Places, num_beams: int, allowed: Allowed | None = None
) -> Ranking:
    """Return up to ``num_beams`` items for each place with the highest scores that a search of this width finds.

    Open paths and finished titles are kept apart, ``num_beams`` of each. Scores only fall, so an open path that is no
    better than the worst of ``num_beams`` finished titles is dropped, and the search ends when none is left. It walks
    the trie's children, so it can neither leave the catalogue nor repeat an item; with as many beams as items it is
    exact. Items that share a title share its score, and follow each other. Paths that end in no ``allowed`` title are
    never open, so a list is as long as there are such titles.
    """
    trie, width = engine.trie, min(num_beams, engine.trie.num_items)
    prompt.rewind()
    if not len(places):
        engine.wait()
        nothing = places.start.new_zeros(0, width)
        return Ranking(nothing, nothing.float(), nothing.bool())
    paths = _roots(engine, prompt, places)
    leaf, leaf_score = paths.node[:, :0], paths.score[:, :0]
    while True:
        child, source, score, leaf, leaf_score = _expand(engine, paths, leaf, leaf_score, num_beams, allowed)
        score, best = _top(score, num_beams)
        if leaf_score.shape[1] == num_beams:
            score = score.masked_fill(score <= leaf_score[:, -1:], -torch.inf)
        open_paths = int((score > -torch.inf).sum(1).max())
        if open_paths == 0:
            break
        score, best = score[:, :open_paths], best[:, :open_paths]
        sees = paths.sees.gather(1, source.gather(1, best)[..., None].expand(-1, -1, paths.sees.shape[2]))
        paths = _advance(engine, prompt, places, child.gather(1, best), score, sees)
    engine.wait()
    prompt.rewind()
    return _items_of(allowed.trie if allowed else trie, leaf, leaf_score, width)


@torch.no_grad()
def best_first_search(
    engine: TreeEngine,
    prompt: PromptCache,
    places: Places,
    num_titles: int,
    wanted: Wanted | None = None,
    width: int = 8,
) -> Ranking:
    """Return the items of the ``num_titles`` best titles at each place, and end early where a list is not ``wanted``.

    The best open paths of each place go on, ``width`` in a pass, whatever their lengths. A path's score bounds those
    of its titles, so a list is complete, and exact, as soon as no open path is better than its last title. Paths above
    the bar come first, so it is known early whether the list is wanted. Both are exact over the whole catalogue unless
    more than ``max(64, 4 * num_titles)`` paths of a place are open; the worst are dropped then: a policy that prefers
    nothing would have the search go through the whole catalogue.

    Args:
        engine: Of the policy.
        prompt: Cached prompts; the cache keeps the prompts alone.
        places: P places in them.
        num_titles: Titles of a list. Items that share one follow each other, and the last may not all fit.
        wanted: Which lists are wanted, all by default. Others come back without a valid item.
        width: Paths of a place that go through the model together, or up to twice as many where others in the
            batch need more.
    """
    trie = engine.trie
    size = min(num_titles - 1 + trie.max_duplicates, trie.num_items)
    prompt.rewind()
    if not len(places):
        engine.wait()
        nothing = places.start.new_zeros(0, size)
        return Ranking(nothing, nothing.float(), nothing.bool())
    paths = _roots(engine, prompt, places)
    leaf, leaf_score = paths.node[:, :0], paths.score[:, :0]
    node, source, score = leaf, leaf, leaf_score  # [P, F] open paths: next node, the line that it goes on, and score
    lines = paths.sees[:, :0]  # [P, R, T] of the paths that went through the model
    left = prompt  # with the prompts alone that have open paths
    while True:
        child, parent, child_score, leaf, leaf_score = _expand(engine, paths, leaf, leaf_score, num_titles)
        node, source = torch.cat([node, child], 1), torch.cat([source, parent + lines.shape[1]], 1)
        score = torch.cat([score, child_score], 1)
        lines = torch.cat([lines, paths.sees], 1)
        if wanted is not None:
            unwanted = _unwanted(engine, wanted, leaf, leaf_score, node, score)[:, None]
            leaf_score, score = leaf_score.masked_fill(unwanted, -torch.inf), score.masked_fill(unwanted, -torch.inf)
        if leaf_score.shape[1] == num_titles:
            score = score.masked_fill(score <= leaf_score[:, -1:], -torch.inf)
        open_paths = (score > -torch.inf).sum(1)
        busy = torch.zeros_like(left.hidden[:, 0, 0], dtype=torch.int64).index_add(0, places.prompt, open_paths.sign())
        most, prompts = torch.stack([open_paths.max(), busy.sign().sum()]).tolist()
        if most == 0:
            break
        if 2 * prompts <= len(busy):
            left, places = left.select(busy.nonzero()[:, 0]), Places(_renumbered(busy > 0, places.prompt), places.start)
            busy = busy[busy > 0]
        score, best = _top(score, min(most, max(64, 4 * num_titles)))
        node, source = node.gather(1, best), source.gather(1, best)
        # Where few places of a prompt are open, each gets more of the rows that the fullest prompt makes a pass have.
        share = (width * busy.max() // busy.clamp(min=1))[places.prompt].clamp(max=2 * width)
        goes = torch.arange(score.shape[1], device=score.device) < share[:, None]
        going = score.masked_fill(~goes, -torch.inf)[:, : 2 * width]
        sees = lines.gather(1, source[:, : 2 * width, None].expand(-1, -1, lines.shape[2]))
        paths = _advance(engine, left, places, node[:, : 2 * width], going, sees)
        score = score.masked_fill(goes, -torch.inf)
    engine.wait()
    prompt.rewind()
    return _items_of(trie, leaf, leaf_score, size)


def _renumbered(kept: Tensor, prompt: Tensor) -> Tensor:
    """Return the numbers of prompts ``[P]`` among the kept ones ``[B]``; of one that is not kept, a neighbour's."""
    return (kept.cumsum(0) - 1).clamp(min=0)[prompt]


def _unwanted(
    engine: TreeEngine, wanted: Wanted, leaf: Tensor, leaf_score: Tensor, node: Tensor, score: Tensor
) -> Tensor:
    """Return ``[P]`` bool: whose lists are certainly not wanted, from finished titles and open paths ``[P, F]``."""
    trie, high = engine.trie, wanted.bar[:, None] + wanted.MARGIN
    above = (leaf_score > high).sum(1)
    if engine.normalization == "trie":
        mean = score - trie.titles[trie.branch[node].long()].log()
        above = above + (mean > high).sum(1)
    unwanted = above > wanted.most
    if wanted.fewest:
        low = high - 2 * wanted.MARGIN
        items = trie.items_at(leaf)
        known = (score < low).all(1)  # no open path can lead to or above the bar
        unwanted |= known & ((items * (leaf_score >= low)).sum(1) < wanted.fewest)
    return unwanted


def _roots(engine: TreeEngine, prompt: PromptCache, places: Places) -> _Paths:
    """Return the empty path at each place."""
    nothing = places.start.new_full((len(places), 1, engine.trie.max_depth), -1)
    hidden = places.hidden(prompt.hidden)[:, None]
    return _Paths(nothing[..., 0] + 1, torch.zeros_like(hidden[..., 0], dtype=torch.float32), hidden, nothing)


def _top(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the best k columns (all, if fewer), best first, and their indices."""
    return scores.topk(min(k, scores.shape[1]), dim=1)


def _expand(
    engine: TreeEngine,
    paths: _Paths,
    leaf: Tensor,
    leaf_score: Tensor,
    num_titles: int,
    allowed: Allowed | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return :func:`_children`, those that end a title at -inf, and the best titles with these among them."""
    trie = engine.trie
    child, source, score = _children(engine, paths)
    if allowed is not None:
        score = score.masked_fill(allowed.closed(child), -torch.inf)
    # Under `trie` normalisation the forced tokens behind a child are free, to the title's end if it comes first.
    stop = trie.branch[child].long() if engine.normalization == "trie" else child
    ends = trie.degree(stop) == 0
    leaf_score, best = _top(torch.cat([leaf_score, score.masked_fill(~ends, -torch.inf)], 1), num_titles)
    return child, source, score.masked_fill(ends, -torch.inf), torch.cat([leaf, stop], 1).gather(1, best), leaf_score


def _children(engine: TreeEngine, paths: _Paths) -> tuple[Tensor, Tensor, Tensor]:
    """Return the children of the open paths of each place, their paths and scores: ``[P, E]``, -inf past the last."""
    if paths.node.shape[1] == 1 and not paths.node.any():  # the first step, where all places have the same
        score = engine.head.first_logprobs(paths.hidden[:, 0])
        child = torch.arange(1, score.shape[1] + 1, device=score.device).expand_as(score)
        return child, torch.zeros_like(child), score
    alive = paths.score > -torch.inf
    at, path = alive.nonzero(as_tuple=True)
    logprobs, children, row = engine.head.child_logprobs(paths.hidden[at, path], paths.node[at, path])
    at, path = at[row], path[row]
    count = at.new_zeros(len(alive)).index_add(0, at, torch.ones_like(at))  # a place's stand one after another
    column = torch.arange(len(at), device=at.device) - (count.cumsum(0) - count)[at]
    child = children.new_zeros(len(alive), int(count.max()))
    source, score = torch.zeros_like(child), logprobs.new_full(child.shape, -torch.inf)
    child[at, column], source[at, column] = children, path
    score[at, column] = logprobs + paths.score[at, path]
    return child, source, score


def _advance(
    engine: TreeEngine, prompt: PromptCache, places: Places, first: Tensor, score: Tensor, sees: Tensor
) -> _Paths:
    """Append to the cache the next tokens of each path, in one chunk.

    The chunk of a path runs from ``first [P, W']`` over forced tokens: to the path's next branching (``trie``), or
    as far as every path is forced (``vocab``: the paths must stay at one length, for their scores to compare).
    """
    trie = engine.trie
    alive = score > -torch.inf
    first = first.where(alive, 1)  # gaps hold any node that has a token
    branch = trie.branch[first].long()
    forced = trie.depth(branch) - trie.depth(first) - (trie.degree(branch) == 0).long()  # a leaf predicts nothing
    if engine.normalization == "vocab":
        forced = forced.where(alive, trie.max_depth).min().expand_as(forced)
    count = (forced + 1).where(alive, 0).flatten()  # [P * W'] rows of each path
    prompts = places.prompt[:, None].expand(first.shape).flatten()
    packing = Packing.of(count, prompts, len(prompt.hidden))

    path, step = packing.segment, packing.step.clamp(min=0)  # [B, N]
    node = first.flatten()[path]
    for t in range(packing.longest - 1):  # down the single children
        node = torch.where(step > t, trie.offsets[node].long().clamp(max=len(trie) - 1), node)

    # Of the rows that each row sees, those of its own chunk have the depths from the chunk's first node to its own.
    own = torch.arange(trie.max_depth, device=node.device) - (trie.depth(node) - 1 - step)[..., None]  # [B, N, T]
    column = prompt.appended + packing.first[path][..., None] + own
    visible = torch.where((own >= 0) & (own <= step[..., None]), column, sees.flatten(0, 1)[path])
    start = places.start[path // first.shape[1]]
    hidden = engine.append(prompt, node, start, visible)
    if engine.normalization == "vocab":  # forced tokens have a price
        inside = packing.filled & (step < count[path] - 1)
        logprobs, *_ = engine.head.child_logprobs(hidden[inside], node[inside])  # one child each
        score = score.flatten().index_add(0, path[inside], logprobs).view_as(score)
    last = (count - 1).clamp(min=0)
    return _Paths(
        node=packing.take(node[..., None], last).view_as(first),
        score=score,
        hidden=packing.take(hidden, last).view(*first.shape, -1),
        sees=packing.take(visible, last).view(*first.shape, -1),
    )


def _items_of(trie: Trie, leaf: Tensor, score: Tensor, width: int) -> Ranking:
    """Replace each leaf, best first, by the items that share it, and keep ``width`` items."""
    valid = ~score.isneginf()  # what is not a number stays, to be seen
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
