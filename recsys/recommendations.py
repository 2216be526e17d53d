"""Recommendations in long form: one line for each item of each list."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from recsys.atomic import replaced
from recsys.data import Catalog, Requests
from recsys.search import Ranking
from recsys.types import UserError

SUFFIXES = (".parquet", ".csv", ".jsonl")

_FORMULA = r"^(?=[=+\-@\t\r])"  # how a text begins that a spreadsheet would compute


def recommendations(catalog: Catalog, requests: Requests, row: np.ndarray, ranking: Ranking) -> pd.DataFrame:
    """Return the lists of requests ``row [B]``, best first; -1 has none.

    Returns:
        ``user_id``, ``rank`` from 1, ``item_id``, ``title`` and ``logprob``: the score that ranks the items, the
        log-probability of the title after the user's prompt, its end included. For rows of a split also ``row``, and
        the target's ``target_item_id``. The index is the request's number.
    """
    listed = ranking.valid[:, : requests.k].cpu().numpy() & (row >= 0)[:, None]
    place, column = listed.nonzero()
    request, item = row[place], ranking.items[:, : requests.k].cpu().numpy()[listed]
    ids, titles = (np.array(texts, dtype=object) for texts in (catalog.item_ids, catalog.titles))
    columns = {
        "user_id": requests.user_ids[request],
        "rank": column + 1,
        "item_id": ids[item],
        "title": titles[item],
        "logprob": ranking.scores[:, : requests.k].cpu().numpy()[listed],
    }
    if requests.row is not None:
        columns |= {"row": requests.row[request], "target_item_id": ids[requests.target[request]]}
    return pd.DataFrame(columns, index=request)


def schema_of(requests: Requests) -> pa.Schema:
    """Return the types of the columns in a file."""
    fields = [("user_id", pa.string()), ("rank", pa.int32()), ("item_id", pa.string()), ("title", pa.string())]
    fields.append(("logprob", pa.float32()))
    return pa.schema(fields + [("row", pa.int64()), ("target_item_id", pa.string())] * (requests.row is not None))


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """As :func:`recsys.atomic.replaced`.

    Raises:
        UserError: if the file cannot be written.
    """
    try:
        with replaced(path) as partial:
            yield partial
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror or error}") from error


def write(tables: Iterable[pa.Table], schema: pa.Schema, path: Path) -> int:
    """Write tables one after another into the file that the suffix tells, and return the number of lines.

    CSV is made for spreadsheets: a text that one would take for a formula gets a ``'`` before it.
    """
    lines = 0
    with whole(path) as partial:
        if path.suffix == ".parquet":
            with pq.ParquetWriter(partial, schema) as file:
                for table in tables:
                    file.write_table(table)
                    lines += len(table)
            return lines
        with partial.open("w", encoding="utf-8", newline="") as text:
            for number, table in enumerate(tables):
                frame = table.to_pandas()
                lines += len(frame)
                if path.suffix == ".jsonl":
                    frame.to_json(text, orient="records", lines=True, force_ascii=False)
                    continue
                for name in schema.names:
                    if schema.field(name).type == pa.string():
                        frame[name] = frame[name].astype(str).str.replace(_FORMULA, "'", regex=True)
                frame.to_csv(text, index=False, header=number == 0)
    return lines
