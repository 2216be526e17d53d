"""Folders of runs: each belongs to one run, and its checkpoints are found by the run's name."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only

from recsys.types import UserError

LAST = "last"  # name of a run's last checkpoint
NO_LOGGER = "run"  # name of runs without a logger


class RunLogger(TensorBoardLogger):
    """TensorBoard's logger, with a folder that no other run has, however close to each other they start.

    Args:
        save_dir: Folder of all runs.
        name: Folder of this run's name in it; checkpoints take it too.
        version: Folder in that, or N for ``version_N``; null takes the next number that is free.
        sub_dir: Folder in that for the events.
        max_queue: Events that wait before logging does.
        flush_secs: Most seconds until they are written.

    Raises:
        UserError: One of the numbers is below 1.
    """

    def __init__(
        self,
        save_dir: str = "runs",
        name: str | None = "recsys",
        version: int | str | None = None,
        sub_dir: str | None = None,
        max_queue: int = 10,
        flush_secs: int = 120,
    ) -> None:
        for option, value in {"max_queue": max_queue, "flush_secs": flush_secs}.items():
            if value < 1:
                raise UserError(f"logger.{option} must be at least 1, but it is {value}")
        super().__init__(
            save_dir,
            name,
            version,
            sub_dir=sub_dir,
            default_hp_metric=False,
            max_queue=max_queue,
            flush_secs=flush_secs,
        )

    def _get_next_version(self) -> int:
        version: int = super()._get_next_version()
        self._version = version
        while getattr(rank_zero_only, "rank", 0) == 0 and not claim(Path(self.log_dir)):
            self._version = version = version + 1
        return version


def claim(folder: Path) -> bool:
    """Make a folder; False if it is there already."""
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        return False
    return True


def claim_version(root: Path, version: str | None) -> Path:
    """Make the folder ``version`` below ``root``, or, if it is there already or None, the next ``version_N``."""
    if version is not None and claim(root / version):
        return root / version
    number = max((_number(folder) for folder in root.glob("version_*")), default=-1) + 1
    while not claim(root / f"version_{number}"):
        number += 1
    return root / f"version_{number}"


def check_writable(folder: Path, option: str) -> None:
    """Write a file to a folder, made if need be.

    Raises:
        UserError: if that fails.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"0" * 4096)
    except OSError as error:
        raise UserError(f"{option}: cannot write to {folder} ({error.strerror}); set another folder") from error


def results_folder(trainer: Any) -> Path | None:
    """Return where a run writes what is no checkpoint: its log folder, or without a logger its checkpoint folder.

    None in a trial run (``fast_dev_run``), and outside of training without a logger. Asks all processes.
    """
    log_dir, checkpoint = trainer.log_dir, trainer.checkpoint_callback
    if trainer.fast_dev_run:
        return None
    if trainer.loggers and log_dir is not None:
        return Path(log_dir)
    if trainer.state.fn == "fit" and checkpoint is not None:
        return Path(checkpoint.dirpath)
    return None


def find_checkpoint(root: Path, which: Literal["last", "best"]) -> Path:
    """Return the last or the best checkpoint of the newest run below ``root`` that has one.

    Raises:
        UserError: if none has.
    """
    for last in sorted(root.glob(f"*/{LAST}.ckpt"), key=_age):
        if which == "last":
            return last
        for state in read_checkpoint(last).get("callbacks", {}).values():
            best = Path(state.get("best_model_path") or "none") if isinstance(state, dict) else Path("none")
            for path in (best, last.parent / best.name):  # the folder may have been moved
                if path.is_file():
                    return path
    raise UserError(f"ckpt_path: no run below {root} has a {which} checkpoint; give the path of one")


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Load a checkpoint of this program, as far as that needs no model.

    Raises:
        UserError: if there is no such file, or it is none.
    """
    if not path.is_file():
        raise UserError(f"ckpt_path: no such file: {path}")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # there are as many kinds as formats
        raise UserError(f"ckpt_path: {path} is broken or no checkpoint ({type(error).__name__})") from error
    check_checkpoint(checkpoint, path)
    return checkpoint


def check_checkpoint(checkpoint: Any, path: Any = "the file") -> None:
    """Check that what was loaded is a checkpoint of this version of the program.

    Raises:
        UserError: if it is not.
    """
    if not isinstance(checkpoint, dict) or not {"state_dict", "policy", "loops"} <= checkpoint.keys():
        raise UserError(f"ckpt_path: {path} is not a checkpoint of a run of recsys")
    if "fingerprint" not in checkpoint:
        raise UserError(
            f"ckpt_path: {path} is of an older version and does not tell its data, prompt and tokenizer; start from "
            "the adapter beside it (model.policy.init_args.adapter)"
        )


def _number(folder: Path) -> int:
    found = re.fullmatch(r"version_(\d+)", folder.name)
    return int(found[1]) if found else -1


def _age(last: Path) -> tuple[int, float]:
    return -_number(last.parent), -last.stat().st_mtime
