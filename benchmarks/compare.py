"""Compare configs over seeds: the same rows, paired differences between variants, intervals.

    python benchmarks/compare.py --config benchmarks/normalization.yaml

Each run is a `recsys fit` in a process of its own. A run that has ended is not repeated, so that the script can be
stopped and started again; delete its folders (below `out` and `checkpoints`) to repeat it. With `warm_start`, all
variants of a seed go on from one checkpoint. With `learning_rates`, each variant gets the rate that is best on
validation with the first seed. With `test`, the tables are of the test rows, on which nothing was chosen.

Prints Markdown tables, and writes them to `<out>/table.md`. Intervals come from a bootstrap that resamples seeds and
rows.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import jsonargparse
import numpy as np
import pandas as pd
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

RESAMPLES = 2000
WARM_START = "warm start"

T = TypeVar("T")


@dataclass(frozen=True)
class Run:
    """One training: its arguments, and its folder `<out>/<variant>/[lr<rate>/]seed<seed>`."""

    out: Path
    variant: str
    arguments: tuple[str, ...]
    seed: int
    rate: float | None = None

    @property
    def name(self) -> Path:
        """Name for the logger, from which checkpoints take their folder too."""
        rate = [] if self.rate is None else [f"lr{self.rate:g}"]
        return Path(self.out.name, self.variant, *rate, f"seed{self.seed}")

    @property
    def folder(self) -> Path:
        """Folder of events, ranks, output and cost."""
        return self.out.parent / self.name

    @property
    def checkpoint(self) -> Path:
        """The last checkpoint, where AdapterCheckpoint puts it by default."""
        return Path("checkpoints") / self.name / "version_0" / "last.ckpt"

    @property
    def cost(self) -> dict[str, float]:
        """Minutes, gigabytes and token rows of the training."""
        return json.loads((self.folder / "cost.json").read_text())

    def ranks(self, test: bool) -> pd.DataFrame:
        """Return what each row got at the last validation, or in the test."""
        if test:
            return pd.read_parquet(next(self.folder.glob("version_*/ranks/test.parquet"))).set_index("row")
        steps = (self.folder / "version_0" / "ranks").glob("step*.parquet")
        return pd.read_parquet(max(steps, key=lambda path: int(path.stem[4:]))).set_index("row")

    def train(self, start: Path | None) -> None:
        """Train, and write what it cost when it has ended well."""
        if (self.folder / "cost.json").is_file():
            return
        for folder in (self.folder, self.checkpoint.parent):
            if folder.exists():
                raise SystemExit(f"{folder}: left by an unfinished or deleted run; delete the folder to repeat it")
        self.folder.mkdir(parents=True)
        gigabytes, minutes = self._recsys("fit", start)
        events = EventAccumulator(str(self.folder / "version_0"), {"scalars": 0})
        events.Reload()
        rows = events.Scalars("train/token_rows")[-1].value
        (self.folder / "cost.json").write_text(
            json.dumps({"minutes": minutes, "gigabytes": gigabytes, "token rows": rows})
        )

    def test(self) -> None:
        """Rank the test rows."""
        if not list(self.folder.glob("version_*/ranks/test.parquet")):
            self._recsys("test", self.checkpoint)

    def _recsys(self, subcommand: str, checkpoint: Path | None) -> tuple[float, float]:
        """Run the command line, and return its gigabytes and minutes."""
        print(f"{time.strftime('%H:%M:%S')} {subcommand} {self.folder}", flush=True)
        logger = [f"--logger.save_dir={self.out.parent}", f"--logger.name={self.name}"]
        rate = [] if self.rate is None else [f"--model.objective.init_args.learning_rate={self.rate:g}"]
        start = [] if checkpoint is None else [f"--ckpt_path={checkpoint}"]
        command = [sys.executable, "-m", "recsys.cli", subcommand, *self.arguments, *rate]
        command += ["--seed_everything", str(self.seed), *logger, *start]
        began = time.perf_counter()
        path = self.folder / f"{subcommand}.txt"
        with path.open("w") as output:
            process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
            _, status, usage = os.wait4(process.pid, 0)
        if status:
            raise SystemExit(f"{path}: the run failed:\n{path.read_text()[-2000:]}")
        return usage.ru_maxrss / 2**20, (time.perf_counter() - began) / 60


def main(
    fit: list[str],
    variants: dict[str, list[str]],
    out: str,
    seeds: tuple[int, ...] = (0, 1, 2),
    metrics: tuple[str, ...] = ("recall@5", "recall@10", "recall@20", "ndcg@10", "wpauc"),
    warm_start: list[str] | None = None,
    learning_rates: tuple[float, ...] = (),
    tune: str = "wpauc",
    against: tuple[str, ...] = (),
    test: bool = False,
    jobs: int = 1,
) -> None:
    """Run every variant with every seed and print the tables.

    Args:
        fit: Arguments of `recsys fit` that all runs share.
        variants: Further arguments of each variant.
        out: Folder of the runs.
        seeds: Values of `--seed_everything`.
        metrics: Columns of the table, as in the ranks' Parquet files.
        warm_start: Further arguments of a run from whose end the variants go on, one for each seed.
        learning_rates: Values of `model.objective.init_args.learning_rate` to choose from; none leaves the config's.
        tune: Validation metric to choose by. A variant's `wpauc` is that of its own window.
        against: Variants from which the others' differences are shown; by default the warm start, or else the first.
        test: Report on the test rows.
        jobs: Runs at the same time; set OMP_NUM_THREADS so that they share the cores.
    """
    root = Path(out)

    def runs_of(variant: str, rate: float | None) -> list[Run]:
        return [Run(root, variant, (*fit, *variants[variant]), seed, rate) for seed in seeds]

    warm = [Run(root, WARM_START, (*fit, *(warm_start or [])), seed) for seed in seeds if warm_start is not None]
    start = {run.seed: run.checkpoint for run in warm}

    def train(run: Run) -> None:
        run.train(None if run in warm else start.get(run.seed))

    parallel(train, warm, jobs)
    parallel(train, [runs_of(name, rate)[0] for rate in learning_rates for name in variants], jobs)
    table = {WARM_START: warm} if warm else {}
    for name in variants:
        quality = {rate: runs_of(name, rate)[0].ranks(test=False)[tune].mean() for rate in learning_rates}
        table[name] = runs_of(name, max(quality, key=quality.__getitem__) if quality else None)
    every = [run for runs in table.values() for run in runs]
    parallel(train, every, jobs)
    if test:
        parallel(Run.test, every, jobs)
    values = {
        name: np.stack([run.ranks(test)[list(metrics)].to_numpy() for run in runs]) for name, runs in table.items()
    }
    text = [means(values, table, metrics)]
    text += [differences(values, first, metrics) for first in against or [next(iter(values))]]
    (root / "table.md").write_text("\n".join(text))
    print("\n".join(text))


def parallel(function: Callable[[T], None], tasks: Iterable[T], jobs: int) -> None:
    """Call the function on every task, some at the same time, and stop at the first error."""
    with ThreadPoolExecutor(jobs) as pool:
        futures = [pool.submit(function, task) for task in tasks]
        try:
            for future in as_completed(futures):
                future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def means(values: dict[str, np.ndarray], runs: dict[str, list[Run]], metrics: tuple[str, ...]) -> str:
    """Return the means of ``[seeds, rows, metrics]`` over seeds and rows, and the median costs."""
    seeds, rows = next(iter(values.values())).shape[:2]
    lines = [f"| {seeds} seeds, {rows} rows | lr | {' | '.join(metrics)} | minutes | GB | token rows |"]
    lines.append("|---" * (len(metrics) + 5) + "|")
    for name, value in values.items():
        rate = runs[name][0].rate
        cost = pd.DataFrame([run.cost for run in runs[name]]).median()
        cells = [name, "" if rate is None else f"{rate:g}", *(f"{mean:.4f}" for mean in value.mean((0, 1)))]
        cells += [f"{cost['minutes']:.1f}", f"{cost['gigabytes']:.1f}", f"{cost['token rows']:,.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def differences(values: dict[str, np.ndarray], first: str, metrics: tuple[str, ...]) -> str:
    """Return the paired differences from a variant, in bold where the 95 % interval excludes 0."""
    lines = [f"| difference from {first} | {' | '.join(metrics)} |", "|---" * (len(metrics) + 1) + "|"]
    for name, value in values.items():
        if name == first:
            continue
        difference = value - values[first]
        cells = []
        for mean, low, high in zip(difference.mean((0, 1)), *interval(difference), strict=True):
            shown = f"{mean:+.4f}" if low <= 0 <= high else f"**{mean:+.4f}**"
            cells.append(f"{shown} [{low:+.4f}, {high:+.4f}]")
        lines.append(f"| {name} | {' | '.join(cells)} |")
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
    jsonargparse.auto_cli(main, as_positional=False)
