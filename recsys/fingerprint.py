"""What a checkpoint belongs to: catalogue, interactions, split, seed, prompt and tokenizer, each as a short text.

Training that resumes needs all of them: the groups, the reports and the place in the epoch are of these rows. Whatever
ranks with the weights needs the prompt and the tokenizer that they were trained with; its interactions may be newer.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np
import pandas as pd
from lightning.pytorch.utilities import rank_zero_info

from recsys.data import HistoryDataModule
from recsys.digest import digest
from recsys.types import UserError

_PROBE = "Äpfel & 苹果's 1984,  \tThe  End\n<b>"  # what tokenizers with one vocabulary may split differently


def fingerprint(data: HistoryDataModule, tokenizer: Any) -> dict[str, str]:
    """Return a text for each thing that can differ; equal texts mean equal things."""
    catalog, rows = data.catalog, data.histories
    ids = pd.util.hash_array(np.array([str(item) for item in catalog.item_ids], dtype=object))
    parts = [rows.train, rows.val, rows.test]
    entries = np.array([str(entry) for entry in data.entries], dtype=object)
    vocabulary = sorted(tokenizer.get_vocab().items())
    found = {
        "catalogue": f"{len(catalog)} items, {_short(ids, *catalog.titles)}",
        "interactions": f"{len(rows.items)} interactions, "
        + _short(rows.users.astype(np.int64), ids[rows.items], pd.util.hash_array(entries)[rows.entry]),
        "split": f"{data.split} {'/'.join(str(len(part)) for part in parts)}, fresh_share {data.fresh_share:g}, "
        + _short(*parts),
        "seed": str(data.seed),
        "tokenizer": f"{len(vocabulary)} tokens, "
        + _short(str(vocabulary), str(tokenizer(_PROBE, add_special_tokens=False).input_ids)),
    }
    return found | {f"prompt.{name}": repr(value) for name, value in asdict(data.prompt).items()}


def check_fingerprint(saved: dict[str, str], present: dict[str, str], resumes: bool) -> None:
    """Compare a checkpoint's fingerprint with that of the present data.

    Args:
        saved: The checkpoint's.
        present: The data's.
        resumes: Whether training goes on; else prompt and tokenizer alone have to agree.

    Raises:
        UserError: if what has to agree does not; the message names it.
    """
    names = [n for n in saved | present if resumes or n == "tokenizer" or n.startswith("prompt.")]
    changed = [n for n in names if saved.get(n) != present.get(n)]
    if changed:
        what = "; ".join(f"{n} was {saved.get(n)} and is {present.get(n)}" for n in changed)
        raise UserError(
            f"ckpt_path: the checkpoint belongs to other data: {what}. Use what it was made with"
            + (", or start a new run from the adapter beside it (model.policy.init_args.adapter)" if resumes else "")
        )


def settings_of(module: Any) -> dict[str, str]:
    """Return what a run may change when it resumes, each as a text.

    Args:
        module: The :class:`recsys.module.Recommender`, with its trainer.
    """
    parts = {"objective": module.objective, "warm_start": module.warm_start}
    found = {"model.window": str(module.window)}
    for part, objective in parts.items():
        found[f"model.{part}"] = type(objective).__name__
        found |= {f"model.{part}.{name}": str(value) for name, value in (vars(objective) if objective else {}).items()}
    for name in ("warm_start_epochs", "normalization", "lr_warmup"):
        found[f"model.{name}"] = str(getattr(module, name))
    for name in ("batch_size", "warm_start_stretches", "policy_stretches", "val_rows"):
        found[f"data.{name}"] = str(getattr(module.data, name))
    return found | {"trainer.max_epochs": str(module.trainer.max_epochs)}


def report_changes(saved: dict[str, str], present: dict[str, str]) -> None:
    """Say which settings a resumed run changes."""
    changed = [n for n in saved | present if saved.get(n) != present.get(n)]
    if changed:
        rank_zero_info("Resumes with " + ", ".join(f"{n} {present.get(n)} (was {saved.get(n)})" for n in changed))


def _short(*parts: np.ndarray | str) -> str:
    return digest(*parts)[:8]  # a person compares them
