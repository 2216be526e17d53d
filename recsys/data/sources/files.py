"""Files as streams of Arrow tables with a few columns each; every error names the file, and the row if there is one.

Texts stay exactly as written: a number in JSON becomes its text, and so does a list, its elements joined by ``|``.
"""

from __future__ import annotations

import csv
import gzip
import json
import warnings
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from recsys.types import UserError

_ROWS = 200_000  # in one Arrow table
_SEPARATORS = {".csv": ",", ".tsv": "\t"}
_SUFFIXES = (*_SEPARATORS, ".jsonl", ".json", ".parquet")
# ValueError: no table, not UTF-8 or not JSON; ParserWarning: rows with more fields than the header
_UNREADABLE = (ValueError, pd.errors.ParserWarning, OSError, EOFError, zlib.error, pa.ArrowException)


@dataclass(frozen=True)
class Delimited:
    """How a text file is written that has one row on each line.

    Args:
        separator: What stands between fields; with several characters there are neither quotes nor a header line.
        quoted: Whether fields may be quoted as in CSV.
        names: Names of the columns, if the first line does not hold them.
        encoding: Encoding of the text.
    """

    separator: str
    quoted: bool = True
    names: tuple[str, ...] | None = None
    encoding: str = "utf-8"


class DataFile:
    """A table in a file: CSV, TSV, JSON Lines or Parquet, which the name tells, or another delimited text.

    Args:
        path: The file, ``~`` is the home folder. All but Parquet may be compressed, with a name that ends in ``.gz``.
        form: How a text file is written whose name does not tell.

    Attributes:
        path: The file.
        first_row: The row number of the first row of data in messages: 2 after a header line, else 1.

    Raises:
        UserError: There is no such file, or its name does not tell how it is written.
    """

    def __init__(self, path: str | Path, form: Delimited | None = None) -> None:
        self.path = Path(path).expanduser()
        suffix = Path(self.path.name.removesuffix(".gz")).suffix
        if form is None and (suffix not in _SUFFIXES or self.path.name.endswith(".parquet.gz")):
            raise UserError(
                f"{path}: the name should end in {' or '.join(_SUFFIXES)}; all but the last may be followed by .gz"
            )
        if not self.path.is_file():
            raise UserError(f"{path}: no such file")
        self.form = form or (Delimited(_SEPARATORS[suffix]) if suffix in _SEPARATORS else None)
        self._is_parquet = form is None and suffix == ".parquet"
        self.first_row = 2 if self.form and self.form.names is None else 1

    def column_names(self) -> list[str]:
        """Names of the columns; of JSON Lines, those in the first 1,000 rows.

        Raises:
            UserError: The file cannot be read.
        """
        try:
            if self.form:
                return list(self.form.names or self._read_csv(self.form, nrows=0))
            if self._is_parquet:
                return list(pq.read_schema(self.path).names)
            return list(dict.fromkeys(name for row in islice(self._json_rows(), 1000) for name in row))
        except _UNREADABLE as error:
            raise self._unreadable(error) from error

    def schema(self, names: list[str]) -> pa.Schema:
        """Arrow types of some columns: a Parquet file's own, and strings for text.

        Raises:
            UserError: The file cannot be read or lacks a column.
        """
        there = self.column_names()
        for name in names:
            if name not in there:
                raise UserError(f"{self.path}: column {name!r} is missing; the file has {', '.join(map(repr, there))}")
        if self._is_parquet:
            schema = pq.read_schema(self.path)
            return pa.schema([pa.field(name, schema.field(name).type) for name in names])
        return pa.schema([pa.field(name, pa.string()) for name in names])

    def tables(self, names: list[str]) -> Iterator[pa.Table]:
        """Some columns, in pieces of the types that :meth:`schema` tells.

        Raises:
            UserError: The file cannot be read.
        """
        try:
            if self._is_parquet:
                for batch in pq.ParquetFile(self.path).iter_batches(_ROWS, columns=names):
                    yield pa.Table.from_batches([batch]).select(names)
            elif self.form:
                split = len(self.form.separator) > 1
                for frame in self._split_lines(self.form) if split else self._csv_frames(self.form):
                    yield pa.table({name: pa.array(frame[name], pa.string()) for name in names})
            else:
                rows = self._json_rows()
                while some := list(islice(rows, _ROWS)):
                    yield pa.table({name: _strings([_text(row.get(name)) for row in some]) for name in names})
        except _UNREADABLE as error:
            raise self._unreadable(error) from error

    def _unreadable(self, error: BaseException) -> UserError:
        return UserError(f"{self.path}: not readable as a table: {str(error).strip()}")

    def _read_csv(self, form: Delimited, **kwargs: Any) -> Any:
        return pd.read_csv(
            self.path,
            sep=form.separator,
            names=form.names,
            encoding=form.encoding,
            dtype=str,  # "category" would need less memory but reads "007" as 7
            na_filter=False,  # the id "NA" is not a missing value
            index_col=False,
            quoting=csv.QUOTE_MINIMAL if form.quoted else csv.QUOTE_NONE,
            **kwargs,
        )

    def _csv_frames(self, form: Delimited) -> Iterator[pd.DataFrame]:
        with self._read_csv(form, chunksize=_ROWS) as frames:
            while True:
                with warnings.catch_warnings():
                    warnings.simplefilter("error", pd.errors.ParserWarning)
                    frame = next(frames, None)
                if frame is None:
                    return
                yield frame

    def _split_lines(self, form: Delimited) -> Iterator[pd.DataFrame]:
        names = form.names or ()
        with self.path.open(encoding=form.encoding, newline="\n") as file:
            lines = enumerate(file, start=1)
            while some := list(islice(lines, _ROWS)):
                rows = [line.rstrip("\r\n").split(form.separator) for _, line in some]
                for (number, _), row in zip(some, rows, strict=True):
                    if len(row) != len(names):
                        raise ValueError(f"line {number} has {len(row)} fields instead of {len(names)}")
                yield pd.DataFrame(rows, columns=list(names))

    def _json_rows(self) -> Iterator[dict[str, Any]]:
        with gzip.open(self.path) if self.path.suffix == ".gz" else self.path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.isspace():
                    continue
                try:
                    row = json.loads(line)
                except ValueError as error:
                    raise ValueError(f"line {number} is not JSON: {error}") from error
                if not isinstance(row, dict):
                    raise ValueError(f"line {number} is not a JSON object; write one object on each line")
                yield row


def _text(value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, list):
        return "|".join(text for text in map(_text, value) if text)
    return json.dumps(value)


def _strings(texts: list[str | None]) -> pa.Array:
    try:
        return pa.array(texts, pa.string())
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can hold and UTF-8 cannot
        return pa.array([t and t.encode("utf-8", "replace").decode() for t in texts], pa.string())
