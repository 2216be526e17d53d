"""Write interactions whose true distribution is known, as many as one likes: a control for the objectives.

    python benchmarks/synthetic.py
    OMP_NUM_THREADS=1 python benchmarks/compare.py --config benchmarks/synthetic.yaml

The next item depends on the last one: softmax(2 E.W / sqrt(32)) with random E [M, 32] and W [32, M], which is too much
for a policy of width 16. Each user has a few actions, and users come one after the other, so that a temporal split has
validation and test users of their own. A title is a word that is one token of the policy's tokenizer.

Prints the Recall@k of the true distribution, which no policy exceeds.
"""

from __future__ import annotations

from pathlib import Path

import jsonargparse
import numpy as np
import pandas as pd

from recsys.policy import LLMPolicy

FEATURES, SCALE = 32, 2.0
CHUNK = 10_000  # users drawn at once


def main(
    out: Path = Path("data/synthetic"),
    users: int = 200_000,
    actions: int = 11,
    items: int = 1000,
    tokenizer: str = "SmolLM2-135M-Instruct",
) -> None:
    """Write interactions.csv and items.csv.

    Args:
        out: Folder to write to.
        users: Number of users.
        actions: Items of each user.
        items: Size of the catalogue, M.
        tokenizer: Model whose tokenizer the policy takes.
    """
    if out.exists() and any(out.iterdir()):
        raise SystemExit(f"{out} is not empty: delete it, or give another --out")
    vocabulary = LLMPolicy(tokenizer).tokenizer.get_vocab()
    words = sorted(
        word for word in vocabulary if word.isascii() and word.isalpha() and word.islower() and len(word) > 3
    )
    if len(words) < items:
        raise SystemExit(f"{tokenizer} has {len(words)} words of one token for {items} items: lower --items")

    rng = np.random.default_rng(0)
    factors = rng.standard_normal((items, FEATURES)), rng.standard_normal((FEATURES, items))
    transition = np.exp(SCALE / np.sqrt(FEATURES) * factors[0] @ factors[1])  # [M, M]
    transition /= transition.sum(axis=1, keepdims=True)
    stationary = np.linalg.matrix_power(transition, 64)[0]
    recall = stationary @ np.sort(transition, axis=1)[:, ::-1].cumsum(axis=1)  # of the best items after each item
    print("true distribution:", ", ".join(f"recall@{k} {recall[k - 1]:.4f}" for k in (1, 5, 10, 20, 40) if k <= items))

    histories = np.empty((users, actions), dtype=np.int64)
    histories[:, 0] = rng.choice(items, users, p=stationary)
    cumulated = transition.cumsum(axis=1)
    cumulated[:, -1] = 1.0  # which rounding may miss
    for action in range(1, actions):
        for first in range(0, users, CHUNK):
            chunk = slice(first, first + CHUNK)
            last = histories[chunk, action - 1]
            histories[chunk, action] = (cumulated[last] < rng.random((len(last), 1))).sum(axis=1)

    titles = [words[i] for i in rng.permutation(len(words))[:items]]
    out.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(
        {
            "user_id": np.repeat(np.arange(users), actions),
            "item_id": histories.ravel(),
            "time": np.arange(users * actions),
        }
    ).to_csv(out / "interactions.csv", index=False)
    pd.DataFrame({"item_id": np.arange(items), "title": titles}).to_csv(out / "items.csv", index=False)


if __name__ == "__main__":
    jsonargparse.auto_cli(main, as_positional=False)
