"""Filters, and the parts of the contract of `SourceData` that only other sources reach."""

from collections import Counter

import numpy as np
import pandas as pd
import pytest

from recsys.data import Columns, Filters, HistoryDataModule, PromptTemplate, Source, SourceData
from recsys.data.sources.source import k_core
from recsys.types import UserError


def tables(rows, columns=("user", "item", "time", "rating"), items="abcd"):
    log = pd.DataFrame(rows, columns=list(columns))
    return SourceData(log, pd.DataFrame({"item": list(items), "title": list(items)}), "log", "items")


def kept(filters, rows):
    filtered = tables(rows).filtered(filters)
    return filtered.interactions.index.tolist(), filtered.dropped


def brute_force_k_core(user, item, k):
    rows = list(range(len(user)))
    while True:
        users, items = Counter(user[r] for r in rows), Counter(item[r] for r in rows)
        fewer = [r for r in rows if users[user[r]] >= k and items[item[r]] >= k]
        if fewer == rows:
            return rows
        rows = fewer


@pytest.mark.parametrize("k", [1, 2, 3, 5, 8, 30])
def test_k_core_is_that_of_brute_force(k):
    rng = np.random.default_rng(k)
    for _ in range(20):
        user, item = rng.integers(0, 40, 150), rng.integers(0, 30, 150) ** 2 // 30
        assert k_core(user, item, k).tolist() == brute_force_k_core(user, item, k)


def test_k_core_needs_several_rounds():
    """Without user 2, item c has one interaction; without it user 1 has one; and so on until nothing is left."""
    rows = [["1", "a", 1, 5], ["1", "c", 2, 5], ["2", "c", 3, 5], ["3", "a", 4, 5], ["3", "b", 5, 5]]
    with pytest.raises(UserError, match=r"log: no interaction is left \(rows_outside_k_core 5, items"):
        tables(rows).filtered(Filters(k_core=2))
    core = [[user, item, 0, 5] for user in "45" for item in "ad"]
    filtered = tables(rows + core).filtered(Filters(k_core=2))
    assert filtered.interactions[Columns.USER].tolist() == ["3", "4", "4", "5", "5"][1:]
    assert filtered.items[Columns.ITEM].tolist() == ["a", "d"]
    assert filtered.items.index.tolist() == [0, 3]
    assert filtered.dropped == {"rows_outside_k_core": 5, "items_outside_k_core": 2}


ROWS = [["1", "a", 10, 5], ["1", "a", 10, 4], ["1", "a", 11, 2.5], ["2", "a", 10, 3], ["2", "b", 30, 1]]


@pytest.mark.parametrize(
    ("filters", "rows", "dropped"),
    [
        (None, [0, 1, 2, 3, 4], {}),
        (Filters(), [0, 1, 2, 3, 4], {}),
        (Filters(drop_duplicates=True), [0, 3, 4], {"rows_duplicate": 2}),
        (Filters(drop_duplicates=True, start=11), [2, 4], {"rows_outside_time": 3, "rows_duplicate": 0}),
        (Filters(min_rating=3), [0, 1, 3], {"rows_below_min_rating": 2}),
        (Filters(start=11), [2, 4], {"rows_outside_time": 3}),
        (Filters(end="11"), [0, 1, 3], {"rows_outside_time": 2}),
        (Filters(start=11, end=30), [2], {"rows_outside_time": 4}),
        (
            Filters(k_core=1, min_rating=2, end=30, drop_duplicates=True),
            [0, 3],
            {
                "rows_below_min_rating": 1,
                "rows_outside_time": 0,
                "rows_duplicate": 2,
                "rows_outside_k_core": 0,
                "items_outside_k_core": 3,
            },
        ),
    ],
)
def test_each_filter_keeps_and_counts(filters, rows, dropped):
    assert kept(filters, ROWS) == (rows, dropped)


@pytest.mark.parametrize("seed", range(5))
def test_the_first_interaction_with_an_item_is_kept(seed):
    """By time, and where times are equal by place in the file, which is in any order."""
    rng = np.random.default_rng(seed)
    rows = [["123"[rng.integers(3)], "abcd"[rng.integers(4)], int(rng.integers(9)), 1] for _ in range(60)]
    first = {}
    for place in sorted(range(60), key=lambda place: (rows[place][2], place)):
        first.setdefault(tuple(rows[place][:2]), place)
    assert kept(Filters(drop_duplicates=True), rows) == (sorted(first.values()), {"rows_duplicate": 60 - len(first)})


@pytest.mark.parametrize("unit", [1, 1000, 10**6, 10**9])
def test_iso_bounds_of_unix_time_in_any_unit(unit):
    days = [1546300799, 1546300800, 1546387199, 1546387200]  # around 1 January 2019
    rows = [["u", "a", day * unit, 1] for day in days]
    assert kept(Filters(start="2019-01-01", end="2019-01-02T00:00:00Z"), rows)[0] == [1, 2]


