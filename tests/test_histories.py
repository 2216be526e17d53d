import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recsys.data import Histories
from recsys.data.histories import check_no_leak
from recsys.types import UserError


def histories(events, split="temporal"):
    """Histories of (user, item, time) triples in file order."""
    return Histories(*np.array(events).T, split)


def one_user(n, **kwargs):
    return histories([(0, item, item) for item in range(n)], **kwargs)


logs = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 3), st.integers(0, 9)), min_size=1, max_size=60)


@settings(deadline=None, max_examples=200)
@given(events=logs, split=st.sampled_from(["temporal", "leave_one_out"]))
def test_every_row_matches_a_naive_account(events, split):
    """Histories and targets are those of a direct reading of the log, and nothing later is in a prompt."""
    try:
        data = histories(events, split)
    except UserError:
        return
    stamped = sorted((user, time, place, item) for place, (user, item, time) in enumerate(events))
    naive = {}  # event index -> (user, history, target, (time, file position))
    for e, (user, time, place, item) in enumerate(stamped):
        history = [(t, p, i) for u, t, p, i in stamped if u == user and (t, p) < (time, place)]
        if history:
            naive[e] = (user, [i for _, _, i in history], item, (time, place))
            assert max(history)[:2] < (time, place)
    parts = [data.train, data.val, data.test]
    assert sorted(np.concatenate(parts)) == sorted(naive)
    for part in parts:
        assert [naive[e][3] for e in part] == sorted(naive[e][3] for e in part)
    for e, (user, history, target, _) in naive.items():
        assert (data.users[e], data.items[e]) == (user, target)
        for limit in (1, 3, 100):
            assert data.history(e, limit).tolist() == history[-limit:]
            assert data.history_start(np.array([e]), limit) == e - len(history[-limit:])


@settings(deadline=None)
@given(events=logs)
def test_temporal_split_never_trains_on_the_future(events):
    try:
        data = histories(events)
    except UserError:
        return
    key = [(time, place) for _, time, place, _ in sorted((u, t, p, i) for p, (u, i, t) in enumerate(events))]
    train_events = {e for row in data.train for e in range(data.user_start[row], row + 1)}
    first_val, first_test = min(key[e] for e in data.val), min(key[e] for e in data.test)
    assert max(key[e] for e in train_events) < first_val
    assert max(key[e] for e in data.val) < first_test


@settings(deadline=None)
@given(events=logs, size=st.integers(1, 5), split=st.sampled_from(["temporal", "leave_one_out"]))
def test_stretches_tile_each_users_train_rows(events, size, split):
    try:
        data = histories(events, split)
    except UserError:
        return
    stretches = data.stretches(data.train, size)
    assert set(stretches) <= set(data.train)
    covered = [e for row in stretches for e in range(row - len(data.history(row, size)), row + 1)]
    assert len(covered) == len(set(covered))
    for user in set(data.users[data.train]):
        own = [e for e in covered if data.users[e] == user]
        assert own == list(range(own[0], max(data.train[data.users[data.train] == user]) + 1))  # no gap
        assert own[0] - data.user_start[own[0]] <= 1  # one event may be left over: it has no history


@settings(deadline=None)
@given(events=logs, data=st.data())
def test_seen_items_are_those_of_the_whole_history(events, data):
    try:
        subject = histories(events)
    except UserError:
        return
    rows = data.draw(st.lists(st.sampled_from(list(subject.train) + list(subject.val)), max_size=6))
    items = np.array(data.draw(st.lists(st.lists(st.integers(0, 6), min_size=3, max_size=3), min_size=len(rows), max_size=len(rows))))  # fmt: skip  # noqa: E501
    seen = subject.seen(np.array(rows, dtype=np.int64), items.reshape(len(rows), 3))
    for i, row in enumerate(rows):
        past = {subject.items[e] for e in range(row) if subject.users[e] == subject.users[row]}
        assert seen[i].tolist() == [item in past for item in items[i]]


def test_seen_items_by_hand():
    assert one_user(14).seen(np.array([13, 2]), np.array([[0, 12, 13], [0, 2, 1]])).tolist() == [
        [True, True, False],
        [True, False, True],
    ]


def test_entries_follow_their_events():
    subject = Histories(np.array([0, 1, 0, 0, 0]), np.arange(5), np.array([4, 0, 1, 2, 3]), entry=np.arange(5) + 10)
    assert (subject.entry == subject.items + 10).all()
    assert subject.items[subject.past(3, 2)].tolist() == subject.history(3, 2).tolist() == [3, 4]


