"""Compare configs over seeds: the same validation rows, paired differences from the first variant, intervals.

    python benchmarks/compare.py --config benchmarks/normalization.yaml

Each run is a `recsys fit` in a process of its own. A run that has ended is not repeated, so that the script can be
stopped and started again; delete its folder below `out` to repeat it. Prints a Markdown table, and writes it to
`<out>/table.md`. Intervals come from a bootstrap that resamples seeds and rows.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import jsonargparse
import numpy as np
import pandas as pd
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

RESAMPLES = 2000


def main(
    fit: list[str],
    variants: dict[str, list[str]],
    out: str,
    seeds: tuple[int, ...] = (0, 1, 2),
    metrics: tuple[str, ...] = ("recall@5", "recall@10", "recall@20", "ndcg@10", "wpauc"),
) -> None:
    """Run every variant with every seed and print the table.

    Args:
        fit: Arguments of `recsys fit` that all runs share.
        variants: Further arguments of each variant; the others are compared with the first.
        out: Folder of the runs.
        seeds: Values of `--seed_everything`.
        metrics: Columns of the table, as in the ranks' Parquet files.
    """
    names = list(variants)
    values: dict[str, list[pd.DataFrame]] = {name: [] for name in names}
    costs: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for seed in seeds:  # all variants of a seed in turn: an early stop leaves complete pairs
        for name in names:
            folder = Path(out) / name / f"seed{seed}"
            if not (folder / "cost.json").is_file():
                run([*fit, *variants[name], "--seed_everything", str(seed)], folder)
            ranks = max((folder / "version_0" / "ranks").glob("*.parquet"), key=lambda p: int(p.stem[4:]))
            values[name].append(pd.read_parquet(ranks).set_index("row")[list(metrics)])
            costs[name].append(json.loads((folder / "cost.json").read_text()))
    text = table(values, costs, metrics)
    (Path(out) / "table.md").write_text(text)
    print(text)


def run(arguments: list[str], folder: Path) -> None:
    """Train once, and write what it cost when it has ended well."""
    if folder.exists():
        raise SystemExit(f"{folder}: an unfinished run; delete the folder to repeat it")
    print(f"{time.strftime('%H:%M:%S')} {folder}", flush=True)
    folder.mkdir(parents=True)
    *parents, sweep, variant, seed = folder.parts  # checkpoints take the logger's name as their folder
    logger = [f"--trainer.logger.init_args.save_dir={Path(*parents)}"]
    logger += [f"--trainer.logger.init_args.name={sweep}/{variant}/{seed}"]
    command = [sys.executable, "-m", "recsys.cli", "fit", *arguments, *logger]
    began = time.perf_counter()
    with (folder / "output.txt").open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{folder}/output.txt: the run failed:\n{(folder / 'output.txt').read_text()[-2000:]}")
    events = EventAccumulator(str(folder / "version_0"), {"scalars": 0})
    events.Reload()
    cost = {
        "minutes": (time.perf_counter() - began) / 60,
        "gigabytes": usage.ru_maxrss / 2**20,
        "token rows": events.Scalars("train/token_rows")[-1].value,
    }
    (folder / "cost.json").write_text(json.dumps(cost))


def table(
    values: dict[str, list[pd.DataFrame]], costs: dict[str, list[dict[str, float]]], metrics: tuple[str, ...]
) -> str:
    """Return the means over seeds and rows, the paired differences from the first variant, and the median costs."""
    first = np.stack([frame.to_numpy() for frame in next(iter(values.values()))])  # [S, R, metrics]
    lines = [f"| {len(first)} seeds, {first.shape[1]} rows | {' | '.join(metrics)} | minutes | GB | token rows |"]
    lines.append("|---" * (len(metrics) + 4) + "|")
    for name, frames in values.items():
        every = np.stack([frame.to_numpy() for frame in frames])
        cost = pd.DataFrame(costs[name]).median()
        cells = [f"{mean:.4f}" for mean in every.mean((0, 1))]
        cells += [f"{cost['minutes']:.1f}", f"{cost['gigabytes']:.1f}", f"{cost['token rows']:,.0f}"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
        if name != next(iter(values)):
            difference = every - first
            low, high = interval(difference)
            cells = [
                f"{m:+.4f} [{a:+.4f}, {b:+.4f}]" for m, a, b in zip(difference.mean((0, 1)), low, high, strict=True)
            ]
            lines.append(f"| {name} - {next(iter(values))} | {' | '.join(cells)} | | | |")
    return "\n".join(lines) + "\n"


def interval(difference: np.ndarray) -> np.ndarray:
    """Return the 95 % interval ``[2, metrics]`` of the mean of ``[S, R, metrics]`` over resampled seeds and rows."""
    rng = np.random.default_rng(0)
    seeds, rows = difference.shape[:2]
    means = [
        difference[rng.integers(seeds, size=seeds)][:, rng.integers(rows, size=rows)].mean((0, 1))
        for _ in range(RESAMPLES)
    ]
    return np.quantile(means, [0.025, 0.975], axis=0)


if __name__ == "__main__":
    jsonargparse.auto_cli(main)
