"""Tables and a figure from what each row got in any set of runs: Recall@k of several objectives on the same rows.

    python benchmarks/report.py --out runs/report --against NLL \
        --runs '{"NLL": ["runs/nll/version_0/ranks/test.parquet"], "TAWin": ["runs/a/version_0/ranks/test.parquet"]}'

A run has one file of ranks for each seed (`runs/*/version_*/ranks`). Writes `table.md`, `curve.csv` and `curve.png`:
the change of Recall@k against k = 1..100 from one of the runs. Intervals (95 %) come from a bootstrap that resamples
seeds and rows. A cut-off beyond the end of a run's lists (model.num_beams) has no number.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import jsonargparse
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

RESAMPLES = 1000
CURVE = tuple(range(1, 101))


def main(
    runs: dict[str, list[str]],
    out: str,
    against: str,
    cutoffs: tuple[int, ...] = (5, 10, 20, 50),
    windows: dict[str, tuple[float, float]] | None = None,
) -> None:
    """Write the tables and the figure.

    Args:
        runs: Parquet files of ranks of each run, one for each seed.
        out: Folder to write to.
        against: Run that the others are compared with.
        cutoffs: Values of K in the table.
        windows: Windows of negatives (a, b] to shade, by the runs that optimise them.
    """
    ranks = {name: read(files) for name, files in runs.items()}
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    text = "\n".join([levels(ranks, cutoffs), differences(ranks, against, cutoffs)])
    (folder / "table.md").write_text(text)
    print(text)
    write_curve(ranks, against, windows or {}, folder)


def read(files: Sequence[str | Path]) -> pd.DataFrame:
    """Return the ranks, rows by seeds, inf where the list lacks the target, and the shortest list among ``attrs``.

    Raises:
        SystemExit: files are of different rows.
    """
    frames = [pd.read_parquet(file) for file in files]
    columns = [frame.set_index("row")["rank"].rename(i) for i, frame in enumerate(frames)]
    if any(not column.index.equals(columns[0].index) for column in columns):
        raise SystemExit(f"{files}: the rows differ; compare runs on the same data")
    ranks = pd.concat(columns, axis=1)
    ranks.attrs["list_length"] = min(frame.attrs.get("list_length", np.inf) for frame in frames)
    return ranks


def hits(ranks: pd.DataFrame, cutoffs: Sequence[int]) -> np.ndarray:
    """Return each row's chance to have its target among the first k, ``[S, R, k]``: 0 or 1, or 0.5 in a tie of two.

    Beyond the end of the list it is NaN: a target that the list lacks may be there.
    """
    k = np.where(np.asarray(cutoffs) <= ranks.attrs["list_length"], cutoffs, np.nan)
    return np.clip(k + 1 - ranks.to_numpy().T[:, :, None], 0, 1).astype(np.float32)


def interval(values: np.ndarray) -> np.ndarray:
    """Return the 95 % interval ``[2, k]`` of the mean of ``[S, R, k]`` over resampled seeds and rows."""
    rng = np.random.default_rng(0)
    seeds, rows = values.shape[:2]
    of_rows = rng.multinomial(rows, np.full(rows, 1 / rows), RESAMPLES).astype(np.float32) / rows  # [RESAMPLES, R]
    of_seeds = rng.multinomial(seeds, np.full(seeds, 1 / seeds), RESAMPLES) / seeds  # [RESAMPLES, S]
    means = np.einsum("ns,snk->nk", of_seeds, np.stack([of_rows @ seed for seed in values]))
    return np.quantile(means, [0.025, 0.975], axis=0)


def change(ranks: dict[str, pd.DataFrame], name: str, against: str, cutoffs: Sequence[int]) -> np.ndarray:
    """Return the paired difference of Recall@k and the ends of its interval: ``[3, k]``.

    Raises:
        SystemExit: the two runs are of different rows or seeds.
    """
    if not ranks[name].index.equals(ranks[against].index) or ranks[name].shape != ranks[against].shape:
        raise SystemExit(f"{name} and {against} are not on the same rows with as many seeds")
    difference = hits(ranks[name], cutoffs) - hits(ranks[against], cutoffs)
    return np.vstack([difference.mean((0, 1)), interval(difference)])


def levels(ranks: dict[str, pd.DataFrame], cutoffs: Sequence[int]) -> str:
    """Return a table of the means over seeds and rows."""
    rows, seeds = next(iter(ranks.values())).shape
    lines = [f"| {seeds} seeds, {rows:,} rows | {' | '.join(f'R@{k}' for k in cutoffs)} |"]
    lines.append("|---" * (len(cutoffs) + 1) + "|")
    for name, frame in ranks.items():
        means = hits(frame, cutoffs).mean((0, 1))
        cells = ["-" if np.isnan(mean) else f"{mean:.4f}" for mean in means]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def differences(ranks: dict[str, pd.DataFrame], against: str, cutoffs: Sequence[int]) -> str:
    """Return a table of the paired differences from a run, bold where the interval excludes 0."""
    lines = [f"| difference from {against} | {' | '.join(f'R@{k}' for k in cutoffs)} |"]
    lines.append("|---" * (len(cutoffs) + 1) + "|")
    for name in ranks:
        if name == against:
            continue
        cells = []
        for mean, low, high in change(ranks, name, against, cutoffs).T:
            if np.isnan(mean):
                cells.append("-")
                continue
            shown = f"{mean:+.4f}" if low <= 0 <= high else f"**{mean:+.4f}**"
            cells.append(f"{shown} [{low:+.4f}, {high:+.4f}]")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def write_curve(
    ranks: dict[str, pd.DataFrame], against: str, windows: dict[str, tuple[float, float]], folder: Path
) -> None:
    """Draw the change of Recall@k against k, a line with its band for each run, and write the numbers beside it.

    A run alone has nothing to be compared with, and gets no figure.
    """
    if ranks.keys() == {against}:
        return
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.add_subplot()
    parts = []
    for place, name in enumerate(name for name in ranks if name != against):
        mean, low, high = change(ranks, name, against, CURVE)
        colour = f"C{place % 10}"
        axes.plot(CURVE, mean, color=colour, label=name, linewidth=2 if name in windows else 1)
        axes.fill_between(CURVE, low, high, color=colour, alpha=0.12, linewidth=0)
        if name in windows:
            axes.axvspan(*np.clip(windows[name], 1, CURVE[-1]), color=colour, alpha=0.06, linewidth=0)
        parts.append(pd.DataFrame({"run": name, "k": CURVE, "change": mean, "low": low, "high": high}))
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set(xscale="log", xlim=(1, CURVE[-1]), xlabel="k", ylabel=f"change of Recall@k from {against}")
    axes.set_xticks([1, 2, 5, 10, 20, 50, 100], ["1", "2", "5", "10", "20", "50", "100"])
    axes.legend(fontsize=8)
    figure.savefig(folder / "curve.png", dpi=110)
    pd.concat(parts).to_csv(folder / "curve.csv", index=False, float_format="%.5f")


if __name__ == "__main__":
    jsonargparse.auto_cli(main, as_positional=False)
