"""The formats of `Table`, its cache, `DataFrames` and `HubDataset`."""

import ast
import csv
import errno
import gzip
import json
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from jsonargparse import ArgumentParser

from recsys.data import Catalog, Columns, DataFrames, Filters, HubDataset, Source, Table
from recsys.data.sources import files
from recsys.types import UserError

LOG = [["u1", "007", "3", "4.5"], ["NA", "7", "1", "2"], ["u1", "7", "2", "5"]]
ITEMS = [["007", 'The "Best"\tof Amélie 🎬', "a|b"], ["7", "two\nlines, one title", ""]]
LOG_NAMES, ITEM_NAMES = ["user_id", "item_id", "timestamp", "stars"], ["item_id", "title", "genre"]


def dump(path, names, rows):
    """Write rows in the format that the name tells, by the standard library."""
    opened = gzip.open if path.suffix == ".gz" else open
    suffix = path.name.removesuffix(".gz").rpartition(".")[2]
    if suffix == "parquet":
        return pq.write_table(pa.table(dict(zip(names, map(list, zip(*rows, strict=True)), strict=True))), path)
    with opened(path, "wt", newline="", encoding="utf-8") as file:
        if suffix in ("csv", "tsv"):
            csv.writer(file, delimiter="," if suffix == "csv" else "\t").writerows([names, *rows])
        else:
            file.writelines(json.dumps(dict(zip(names, row, strict=True))) + "\n" for row in rows)


@pytest.fixture
def table(tmp_path):
    """Writes the two files and returns their Table."""

    def make(log="log.csv", items="items.csv", rows=LOG, item_rows=ITEMS, **kwargs):
        dump(tmp_path / log, LOG_NAMES, rows)
        dump(tmp_path / items, ITEM_NAMES, item_rows)
        kwargs = {"rating": "stars", "category": "genre", "cache_dir": str(tmp_path / "cache")} | kwargs
        return Table(str(tmp_path / log), str(tmp_path / items), **kwargs)

    return make


def fails(source, *parts):
    with pytest.raises(UserError) as caught:
        source.load()
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    "suffix", ["csv", "tsv", "jsonl", "json", "parquet", "csv.gz", "tsv.gz", "jsonl.gz", "json.gz"]
)
def test_every_format_gives_the_same_tables(table, suffix):
    tables = table(f"log.{suffix}", f"items.{suffix}").load()
    log, items = tables.interactions, tables.items
    assert log.drop(columns=Columns.RATING).to_numpy().tolist() == [["u1", "007", 3], ["NA", "7", 1], ["u1", "7", 2]]
    assert log[Columns.RATING].tolist() == [4.5, 2, 5]
    assert items.to_numpy().tolist() == [["007", 'The "Best" of Amélie 🎬', "a|b"], ["7", "two lines, one title", ""]]
    first = 2 if "sv" in suffix else 1  # the header is a row
    assert log.index.tolist() == [first, first + 1, first + 2]
    assert not tables.dropped


def test_numbers_dates_and_lists_of_json_and_parquet(table):
    """Ids of any type become their text; null is a missing category."""
    for suffix in ("jsonl", "parquet"):
        rows = [[9, 10, 1.5e9, 3], [7, 11, 1.6e9, 4]]
        tables = table(f"log.{suffix}", f"items.{suffix}", rows, [[10, "x", ["a", "b"]], [11, "y", None]]).load()
        assert tables.interactions.to_numpy().tolist() == [["9", "10", 1.5e9, 3], ["7", "11", 1.6e9, 4]]
        assert tables.items[Columns.CATEGORY].tolist() == ["a|b", ""]
    for unit in ("s", "ns"):
        dates = np.array(["2024-01-02", "2024-01-01"], f"datetime64[{unit}]")
        source = table("log.parquet", rows=[["u", "7", date, 1] for date in dates])
        assert source.load().interactions[Columns.TIME].tolist() == [1704153600000000, 1704067200000000]


def test_parquet_of_a_categorical(table, tmp_path):
    source = table("log.parquet")
    frame = pd.DataFrame(LOG, columns=LOG_NAMES).astype({"user_id": "category", "item_id": "category"})
    frame.to_parquet(tmp_path / "log.parquet")
    assert source.load().interactions[Columns.ITEM].tolist() == ["007", "7", "7"]


