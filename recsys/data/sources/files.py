"""Files as streams of Arrow tables with a few columns each; every error names the file, and the row if there is one.

Texts stay exactly as written: a number in JSON becomes its text, and so does a list, its elements joined by ``|``.
"""

from __future__ import annotations

import csv
import glob
import gzip
import json
import os
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from recsys.types import UserError

_ROWS = 200_000  # in one Arrow table
_BLOCK = 1000  # rows that are Python objects at a time: as many as `_ROWS` slow its garbage collection down
_UNIT = "\x1f"  # the control character that separates units
_SEPARATORS = {".csv": ",", ".tsv": "\t"}
_SUFFIXES = (*_SEPARATORS, ".jsonl", ".json", ".parquet")
# ValueError: no table, not UTF-8 or not JSON
_UNREADABLE = (ValueError, OSError, EOFError, zlib.error, pa.ArrowException)
csv.field_size_limit(1 << 24)  # characters; descriptions of products exceed the 131,072 of the standard library


@dataclass(frozen=True)
class Delimited:
    """How a text file is written that has one row on each line.

    Args:
        separator: What stands between fields; with several characters there are no quotes. None is that of the name.
        quoted: Whether fields may be quoted as in CSV. None as well, but a file is refused where a quote joins lines
            that would be whole rows without it, as it can be read in two ways.
        names: Names of the columns, if the first line does not hold them.
        encoding: Encoding of the text.

    Raises:
        UserError: There cannot be such a separator or encoding.
    """

    separator: str | None = None
    quoted: bool | None = None
    names: tuple[str, ...] | None = None
    encoding: str = "utf-8"

    def __post_init__(self) -> None:
        if self.separator is not None and (not self.separator or set(self.separator) & set('"\r\n')):
            raise UserError(f"the source's separator must be text without quotes and line ends, not {self.separator!r}")
        try:
            "".encode(self.encoding)
        except (LookupError, ValueError, TypeError) as error:
            raise UserError(f"the source's encoding {self.encoding!r} is not one that Python knows") from error


class DataFile:
    """A table in a file: CSV, TSV, JSON Lines or Parquet, which the name tells, or another delimited text.

    Args:
        path: The file, ``~`` is the home folder. All but Parquet may be compressed, with a name that ends in ``.gz``.
        form: How a text file is written, unless it is JSON Lines; without a separator, its name has to tell it.

    Attributes:
        path: The file.
        form: How a text file is written; None for JSON Lines and Parquet.
        is_parquet: Whether it is Parquet.
        first_row: The row number of the first row of data in messages: 2 after a header line, else 1.

    Raises:
        UserError: There is no such file, or its name does not tell how it is written.
    """

    def __init__(self, path: str | Path, form: Delimited | None = None) -> None:
        self.path = Path(path).expanduser()
        suffix = Path(self.path.name.removesuffix(".gz")).suffix
        form = form or Delimited()
        separator = form.separator or _SEPARATORS.get(suffix)
        if (suffix not in _SUFFIXES and separator is None) or self.path.name.endswith(".parquet.gz"):
            raise UserError(
                f"{path}: the name should end in {' or '.join(_SUFFIXES)}; all but the last may be followed by .gz"
            )
        if not os.path.isfile(self.path):  # unlike Path's own it takes whatever cannot be a path
            raise UserError(f"{path}: no such file")
        self.is_parquet = suffix == ".parquet"
        is_text = suffix in _SEPARATORS or suffix not in _SUFFIXES
        self.form = replace(form, separator=separator) if is_text else None
        self.first_row = 2 if self.form and self.form.names is None else 1

    def column_names(self) -> list[str]:
        """Names of the columns; of JSON Lines, those in the first 1,000 rows.

        Raises:
            UserError: The file cannot be read.
        """
        try:
            if self.form:
                return list(self.form.names or next(self._rows(self.form))[0])
            if self.is_parquet:
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
            if there.count(name) > 1:
                raise UserError(f"{self.path}: has several columns {name!r}; rename all but one")
        if self.is_parquet:
            schema = pq.read_schema(self.path)
            return pa.schema([pa.field(name, schema.field(name).type) for name in names])
        return pa.schema([pa.field(name, pa.string()) for name in names])

    def tables(self, names: list[str]) -> Iterator[pa.Table]:
        """Some columns, in pieces of the types that :meth:`schema` tells.

        Raises:
            UserError: The file cannot be read.
        """
        try:
            if self.is_parquet:
                parquet = pq.ParquetFile(self.path, page_checksum_verification=True)
                for batch in parquet.iter_batches(_ROWS, columns=names):
                    yield pa.Table.from_batches([batch]).select(names)
            elif self.form:
                blocks = self._rows(self.form)
                first = next(blocks)
                header = list(self.form.names or first.pop(0))
                places = [header.index(name) for name in names]
                yield from _tables(([[row[i] for row in b] for i in places] for b in chain([first], blocks)), names)
            else:
                objects = self._json_rows()
                some = iter(lambda: list(islice(objects, _BLOCK)), [])
                yield from _tables(([[_text(row.get(name)) for row in b] for name in names] for b in some), names)
        except _UNREADABLE as error:
            raise self._unreadable(error) from error

    def _unreadable(self, error: BaseException) -> UserError:
        return UserError(f"{self.path}: not readable as a table: {' '.join(str(error).split())}")

    def _rows(self, form: Delimited) -> Iterator[list[list[str]]]:
        """Rows as lists of their fields, some at a time, that of the header first; empty lines are none."""
        line, width, separator = 1, len(form.names or ()), str(form.separator)
        with self._open(form.encoding) as file:
            reader = _reader(file, form, separator)
            while True:
                rows: list[list[str]] = []
                before, problem = reader.line_num, None
                try:
                    rows.extend(islice(reader, _BLOCK))
                except csv.Error as error:
                    problem = error
                if reader.line_num - before == len(rows) and {len(row) for row in rows} == {width}:
                    line += len(rows)
                else:
                    for row in rows:
                        last = line + sum(field.count("\n") for field in row)
                        width = width or len(row)
                        if row and len(row) != width:
                            raise ValueError(f"line {line} has {len(row)} fields instead of {width}")
                        if line < last and form.quoted is None and _may_be_rows(row, separator):
                            raise ValueError(
                                f"a quote joins the lines {line} to {last}, each of which would be a row without it; "
                                "say by the source's `quoted` whether fields are quoted"
                            )
                        line = last + 1
                if problem:
                    raise ValueError(
                        f"line {line}: {problem}; double the quotes inside quoted fields, or set the source's `quoted` "
                        "to false if quotes are mere characters"
                    ) from problem
                if not rows:
                    break
                if filled := [row for row in rows if row]:
                    yield filled
        if not width:
            raise ValueError("it is empty")

    def _open(self, encoding: str) -> IO[str]:
        encoding = "utf-8-sig" if encoding == "utf-8" else encoding  # some programs mark UTF-8 at the start
        if self.path.suffix == ".gz":
            return gzip.open(self.path, "rt", encoding=encoding, newline="\n")
        return self.path.open(encoding=encoding, newline="\n")

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