@pytest.mark.parametrize(
    "times",
    [
        [20140513, 20150101, 20160101],
        [2014, 2015, 2016],
        [16200, 16500, 16800],  # days
        [1.4e9, 1.5e12, 1.6e9],  # one in milliseconds
        [0, 1.5e9, 1.6e9],
    ],
)
def test_an_iso_bound_of_times_that_are_not_unix_time(times):
    """It would leave out nothing, or nearly all; a number in their unit does what it says."""
    rows = [["u", "a", time, 1] for time in times]
    for filters in (Filters(start="2015-01-01"), Filters(end="2015-01-01")):
        with pytest.raises(UserError, match=r"filters\..*, but log, row [01], has the time .* is not Unix time"):
            tables(rows).filtered(filters)
    assert kept(Filters(start=times[1]), rows)[0] == [i for i, time in enumerate(times) if time >= times[1]]


@pytest.mark.parametrize("times", [[1.4e9, 1.5e9], [2014, 2015], [0, 1]])
@pytest.mark.parametrize("filters", [{"start": -1}, {"end": 1.6e12}, {"end": "20250101000"}])
def test_a_number_beyond_all_times(times, filters):
    with pytest.raises(UserError, match="would leave out nothing; write it in their unit"):
        tables([["u", "a", time, 1] for time in times]).filtered(Filters(**filters))


def test_numbers_as_bounds_of_dates():
    """A year is a date; old dates are dates, too."""
    rows = [["u", "a", day, 1] for day in ("1960-05-01", "2014-12-31T23:59:59", "2015-01-01")]
    assert kept(Filters(start="2015"), rows)[0] == [2]
    assert kept(Filters(end=1970), rows)[0] == [0]
    filtered = tables(rows).filtered(Filters(start="1961-01-01"))
    assert filtered.filtered(Filters(end="2015")).interactions.index.tolist() == [1]  # filtered once more
    with pytest.raises(UserError, match=r"filters\.end is 1400000000.*write it as an ISO 8601 date"):
        tables(rows).filtered(Filters(end=1400000000.5))


def test_bounds_are_exact():
    """Nanoseconds, which a float would round to hundreds."""
    day = 1_546_300_800 * 10**9
    rows = [["u", "a", time, 1] for time in (day - 1, day, day + 1)]
    assert kept(Filters(start="2019-01-01"), rows)[0] == [1, 2]
    assert kept(Filters(start=str(day + 1)), rows)[0] == [2]


def test_times_beyond_int64():
    times = np.array([2**63 + 3, 5, 2**63 + 1, 2**64 - 1, 2**63 + 2], np.uint64)
    time = tables([["u", "a", t, 1] for t in times]).interactions[Columns.TIME]
    assert time.to_numpy().argsort(kind="stable").tolist() == [1, 2, 4, 0, 3]


def test_iso_bounds_of_dates():
    rows = [["u", "a", day, 1] for day in ("2018-12-31 23:59:59", "2019-01-01", "2019-01-01T01:00:00+02:00")]
    assert kept(Filters(start="2019-01-01"), rows)[0] == [1]


def test_filters_that_cannot_be_meant():
    for bound in ("yesterday", ""):
        with pytest.raises(UserError, match=r"filters\.start must be a number or an ISO 8601 date"):
            Filters(start=bound)
    with pytest.raises(UserError, match=r"filters\.k_core must be at least 0, but it is -1"):
        Filters(k_core=-1)
    for value in (float("nan"), float("inf")):
        with pytest.raises(UserError, match=r"filters\.min_rating must be a number"):
            Filters(min_rating=value)
        with pytest.raises(UserError, match=r"filters\.end must be a number or an ISO 8601 date"):
            Filters(end=value)
    for start, end in ((2, 1), (5, "5"), ("2019-01-01", "2018-12-31"), ("2019-01-01", "2019-01-01")):
        with pytest.raises(UserError, match=r"filters\.start, .*, must be before filters\.end"):
            Filters(start=start, end=end)
    with pytest.raises(UserError, match=r"filters\.min_rating is set, but log is read without ratings"):
        tables([["u", "a", 1]], ["user", "item", "time"]).filtered(Filters(min_rating=1))


def test_normalised_columns():
    log = pd.DataFrame({"user": ["u"], "item": ["a"], "time": [1], "rating": ["3"]})
    items = pd.DataFrame({"item": ["a", "b"], "title": [" A  b", "c"], "category": [" x\ty ", None]})
    result = SourceData(log, items, "log", "items")
    assert result.items.to_numpy().tolist() == [["a", "A b", "x y"], ["b", "c", ""]]
    assert result.interactions[Columns.RATING].dtype == float


def test_the_data_module_reports_what_was_dropped(monkeypatch):
    class Dirty(Source):
        def load(self):
            rows = [[user, item, time, time % 5] for user in "123" for time, item in enumerate("abcdabcd")]
            return tables(rows).filtered(Filters(min_rating=1))

    printed = []
    monkeypatch.setattr("recsys.data.datamodule.rank_zero_info", printed.append)
    module = HistoryDataModule(Dirty(), PromptTemplate("{history}", max_history=2))
    module.load()
    assert printed[0].endswith(", dropped_rows_below_min_rating 6")
    assert module.user_ids[module.histories.users[-1]] == "3"


def test_a_missing_rating_is_allowed_and_below_every_minimum():
    found = tables([["u", "a", 1, "3"], ["u", "b", 2, ""], ["u", "c", 3, None]])
    assert found.interactions["rating"].fillna(-1).tolist() == [3, -1, -1]
    assert len(found.filtered(Filters(min_rating=1)).interactions) == 1
