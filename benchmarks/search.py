"""Constrained beam search: the tree engine against ``transformers.generate`` with a prefix function, in one run.

    python benchmarks/search.py              # titles of 6 tokens
    python benchmarks/search.py --joined 5   # titles of 30 tokens

Prints for each method the median seconds per user, token rows per user through the model, peak memory of the process
above its start, and how far its scores are from exact ones (a float64 copy of the policy, one full row per item).
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

import jsonargparse
import torch
from measure import Memory, timed
from setting import Exact, Setting

from recsys.engine import TreeEngine
from recsys.search import beam_search

Result = tuple[list[int], list[float]]  # items and scores, best first


def generate_with_prefix_function(setting: Setting, beams: int) -> Callable[[int], Result]:
    """What people use: a dictionary of prefixes, and ``generate`` with beam search."""
    legal: dict[tuple[int, ...], set[int]] = {}
    for sequence in setting.items:
        for i, token in enumerate(sequence):
            legal.setdefault(tuple(sequence[:i]), set()).add(token)
    index = {tuple(sequence): i for i, sequence in enumerate(setting.items)}
    end = setting.items[0][-1]

    def run(user: int) -> Result:
        tokens, _ = setting.prompt(user)
        width = tokens.shape[1]

        def allowed(_: int, ids: torch.Tensor) -> list[int]:
            return list(legal.get(tuple(ids[width:].tolist()), {end}))

        output = setting.policy.model.generate(
            input_ids=tokens,
            attention_mask=torch.ones_like(tokens),
            num_beams=beams,
            num_return_sequences=beams,
            prefix_allowed_tokens_fn=allowed,
            max_new_tokens=max(map(len, setting.items)),
            eos_token_id=end,
            pad_token_id=0,
            length_penalty=0.0,
            do_sample=False,
            return_dict_in_generate=True,
            output_scores=True,
        )
        found = []
        for sequence in output.sequences[:, width:].tolist():
            found.append(index[tuple(sequence[: sequence.index(end) + 1])])
        return found, output.sequences_scores.tolist()

    return run


def tree_search(engine: TreeEngine, setting: Setting, beams: int) -> Callable[[int], Result]:
    """The engine's search, one user at a time as the alternative."""

    def run(user: int) -> Result:
        tokens, places = setting.prompt(user)
        found = beam_search(engine, engine.prefill(tokens), places, beams)
        return found.items[0].tolist(), found.scores[0].tolist()

    return run


def compare(found: list[Result], base: list[Result], trie_leaf: list[int]) -> str:
    """Say how many titles two methods share, and what the others are worth."""
    shared = ours = theirs = 0
    gap = 0.0
    for (items, scores), (base_items, base_scores) in zip(found, base, strict=True):
        mine = {trie_leaf[i]: s for i, s in zip(items, scores, strict=True)}
        other = {trie_leaf[i]: s for i, s in zip(base_items, base_scores, strict=True)}
        both = mine.keys() & other.keys()
        shared += len(both)
        gap = max([gap, *(abs(mine[i] - other[i]) for i in both)])
        ours += sum(s > min(base_scores) for i, s in mine.items() if i not in both)
        theirs += sum(s > min(scores) for i, s in other.items() if i not in both)
    return (
        f"{shared} titles in both, scores within {gap:.1e}; {ours} titles that belong into the other's list are only "
        f"here, {theirs} that belong here only there"
    )


def main(users: int = 4, beams: int = 50, history: int = 20, joined: int = 1, dtype: str = "float32") -> None:
    """Run the comparison.

    Args:
        users: Prompts to search for.
        beams: Width of the search.
        history: Titles in a prompt.
        joined: Titles of MovieLens-100K joined into one, for a catalogue of longer titles.
        dtype: Compute type; only float32 can agree with exact scores to 1e-4.
    """
    setting = Setting.make(users, history, joined, dtype)
    print(f"{setting}, {beams} beams", flush=True)
    trie = setting.trie()
    rows_seen = 0

    def count(_: object, args: tuple[torch.Tensor, ...]) -> None:
        nonlocal rows_seen
        rows_seen += args[0].numel()

    exact = Exact(setting)
    setting.policy.causal_lm.get_input_embeddings().register_forward_pre_hook(count)
    methods = {
        "generate + prefix function": generate_with_prefix_function(setting, beams),
        "tree, vocab": tree_search(TreeEngine(setting.policy, trie, "vocab"), setting, beams),
        "tree, trie": tree_search(TreeEngine(setting.policy, trie, "trie"), setting, beams),
    }
    base: tuple[float, float, list[Result]] | None = None
    for name, method in methods.items():
        with torch.no_grad():
            method(0)  # warm up
            rows_seen = 0
            with Memory() as memory:
                runs = [timed(method, user) for user in range(users)]
        median, rows, results = statistics.median(s for s, _ in runs), rows_seen / users, [r for _, r in runs]
        normalization = "trie" if name == "tree, trie" else "vocab"
        best = list(zip(*results[0], strict=True))[:10]
        error = max(abs(exact.score(setting.prompts[0], item, normalization) - score) for item, score in best)
        line = f"{name:28s} {median:8.2f} s/user {rows:8.0f} token rows/user {memory.bytes / 1e6:8.0f} MB"
        line += f"   exact to {error:.0e}"
        if base is None:
            base = (median, rows, results)
        else:
            line += f"   {base[0] / median:5.1f} times faster, {base[1] / rows:5.1f} times fewer rows"
        if name == "tree, vocab":
            line += f"\n    {compare(results, base[2], trie.leaf.tolist())}"
        print(line, flush=True)


if __name__ == "__main__":
    jsonargparse.auto_cli(main)
