"""What the data costs: seconds and memory to prepare it, and tokens per second of the loader alone.

    python benchmarks/loader.py --data configs/data/movielens100k.yaml

The loader's rate is to be compared with ``train/tokens_per_second`` of a run: a loader that is many times faster never
keeps the model waiting. Padding counts as no token.
"""

from __future__ import annotations

import jsonargparse
from measure import Memory, timed
from torch.utils.data import DataLoader

from recsys.data import HistoryDataModule
from recsys.policy import LLMPolicy
from recsys.types import Batch


def tokens_of(loader: DataLoader[Batch]) -> tuple[int, int]:
    """Go through a loader; returns its tokens, without and with padding."""
    batches = [(int(batch.length.sum()), batch.tokens.numel()) for batch in loader]
    return sum(real for real, _ in batches), sum(padded for _, padded in batches)


def main(data: HistoryDataModule, stretches: int = 2_000) -> None:
    """Prepare the data and go through the stretches of an epoch.

    Args:
        data: The data module; a file of `configs/data/` or one like it.
        stretches: Stretches to go through.
    """
    data.policy_stretches = stretches
    tokenizer = LLMPolicy().tokenizer
    with Memory() as memory:
        loading, _ = timed(data.load)
    tokenizing, _ = timed(data.tokenize, tokenizer)
    print(f"{len(data.catalog)} items, {len(data.histories.items)} interactions")
    print(f"load {loading:.2f} s and {memory.bytes / 1e9:.2f} GB at the peak, tokenise {tokenizing:.2f} s")
    dataset = data.dataset(data.plan(0, warm_start=False), warm_start=False)
    loader = DataLoader(dataset, batch_size=None, num_workers=data.num_workers)
    seconds, (real, padded) = timed(tokens_of, loader)
    print(
        f"{stretches} stretches in batches of {data.batch_size}, {data.num_workers} workers: "
        f"{real / seconds:,.0f} tokens per second, {1 - real / padded:.2%} padding"
    )


if __name__ == "__main__":
    jsonargparse.auto_cli(main, as_positional=False)
