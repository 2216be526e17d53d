"""Constrained beam search: the tree engine against ``transformers.generate`` with a prefix function, in one run.

    python benchmarks/search.py --users 4 --beams 50
    python benchmarks/search.py --items amazon.csv   # longer titles: a CSV with a column `title`

Prints for each method the median seconds per user, token rows per user through the model, peak memory of the process
above its start, and how its results compare with the first method's. Titles and prompts are MovieLens-100K's by
default, the policy is the default 4-bit SmolLM2; on a GPU it runs there.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import jsonargparse
import numpy as np
import pandas as pd
import torch
from measure import Memory

from recsys.data import Catalog, HistoryDataModule, MovieLens100K, PromptEncoder, PromptTemplate
from recsys.policy import LLMPolicy
from recsys.search import beam_search
from recsys.tree import TreeEngine
from recsys.trie import Trie

Result = tuple[list[int], list[float]]  # items and scores, best first


def generate_with_prefix_function(
    policy: LLMPolicy, items: list[list[int]], beams: int
) -> Callable[[list[int]], Result]:
    """What people use: a dictionary of prefixes, and ``generate`` with beam search."""
    legal: dict[tuple[int, ...], set[int]] = {}
    for sequence in items:
        for i, token in enumerate(sequence):
            legal.setdefault(tuple(sequence[:i]), set()).add(token)
    index = {tuple(sequence): i for i, sequence in enumerate(items)}
    end = items[0][-1]

    def run(prompt: list[int]) -> Result:
        def allowed(_: int, ids: torch.Tensor) -> list[int]:
            return list(legal.get(tuple(ids[len(prompt) :].tolist()), {end}))

        tokens = torch.tensor([prompt], device=policy.head.weight.device)
        output = policy.model.generate(
            input_ids=tokens,
            attention_mask=torch.ones_like(tokens),
            num_beams=beams,
            num_return_sequences=beams,
            prefix_allowed_tokens_fn=allowed,
            max_new_tokens=max(map(len, items)),
            eos_token_id=end,
            pad_token_id=0,
            length_penalty=0.0,
            do_sample=False,
            return_dict_in_generate=True,
            output_scores=True,
        )
        found = []
        for sequence in output.sequences[:, len(prompt) :].tolist():
            found.append(index[tuple(sequence[: sequence.index(end) + 1])])
        return found, output.sequences_scores.tolist()

    return run


def tree_search(engine: TreeEngine, beams: int) -> Callable[[list[int]], Result]:
    """The engine's search, one user at a time as the alternative."""

    def run(prompt: list[int]) -> Result:
        tokens = torch.tensor([prompt], device=engine.trie.leaf.device)
        found = beam_search(engine, engine.prefill(tokens, torch.tensor([len(prompt)], device=tokens.device)), beams)
        return found.items[0].tolist(), found.scores[0].tolist()

    return run


def main(users: int = 4, beams: int = 50, items: str | None = None, history: int = 20, dtype: str = "float32") -> None:
    """Run the comparison.

    Args:
        users: Prompts to search for.
        beams: Width of the search.
        items: CSV file with a column ``title``, for another catalogue than MovieLens-100K's.
        history: Titles in a prompt.
        dtype: Compute type; scores of the two methods agree to 1e-4 in float32.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    policy = LLMPolicy(dtype=dtype)
    template = PromptTemplate(max_history=history, max_tokens=2000)
    if items is None:
        data = HistoryDataModule(MovieLens100K(), template)
        data.load()
        catalog, rows = data.catalog, data.histories.val[:: len(data.histories.val) // users][:users]
        histories = [data.histories.history(row, history) for row in rows]
    else:
        titles = [str(title) for title in pd.read_csv(items)["title"]]
        catalog = Catalog([str(i) for i in range(len(titles))], titles)
        histories = [np.random.default_rng(u).choice(len(titles), history) for u in range(users)]
    sequences = catalog.tokenize(policy.tokenizer, template.end)
    encoder = PromptEncoder(policy.tokenizer, sequences, template)
    prompts = [encoder.encode(h).tokens for h in histories]
    policy.build(device)
    policy.eval()
    trie = Trie.from_sequences(sequences).to(device)
    lengths = np.array([len(s) for s in sequences])
    print(
        f"{device}, {torch.get_num_threads()} threads, {dtype}: {len(catalog)} titles of {lengths.mean():.1f} tokens, ",
        end="",
    )
    print(f"{users} prompts of {np.mean([len(p) for p in prompts]):.0f} tokens, {beams} beams")

    rows_seen = 0

    def count(_: object, args: tuple[torch.Tensor, ...]) -> None:
        nonlocal rows_seen
        rows_seen += args[0].numel()

    policy.causal_lm.get_input_embeddings().register_forward_pre_hook(count)
    methods = {
        "generate + prefix function": generate_with_prefix_function(policy, sequences, beams),
        "tree, vocab": tree_search(TreeEngine(policy, trie, "vocab"), beams),
        "tree, trie": tree_search(TreeEngine(policy, trie, "trie"), beams),
    }
    base: tuple[float, float, list[Result]] | None = None
    for name, method in methods.items():
        method(prompts[0])  # warm up
        rows_seen, seconds, results = 0, [], []
        with torch.no_grad(), Memory() as memory:
            for prompt in prompts:
                began = time.perf_counter()
                results.append(method(prompt))
                seconds.append(time.perf_counter() - began)
        median, rows = statistics.median(seconds), rows_seen / users
        line = f"{name:28s} {median:8.2f} s/user {rows:8.0f} token rows/user {memory.bytes / 1e6:8.0f} MB"
        if base is None:
            base = (median, rows, results)
        else:
            line += f"   {base[0] / median:5.1f} times faster, {base[1] / rows:5.1f} times fewer rows"
        if name == "tree, vocab":
            shared = [len(set(a[0]) & set(b[0])) / beams for a, b in zip(base[2], results, strict=True)]
            gaps = [
                abs(dict(zip(*a, strict=True))[item] - score)
                for a, b in zip(base[2], results, strict=True)
                for item, score in zip(*b, strict=True)
                if item in a[0]
            ]
            line += f"; {np.mean(shared):.1%} of the items the same, scores within {max(gaps):.1e}"
        print(line, flush=True)


if __name__ == "__main__":
    jsonargparse.auto_cli(main)
