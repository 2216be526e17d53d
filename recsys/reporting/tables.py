"""Tables of validations as text."""

from __future__ import annotations

import numpy as np

from recsys.data import HistoryDataModule
from recsys.data.card import literal
from recsys.evaluation import FILTERED
from recsys.reporting.validation import Validation
from recsys.window import Dial

SHOWN = 5  # titles of a history, and of a ranked list, in the table of examples


def bootstrap_interval(difference: np.ndarray, resamples: int, seed: int = 0) -> tuple[float, float]:
    """Return the 95 % percentile interval of the mean of ``difference [R]`` over resampled rows."""
    rng = np.random.default_rng(seed)
    means = [difference[rng.integers(len(difference), size=len(difference))].mean() for _ in range(resamples)]
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def closing_table(validations: list[Validation], dial: Dial, resamples: int) -> str:
    """Return a table of the first validation and the last of each phase, and the paired differences from the end.

    Below the table stand the means over users, and the mean over rows of the lists without the items already seen;
    these and the differences are of the chosen K.
    """
    last_of_phase = {v.phase: v for v in validations}
    shown = list(last_of_phase.values())
    at_k = f"recall@{dial.window.k}"
    names = [n for n in shown[-1].metrics if not n.startswith(FILTERED)]
    names = [n for n in names if all(n in v.values for v in shown)]  # a resumed run may have other cut-offs
    trained = {p: sum(v.train_seconds for v in validations if v.phase == p) for p in last_of_phase}
    validated = {p: sum(v.seconds for v in validations if v.phase == p) for p in last_of_phase}
    short = [name.replace("recall", "R").replace("ndcg", "N").upper() for name in names]
    lines = [["validation after", "rows", *short, "train s", "val s"]]
    for v in shown:
        times = ["-" if v is validations[0] else f"{trained[v.phase]:.0f}", f"{validated[v.phase]:.0f}"]
        lines.append([v.phase, str(len(v.row)), *(f"{v.mean(n):.4f}" for n in names), *times])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    text = ["", *("  ".join(cell.rjust(w) for cell, w in zip(line, widths, strict=True)) for line in lines), ""]
    end, compared = shown[-1], [n for n in (at_k, "wpauc") if n in names]
    for v in shown:
        of_users = ", ".join(f"{n} {v.user_mean(n):.4f}" for n in compared)
        text.append(f"{v.phase}: mean over {len(np.unique(v.user))} users: {of_users}")
        if FILTERED + at_k in v.values:
            text[-1] += f"; without seen items: {at_k} {v.mean(FILTERED + at_k):.4f}"
    text.append("")
    for before in shown[:-1]:
        _, at_end, at_before = np.intersect1d(end.row, before.row, return_indices=True)  # the rows may differ, too
        for name in compared if len(at_end) else []:
            difference = end.values[name][at_end] - before.values[name][at_before]
            low, high = bootstrap_interval(difference, resamples)
            text.append(
                f"{name}: {end.phase} - {before.phase} = {difference.mean():+.4f} "
                f"[{low:+.4f}, {high:+.4f}] (paired bootstrap over {len(difference)} rows, 95 %)"
            )
    return "\n".join(text)


def examples_table(data: HistoryDataModule, row: np.ndarray, items: np.ndarray, count: int) -> str:
    """Return a Markdown table of some rows, spread evenly: user, newest history, target and best items.

    Args:
        data: The rows' data.
        row: ``[R]`` row ids.
        items: ``[R, W]`` their ranked lists.
        count: Rows in the table.
    """
    titles = data.catalog.titles
    lines = ["| user: history (newest last) | target | top items |", "|---|---|---|"]  # narrow columns break anywhere
    for r, best in list(zip(row, items[:, :SHOWN], strict=True))[:: max(1, len(row) // count)][:count]:
        history = "; ".join(literal(titles[i]) for i in data.histories.history(r, SHOWN))
        target = data.histories.items[r]
        top = "; ".join(f"**{literal(titles[i])}**" if i == target else literal(titles[i]) for i in best)
        user = literal(data.user_ids[data.histories.users[r]])
        lines.append(f"|**{user}**: {history}|{literal(titles[target])}|{top}|")
    return "\n".join(lines)
