"""Text files as Parquet: converted once, and again when they have changed or what was kept is broken."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock

from recsys.atomic import replaced
from recsys.data.sources.files import DataFile
from recsys.types import UserError

_VERSION = 1  # of the conversion; another one leaves what was kept before unused
_LARGE = 64 << 20  # bytes of a file from which converting it takes long enough for a message
_KEY = b"recsys"


class Conversion:
    """Some columns of a text file in a Parquet file with checksums.

    Reading it needs no lock and writes nothing; a file under its final name is whole, since it is renamed to it.

    Args:
        file: The text file.
        columns: Names of its columns.
        cache_dir: Folder that keeps the Parquet file; ``~`` is the home folder.

    Raises:
        UserError: ``cache_dir`` is empty.
    """

    def __init__(self, file: DataFile, columns: list[str], cache_dir: str) -> None:
        if not cache_dir:
            raise UserError("the source's cache_dir must name a folder")
        self.file = file
        self.columns = columns
        stat = file.path.stat()
        # A program can set a file's time of modification, but not that of its last change (ctime).
        state = (stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
        self._key = repr((_VERSION, str(file.path.absolute()), state, file.form, columns)).encode()
        name = f"{file.path.name[:40]}-{hashlib.sha256(self._key).hexdigest()[:20]}.parquet"
        self.path = Path(cache_dir).expanduser() / name

    def exists(self) -> bool:
        """Whether the file was converted as it is now, going by what was kept says of itself."""
        if not self.path.is_file():
            return False
        try:
            return bool((pq.read_metadata(self.path).metadata or {}).get(_KEY) == self._key)
        except (OSError, ValueError, pa.ArrowException):
            return False

    def make(self) -> None:
        """Convert the file, unless another process does it meanwhile.

        Raises:
            UserError: The file cannot be read or lacks a column, or the cache cannot be written.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(self.path.with_suffix(".lock")):
                if not self.exists():
                    with replaced(self.path) as part:
                        self._convert(part)
        except OSError as error:
            raise UserError(
                f"{self.file.path} cannot be converted into the cache folder {self.path.parent}: {error}; free some "
                "space or set another cache_dir"
            ) from error

    def discard(self) -> None:
        """Remove a broken Parquet file.

        Raises:
            UserError: It cannot be removed.
        """
        print(f"{self.path} is broken; converting {self.file.path} again", file=sys.stderr, flush=True)
        try:
            self.path.unlink(missing_ok=True)
        except OSError as error:
            raise UserError(f"{self.path} is broken and cannot be removed: {error}; set another cache_dir") from error

    def _convert(self, part: Path) -> None:
        size = self.file.path.stat().st_size
        if size >= _LARGE:
            print(f"Converting {self.file.path} ({size / 1e6:,.0f} MB) ...", file=sys.stderr, flush=True)
        schema = self.file.schema(self.columns).with_metadata({_KEY: self._key})
        with pq.ParquetWriter(part, schema, write_page_checksum=True) as writer:
            for table in self.file.tables(self.columns):
                writer.write_table(table.cast(schema))
