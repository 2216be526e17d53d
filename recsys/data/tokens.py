"""Tokens of texts that come from data; those of a large catalogue's titles are kept between runs."""

from __future__ import annotations

import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock

from recsys.assets import CACHE_DIR
from recsys.atomic import replaced
from recsys.digest import digest

TOKENS_CACHE = f"{CACHE_DIR}/tokens"
KEPT = 50_000  # titles; fewer take no time worth a file


def plain_tokens(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """Token ids of texts that come from data: what spells a control token, as ``<|im_end|>``, is text."""
    ids: list[list[int]] = tokenizer(texts, add_special_tokens=False, split_special_tokens=True).input_ids
    return ids


def control_tokens(tokenizer: Any) -> set[int]:
    """Ids of the tokens that have a meaning of their own, all but the one of unknown text."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return {i for i, token in added.items() if token.special} - {getattr(tokenizer, "unk_token_id", None)}


def kept_tokens(tokenizer: Any, titles: list[str], cache_dir: str | None) -> list[list[int]]:
    """Return :func:`plain_tokens` of the titles, from a file if an earlier run has left it: a million take a minute.

    A file is named by the tokenizer's whole state and all titles, and is whole, since it is renamed to its name. One
    that is broken is made again. Where none can be written, a message says so, and the tokens are made at each start.

    Args:
        tokenizer: A ``transformers`` tokenizer; the tokens of one without a state that can be written are not kept.
        titles: M titles.
        cache_dir: Folder of the files; ``~`` is the home folder; None keeps none.
    """
    state = getattr(tokenizer, "backend_tokenizer", None)
    if cache_dir is None or state is None or len(titles) < KEPT:
        return plain_tokens(tokenizer, titles)
    path = Path(cache_dir).expanduser() / f"titles-{digest(state.to_str(), *titles)[:20]}.parquet"
    if (kept := _read(path, len(titles))) is not None:
        return kept
    print(f"Tokenising {len(titles):,} titles ...", file=sys.stderr, flush=True)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_suffix(".lock")):  # of several processes one makes them
            if (kept := _read(path, len(titles))) is None:
                kept = plain_tokens(tokenizer, titles)
                with replaced(path) as part:
                    table = pa.table({"tokens": pa.array(kept, pa.list_(pa.int32()))})
                    pq.write_table(table, part, write_page_checksum=True)
    except OSError as error:
        print(f"{path.parent}: the titles' tokens cannot be kept: {error}", file=sys.stderr, flush=True)
    return plain_tokens(tokenizer, titles) if kept is None else kept


def _read(path: Path, count: int) -> list[list[int]] | None:
    """Return the lists of a file, or None if it is not there or not whole."""
    try:
        column = pq.read_table(path, page_checksum_verification=True)["tokens"].combine_chunks()
    except (OSError, KeyError, pa.ArrowException):
        return None
    if len(column) != count:
        return None
    values, edges = column.values.to_pylist(), np.asarray(column.offsets).tolist()
    return [values[first:last] for first, last in pairwise(edges)]
