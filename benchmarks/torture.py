"""What a run does when it is killed, when the disk is full, and when files and settings make no sense.

    mkdir -p /tmp/small && sudo mount -t tmpfs -o size=16m tmpfs /tmp/small
    python benchmarks/torture.py --small_disk=/tmp/small

prints a table of what was tried and what came of it. A run ends as it should, or with one line that says what is wrong
(`refused`); anything else is a fault: a traceback, a line that comes after training has begun (`late`), a result that
is not that of an undisturbed run (`wrong`). `done` is for a reader to judge: a run that took a value as it was.
Everything is made in a temporary folder, and on the small disk in a folder of its own. `--only` runs some of the parts,
`--share=0.1` a tenth of each.
"""

from __future__ import annotations

import csv
import io
import itertools
import multiprocessing
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import jsonargparse
import numpy as np
import pandas as pd
import torch
import yaml

from recsys.cli import main as recsys
from recsys.data import Columns, Table
from recsys.module import Recommender
from recsys.types import UserError

USERS, ITEMS, EVENTS = 30, 20, 12
VALUES = ("0", "-1", "nan", "inf", "1e30", "abc", "[1,2]", "", "null", "true", "99999999999999999999")
ODD = (b'"', b"\0", b"\n", b"\r", b"\xff", b"\\", b",", b"\t", b"\xef\xbb\xbf", b"\xed\xa0\x80", b"-", b"e5")
FORK = multiprocessing.get_context("fork")  # the libraries are loaded once

Outcome = tuple[str, str]  # its name, and what was seen if it is a fault


def write_tables(folder: Path) -> None:
    """Write interactions and items as CSV."""
    with (folder / "items.csv").open("w", newline="") as file:
        rows = [[f"i{i}", f'Film {i}, "the {"very " * (i % 4)}best"', f"c{i % 3}"] for i in range(ITEMS)]
        csv.writer(file).writerows([["item_id", "title", "genre"], *rows])
    with (folder / "log.csv").open("w", newline="") as file:
        rows = [
            [f"u{u}", f"i{(3 * u + t) % ITEMS}", str(100 * t + u), 1 + t % 5]
            for u in range(USERS)
            for t in range(EVENTS)
        ]
        csv.writer(file).writerows([["user_id", "item_id", "timestamp", "stars"], *rows])


def new_folder(tables: Path, folder: Path) -> Path:
    """Make a folder with a copy of the tables."""
    folder.mkdir()
    for name in ("log.csv", "items.csv"):
        shutil.copy(tables / name, folder)
    return folder


