"""From a file or a dataset of the ``datasets`` library to the frames that :class:`Tables` checks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from recsys.assets import CACHE_DIR
from recsys.data.sources.files import DataFile
from recsys.data.sources.tables import Columns
from recsys.types import UserError

ARROW_CACHE = f"{CACHE_DIR}/tables"
_ROWS = 1_000_000  # encoded at a time


def read(file: DataFile, columns: dict[str, str], cache_dir: str) -> pd.DataFrame:
    """Read some columns of a file through the Arrow cache.

    Args:
        file: The file.
        columns: For each column of the frame, the column of the file.
        cache_dir: Folder that keeps the converted file.

    Returns:
        The frame that :func:`to_frame` makes; its index is the row number in the file.

    Raises:
        UserError: The file cannot be read or lacks a column, or the cache cannot be written.
    """
    from recsys.data.sources.cache import cached

    dataset = cached(file, list(dict.fromkeys(columns.values())), cache_dir)
    return to_frame(dataset, columns, str(file.path), file.first_row)


def to_frame(dataset: Any, columns: dict[str, str], name: str, first_row: int) -> pd.DataFrame:
    """Read some columns of a dataset piece by piece.

    Args:
        dataset: A ``datasets.Dataset``.
        columns: For each column of the frame, the column of the dataset.
        name: What messages call the dataset.
        first_row: First value of the frame's index.

    Returns:
        A frame whose columns user and item are categories, and time and rating numbers or Arrow text; all others are
        text.

    Raises:
        UserError: The dataset lacks a column, or a column cannot become text.
    """
    for column in columns.values():
        if column not in dataset.column_names:
            there = ", ".join(map(repr, dataset.column_names))
            raise UserError(f"{name}: column {column!r} is missing; the dataset has {there}")
    pieces: dict[str, list[pa.Array]] = {target: [] for target in columns}
    try:
        for table in dataset.with_format("arrow").iter(_ROWS):
            for target, column in columns.items():
                piece = table[column].combine_chunks()
                pieces[target].append(_convert(piece, target))
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise UserError(f"{name}: a column in {list(columns.values())} is neither text nor numbers: {error}") from error
    index = pd.RangeIndex(first_row, first_row + len(dataset))
    return pd.DataFrame({target: _column(arrays, target, index) for target, arrays in pieces.items()})


def _convert(piece: pa.Array, target: str) -> pa.Array:
    if target in (Columns.USER, Columns.ITEM):
        codes = piece if pa.types.is_dictionary(piece.type) else piece.dictionary_encode()
        return pa.DictionaryArray.from_arrays(codes.indices.cast(pa.int32()), _as_text(codes.dictionary))
    if target in (Columns.TIME, Columns.RATING):
        if pa.types.is_temporal(piece.type):
            return piece.cast(pa.timestamp("us")).cast(pa.int64())
        return piece
    return _as_text(piece)


def _as_text(values: pa.Array) -> pa.Array:
    if pa.types.is_list(values.type) or pa.types.is_large_list(values.type):
        return pc.binary_join(values.cast(pa.list_(pa.string())), "|")
    return values.cast(pa.string())


def _column(pieces: list[pa.Array], target: str, index: pd.Index) -> pd.Series:
    if target in (Columns.USER, Columns.ITEM):
        encoded = pa.chunked_array(pieces, pa.dictionary(pa.int32(), pa.string())).unify_dictionaries()
        codes = [np.asarray(chunk.indices.fill_null(-1)) for chunk in encoded.chunks]
        words = encoded.chunk(0).dictionary.to_pylist() if codes else []
        values = pd.Categorical.from_codes(
            np.concatenate([np.empty(0, np.int32), *codes]), pd.Index(words, dtype=object)
        )
        return pd.Series(values, index)
    if target in (Columns.TIME, Columns.RATING):
        values = pa.chunked_array(pieces) if pieces else pa.chunked_array([], pa.string())
        return pd.Series(pd.arrays.ArrowExtensionArray(values), index)
    return pd.Series([text for piece in pieces for text in piece.to_pylist()], index, dtype=object)