@pytest.mark.parametrize(
    ("source", "paths"),
    [
        ("Table", {"interactions": "log.csv", "items": "../items.csv"}),
        ("HistoryRows", {"files": ["train.csv", "/test.csv"]}),
        ("MovieLens", {"folder": "ml"}),
        ("AmazonReviews", {"reviews": "log.json", "metadata": "~/meta.json"}),
        ("Yelp", {"folder": "../yelp"}),
    ],
)
def test_paths_in_a_yaml_count_from_that_file(tmp_path, source, paths):
    (tmp_path / "data").mkdir()
    arguments = {"class_path": f"recsys.data.{source}", "init_args": paths | {"cache_dir": "cache"}}
    (tmp_path / "data" / "set.yaml").write_text(yaml.safe_dump(arguments))
    (tmp_path / "whole.yaml").write_text("source: data/set.yaml\n")
    parser = ArgumentParser()
    parser.add_subclass_arguments(Source, "source")
    for parsed in (
        parser.parse_args([f"--source={tmp_path}/data/set.yaml"]),
        parser.parse_path(tmp_path / "whole.yaml"),
    ):
        assert parsed.source.init_args.cache_dir == "cache"
        for name, value in paths.items():
            absolute = [os.path.abspath(tmp_path / "data" / os.path.expanduser(p)) for p in np.atleast_1d(value)]
            assert np.atleast_1d(parsed.source.init_args[name]).tolist() == absolute


def test_titles_may_be_the_ids(table):
    tables = table(rows=[["u", "Heat", "1", "2"]], item_rows=[["Heat", "?", ""]], title="item_id").load()
    assert tables.items[Columns.TITLE].tolist() == ["Heat"]


def test_many_rows_are_encoded_piece_by_piece(table, monkeypatch):
    """The pieces meet different ids and kinds of numbers; the result is that of the csv module."""
    monkeypatch.setattr(files, "_ROWS", 7)
    monkeypatch.setattr(files, "_BLOCK", 3)
    monkeypatch.setattr("recsys.data.sources.reading._ROWS", 10)
    monkeypatch.setattr("recsys.data.sources.source._SLICE", 9)
    rng = np.random.default_rng(0)
    rows = [[f"u{rng.integers(20)}", str(rng.integers(2)), str(i + 0.5 * (i > 40)), "1"] for i in range(71)]
    for suffix in ("csv", "jsonl", "parquet"):
        source = table(f"log.{suffix}", rows=rows, item_rows=[["0", "x", ""], ["1", "x", ""]])
        log = source.load().interactions
        assert log[Columns.USER].tolist() == [row[0] for row in rows]
        assert log[Columns.ITEM].tolist() == [row[1] for row in rows]
        assert log[Columns.TIME].tolist() == [float(row[2]) for row in rows]
        assert Catalog(["1", "0"], ["x", "x"]).index_of(log[Columns.ITEM]).tolist() == [1 - int(r[1]) for r in rows]
        assert isinstance(log[Columns.USER].dtype, pd.CategoricalDtype)


def test_dates_in_pieces(table, monkeypatch):
    monkeypatch.setattr("recsys.data.sources.source._SLICE", 2)
    dates = ["2024-01-01", "2024-01-01 00:00:01", "2024-01-01T00:00:02.000003999", "1969-12-31T23:59:59Z"]
    time = table(rows=[["u", "7", date, "1"] for date in dates]).load().interactions[Columns.TIME]
    assert time.tolist() == [1704067200000000, 1704067201000000, 1704067202000003, -1000000]


# ------------------------------------------------------------------------------------------------ faults


def test_unreadable_rating(table):
    fails(table(rows=[*LOG, ["u", "7", "1", "good"]]), "log.csv, row 5", "rating 'good'", "1 such rows")
    fails(table(rows=[["u", "7", "1", "2024-01-01"]]), "log.csv, row 2", "rating '2024-01-01' is not a number")


def test_filters_that_need_ratings_are_refused_at_once():
    for source in (Table, DataFrames, HubDataset):
        with pytest.raises(UserError, match="`rating`"):
            source("log.csv", "items.csv", filters=Filters(min_rating=3))


