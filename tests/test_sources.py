import gzip

import pandas as pd
import pytest

from recsys.data import Columns, SourceData, Table
from recsys.types import UserError

ITEMS = "item_id,title\n007,Alien\n7,Brazil\n"
INTERACTIONS = "user_id,item_id,timestamp\nu1,7,30\nu1,007,10\nNA,7,20\n"


@pytest.fixture
def table(tmp_path):
    """Writes the two files and returns their Table."""

    def write(interactions=INTERACTIONS, items=ITEMS, **columns):
        paths = [tmp_path / "log.csv", tmp_path / "items.csv"]
        for path, text in zip(paths, (interactions, items), strict=True):
            path.write_text(text, encoding="utf-8")
        return Table(*map(str, paths), cache_dir=str(tmp_path / "cache"), **columns)

    return write


def fails(source, *parts):
    with pytest.raises(UserError) as caught:
        source.load()
    for part in parts:
        assert part in str(caught.value)


def test_ids_stay_text_and_rows_stay_in_file_order(table):
    tables = table().load()
    assert tables.interactions[Columns.USER].tolist() == ["u1", "u1", "NA"]
    assert tables.interactions[Columns.ITEM].tolist() == ["7", "007", "7"]
    assert tables.interactions[Columns.TIME].tolist() == [30, 10, 20]
    assert tables.items[Columns.ITEM].tolist() == ["007", "7"]


def test_tsv_gzip_and_own_column_names(tmp_path):
    with gzip.open(tmp_path / "log.tsv.gz", "wt") as file:
        file.write("when\tthing\twho\textra\n5\ta\tx\t-\n")
    (tmp_path / "items.csv").write_text("thing,name\na,Alien\n")
    paths = map(str, [tmp_path / "log.tsv.gz", tmp_path / "items.csv"])
    source = Table(*paths, "who", "thing", "when", "name", cache_dir=str(tmp_path / "cache"))
    tables = source.load()
    assert tables.interactions.iloc[0].to_dict() == {"user": "x", "item": "a", "time": 5}
    assert tables.items.iloc[0].to_dict() == {"item": "a", "title": "Alien"}


def test_titles_keep_unicode_and_quotes_and_lose_odd_whitespace(table):
    items = 'item_id,title\n1,"  Tab\there,\nline  two "\n2,"The ""Best"" of Amélie 🎬"\n3,NA\n4,a\u2028b\n'
    titles = table("user_id,item_id,timestamp\nu,1,1\n", items).load().items[Columns.TITLE]
    assert titles.tolist() == ["Tab here, line two", 'The "Best" of Amélie 🎬', "NA", "a b"]


@pytest.mark.parametrize(
    ("times", "order"),
    [
        (["9", "10", "8.5"], [2, 0, 1]),
        (["2024-01-02", "2024-01-01T23:59:59Z", "2024-01-02T01:00:00+02:00"], [2, 1, 0]),
        (["1600000000000000001", "1600000000000000000", "1600000000000000002"], [1, 0, 2]),  # beyond float64
    ],
)
def test_times_are_numbers_or_iso_dates(table, times, order):
    rows = "".join(f"u,7,{time}\n" for time in times)
    time = table("user_id,item_id,timestamp\n" + rows).load().interactions[Columns.TIME]
    assert time.to_numpy().argsort(kind="stable").tolist() == order


def test_missing_file(table, tmp_path):
    source = table()
    (tmp_path / "items.csv").unlink()
    fails(source, "items.csv", "no such file")


def test_missing_column_lists_those_there(table):
    fails(table(user="uid"), "log.csv", "'uid'", "'user_id'", "'timestamp'")


def test_other_file_formats_are_named(tmp_path):
    fails(Table("log.txt", "items.csv"), "log.txt", ".csv or .tsv or .jsonl or .json or .parquet")
    fails(Table("log.parquet.gz", "items.csv"), "log.parquet.gz", "all but the last")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "item_id,title\n7,Crouching Tiger, Hidden Dragon\n",  # every row has a field too many
        "item_id,title\n7,Brazil\n8,Crouching Tiger, Hidden Dragon\n",
        'item_id,title\n7,"Brazil\n',
    ],
)
def test_text_that_is_not_a_table(table, text):
    fails(table(items=text), "items.csv", "not readable as a table")


NOTES = [('"lone', 'also"'), ('"lone', '"also'), ('"lone', "plain"), ('5"', '6"')]


@pytest.mark.parametrize("notes", NOTES)
@pytest.mark.parametrize("separator", ["\t", ","])
def test_quotes_that_are_mere_characters_join_no_rows(tmp_path, notes, separator):
    """In a column that is not read; a file is read whole, or refused with its lines and the way out."""
    rows = [[f"u{i}", "7", str(100 - i), {5: notes[0], 11: notes[1]}.get(i, "-")] for i in range(24)]
    path = tmp_path / ("log.tsv" if separator == "\t" else "log.csv")
    path.write_text("".join(separator.join(row) + "\n" for row in [["user_id", "item_id", "timestamp", "note"], *rows]))
    (tmp_path / "items.csv").write_text("item_id,title\n7,Brazil\n")
    paths = str(path), str(tmp_path / "items.csv")
    told = Table(*paths, cache_dir=str(tmp_path / "cache"), quoted=False).load().interactions
    assert told[Columns.USER].tolist() == [row[0] for row in rows]
    assert told[Columns.TIME].tolist() == [int(row[2]) for row in rows]
    source = Table(*paths, cache_dir=str(tmp_path / "cache"))
    if notes[0] == '5"':  # no field begins with a quote
        assert len(source.load().interactions) == 24
    else:
        fails(source, path.name, "lines 7 to 13" if notes[1] == 'also"' else "line 7", "`quoted`")


