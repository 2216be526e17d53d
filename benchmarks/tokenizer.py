"""Make a small tokenizer for a catalogue: byte-pair encoding learnt from its titles, across words.

    python benchmarks/tokenizer.py --items data/ml-1m/items.csv --size 4000 --out runs/window/ml-1m/tokenizer

A small policy without pretraining has nothing to gain from a language's 50,000 tokens, whose embeddings would be most
of its weights; `model.policy.init_args.tokenizer` takes the folder.
"""

from __future__ import annotations

from pathlib import Path

import jsonargparse
import pandas as pd
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

END = "<|end|>"


def main(items: str, out: str, size: int = 4000, title: str = "title") -> None:
    """Learn the tokens and save them in the format of `transformers`; does nothing if the folder exists.

    Args:
        items: CSV file with the titles.
        out: Folder to write.
        size: Tokens, the 256 bytes among them.
        title: Column of the titles.
    """
    if Path(out).exists():
        return
    titles = pd.read_csv(items, keep_default_na=False)[title].astype(str)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, special_tokens=[END], show_progress=False)
    tokenizer.train_from_iterator(titles, trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END).save_pretrained(out)
    lengths = [len(encoded.ids) for encoded in tokenizer.encode_batch(titles.tolist())]
    print(f"{out}: {tokenizer.get_vocab_size():,} tokens, {sum(lengths) / len(lengths):.2f} a title")


if __name__ == "__main__":
    jsonargparse.auto_cli(main, as_positional=False)