def test_rows_of_json_and_parquet_count_from_one(table):
    for suffix in ("jsonl", "parquet"):
        fails(table(f"log.{suffix}", rows=[*LOG, ["u", "x", "1", "1"]]), f"log.{suffix}, row 4", "'x'")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('{"item_id": 1, "title": "x"}\n{"item_id": 2, "title"\n', "line 2 is not JSON"),
        ('[{"item_id": 1, "title": "x"}]\n', "line 1 is not a JSON object; write one object on each line"),
        ('{"item_id": 1}\n', "column 'title' is missing; the file has 'item_id'"),
        ("", "column 'item_id' is missing"),
        ('\n{"item_id": 1, "title": "x"}\n\n{"item_id": 2}\n', "row 2: item id '2' has no title"),
        ('{"item_id": 1, "title": "x"}\n{"title": "y"}\n', "row 2: item id nan is empty"),
    ],
)
def test_malformed_json_lines(table, tmp_path, text, problem):
    source = table(items="items.jsonl", category=None)
    (tmp_path / "items.jsonl").write_text(text)
    fails(source, "items.jsonl", problem)


def test_half_a_surrogate_pair_is_replaced(table, tmp_path):
    source = table(items="items.jsonl", rows=[["u", "1", "1", "1"]], category=None)
    (tmp_path / "items.jsonl").write_text('{"item_id": 1, "title": "a\\ud83d"}\n')
    assert source.load().items[Columns.TITLE].tolist() == ["a?"]


@pytest.mark.parametrize("suffix", ["csv.gz", "jsonl.gz"])
def test_damaged_gzip(table, tmp_path, suffix):
    source = table(f"log.{suffix}")
    whole = bytearray((tmp_path / f"log.{suffix}").read_bytes())
    whole[25:40] = bytes(15)
    (tmp_path / f"log.{suffix}").write_bytes(whole)
    fails(source, f"log.{suffix}", "not readable as a table")


def test_malformed_parquet(table, tmp_path):
    source = table("log.parquet")
    (tmp_path / "log.parquet").write_bytes(b"PAR1 nothing PAR1")
    fails(source, "log.parquet", "not readable as a table")


def test_parquet_whose_text_is_none(table, tmp_path):
    source = table("log.parquet")
    bad = pa.Array.from_buffers(pa.string(), 1, [None, pa.py_buffer(b"\0\0\0\0\1\0\0\0"), pa.py_buffer(b"\xc2")])
    pq.write_table(pa.table({LOG_NAMES[0]: bad} | {name: ["1"] for name in LOG_NAMES[1:]}), tmp_path / "log.parquet")
    fails(source, "log.parquet", "Invalid UTF8")


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_columns_that_are_missing(table, suffix):
    fails(table(f"log.{suffix}", time="when"), f"log.{suffix}", "'when' is missing", "'timestamp'")


def test_a_fault_deep_in_the_file_is_one_clear_error(table, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_BLOCK", 2)
    source = table()
    with (tmp_path / "log.csv").open("a") as file:
        file.write("u,7,1,2,too many\n")
    fails(source, "log.csv", "not readable as a table", "line 5")
    (tmp_path / "log.csv").write_text("user_id,item_id,timestamp,stars\n" + "u,7,1,2\n" * 5)
    assert len(source.load().interactions) == 5  # nothing of the failed conversion is left


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_a_file_without_rows(table, tmp_path, suffix):
    source = table(f"log.{suffix}")
    (tmp_path / "log.csv").write_text(",".join(LOG_NAMES) + "\n")
    pq.write_table(pa.table({name: pa.array([], pa.string()) for name in LOG_NAMES}), tmp_path / "log.parquet")
    fails(source, f"log.{suffix}", "has no rows")


# ------------------------------------------------------------------------------------------------- cache


def test_the_second_start_reads_the_cache(table, monkeypatch):
    source = table()
    first = source.load()
    monkeypatch.setattr(files, "_tables", None)
    second = source.load()
    pd.testing.assert_frame_equal(first.interactions, second.interactions)
    pd.testing.assert_frame_equal(first.items, second.items)


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
@pytest.mark.parametrize(("user", "nanoseconds"), [("v1", 1), ("longer", 0), ("v1", 0)])
def test_a_changed_file_is_read_again(table, tmp_path, suffix, user, nanoseconds):
    """Also when neither its size nor its time of modification has changed."""
    source = table(f"log.{suffix}")
    source.load()
    path = tmp_path / f"log.{suffix}"
    before = path.stat()
    dump(path, LOG_NAMES, [[user, *row] for _, *row in LOG])
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + nanoseconds))
    assert source.load().interactions[Columns.USER].tolist() == [user] * 3


