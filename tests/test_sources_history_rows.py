"""Interactions rebuilt from rows (history -> target)."""

import csv

import numpy as np
import pytest

from recsys.data import Columns, HistoryRows
from recsys.types import UserError

TITLES = [f'Item\'s "{i % 40}", \\n' for i in range(50)]  # titles repeat


def published(users, max_history, with_time, seed=0):
    """Rows as the published files have them, sorted by time, and the events they were made from."""
    rng = np.random.default_rng(seed)
    rows, events = [], {}
    for user in range(users):
        length = int(rng.integers(2, 3 * max_history))
        items = rng.integers(0, 5 if user % 2 else 50, length).tolist()
        times = np.sort(rng.integers(0, 300, length)).tolist()  # with ties
        ratings = rng.integers(1, 6, length).astype(float).tolist()
        events[f"u{user}"] = [(str(i), t, r) for i, t, r in zip(items, times, ratings, strict=True)]
        for n in range(1, length):
            past = slice(max(0, n - max_history), n)
            row = {"user_id": f"u{user}", "history_item_title": [TITLES[i] for i in items[past]]}
            row |= {"item_title": TITLES[items[n]], "history_item_id": items[past], "item_id": items[n], "sid": "<a_1>"}
            if with_time:
                row |= {"history_rating": ratings[past], "rating": ratings[n]}
                row |= {"history_timestamp": times[past]}
            rows.append(row | {"timestamp": times[n]})
    rows.sort(key=lambda row: row["timestamp"])
    if not with_time:
        rows = [{name: value for name, value in row.items() if name != "timestamp"} for row in rows]
    return rows, events


@pytest.fixture
def source(tmp_path):
    """Writes each list of rows to a file and returns the source."""

    def make(*parts, **kwargs):
        paths = []
        for n, rows in enumerate(parts):
            paths.append(str(tmp_path / f"{n}.csv"))
            with open(paths[-1], "w", newline="") as file:
                writer = csv.DictWriter(file, rows[0])
                writer.writeheader()
                writer.writerows(rows)
        return HistoryRows(paths, cache_dir=str(tmp_path / "cache"), **kwargs)

    return make


def by_user(tables):
    log = tables.interactions.sort_values(Columns.TIME, kind="stable")
    names = [name for name in (Columns.ITEM, Columns.TIME, Columns.RATING) if name in log]
    return {user: list(zip(*(rows[name] for name in names), strict=True)) for user, rows in log.groupby("user")}


@pytest.mark.parametrize("seed", range(3))
def test_files_with_times_give_back_the_events(source, seed):
    rows, events = published(30, max_history=4, with_time=True, seed=seed)
    cut = len(rows) * 8 // 10
    tables = source(rows[:cut], rows[cut:-20], rows[-20:]).load()
    assert by_user(tables) == events
    titles = dict(zip(tables.items[Columns.ITEM], tables.items[Columns.TITLE], strict=True))
    assert titles == {item: " ".join(TITLES[int(item)].split()) for user in events.values() for item, *_ in user}


def test_files_without_times_keep_the_order(source):
    rows, events = published(30, max_history=4, with_time=False)
    tables = source(rows[:-20], rows[-20:]).load()
    found = by_user(tables)
    assert {user: [item for item, _ in found[user]] for user in found} == {
        user: [item for item, *_ in sequence] for user, sequence in events.items()
    }
    newest = [max(time for _, time in found[row["user_id"]]) for row in rows[-20:]]
    assert min(newest) >= len(rows) - 20  # the rows of the last file are the newest events


def test_files_may_be_listed_in_any_order_if_there_are_times(source):
    rows, events = published(30, max_history=4, with_time=True)
    assert by_user(source(rows[-50:], rows[:-50]).load()) == events


@pytest.mark.parametrize("floats", [["user_id"], ["item_id", "timestamp"], ["history_item_id", "history_timestamp"]])
def test_numbers_may_be_written_as_floats(source, floats):
    """As pandas writes a column of whole numbers that has missing values."""

    def as_floats(row):
        lists = {name: [float(value) for value in row[name]] for name in floats if name.startswith("history")}
        return row | {name: f"{row[name]}.0" for name in floats if name not in lists} | lists

    rows, events = published(30, max_history=4, with_time=True)
    rows = [row | {"user_id": row["user_id"][1:]} for row in rows]
    cut = len(rows) // 2
    found = source(rows[:cut], [as_floats(row) for row in rows[cut:]]).load()
    assert by_user(found) == {user[1:]: sequence for user, sequence in events.items()}
    assert len(found.items) == len({item for sequence in events.values() for item, *_ in sequence})


def test_a_missing_file_leaves_a_gap(source):
    """The first file is missing: what its rows alone show is lost, and nothing is counted twice."""
    rows, events = published(30, max_history=4, with_time=True)
    found = by_user(source(rows[len(rows) // 2 :]).load())
    assert 10 < len(found) < len(events) + 1
    for user, sequence in found.items():
        assert sequence == events[user][len(events[user]) - len(sequence) :]


ROW = {"user_id": "u", "history_item_title": "['a']", "item_title": "b", "history_item_id": "[1]", "item_id": "2"}


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"history_item_id": "[1"}, r"0\.csv, row 3: history_item_id is not a list as Python writes it"),
        ({"history_item_id": "[print(1)]"}, r"row 3: history_item_id is not a list as Python writes it"),
        ({"history_item_id": "1"}, r"row 3: history_item_id is '1', not a list"),
        ({"history_item_id": "[1, 2]"}, r"row 3: the lists differ in length"),
        ({"history_item_id": "[]", "history_item_title": "[]"}, r"row 3: the history of user 'u' is shorter"),
        ({"item_title": ""}, r"has no title"),
        ({"user_id": ""}, r"row 3: user id '' is empty"),
    ],
)
def test_faults_name_the_row(source, change, problem):
    row = {"item_id": "3", "history_item_id": "[2]"}
    with pytest.raises(UserError, match=problem):
        source([ROW, ROW | row | change]).load()


def test_missing_columns_and_files(source):
    with pytest.raises(UserError, match=r"0\.csv: column 'item_title' is missing"):
        source([{name: value for name, value in ROW.items() if name != "item_title"}]).load()
    with pytest.raises(UserError, match="no such file"):
        HistoryRows(["nothing.csv"]).load()
    with pytest.raises(UserError, match="`files` is empty"):
        HistoryRows([])
