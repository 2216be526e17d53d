"""Files and folders that are replaced as a whole: whatever stops a write, the one before it stays.

A new one is written beside its place, since a rename is one step only within a file system.
"""

from __future__ import annotations

import io
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins import TorchCheckpointIO

_NEW, _OLD = ".new", ".old"  # suffixes beside the place


class AtomicCheckpointIO(TorchCheckpointIO):
    """Replaces checkpoints as a whole. Lightning's own goes through ``$TMPDIR``, and from another disk it copies."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Write one checkpoint to the disk, then put it in its place."""
        content = io.BytesIO()
        torch.save(checkpoint, content)  # first: a full disk raises an OSError in write, anything else in torch.save
        with replaced(Path(path)) as new:
            new.write_bytes(content.getbuffer())


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """Give a name to write a file under; then it goes to the disk, and into the place of ``path``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(path.name + _NEW)
    try:
        yield new
        with new.open("rb") as file:
            _flush(file.fileno())
        new.replace(path)
    except BaseException:
        new.unlink(missing_ok=True)
        raise
    _flush_folder(path.parent)


def replace_folder(path: Path, write: Callable[[Path], None]) -> None:
    """Have ``write`` fill a new folder, and put it in the place of ``path``."""
    new, old = (path.with_name(path.name + suffix) for suffix in (_NEW, _OLD))
    shutil.rmtree(new, ignore_errors=True)
    try:
        write(new)
        for file in new.rglob("*"):
            if file.is_file():
                with file.open("rb") as opened:
                    _flush(opened.fileno())
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)
    if path.exists():
        path.rename(old)  # a folder that is not empty cannot be renamed over
    new.rename(path)
    _flush_folder(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def _flush(descriptor: int) -> None:
    os.fsync(descriptor)


def _flush_folder(folder: Path) -> None:
    """Make renames last; only POSIX opens folders."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            _flush(descriptor)
        finally:
            os.close(descriptor)