def test_a_quoted_field_with_lines_is_read_unless_they_would_be_rows(table):
    long = 'item_id,title\n007,Alien\n7,"three\nlines, and, commas\n"\n'
    assert table(items=long).load().items[Columns.TITLE].tolist() == ["Alien", "three lines, and, commas"]
    rows = 'item_id,title\n007,"Alien\n7,Brazil"\n7,M\n'
    fails(table(items=rows), "items.csv", "lines 2 to 3", "`quoted`")
    assert table(items=rows, quoted=True).load().items[Columns.TITLE].tolist() == ["Alien 7,Brazil", "M"]


def test_a_quote_behind_a_backslash_does_not_change_the_title(table):
    fails(table(items='item_id,title\n7,Brazil\n007,"The \\"Best\\" of"\n'), "items.csv", "line 3", "double the quotes")
    titles = table(items='item_id,title\n7,Brazil\n007,The \\"Best\\" of\n').load().items[Columns.TITLE]
    assert titles.tolist() == ["Brazil", 'The \\"Best\\" of']


def test_rows_that_are_cut_are_refused(table):
    fails(table(INTERACTIONS.replace("u1,007,10", "u1,007")), "log.csv", "line 3 has 2 fields instead of 3")
    fails(table("user_id,item_id,timestamp,user_id\nu,7,1,v\n"), "log.csv", "several columns 'user_id'")


def test_separator_and_encoding(tmp_path):
    """As in Book-Crossing: semicolons, everything quoted, Latin-1, an ampersand in a title."""
    text = '"item_id";"title"\r\n"0";"Amélie; ""the"" & 1"\r\n'
    (tmp_path / "items.csv").write_bytes(text.encode("latin-1"))
    (tmp_path / "log.dat").write_bytes(b'"user_id";"item_id";"timestamp"\n"1";"0";"5"\n')
    paths = str(tmp_path / "log.dat"), str(tmp_path / "items.csv")
    found = Table(*paths, cache_dir=str(tmp_path / "cache"), separator=";", encoding="latin-1").load()
    assert found.items[Columns.TITLE].tolist() == ['Amélie; "the" & 1']
    assert found.interactions.iloc[0].tolist() == ["1", "0", 5]
    for name, value in (("separator", ""), ("separator", '"'), ("encoding", "x")):
        with pytest.raises(UserError, match=name):
            Table(*paths, **{name: value})


def test_a_mark_at_the_start_of_utf8_is_no_part_of_a_name(table):
    assert len(table("\ufeff" + INTERACTIONS).load().interactions) == 3


def test_text_that_is_not_utf8(table, tmp_path):
    source = table()
    (tmp_path / "items.csv").write_bytes("item_id,title\n7,Amélie\n".encode("latin-1"))
    fails(source, "items.csv", "not readable as a table", "utf-8")


def test_gzip_that_is_cut_short(tmp_path):
    (tmp_path / "items.csv").write_text(ITEMS)
    (tmp_path / "log.csv.gz").write_bytes(gzip.compress(INTERACTIONS.encode())[:-12])
    paths = map(str, [tmp_path / "log.csv.gz", tmp_path / "items.csv"])
    fails(Table(*paths, cache_dir=str(tmp_path / "cache")), "log.csv.gz", "not readable as a table")


def test_unknown_item(table):
    fails(table(INTERACTIONS + "u2,x1,5\nu2,x2,6\n"), "log.csv, row 5", "'x1'", "items.csv", "2 such rows")


@pytest.mark.parametrize("title", ["", '"  "', '"\t"'])
def test_empty_title(table, title):
    fails(table(items=ITEMS + f"8,{title}\n"), "items.csv, row 4", "'8'", "no title")


def test_missing_title_of_another_source():
    items = pd.DataFrame({Columns.ITEM: ["a"], Columns.TITLE: [None]})
    log = pd.DataFrame({Columns.USER: ["u"], Columns.ITEM: ["a"], Columns.TIME: [1]})
    with pytest.raises(UserError, match="items, row 0: item id 'a' has no title"):
        SourceData(log, items, "log", "items")


def test_repeated_item_id(table):
    fails(table(items=ITEMS + "7,Brazil again\n"), "items.csv, row 4", "'7'", "seen before")


def test_empty_ids(table):
    fails(table(INTERACTIONS + ",7,5\n"), "log.csv, row 5", "user id")
    fails(table(items=ITEMS + ",Nameless\n"), "items.csv, row 4", "item id")


@pytest.mark.parametrize("time", ["yesterday", "", "nan", "inf", "2024-01-01"])
def test_unreadable_time(table, time):
    fails(table(INTERACTIONS + f"u2,7,{time}\n"), "log.csv, row 5", repr(time), "1 such rows")


def test_unreadable_date(table):
    log = "user_id,item_id,timestamp\nu,7,2024-01-01\nu,7,5.5.2024\n"
    fails(table(log), "log.csv, row 3", "'5.5.2024'")