def test_other_columns_of_the_same_file(table):
    source = table(rating=None)
    source.load()
    other = Table(source.interactions, source.items, rating="stars", cache_dir=source.cache_dir)
    assert other.load().interactions[Columns.RATING].tolist() == [4.5, 2, 5]


def test_a_cache_that_cannot_be_written(table, tmp_path):
    (tmp_path / "file").write_text("")
    fails(table(cache_dir=str(tmp_path / "file" / "cache")), "items.csv", "cache", "cache_dir")


BROKEN = {
    "empty": lambda content: b"",
    "cut": lambda content: content[: len(content) // 2],
    "foreign": lambda content: b"PAR1 of another program PAR1",
    "a byte": lambda content: content[:40] + bytes([content[40] ^ 255]) + content[41:],
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_cache_is_made_again(table, tmp_path, capsys, name):
    source = table()
    first = source.load()
    for path in (tmp_path / "cache").glob("*.parquet"):
        path.write_bytes(BROKEN[name](path.read_bytes()))
    second = source.load()
    pd.testing.assert_frame_equal(first.interactions, second.interactions)
    pd.testing.assert_frame_equal(first.items, second.items)
    message = capsys.readouterr().err.splitlines()
    assert len(message) == 2
    assert f"is broken; converting {tmp_path}/items.csv again" in message[0]
    source.load()
    assert capsys.readouterr().err == ""


def test_the_cache_of_another_file_under_its_name_is_not_read(table, tmp_path):
    source = table()
    expected = source.load().items
    log, items = (next((tmp_path / "cache").glob(f"{name}.csv-*.parquet")) for name in ("log", "items"))
    items.write_bytes(log.read_bytes())
    pd.testing.assert_frame_equal(source.load().items, expected)


@pytest.mark.parametrize("number", [errno.EROFS, errno.ENOSPC])
def test_a_whole_cache_is_read_where_nothing_can_be_written(table, tmp_path, monkeypatch, number):
    """And one that is not whole is one line, as a disk that fills up while a file is converted."""
    source = table()
    first = source.load()

    def refuse(*args, **kwargs):
        raise OSError(number, os.strerror(number))

    for owner, name in ((Path, "mkdir"), (Path, "unlink"), (os, "mkdir"), (pq.ParquetWriter, "write_table")):
        monkeypatch.setattr(owner, name, refuse)
    monkeypatch.setattr("filelock.FileLock._acquire", refuse)
    pd.testing.assert_frame_equal(source.load().interactions, first.interactions)
    part = os.strerror(number)
    fails(Table(source.interactions, source.items, cache_dir=source.cache_dir), "items.csv", part, "another cache_dir")


def test_names_that_look_like_patterns(table):
    assert len(table("log[1]*.csv").load().interactions) == 3


def test_small_files_show_no_progress_bar(table, capfd):
    table().load()
    assert capfd.readouterr() == ("", "")


def test_datasets_is_imported_only_to_load_from_the_hub():
    """Its import takes most of a second, which `recsys --help` should not pay."""
    for path in Path(files.__file__).parent.glob("*.py"):
        for node in ast.parse(path.read_text()).body:
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [getattr(node, "module", None)]
            assert "datasets" not in names


# ------------------------------------------------------------------------------------- tables of many files


def test_a_table_in_many_files(table, tmp_path):
    """A folder as Spark writes it, and a pattern: the rows of all, and errors that name one."""
    expected = table(rows=LOG * 3).load()
    folder = tmp_path / "parts"
    folder.mkdir()
    for name, rows in (("part-00001.csv", LOG), ("part-00000.csv", LOG), ("part-00002.csv", []), ("part-3.csv", LOG)):
        dump(folder / name, LOG_NAMES, rows)
    for name in ("_SUCCESS", ".part-00000.csv.crc", "part-00004.csv"):
        (folder / name).write_text("")
    for number, row in enumerate(ITEMS):
        dump(tmp_path / f"films-{number}.jsonl", ITEM_NAMES, [row])
    source = Table(
        str(folder), str(tmp_path / "films-*.jsonl"), rating="stars", category="genre", cache_dir=str(tmp_path)
    )
    for _ in range(2):  # the second time from the cache
        found = source.load()
        assert found.interactions.to_numpy().tolist() == expected.interactions.to_numpy().tolist()
        assert found.items.to_numpy().tolist() == expected.items.to_numpy().tolist()
    dump(folder / "part-00001.csv", LOG_NAMES, [["u", "7", "1", "2"], ["u", "x", "1", "2"]])
    fails(source, "part-00001.csv, row 3: item id 'x' is not in", "films-*.jsonl")
    dump(folder / "part-00001.csv", LOG_NAMES, [["u", "7", "1", "2"]])
    dump(folder / "part-3.csv", LOG_NAMES, [["u", "7", "1", "2"], ["", "7", "1", "2"]])
    fails(source, "part-3.csv, row 3: user id '' is empty")


@pytest.mark.parametrize(
    ("name", "columns", "problem"),
    [
        ("b.csv", LOG_NAMES[::-1], None),
        ("b.csv", ["user_id", "item_id", "timestamp", "price"], "b.csv: column 'stars' is missing"),
        ("b.csv", [*LOG_NAMES[:4], "price"], "b.csv: has not the same columns as"),
        ("b.csv", ["u1", "7", "2", "5"], "b.csv: column 'user_id' is missing"),  # no header
        ("b.parquet", LOG_NAMES, "b.parquet: its columns have other types than in"),
        ("b.txt", LOG_NAMES, "b.txt: the name should end in"),
    ],
)
def test_files_of_one_table_agree(table, tmp_path, name, columns, problem):
    source = table()
    folder = tmp_path / "parts"
    folder.mkdir()
    dump(folder / "a.csv", LOG_NAMES, LOG)
    dump(folder / name, columns, [list(range(len(columns)))])
    source.interactions = str(folder)
    dump(tmp_path / "items.csv", ITEM_NAMES, [*ITEMS, ["2", "x", ""]])
    if problem:
        return fails(source, problem)
    assert source.load().interactions[Columns.USER].tolist() == [*(row[0] for row in LOG), "3"]


def test_folders_without_files(table, tmp_path):
    source = table()
    for path in ("nothing-*.csv", "folder"):
        (tmp_path / "folder").mkdir(exist_ok=True)
        source.interactions = str(tmp_path / path)
        fails(source, f"{path}: holds no file with rows")
    (tmp_path / "folder" / "year=2024").mkdir()
    fails(source, "year=2024: is a folder inside")


# -------------------------------------------------------------------------------- no times, and items that lack


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_without_times_the_order_is_that_of_the_file(table, tmp_path, suffix):
    source = table(f"log.{suffix}", time=None)
    assert source.load().interactions[Columns.TIME].tolist() == [0, 1, 2]
    log = pd.DataFrame(LOG, columns=LOG_NAMES).drop(columns="timestamp")
    frames = DataFrames(log, pd.DataFrame(ITEMS, columns=ITEM_NAMES), time=None, filters=Filters(drop_duplicates=True))
    assert frames.load().interactions[Columns.TIME].tolist() == [0, 1, 2]
    for bound in ("start", "end"):
        with pytest.raises(UserError, match="need times: set the source's `time`"):
            Table("log.csv", "items.csv", time=None, filters=Filters(**{bound: 2015}))


def test_interactions_whose_item_is_missing(table):
    rows = [*LOG, ["u2", "gone", "4", "1"], ["u2", "untitled", "5", "1"], ["u2", "", "6", "1"]]
    items = [*ITEMS, ["untitled", " ", ""], ["unseen", "Unseen", ""]]
    fails(table(rows=rows, item_rows=items), "items.csv, row", "has no title")
    found = table(rows=rows, item_rows=items, missing="drop").load()
    assert found.interactions.index.tolist() == [2, 3, 4]
    assert found.items[Columns.ITEM].tolist() == ["007", "7", "unseen"]
    assert found.dropped == {"items_without_title": 1, "rows_without_item": 3}
    fails(
        table(rows=rows[3:], item_rows=items, missing="drop"), "log.csv: no interaction is left", "rows_without_item 3"
    )


# ------------------------------------------------------------------------------------------------ frames


@pytest.mark.parametrize("rows", [LOG, [[9, 7, 1.5, 3.0], [7.0, 7, 2, None]]])
@pytest.mark.parametrize("filters", [None, Filters(min_rating=3, k_core=1)])
def test_frames_give_the_same_as_a_table(table, tmp_path, monkeypatch, rows, filters):
    """Whatever their index, and without any change to them; numbers are compared with those of Parquet."""
    monkeypatch.setattr("recsys.data.sources.reading._ROWS", 2)
    log = pd.DataFrame(rows, index=list("cba")[: len(rows)], columns=LOG_NAMES)
    items = pd.DataFrame(ITEMS, columns=ITEM_NAMES).assign(more=object())
    before = log.copy(), items.copy()
    columns = {"rating": "stars", "category": "genre", "filters": filters}
    found = DataFrames(log, items, **columns).load()
    source = table("log.parquet", "items.parquet", **columns)
    log.to_parquet(tmp_path / "log.parquet")
    expected = source.load()
    for frame in (expected.interactions, expected.items):
        frame.index -= 1  # the rows of a file count from 1
    pd.testing.assert_frame_equal(found.interactions, expected.interactions)
    pd.testing.assert_frame_equal(found.items, expected.items)
    assert found.dropped == expected.dropped
    pd.testing.assert_frame_equal(log, before[0])
    pd.testing.assert_frame_equal(items, before[1])


def test_times_of_frames():
    items = pd.DataFrame({"item_id": [1], "title": ["x"]})
    for times in (["2024-01-02", "2024-01-01"], np.array(["2024-01-02T00:00:00.000000999", "2024-01-01"], "M8[ns]")):
        log = pd.DataFrame({"user_id": 0, "item_id": 1, "timestamp": times})
        found = DataFrames(log, items).load().interactions
        assert found[Columns.TIME].tolist() == [1704153600000000, 1704067200000000]


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"item_id": ["7", "x"]}, ["interactions, row 1", "'x' is not in items", "1 such rows"]),
        ({"user_id": ["u", None]}, ["interactions, row 1", "user id nan is empty"]),
        ({"timestamp": [1, None]}, ["interactions, row 1", "time <NA>"]),
        ({"user_id": ["u", 1]}, ["interactions", "neither text nor numbers", "user_id"]),
    ],
)
def test_faults_of_frames_name_the_position(change, parts):
    log = pd.DataFrame({"user_id": ["u", "v"], "item_id": ["7", "7"], "timestamp": [1, 2]} | change, index=[5, 6])
    fails(DataFrames(log, pd.DataFrame({"item_id": ["7"], "title": ["x"]})), *parts)