def data_files(path: str, form: Delimited, columns: list[str]) -> list[DataFile]:
    """Files that hold one table, in the order of their names.

    Args:
        path: A file; or a folder or a pattern with ``*``, ``?`` or ``[``, where names beginning with ``_`` or ``.`` and
            empty files, as Spark writes them, are left out.
        form: How they are written.
        columns: Columns that will be read.

    Raises:
        UserError: There is none, one cannot be read or lacks a column, or its columns are not those of the first file.
    """
    whole = os.path.expanduser(path)
    if os.path.isfile(whole) or not (os.path.isdir(whole) or glob.has_magic(whole)):
        paths = [whole]
    else:
        found = glob.glob(os.path.join(glob.escape(whole), "*") if os.path.isdir(whole) else whole)
        paths = sorted(p for p in found if os.path.basename(p)[0] not in "_." and os.path.getsize(p))
        if not paths:
            raise UserError(f"{path}: holds no file with rows")
        if folder := next(filter(os.path.isdir, paths), None):
            raise UserError(f"{folder}: is a folder inside {path}; name the files by a pattern, as {path}/*/*.csv")
    files = [DataFile(p, form) for p in paths]
    first, *others = [(file.schema(columns), _names(file)) for file in files]
    for file, (schema, names) in zip(files[1:], others, strict=True):
        if names != first[1]:
            raise UserError(f"{file.path}: has not the same columns as {files[0].path}; make them agree")
        if schema != first[0]:
            raise UserError(f"{file.path}: its columns have other types than in {files[0].path}; make them agree")
    return files


def _names(file: DataFile) -> set[str]:
    """Columns that files of one table have in common; those of JSON Lines may be left out where they are empty."""
    return set(file.column_names()) if file.form or file.is_parquet else set()


def _reader(file: IO[str], form: Delimited, separator: str) -> Any:
    """Reader of the standard library, which takes one character as separator."""
    if len(separator) > 1:
        lines = (line.replace(separator, _UNIT) for line in file)
        return csv.reader(lines, delimiter=_UNIT, quoting=csv.QUOTE_NONE, strict=True)
    quoting: Any = csv.QUOTE_NONE if form.quoted is False else csv.QUOTE_MINIMAL
    return csv.reader(file, delimiter=separator, quoting=quoting, strict=True)


def _may_be_rows(row: list[str], separator: str) -> bool:
    """Whether each line of a row that has several would be a row without quotes."""
    return all(line.count(separator) == len(row) - 1 for line in separator.join(row).split("\n"))


def _tables(blocks: Iterable[Sequence[Sequence[str | None]]], names: list[str]) -> Iterator[pa.Table]:
    """Join blocks, each a list of values for each name."""
    columns: list[list[str | None]] = [[] for _ in names]
    for block in blocks:
        for column, values in zip(columns, block, strict=True):
            column += values
        if len(columns[0]) >= _ROWS:
            yield pa.table({name: _strings(column) for name, column in zip(names, columns, strict=True)})
            columns = [[] for _ in names]
    if columns[0]:
        yield pa.table({name: _strings(column) for name, column in zip(names, columns, strict=True)})


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
