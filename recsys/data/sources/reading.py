"""From files, datasets of the ``datasets`` library and frames to the frames that :class:`SourceData` checks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from recsys.assets import CACHE_DIR
from recsys.data.sources.cache import Conversion
from recsys.data.sources.files import DataFile
from recsys.data.sources.source import Columns, Origin
from recsys.types import UserError

TABLE_CACHE = f"{CACHE_DIR}/tables"
_ROWS = 1_000_000  # encoded at a time
_Pieces = dict[str, list[pa.Array]]  # the values of each column of a frame, piece by piece


def read(file: DataFile, columns: dict[str, str], cache_dir: str) -> pd.DataFrame:
    """Read some columns of a file, of a text through its conversion to Parquet.

    Args:
        file: The file.
        columns: For each column of the frame, the column of the file.
        cache_dir: Folder that keeps the conversion.

    Returns:
        A frame as that of :func:`to_frame`; its index is the row number in the file.

    Raises:
        UserError: The file cannot be read or lacks a column, or the cache cannot be written.
    """
    return _frame(_read(file, columns, cache_dir), str(file.path), file.first_row)


def read_all(files: list[DataFile], columns: dict[str, str], name: str, cache_dir: str) -> tuple[pd.DataFrame, Origin]:
    """Read some columns of the files that hold one table, see :func:`read`.

    Returns:
        A frame whose index goes on from file to file, and where its rows are from.
    """
    pieces: _Pieces = {target: [] for target in columns}
    first_rows, starts = [file.first_row for file in files], []
    for file in files:
        starts.append(first_rows[0] + sum(map(len, pieces[Columns.ITEM])))
        for target, arrays in _read(file, columns, cache_dir).items():
            pieces[target] += arrays
    return _frame(pieces, name, first_rows[0]), Origin(name, [str(file.path) for file in files], starts, first_rows)


def _read(file: DataFile, columns: dict[str, str], cache_dir: str) -> _Pieces:
    names = list(dict.fromkeys(columns.values()))

    def pieces(parquet: DataFile) -> _Pieces:
        return _collect(parquet.tables(names), columns, str(file.path))

    if file.is_parquet:
        file.schema(names)
        return pieces(file)
    conversion = Conversion(file, names, cache_dir)
    if not conversion.exists():
        if conversion.path.exists():
            conversion.discard()
        conversion.make()
    try:
        return pieces(DataFile(conversion.path))
    except UserError:  # a fault of the file itself would have shown when it was converted
        conversion.discard()
        conversion.make()
        return pieces(DataFile(conversion.path))


def to_frame(data: Any, columns: dict[str, str], name: str, first_row: int) -> pd.DataFrame:
    """Read some columns of a dataset or a frame piece by piece.

    Args:
        data: A ``datasets.Dataset``, or a frame, which stays as it is.
        columns: For each column of the result, the column of the data.
        name: What messages call the data.
        first_row: First value of the frame's index.

    Returns:
        A frame whose columns user and item are categories, and time and rating numbers, dates or Arrow text; all others
        are text.

    Raises:
        UserError: The data lacks a column or has no rows, or a column cannot become text.
    """
    there = list(data.columns if isinstance(data, pd.DataFrame) else data.column_names)
    for column in columns.values():
        if column not in there:
            raise UserError(f"{name}: column {column!r} is missing; there are {', '.join(map(repr, there))}")
    return _frame(_collect(_tables(data, list(dict.fromkeys(columns.values()))), columns, name), name, first_row)


def _collect(tables: Iterable[pa.Table], columns: dict[str, str], name: str) -> _Pieces:
    pieces: _Pieces = {target: [] for target in columns}
    try:
        for table in tables:
            for target, column in columns.items():
                piece = table[column].combine_chunks()
                piece.validate(full=True)  # Parquet may hold text that is none
                pieces[target].append(_convert(piece, target))
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, pa.ArrowTypeError) as error:
        raise UserError(f"{name}: a column in {list(columns.values())} is neither text nor numbers: {error}") from error
    return pieces


def _frame(pieces: _Pieces, name: str, first_row: int) -> pd.DataFrame:
    rows = sum(map(len, next(iter(pieces.values()))))
    if not rows:
        raise UserError(f"{name}: has no rows")
    index = pd.RangeIndex(first_row, first_row + rows)
    return pd.DataFrame({target: _column(arrays, target, index) for target, arrays in pieces.items()})


def _tables(data: Any, columns: list[str]) -> Iterator[pa.Table]:
    if isinstance(data, pd.DataFrame):
        table = pa.Table.from_pandas(data[columns], preserve_index=False)
        yield from (table.slice(start, _ROWS) for start in range(0, len(table), _ROWS))
    else:
        yield from data.with_format("arrow").iter(_ROWS)


def _convert(piece: pa.Array, target: str) -> pa.Array:
    if target in (Columns.USER, Columns.ITEM):
        codes = piece if pa.types.is_dictionary(piece.type) else piece.dictionary_encode()
        return pa.DictionaryArray.from_arrays(codes.indices.cast(pa.int32()), _as_text(codes.dictionary))
    if target in (Columns.TIME, Columns.RATING):
        return piece.cast(pa.timestamp("us"), safe=False) if pa.types.is_temporal(piece.type) else piece
    return _as_text(piece)


def _as_text(values: pa.Array) -> pa.Array:
    if pa.types.is_list(values.type) or pa.types.is_large_list(values.type):
        return pc.binary_join(values.cast(pa.list_(pa.string())), "|")
    return values.cast(pa.string())


def _column(pieces: list[pa.Array], target: str, index: pd.Index) -> pd.Series:
    if target in (Columns.USER, Columns.ITEM):
        encoded = pa.chunked_array(pieces, pa.dictionary(pa.int32(), pa.string())).unify_dictionaries()
        codes = [np.asarray(chunk.indices.fill_null(-1)) for chunk in encoded.chunks]
        words = pd.Index(encoded.chunk(0).dictionary.to_pylist(), dtype=object)
        return pd.Series(pd.Categorical.from_codes(np.concatenate(codes), words), index)
    if target in (Columns.TIME, Columns.RATING):
        return pd.Series(pd.arrays.ArrowExtensionArray(pa.chunked_array(pieces)), index)
    return pd.Series([text for piece in pieces for text in piece.to_pylist()], index, dtype=object)