@pytest.mark.parametrize("events", [1, 2, 3, 1_000_000])
def test_a_leak_is_noticed(events: int, monkeypatch: pytest.MonkeyPatch):
    """A time that is not a number has no place in the order; the other faults are put into the arrays by hand."""
    monkeypatch.setattr("recsys.data.histories._EVENTS", events)
    with pytest.raises(RuntimeError, match="check that every time is a number"):
        Histories(np.zeros(5, dtype=int), np.arange(5), np.array([1.0, 2.0, np.nan, 3.0, 4.0]))
    good = {
        "users": np.array([0, 0, 0, 1, 1]),
        "time": np.array([1, 2, 2, 0, 1]),
        "place": np.array([0, 1, 4, 2, 3]),
        "user_start": np.array([0, 0, 0, 3, 3]),
        "parts": [np.array([1, 3]), np.array([5]), np.array([6])],
    }
    check_no_leak(**good)
    for fault in (
        {"time": np.array([1, 2, 1, 0, 1])},  # a later event before an earlier one
        {"place": np.array([0, 4, 1, 2, 3])},  # the same among equal times
        {"user_start": np.array([0, 0, 0, 2, 3])},  # another user's event
        {"user_start": np.array([0, 2, 0, 3, 3])},  # a later event
        {"parts": [np.array([1, 5]), np.array([5]), np.array([6])]},  # a train row in the held-out time
        {"parts": [np.array([1, 3]), np.array([7]), np.array([6])]},
    ):
        with pytest.raises(RuntimeError, match="would hold its target"):
            check_no_leak(**(good | fault))


def test_temporal_cut_is_80_10_10():
    data = one_user(101)
    assert [len(data.train), len(data.val), len(data.test)] == [80, 10, 10]
    assert data.train.tolist() == list(range(1, 81))


def test_leave_one_out():
    data = histories([(0, 0, 0), (0, 1, 1), (0, 2, 2), (0, 3, 3), (1, 4, 0), (1, 5, 1), (2, 6, 0)], "leave_one_out")
    assert [data.items[part].tolist() for part in (data.train, data.val, data.test)] == [[1], [2], [5, 3]]


def test_stretches_by_hand():
    data = one_user(14)  # 13 rows: events 1..11 train, 12 val, 13 test
    assert data.train.tolist() == list(range(1, 12))
    assert data.stretches(data.train, 3).tolist() == [3, 7, 11]
    assert data.stretches(data.train, 4).tolist() == [1, 6, 11]
    assert data.stretches(data.train, 100).tolist() == [11]
    assert data.stretches(data.train[:9], 3).tolist() == [1, 5, 9]


def test_equal_times_keep_file_order():
    data = histories([(0, 5, 1), (0, 3, 1), (0, 4, 1), (0, 9, 0)])
    assert data.items.tolist() == [9, 5, 3, 4]
    assert data.describe()["equal_time_share"] == pytest.approx(2 / 3)


def test_equal_histories_with_different_targets_stay_two_rows():
    data = histories([(u, item, t) for u in range(4) for t, item in enumerate([0, 1, 2 + u % 2])])
    rows = [row for part in (data.train, data.val, data.test) for row in part if row - data.user_start[row] == 2]
    assert sorted((tuple(data.history(row, 9)), data.items[row]) for row in rows) == [
        ((0, 1), 2), ((0, 1), 2), ((0, 1), 3), ((0, 1), 3)
    ]  # fmt: skip


def test_target_in_its_own_history_is_kept_and_counted():
    data = histories([(0, 7, 0), (0, 7, 1), (0, 8, 2), (0, 7, 3)])
    assert data.describe()["rows"] == 3
    assert data.describe()["target_in_history_share"] == pytest.approx(2 / 3)


def test_users_and_items_too_many_for_32_bits_together():
    data = histories([(user, item, t) for user in (0, 2**16) for t, item in enumerate([0, 1, 2**16 - 1 - user // 2])])
    assert data.describe()["target_in_history_share"] == 0


def test_targets_in_histories_are_counted_part_by_part(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("recsys.data.histories._EVENTS", 7)
    rng = np.random.default_rng(0)
    log = [(int(u), int(rng.integers(6)), t) for t, u in enumerate(rng.integers(0, 9, 100))] + [(9, 1, 0), (9, 1, 1)]
    found, seen = 0, set()
    for user, item, _ in sorted(log, key=lambda event: event[2]):
        found += (user, item) in seen
        seen.add((user, item))
    data = histories(log)
    assert data.describe()["target_in_history_share"] == pytest.approx(found / data.describe()["rows"])


def test_describe_counts_what_was_dropped():
    data = histories([(0, i, i) for i in range(5)] + [(1, 0, 0), (2, 0, 0)])
    assert data.describe() == {
        "interactions": 7,
        "users": 3,
        "users_without_history": 2,
        "rows": 4,
        "train_rows": 2,
        "val_rows": 1,
        "test_rows": 1,
        "equal_time_share": 0,
        "target_in_history_share": 0,
    }


@pytest.mark.parametrize("split", ["temporal", "leave_one_out"])
@pytest.mark.parametrize("n", [0, 1, 2, 3])
def test_too_few_interactions(n, split):
    with pytest.raises(UserError, match=f"{n} interactions of {min(n, 1)} users make {max(0, n - 1)} rows"):
        Histories(*np.arange(3 * n).reshape(3, n) * [[0], [1], [1]], split)


def test_only_users_with_one_interaction():
    with pytest.raises(UserError, match="9 interactions of 9 users make 0 rows"):
        histories([(user, 0, 0) for user in range(9)])