def test_frames_without_a_column_or_rows():
    log = pd.DataFrame({"user_id": ["u"], "item_id": ["7"], "timestamp": [1]})
    items = pd.DataFrame({"item_id": ["7"], "name": ["x"]})
    fails(DataFrames(log, items), "items: column 'title' is missing; there are 'item_id', 'name'")
    fails(DataFrames(log, items, title="name", time="when"), "interactions: column 'when' is missing", "'timestamp'")
    fails(DataFrames(log[:0], items, title="name"), "interactions: has no rows")


# --------------------------------------------------------------------------------------------------- hub


def test_hub_reads_a_folder(tmp_path):
    (tmp_path / "set").mkdir()
    dump(tmp_path / "set" / "train.jsonl", LOG_NAMES, [[1, "a", 3, 4.5], [2, "b", 1, 2]])
    (tmp_path / "titles").mkdir()
    dump(tmp_path / "titles" / "test.csv", ITEM_NAMES, [["a", "Alien", "x"], ["b", "Brazil", "y"]])
    arguments = {"items_split": "test", "category": "genre", "cache_dir": str(tmp_path / "cache")}
    tables = HubDataset(str(tmp_path / "set"), str(tmp_path / "titles"), **arguments).load()
    assert tables.interactions.to_numpy().tolist() == [["1", "a", 3], ["2", "b", 1]]
    assert tables.interactions.index.tolist() == [0, 1]
    assert tables.items.to_numpy().tolist() == [["a", "Alien", "x"], ["b", "Brazil", "y"]]
    missing = HubDataset(str(tmp_path / "set"), str(tmp_path / "titles"), items_split="test", rating="score")
    missing.cache_dir = str(tmp_path / "cache")
    fails(missing, "set", "'score' is missing", "'stars'")


def test_hub_names_what_cannot_be_loaded(tmp_path):
    fails(HubDataset(str(tmp_path / "nothing"), str(tmp_path / "nothing")), "nothing", "cannot be loaded")


def test_what_the_hub_says_is_one_line(monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("401 Client Error.\n\nAccess is restricted.")

    monkeypatch.setattr("datasets.load_dataset", fail)
    fails(HubDataset("a/b", "c/d"), "the dataset 'c/d' cannot be loaded: 401 Client Error. Access is restricted.")
