"""The data card: what the data holds, and what the split, the prompt and the batch sizes make of it."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import numpy as np

from recsys.data.batches import plan_batches
from recsys.data.datamodule import HistoryDataModule


def data_card(data: HistoryDataModule) -> dict[str, Any]:
    """Describe the data of a run.

    Args:
        data: After ``tokenize``.

    Returns:
        A number, or several by name, for each thing described. What begins with "share" is a fraction, all else a
        count. A row is a history with its target; all rows are described, but the batches are those of the first
        epoch on one device, those of training made of stretches. A user or target is unseen in training if no train row
        has that user or target.
    """
    histories, counts = data.histories, data.histories.describe()
    parts = {"train": histories.train, "validation": histories.val, "test": histories.test}
    held_out = {name: parts[name] for name in ("validation", "test")}
    rows = np.concatenate(list(parts.values()))
    seen_users, seen_items = histories.users[histories.train], histories.items[histories.train]
    titles = Counter(map(tuple, data.item_tokens))
    plans = {"warm start": (data.plan(0, warm_start=True), True), "policy": (data.plan(0, warm_start=False), True)}
    for name, drawn in (("validation", data.evaluation_rows("val")), ("test", data.evaluation_rows("test"))):
        plans[name] = plan_batches(drawn, data.encoder.lengths(histories, drawn), data.eval_batch_size), False
    return {
        "items": len(data.catalog),
        "items that nobody chose": len(data.catalog) - len(np.unique(histories.items)),
        "items that share their title": sum(n for n in titles.values() if n > 1),
        "users": counts["users"],
        "users without history": counts["users_without_history"],
        "interactions": counts["interactions"],
        "dropped by the source": data.dropped or 0,
        "share of user-item pairs (density)": counts["interactions"] / (counts["users"] * len(data.catalog)),
        "rows": {name: len(part) for name, part in parts.items()},
        "share of rows at the time of the one before": counts["equal_time_share"],
        "share of targets already in the history": counts["target_in_history_share"],
        "share of users unseen in training": {
            name: _share_not_in(np.unique(histories.users[part]), seen_users) for name, part in held_out.items()
        },
        "share of targets unseen in training": {
            name: _share_not_in(histories.items[part], seen_items) for name, part in held_out.items()
        },
        "history length": _distribution(rows - histories.user_start[rows]),
        "title length in tokens, end included": _distribution(data.encoder.item_lengths),
        "titles cut": data.catalog.cut_titles,
        "prompt length in tokens": _distribution(data.encoder.lengths(histories, rows)),
        "drawn for an epoch": {name: sum(map(len, plan)) for name, (plan, _) in plans.items()},
        "share of padding in the batches": {name: _padding(data, *plan) for name, plan in plans.items()},
    }


def _distribution(values: np.ndarray) -> dict[str, float]:
    return {
        "mean": float(values.mean()),
        "median": float(np.median(values)),
        "95 %": float(np.quantile(values, 0.95)),
        "max": int(values.max()),
    }


def _share_not_in(values: np.ndarray, others: np.ndarray) -> float:
    return float((~np.isin(values, others)).mean())


def _padding(data: HistoryDataModule, plan: list[np.ndarray], answers: bool) -> float:
    every = data.encoder.lengths(data.histories, np.concatenate(plan), answers)
    lengths = np.split(every, np.cumsum([len(batch) for batch in plan])[:-1])
    return 1 - float(sum(batch.sum() for batch in lengths) / sum(len(batch) * batch.max() for batch in lengths))


def card_text(card: dict[str, Any]) -> str:
    """Write a card in two aligned columns."""
    width = max(map(len, card))
    return "\n".join(f"{name:{width}}  {_written(name, value)}" for name, value in card.items())


def card_markdown(card: dict[str, Any]) -> str:
    """Write a card as a Markdown table."""
    rows = (f"| {literal(name)} | {literal(_written(name, value))} |" for name, value in card.items())
    return "\n".join(["| data | |", "|---|---|", *rows])


def literal(text: str) -> str:
    """Write a text so that Markdown and HTML show it as it is: no image is fetched, no cell or link begins in it."""
    return re.sub(r"[^\w ,.;:/'\"%()=-]|_", lambda match: f"&#{ord(match[0])};", text)


def _written(name: str, value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_written(name, number)}" for key, number in value.items())
    if name.startswith("share"):
        return f"{value:.2%}"
    return f"{value:,.1f}" if isinstance(value, float) and value % 1 else f"{value:,.0f}"
