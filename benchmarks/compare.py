"""Compare objectives: tuned alike, from the same start, for the same seconds, on the same rows, over seeds.

    python benchmarks/compare.py --config benchmarks/normalization.yaml

Each run is a `recsys fit` in a process of its own. A run that has ended is not repeated, so the script can be stopped
and started again; an unfinished one begins anew, beside what it left. With `warm_start`, all variants of a seed go on
from one checkpoint. With `seconds`, a short pilot of each variant measures how many stretches it goes through in that
time. With `grid`, each variant's settings are chosen on validation rows with the first seed, by successive halving.
With `test`, the tables are of the test rows, on which nothing was chosen.

Writes to `out`: `table.md` with levels, costs, settings and paired differences, `curve.png` with the change of Recall@k
against k, and `curve.csv` with its numbers (`benchmarks/report.py` makes the same of any set of runs).
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Executor, Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jsonargparse
import numpy as np
import pandas as pd
import yaml
from report import differences, levels, read, write_curve
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

WARM_START = "warm start"


@dataclass
class Variant:
    """What is compared.

    Args:
        arguments: Of `recsys fit`, beyond those that all share.
        grid: Choices to make, as in :func:`main`; null takes those that all share.
        like: Variant whose chosen settings it takes, in place of a choice of its own, but for what its arguments give.
        as_many_as: Variant whose number of stretches it takes, in place of its own number for the time.
    """

    arguments: list[str] = field(default_factory=list)
    grid: list[list[dict[str, Any]]] | None = None
    like: str | None = None
    as_many_as: str | None = None

    def unless_given(self, settings: dict[str, Any]) -> dict[str, Any]:
        """Return the settings that its own arguments do not give."""
        given = {argument.split("=", 1)[0] for argument in self.arguments}
        return {option: value for option, value in settings.items() if f"--{option}" not in given}


@dataclass(frozen=True)
class Run:
    """One training: its arguments, and its folder `<out>/<variant>/<label>/seed<seed>`."""

    out: Path
    variant: str
    arguments: tuple[str, ...]
    seed: int
    label: str = ""

    @property
    def name(self) -> Path:
        """Name for the logger, from which checkpoints take their folder too."""
        return Path(self.out.name, self.variant, self.label, f"seed{self.seed}")

    @property
    def folder(self) -> Path:
        """Folder of events, ranks, output and cost."""
        return self.out.parent / self.name

    @property
    def cost(self) -> dict[str, Any]:
        """The version that has ended, its arguments, seconds of training, gigabytes and token rows."""
        return json.loads((self.folder / "cost.json").read_text())

    @property
    def events(self) -> Path:
        """Folder that the logger made."""
        return self.folder / self.cost["version"]

    @property
    def checkpoint(self) -> Path:
        """The last checkpoint, where AdapterCheckpoint puts it by default."""
        return Path("checkpoints") / self.name / self.cost["version"] / "last.ckpt"

    def ranks(self, test: bool) -> Path:
        """Return the file with what each row got at the last validation, or in the test."""
        if test:
            return next(self.folder.glob("version_*/ranks/test.parquet"))
        return max((self.events / "ranks").glob("step*.parquet"), key=lambda path: int(path.stem[4:]))

    def train(self, start: Path | None) -> None:
        """Train, and write what it cost when it has ended well."""
        if (self.folder / "cost.json").is_file():
            if self.cost["arguments"] != list(self.arguments):
                raise SystemExit(
                    f"{self.folder}: made with other arguments; set another `out`, or move the folder away"
                )
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        before = set(self.folder.glob("version_*"))
        gigabytes = self._recsys("fit", start)
        [version] = set(self.folder.glob("version_*")) - before
        events = EventAccumulator(str(version), {"scalars": 0})
        events.Reload()
        if "train/token_rows" not in events.Tags()["scalars"]:
            raise SystemExit(f"{version}: no step was logged; lower trainer.log_every_n_steps")
        rows = events.Scalars("train/token_rows")
        first, last = rows[0], rows[-1]
        seconds = (last.wall_time - first.wall_time) / max(last.step - first.step, 1)  # a step
        settings = yaml.safe_load((version / "config.yaml").read_text())
        cost = {
            "version": version.name,
            "arguments": list(self.arguments),
            "seconds a stretch": seconds / settings["data"]["batch_size"],
            "seconds": seconds * (last.step - first.step + settings["trainer"]["log_every_n_steps"]),
            "gigabytes": gigabytes,
            "token rows": last.value,
        }
        (self.folder / "cost.json").write_text(json.dumps(cost))

    def test(self) -> None:
        """Rank the test rows."""
        if not list(self.folder.glob("version_*/ranks/test.parquet")):
            self._recsys("test", self.checkpoint)

    def _recsys(self, subcommand: str, checkpoint: Path | None) -> float:
        """Run the command line, and return its gigabytes."""
        print(f"{time.strftime('%H:%M:%S')} {subcommand} {self.folder}", flush=True)
        command = [sys.executable, "-m", "recsys.cli", subcommand, *self.arguments]
        command += ["--seed_everything", str(self.seed)]
        command += [f"--logger.save_dir={self.out.parent}", f"--logger.name={self.name}"]
        command += [] if checkpoint is None else [f"--ckpt_path={checkpoint}"]
        path = self.folder / f"{subcommand}.txt"
        with path.open("w") as output:
            process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
            _, status, usage = os.wait4(process.pid, 0)
        if status:
            raise SystemExit(f"{path}: the run failed:\n{path.read_text()[-2000:]}")
        return usage.ru_maxrss / 2**20


@dataclass
class Sweep:
    """All runs of a comparison."""

    root: Path
    fit: tuple[str, ...]
    variants: dict[str, Variant]
    seeds: tuple[int, ...]
    warm: dict[int, Run]  # each seed's warm start
    epochs: int  # of the warm start
    seconds: float | None
    pilot_stretches: int
    pool: Executor
    started: dict[int, Future[None]] = field(default_factory=dict)

    def warm_up(self) -> None:
        """Begin the warm starts. A run waits for that of its own seed alone."""
        self.started = {seed: self.pool.submit(run.train, None) for seed, run in self.warm.items()}

    def train(self, runs: Iterable[Run]) -> None:
        """Train, some at the same time."""
        parallel(self.pool, self._train, runs)

    def _train(self, run: Run) -> None:
        for started in self.started.values():
            if started.done():
                started.result()  # one that failed ends the comparison now, not when its own seed comes
        if run.seed in self.warm:
            self.started[run.seed].result()  # begun before this, so that a job is left for it
            run.train(self.warm[run.seed].checkpoint)
        else:
            run.train(None)

    def run(self, name: str, settings: dict[str, Any], seed: int, share: float = 1.0) -> Run:
        """Return a run with a share of the budget."""
        label = ",".join(f"{option.rsplit('.', 1)[-1]}={value}" for option, value in settings.items())
        arguments = [*self.variants[name].arguments, *(f"--{option}={value}" for option, value in settings.items())]
        if self.seconds is not None:
            speed = self.pilot(self.variants[name].as_many_as or name).cost["seconds a stretch"]
            budget = max(round(self.seconds * share / speed), 1)
            epochs = -(-budget // self.available(name))
            arguments += [f"--data.policy_stretches={-(-budget // epochs)}"]
            arguments += [f"--trainer.max_epochs={self.epochs + epochs}"]
            arguments += [f"--trainer.check_val_every_n_epoch={self.epochs + epochs}"]
            label = f"{label},stretches={budget}" if label else f"stretches={budget}"
        return Run(self.root, name, (*self.fit, *arguments), seed, label)

    def pilot(self, name: str) -> Run:
        """Return a short run that measures the speed of a variant."""
        budget = [f"--data.policy_stretches={self.pilot_stretches}", f"--trainer.max_epochs={self.epochs + 1}"]
        budget += ["--trainer.limit_val_batches=0"]
        return Run(self.root, name, (*self.fit, *self.variants[name].arguments, *budget), self.seeds[0], "pilot")

    def available(self, name: str) -> int:
        """Return how many stretches the variant's phase has."""
        path = self.pilot(name).folder / "data.txt"
        if not path.is_file():
            command = [sys.executable, "-m", "recsys.cli", "data", *self.fit, *self.variants[name].arguments]
            done = subprocess.run([*command, "--data.policy_stretches=null"], capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(f"{' '.join(command)}: {done.stderr[-2000:]}")
            path.write_text(done.stdout)
        found = re.search(r"drawn for an epoch.* policy ([\d,]+)", path.read_text())
        assert found is not None
        return int(found[1].replace(",", ""))


def main(
    fit: list[str],
    variants: dict[str, Variant],
    out: str,
    seeds: tuple[int, ...] = (0, 1, 2),
    folder: str = "data",
    data: str = "",
    cutoffs: tuple[int, ...] = (5, 10, 20, 50),
    warm_start: list[str] | None = None,
    warm_start_epochs: int = 0,
    seconds: float | None = None,
    pilot: int = 1600,
    grid: list[list[dict[str, Any]]] | None = None,
    rungs: tuple[float, ...] = (1.0,),
    chosen: dict[str, dict[str, Any]] | None = None,
    prepare: list[str] | None = None,
    tune: str = "wpauc",
    against: tuple[str, ...] = (),
    test: bool = False,
    only: tuple[str, ...] = (),
    jobs: int = 1,
) -> None:
    """Run every variant with every seed, and write the tables and the figure.

    Args:
        fit: Arguments of `recsys fit` that all runs share. `{folder}` and `{data}` in them, in `prepare` and in `out`
            stand for the options of these names.
        variants: What is compared.
        out: Folder of the runs.
        seeds: Values of `--seed_everything`.
        folder: Folder of the data sets.
        data: Name of the data set, where arguments ask for one.
        cutoffs: Values of K in the tables.
        warm_start: Further arguments of a run from whose end the variants go on, one for each seed.
        warm_start_epochs: Its epochs.
        seconds: Time that each variant trains for, behind the warm start; null leaves the config's numbers.
        pilot: Stretches of the run that measures how many a variant goes through in that time. Take more where one
            costs less as training goes on; the table shows the real seconds.
        grid: Choices to make, one after the other, each between some settings (options with their values).
        rungs: Shares of the budget in successive halving: after each, the better half goes on, after the last the best.
        chosen: Settings of variants that need no choice any more, as an earlier run printed them.
        prepare: Script beside this one, and its arguments, to run first.
        tune: Validation metric to choose by. A variant's `wpauc` is that of its own window.
        against: Variants from which the others' differences are shown, the first one in the figure too; by default the
            warm start, or else the first.
        test: Report on the test rows.
        only: Variants to run, by default all; with them those that `like`, `as_many_as` and `against` name.
        jobs: Runs at the same time; set OMP_NUM_THREADS so that they share the cores.
    """
    compared = {name: variants[name] for name in only or variants}
    like = {v.like for v in compared.values() if v.like} - (chosen or {}).keys()
    named = {v.as_many_as for v in compared.values() if v.as_many_as}.union(like, against)
    if lacking := sorted(named - {WARM_START, *compared}):
        raise SystemExit(f"only: {', '.join(lacking)} is needed too, or another `against`")

    def filled(argument: str) -> str:
        return argument.replace("{folder}", folder).replace("{data}", data)

    root = Path(filled(out))
    if prepare is not None:
        script, *arguments = map(filled, prepare)
        subprocess.run([sys.executable, Path(__file__).with_name(script), *arguments], check=True)
    shared = tuple(map(filled, fit))
    warm = {seed: Run(root, WARM_START, (*shared, *warm_start), seed) for seed in seeds if warm_start is not None}
    with ThreadPoolExecutor(jobs) as pool:
        sweep = Sweep(root, shared, compared, seeds, warm, warm_start_epochs, seconds, pilot, pool)
        sweep.warm_up()
        if seconds is not None:
            sweep.train(sweep.pilot(name) for name in compared)
        settings = choose(sweep, grid or [], rungs, tune, chosen or {})
        print(f"chosen: {json.dumps(settings)}", flush=True)
        table = {WARM_START: list(warm.values())} if warm else {}
        table |= {name: [sweep.run(name, settings[name], seed) for seed in seeds] for name in compared}
        sweep.train(run for name in compared for run in table[name])
        if test:
            parallel(pool, Run.test, (run for runs in table.values() for run in runs))
    ranks = {name: read([run.ranks(test) for run in runs]) for name, runs in table.items()}
    first = against or (next(iter(ranks)),)
    text = [costs(table), levels(ranks, cutoffs), *(differences(ranks, name, cutoffs) for name in first)]
    (root / "table.md").write_text("\n".join(text))
    print("\n".join(text))
    windows = {name: window for name, runs in table.items() if (window := window_of(runs[0])) is not None}
    write_curve(ranks, first[0], windows, root)


def choose(
    sweep: Sweep,
    grid: list[list[dict[str, Any]]],
    rungs: tuple[float, ...],
    tune: str,
    chosen: dict[str, dict[str, Any]],
) -> dict[str, dict[str, Any]]:
    """Return each variant's settings: one choice after the other, each by successive halving with the first seed."""
    own = {name: v for name, v in sweep.variants.items() if v.like is None}
    choices = {name: grid if v.grid is None else v.grid for name, v in own.items() if name not in chosen}
    found = {name: {} for name in own} | chosen
    for place in range(max(map(len, choices.values()), default=0)):
        left = {
            name: [found[name] | cell for cell in each[place]] for name, each in choices.items() if place < len(each)
        }
        for rung, share in enumerate(rungs):
            cells = {name: [sweep.run(name, cell, sweep.seeds[0], share) for cell in left[name]] for name in left}
            sweep.train(run for runs in cells.values() for run in runs)
            for name, runs in cells.items():
                quality = [pd.read_parquet(run.ranks(test=False))[tune].mean() for run in runs]
                best = np.argsort(quality)[::-1]
                shown = ", ".join(f"{runs[i].label} {quality[i]:.4f}" for i in best)
                print(f"{name}: {tune} of {shown}", flush=True)
                keep = 1 if rung == len(rungs) - 1 else -(-len(runs) // 2)
                left[name] = [left[name][i] for i in best[:keep]]
        found |= {name: cells[0] for name, cells in left.items()}
    return {
        name: found[name] if variant.like is None else variant.unless_given(found[variant.like])
        for name, variant in sweep.variants.items()
    }


def parallel(pool: Executor, function: Callable[[Run], None], runs: Iterable[Run]) -> None:
    """Call the function on every run in the pool, which begins nothing more after the first error."""
    futures = [pool.submit(function, run) for run in runs]
    try:
        for future in as_completed(futures):
            future.result()
    except BaseException:
        pool.shutdown(cancel_futures=True)
        raise


def costs(runs: dict[str, list[Run]]) -> str:
    """Return a table of the settings and median costs."""
    lines = ["| run | settings | seconds | token rows | GB |", "|---|---|---|---|---|"]
    for name, seeds in runs.items():
        cost = pd.DataFrame([run.cost for run in seeds]).median(numeric_only=True)
        cells = [name, seeds[0].label, f"{cost['seconds']:.0f}", f"{cost['token rows']:,.0f}"]
        lines.append(f"| {' | '.join(cells)} | {cost['gigabytes']:.1f} |")
    return "\n".join(lines) + "\n"


def window_of(run: Run) -> tuple[float, float] | None:
    """Return the window (a, b] that a run optimised; None if its objective has none."""
    settings = yaml.safe_load((run.events / "config.yaml").read_text())
    if not settings["model"]["objective"]["class_path"].endswith("TAWin") or run.variant == WARM_START:
        return None
    found = re.search(r"negatives \(([\d.]+), ([\d.]+)\]", (run.folder / "fit.txt").read_text())
    assert found is not None
    return float(found[1]), float(found[2])


if __name__ == "__main__":
    jsonargparse.auto_cli(main, as_positional=False)