def arguments(folder: Path, *more: str) -> list[str]:
    """Return those of a run of seconds, with each part of a long one, in a folder that has the tables."""
    config = {
        "seed_everything": 0,
        "model": {
            "policy": {"class_path": "recsys.policy.TinyPolicy", "init_args": {"hidden_size": 16, "layers": 1}},
            "warm_start": {
                "class_path": "recsys.objectives.SupervisedFineTuning",
                "init_args": {"learning_rate": 0.01},
            },
            "warm_start_epochs": 2,
            "objective": {
                "class_path": "recsys.objectives.TAWin",
                "init_args": {"learning_rate": 1e-3, "kl_coef": 0.01, "anchor_coef": 0.1},
            },
            "window": {"k": 3, "half_width": 2},
            "num_beams": 10,
        },
        "data": {
            "source": {
                "class_path": "recsys.data.Table",
                "init_args": {
                    **{"interactions": str(folder / "log.csv"), "items": str(folder / "items.csv"), "rating": "stars"},
                    **{"category": "genre", "cache_dir": str(folder / "cache")},
                },
            },
            "prompt": {"template": "Seen:\n{history}", "max_history": 4, "max_tokens": 128},
            "policy_stretches": 23,
            "batch_size": 4,
        },
        "negatives": {"count": 6, "batch_size": 4},
        "checkpoint": {"dirpath": str(folder / "checkpoints"), "every_n_minutes": 0.005},
        "trainer": {
            "max_epochs": 4,
            "accelerator": "cpu",
            "devices": 1,
            "log_every_n_steps": 1,
            "enable_progress_bar": False,
        },
        "logger": {"save_dir": str(folder / "runs"), "name": "run"},
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return ["fit", f"--config={path}", *more]


class Attempt:
    """A run of the command line in a process of its own."""

    def __init__(self, args: list[str], folder: Path, output: Path | None = None) -> None:
        self.output, self.trained = (output or folder) / "output.txt", (output or folder) / "trained"
        self.trained.unlink(missing_ok=True)
        self.process = FORK.Process(target=self._run, args=(args, folder))
        self.process.start()

    def _run(self, args: list[str], folder: Path) -> None:
        os.chdir(folder)
        with self.output.open("w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        step = Recommender.training_step

        def marked(*given: Any, **named: Any) -> Any:
            self.trained.touch()
            return step(*given, **named)

        Recommender.training_step = marked  # type: ignore[method-assign]
        try:
            recsys(args)
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
        except BaseException:
            traceback.print_exc()
            code = 99
        else:
            code = 0
        sys.stdout.flush()
        os._exit(code)

    def end(self, seconds: float = 120) -> Outcome:
        """Wait for its end, and return what came of it."""
        self.process.join(seconds)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
            return "hangs", ""
        lines = self.output.read_text(errors="replace").splitlines() if self.output.is_file() else []
        last = next((line for line in reversed(lines) if line.strip()), "")
        if self.process.exitcode == 0:
            return "done", ""
        if any(line.startswith("Traceback") for line in lines) or self.process.exitcode == 99:
            return "traceback", last
        return ("late" if self.trained.is_file() else "refused"), last


def weights(folder: Path) -> Any:
    """Return what the last checkpoint below a folder holds of the training."""
    paths = sorted(folder.glob("checkpoints/run/*/last.ckpt"), key=lambda path: int(path.parent.name.split("_")[1]))
    checkpoint = torch.load(paths[-1], weights_only=False)
    return checkpoint["state_dict"], checkpoint["optimizer_states"], checkpoint["global_step"]


def same(a: Any, b: Any) -> bool:
    """Return whether two trees of tensors agree bit for bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def ranks(folder: Path) -> pd.DataFrame:
    """Return what each row got at the last validation below a folder."""
    path = max(folder.glob("runs/run/*/ranks/step*.parquet"), key=lambda path: int(path.stem[4:]))
    found = pd.read_parquet(path)
    return found.sort_values(list(found.columns)).reset_index(drop=True)


def kills(root: Path, count: int, rng: random.Random) -> Iterator[Outcome]:
    """Kill a run, at any moment or while it writes a checkpoint, resume it, and compare with one left alone."""
    write_tables(root)
    whole = new_folder(root, root / "whole")
    began = time.monotonic()
    assert Attempt(arguments(whole), whole).end() == ("done", "")
    seconds, expected = time.monotonic() - began, weights(whole)
    for number in range(count):
        folder = new_folder(root, root / f"kill{number}")
        args = arguments(folder)
        attempt = Attempt(args, folder)
        if number % 2:
            time.sleep(rng.uniform(0, seconds))
        else:
            writes, before = rng.randrange(1, 20), set[Path]()
            while writes > 0 and attempt.process.is_alive():
                now = set(folder.glob("checkpoints/run/*/*.new"))
                writes -= len(now - before)
                before = now
                time.sleep(5e-4)
        attempt.process.kill()
        attempt.process.join()
        again = list(folder.glob("checkpoints/run/*/last.ckpt"))
        outcome = Attempt([*args, "--ckpt_path=last"] if again else args, folder).end()
        if outcome[0] == "done":
            outcome = ("as if left alone", "") if same(weights(folder), expected) else ("wrong", str(folder))
        yield outcome
        if outcome[0] == "as if left alone":
            shutil.rmtree(folder)


def processes(root: Path, count: int, rng: random.Random) -> Iterator[Outcome]:
    """Train and validate with 2, 3 and 4 processes on odd numbers of rows, and compare groups and ranks with one."""
    write_tables(root)
    still = [f"--model.{phase}.init_args.learning_rate=1e-30" for phase in ("warm_start", "objective")]
    cases = [(size, rows) for rows in (1, 2, 5, 23) for size in (1, 2, 3, 4)]
    alone: dict[int, Any] = {}
    for size, rows in cases[:count]:
        folder = new_folder(root, root / f"processes{size}-{rows}")
        more = [f"--data.policy_stretches={rows}", f"--data.val_rows={2 * rows + 1}", f"--trainer.devices={size}"]
        more += [*still, "--trainer.max_epochs=3", *(["--trainer.strategy=ddp"] if size > 1 else [])]
        done = subprocess.run(
            [sys.executable, "-m", "recsys.cli", *arguments(folder, *more)],
            cwd=folder, capture_output=True, text=True, timeout=600, check=False,
        )  # fmt: skip
        if done.returncode:
            yield ("traceback" if "Traceback" in done.stderr else "refused"), (done.stderr.splitlines() or [""])[-1]
            continue
        [path] = folder.glob("checkpoints/run/*/last.ckpt")
        groups = torch.load(path, weights_only=False)["callbacks"]["BeamNegatives"]["groups"]
        found = ranks(folder)
        if size == 1:
            alone[rows] = groups, found
            continue
        equal = same([groups["row"], groups["items"]], [alone[rows][0]["row"], alone[rows][0]["items"]])
        yield ("as one process", "") if equal and found.equals(alone[rows][1]) else ("wrong", str(folder))


def disk(root: Path, count: int, rng: random.Random) -> Iterator[Outcome]:
    """Leave ever more room on a small disk: a run that ends in one line resumes to the end once there is room."""
    home = Path(tempfile.mkdtemp(dir=root / "small"))
    whole = home / "run"
    try:
        write_tables(home)
        for room in np.linspace(0, 1, count + 1)[:-1]:
            args = arguments(new_folder(home, whole))
            if room == 0:
                assert Attempt(args, whole).end() == ("done", "")
                expected, needed = weights(whole), sum(p.stat().st_size for p in whole.rglob("*") if p.is_file())
                shutil.rmtree(whole)
                continue
            free = shutil.disk_usage(home).free
            filler = home / "filler"
            with filler.open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, max(int(free - room * needed), 1))
            outcome = Attempt(args, whole, root).end()
            filler.unlink()
            if outcome[0] in ("refused", "late"):  # in training, where it is the first that can be known
                last = list(whole.glob("checkpoints/run/*/last.ckpt"))
                told = "space" in outcome[1] or "writ" in outcome[1]
                then = Attempt([*args, "--ckpt_path=last"] if last else args, whole).end()
                right = then[0] == "done" and same(weights(whole), expected)
                outcome = ("one line, then as if left alone", "") if right and told else ("wrong", f"{outcome} {then}")
            elif outcome[0] == "done" and not same(weights(whole), expected):
                outcome = ("wrong", f"{room:.3f} of {needed} bytes")
            yield outcome
            shutil.rmtree(whole)
    finally:
        shutil.rmtree(home)


def files(root: Path, count: int, rng: random.Random) -> Iterator[Outcome]:
    """Spoil a table, read it, and compare what is read with Python's own reader."""
    write_tables(root)
    sound = {name: (root / f"{name}.csv").read_bytes() for name in ("log", "items")}
    frames = {name: pd.read_csv(root / f"{name}.csv", dtype=str) for name in sound}
    forms: dict[str, Callable[[pd.DataFrame], bytes]] = {
        ".csv": lambda frame: frame.to_csv(index=False).encode(),
        ".tsv": lambda frame: frame.to_csv(index=False, sep="\t").encode(),
        ".jsonl": lambda frame: frame.to_json(orient="records", lines=True).encode(),
        ".parquet": lambda frame: frame.to_parquet(index=False),
    }
    for number in range(count):
        form, name = rng.choice(list(forms)), rng.choice(list(sound))
        paths = {each: root / f"{each}{number % 50}{form}" for each in sound}
        for each, path in paths.items():
            path.write_bytes(forms[form](frames[each]))
        paths[name].write_bytes(spoilt(forms[form](frames[name]), rng))
        try:
            data = Table(
                str(paths["log"]), str(paths["items"]), rating="stars", category="genre", cache_dir=str(root / "cache")
            ).load()
        except UserError as error:
            yield ("refused", "") if "\n" not in str(error).strip() else ("more than one line", str(error))
        except Exception as error:
            yield "traceback", f"{_keep(paths[name], number)}: {type(error).__name__}: {error}"
        else:
            if form not in (".csv", ".tsv"):
                yield "read", ""
                continue
            log, items = (
                by_python(paths[each].read_bytes(), "," if form == ".csv" else "\t") for each in ("log", "items")
            )
            read = Counter(zip(data.interactions[Columns.USER], data.interactions[Columns.ITEM], strict=True))
            titles = dict(zip(data.items[Columns.ITEM], data.items[Columns.TITLE], strict=True))
            if log is None or items is None:
                right = False
            else:
                right = read == Counter((row["user_id"], row["item_id"]) for row in log)
                right &= titles == {row["item_id"]: " ".join(row["title"].split()) for row in items}
            yield ("read as Python does", "") if right else ("otherwise than Python", _keep(paths[name], number))


def _keep(path: Path, number: int) -> Path:
    """Copy a file to where it outlives the run, and return where that is."""
    return Path(shutil.copy(path, Path(tempfile.gettempdir(), f"torture{number}{path.suffix}")))


def spoilt(content: bytes, rng: random.Random) -> bytes:
    """Return content with one to three changes: bytes overwritten, added, taken, repeated or cut off."""
    for _ in range(rng.randint(1, 3)):
        at, size = rng.randrange(len(content) + 1), rng.choice([1, 1, 2, 5, 30])
        odd = rng.choice(
            [b'"', b"\0", b"\n", b"\r", b"\xff", b"\\", b",", b"\t", b"\xef\xbb\xbf", b"\xed\xa0\x80", b"-", b"e5"]
        )
        change = rng.randrange(5)
        if change == 0:
            content = content[:at] + bytes(rng.randrange(256) for _ in range(size)) + content[at + size :]
        elif change == 1:
            content = content[:at] + odd + content[at:]
        elif change == 2:
            content = content[:at] + content[at + size :]
        elif change == 3:
            content = content[:at] + content[max(at - size, 0) : at] + content[at:]
        else:
            content = content[:at] if rng.random() < 0.2 else content
    return content


def by_python(content: bytes, separator: str) -> list[dict[str, str]] | None:
    """Return the rows of a table, None if they cannot be told."""
    try:
        text = content.decode("utf-8-sig")
        rows = [row for row in csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True) if row]
    except (csv.Error, UnicodeDecodeError):
        return None
    if any(len(row) != len(rows[0]) for row in rows):
        return None
    return [dict(zip(rows[0], row, strict=True)) for row in rows[1:]]


def settings(root: Path, count: int, rng: random.Random) -> Iterator[Outcome]:
    """Give options values that make no sense."""
    write_tables(root)
    less = ["--data.policy_stretches=4", "--data.warm_start_stretches=4", "--data.val_rows=4", "--trainer.max_epochs=3"]
    command = [sys.executable, "-m", "recsys.cli", *arguments(root, *less), "--print_config"]
    shown = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    names = list(_options(yaml.safe_load(shown.stdout)))
    cases = list(itertools.product(names, VALUES))
    for number, (name, value) in enumerate(rng.sample(cases, min(count, len(cases)))):
        folder = new_folder(root, root / f"setting{number}")
        outcome, seen = Attempt(arguments(folder, *less, f"--{name}={value}"), folder).end(60)
        yield outcome, "" if outcome == "refused" else f"--{name}={value}: {seen}"
        shutil.rmtree(folder)


def _options(tree: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for name, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _options(value, f"{prefix}{name}.")
        elif name != "class_path":
            yield f"{prefix}{name}"


PARTS: dict[str, tuple[Callable[[Path, int, random.Random], Iterator[Outcome]], int]] = {
    "kills": (kills, 100),
    "processes": (processes, 16),
    "disk": (disk, 61),
    "files": (files, 10_000),
    "settings": (settings, 300),
}
FINE = {
    "as if left alone",
    "as one process",
    "one line, then as if left alone",
    "refused",
    "read",
    "read as Python does",
}


def main(
    only: list[Literal["kills", "processes", "disk", "files", "settings"]] | None = None,
    share: float = 1.0,
    seed: int = 0,
    small_disk: str | None = None,
) -> None:
    """Try everything, and print what came of it.

    Args:
        only: Parts to run; null runs all.
        share: Share of the attempts of each part.
        seed: Of the moments, the files and the settings.
        small_disk: Folder on a disk of some megabytes; without, `disk` is left out.
    """
    torch.set_num_threads(1)
    lines = ["| | tried | outcomes | seconds |", "|---|---|---|---|"]
    with tempfile.TemporaryDirectory() as temporary:
        for name in only or list(PARTS):
            if name == "disk" and small_disk is None:
                print("disk: left out, for want of --small_disk")
                continue
            root, began = Path(temporary, name), time.monotonic()
            root.mkdir()
            if name == "disk":
                (root / "small").symlink_to(Path(str(small_disk)).resolve())
            function, count = PARTS[name]
            outcomes: Counter[str] = Counter()
            for outcome, seen in function(root, max(round(count * share), 1), random.Random(seed)):
                outcomes[outcome] += 1
                if outcome not in FINE:
                    print(f"{name}: {outcome}: {seen}", flush=True)
            shown = ", ".join(f"{number:,} {outcome}" for outcome, number in outcomes.most_common())
            lines.append(f"| {name} | {sum(outcomes.values()):,} | {shown} | {time.monotonic() - began:.0f} |")
            print(lines[-1], flush=True)
    print("\n" + "\n".join(lines))


if __name__ == "__main__":
    jsonargparse.auto_cli(main, as_positional=False)
