"""Builder of the ``datasets`` library: converts a file once and keeps it as memory-mapped Arrow.

Importing this takes most of a second, so only the function that reads a file does.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import datasets
import pyarrow as pa

from recsys.data.sources.files import DataFile
from recsys.types import UserError

_SHOW_PROGRESS = 64 << 20  # bytes of a file from which converting it takes long enough for a progress bar


@dataclass
class FileConfig(datasets.BuilderConfig):
    """What names a conversion in the cache.

    Args:
        key: Path, size and time of change of the file, so that a changed file gets a new one, and its columns.
    """

    key: str = ""


class FileBuilder(datasets.ArrowBasedBuilder):
    """Converts some columns of one file.

    Args:
        file: The file.
        columns: Its columns.
        cache_dir: Folder that keeps the result.
    """

    BUILDER_CONFIG_CLASS = FileConfig

    def __init__(self, file: DataFile, columns: list[str], cache_dir: str) -> None:
        self.file = file
        self.columns = columns
        stat = file.path.stat()
        key = str((str(file.path.absolute()), stat.st_size, stat.st_mtime_ns, columns))
        super().__init__(cache_dir=cache_dir, key=key)

    def _info(self) -> datasets.DatasetInfo:
        features = datasets.Features.from_arrow_schema(self.file.schema(self.columns))
        return datasets.DatasetInfo(features=features)

    def _split_generators(self, dl_manager: Any) -> list[datasets.SplitGenerator]:
        return [datasets.SplitGenerator(name="train")]

    def _generate_tables(self) -> Iterator[tuple[tuple[int, int], pa.Table]]:
        rows = 0
        for i, table in enumerate(self.file.tables(self.columns)):
            rows += len(table)
            yield (0, i), table
        if not rows:
            raise UserError(f"{self.file.path}: has no rows")


def cached(file: DataFile, columns: list[str], cache_dir: str) -> datasets.Dataset:
    """Some columns of a file as a memory-mapped dataset, converted when the file is new or has changed.

    Args:
        file: The file.
        columns: Names of its columns.
        cache_dir: Folder that keeps the conversion; ``~`` is the home folder.

    Raises:
        UserError: The file cannot be read, lacks a column or has no rows, or the cache cannot be written.
    """
    quiet = file.path.stat().st_size < _SHOW_PROGRESS and not datasets.are_progress_bars_disabled()
    if quiet:
        datasets.disable_progress_bars()
    try:
        builder = FileBuilder(file, columns, cache_dir)
        builder.download_and_prepare()
        return builder.as_dataset(split="train")
    except datasets.exceptions.DatasetGenerationError as error:
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from None
        raise
    except OSError as error:
        raise UserError(
            f"{file.path} cannot be converted into the cache folder {cache_dir}: {error}; free some space or set "
            "another cache_dir"
        ) from error
    finally:
        if quiet:
            datasets.enable_progress_bars()
