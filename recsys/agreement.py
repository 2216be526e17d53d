"""Whether a language model is one that the tree engine can run, found out before anything long starts.

The engine computes what one full row per title through the whole model would give, if each token sees all that precedes
it and nothing else, at the position that it is told, and if the logits are the head's. A window of attention shorter
than a prompt, a recurrence, positions that count what lies in the cache, capped logits: each makes search, update and
full row disagree, and a run would train on the difference.
"""

from __future__ import annotations

import torch
from torch import Tensor

from recsys.engine import TreeEngine
from recsys.logprobs import check_vocabulary
from recsys.tree import Places
from recsys.trie import Trie
from recsys.types import UserError

# Nats and share of a score by which two passes may differ, and the share of the largest logit by which logits may: in
# bfloat16 each pass rounds otherwise.
TOLERANCE = {"exact": (2e-3, 1e-4, 1e-4), "rounded": (0.5, 0.05, 1e-2)}


def check_agreement(engine: TreeEngine, prompt: list[int]) -> None:
    """Compare one full row, one search and one update of two titles, behind a prompt and in the middle of it.

    Args:
        engine: Its policy is in training mode afterwards.
        prompt: Tokens of a real prompt, the longest that will be used: a window of attention shows from its length on.

    Raises:
        UserError: if they disagree, or the model takes no such pass; or if a trained weight has no part in them.
    """
    policy = engine.policy
    tokens = torch.tensor([prompt], device=engine.trie.tokens.device)
    check_vocabulary(policy, tokens)
    try:
        capped, full, searched, updated, unreached = _compared(engine, tokens)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        first = str(error).strip().split("\n")[0]
        raise UserError(
            f"{policy.name} cannot run titles as a tree behind a prompt ({type(error).__name__}: {first}); use a "
            "causal language model whose layers are attention"
        ) from error
    nats, share, of_logits = TOLERANCE["exact" if policy.head.weight.dtype == torch.float32 else "rounded"]
    if not bool(full.isfinite().all()):
        raise UserError(f"{policy.name}: the scores of a real prompt are not numbers: its weights are not finite")
    if not capped <= of_logits:
        raise UserError(f"{policy.name}: its logits are not its output head applied to its decoder; not supported")
    for name, scores in (("a search", searched), ("an update", updated)):
        gap = (scores - full).abs()
        if not bool((gap <= nats + share * full.abs()).all()):
            raise UserError(
                f"{policy.name}: {name} and a full row through the model differ by {gap.max():.2g} nats in the score "
                f"of a title behind a prompt of {len(prompt)} tokens, so a token does not see just what precedes it (a "
                "sliding window, a recurrence): lower data.prompt.max_tokens, or use another model"
            )
    if unreached:
        raise UserError(
            f"{policy.name}: {len(unreached)} trained weights have no part in any score, first {unreached[0]}: leave "
            "their modules out of the adapter's target_modules"
        )


def _compared(engine: TreeEngine, tokens: Tensor) -> tuple[float, Tensor, Tensor, Tensor, list[str]]:
    """Run the prompt ``tokens [1, L]`` in all ways.

    Returns:
        By which share of the largest the model's logits differ from the head's; the scores ``[P, G]`` by full rows, a
        search and an update; and the trained weights that the update does not reach.
    """
    policy, trie, width = engine.policy, engine.trie, tokens.shape[1]
    start = tokens.new_tensor([(width + 1) // 2, width])
    places, items = Places(torch.zeros_like(start), start), _siblings(trie).expand(2, -1)
    policy.eval()
    with torch.no_grad():
        few = tokens[:, :64]
        hook = policy.head.register_forward_hook(lambda module, inputs, logits: 100 * logits)  # up to any cap
        logits, expected = policy.model(input_ids=few).logits.float(), policy.head(policy.hidden(few)).float()
        hook.remove()
        capped = (logits - expected).abs().max() / expected.abs().max()
        full = []
        for place, item in zip(start.repeat_interleave(2), items.flatten(), strict=True):
            path = trie.paths(item)
            row = torch.cat([tokens[0, :place], trie.tokens[path[path >= 0]].long()])
            full.append(engine.head.title_logprobs(engine.hidden(row[None]), item[None, None], place[None, None]))
        searched = engine.score(engine.prefill(tokens), places, items)
    policy.train()
    with torch.enable_grad():
        updated, _ = engine.forward(tokens, places, items)
        trained = policy.trainable()
        gradients = torch.autograd.grad(updated.sum(), list(trained.values()), allow_unused=True)
    unreached = [name for name, gradient in zip(trained, gradients, strict=True) if gradient is None]
    return float(capped), torch.cat(full).view_as(items), searched, updated.detach(), unreached


def _siblings(trie: Trie) -> Tensor:
    """Return two items ``[2]`` whose titles have the longest beginning in common."""
    node = (trie.offsets.diff() > 1).nonzero()[-1]  # nodes are numbered by depth: the deepest that branches
    node = trie.offsets[node].long() + torch.arange(2, device=node.device)
    while bool((inner := trie.degree(node) > 0).any()):
        node = torch.where(inner, trie.offsets[node].long(), node)
    return trie.leaf_items[trie.leaf_offsets[torch.searchsorted(trie.leaf_nodes, node.to(torch.int32))]]
