"""Rows (history -> target) of a time-ordered interaction log, and their split into train, validation and test."""

from __future__ import annotations

from itertools import pairwise
from typing import Literal

import numpy as np
import pandas as pd

from recsys.types import UserError

Split = Literal["temporal", "leave_one_out"]
_EVENTS = 1_000_000  # looked through at a time, or those of one user if they are more


class Histories:
    """Events sorted by user, then time, then file order; a row is an event that has an earlier event of its user.

    A row is named by its event's index. Its target is the event's item and its history the user's earlier events, so
    no history holds its row's target event or a later one, and equal histories with different targets stay apart.

    The temporal split sorts all rows by their target's time, then file order, and cuts them 80/10/10: no event of a
    train row, history or target, is later than a validation target. Leave-one-out makes each user's last event a test
    row, the one before a validation row and the others train rows: comparable with much published work, but train rows
    then contain events that are later than other users' test targets.

    Args:
        user: [E] user of each event as an integer code, in file order.
        item: [E] catalogue index of each event.
        time: [E] time of each event, integers or floats.
        split: How rows are divided.
        entry: [E] which text each event has in a prompt, see :func:`recsys.data.prompts.write_entries`; 0 by default.

    Attributes:
        users: [E] int32, user of each sorted event.
        items: [E] int32, catalogue index of each sorted event.
        entry: [E] int32, which text each sorted event has in a prompt.
        user_start: [E] int32, index of the first event of the same user.
        train: Train rows: event indices, int64, in the order of time, then file.
        val: The same for validation rows.
        test: The same for test rows.

    Raises:
        UserError: There are too few interactions for one row in each of train, validation and test.
    """

    def __init__(
        self,
        user: np.ndarray,
        item: np.ndarray,
        time: np.ndarray,
        split: Split = "temporal",
        entry: np.ndarray | None = None,
    ) -> None:
        # Each array counts at 20 million events: most take 32 bits, and what is done with goes.
        by_time = np.argsort(time, kind="stable").astype(np.int32)  # equal times keep the order of the file
        by_user = np.argsort(user[by_time], kind="stable").astype(np.int32)  # [E] place in time of each event
        order = by_time[by_user]
        del by_time
        self.users = user[order].astype(np.int32, copy=False)
        self.items = item[order].astype(np.int32, copy=False)
        self.entry = np.zeros(len(order), dtype=np.int32) if entry is None else entry[order].astype(np.int32)
        changes = self.users[1:] != self.users[:-1]
        first = np.append(True, changes)[: len(order)]  # the cut matters when there is no event at all
        last = np.append(changes, True)[: len(order)]
        self.user_start = np.where(first, np.arange(len(order), dtype=np.int32), 0)
        np.maximum.accumulate(self.user_start, out=self.user_start)
        time = time[order]
        self._equal_times = int((~first[1:] & (time[1:] == time[:-1])).sum())

        in_time = np.empty_like(by_user)  # [E] events in the order of time
        in_time[by_user] = np.arange(len(order), dtype=np.int32)
        rows = in_time[~first[in_time]]
        del in_time
        if split == "temporal":
            held_out = max(1, len(rows) // 10)
            parts = np.split(rows, [max(0, len(rows) - 2 * held_out), max(0, len(rows) - held_out)])
        else:
            is_test, is_val = last[rows], (~last & np.append(last[1:], False))[rows]
            parts = [rows[~is_test & ~is_val], rows[is_val], rows[is_test]]
        count = len(rows)
        del rows
        self.train, self.val, self.test = parts = [part.astype(np.int64) for part in parts]
        if not all(map(len, parts)):
            raise UserError(
                f"{len(self.users)} interactions of {first.sum()} users make {count} rows with a history, of "
                f"which the {split} split leaves {len(self.train)} for training, {len(self.val)} for validation and "
                f"{len(self.test)} for test; each needs at least one, so provide users with more interactions"
            )
        cut = split == "temporal"
        check_no_leak(self.users, time, order, self.user_start, [by_user[part] for part in parts] if cut else [])

    def history_start(self, rows: np.ndarray, limit: int) -> np.ndarray:
        """Index of the oldest of the ``limit`` events before each row, or of all if there are fewer: [R] int64."""
        return np.maximum(self.user_start[rows], rows - limit)

    def past(self, row: int, limit: int) -> slice:
        """The ``limit`` newest events before one row; fewer if there are fewer."""
        return slice(max(self.user_start[row], row - limit), row)

    def history(self, row: int, limit: int) -> np.ndarray:
        """Catalogue indices of the ``limit`` newest events before one row, oldest first; fewer if there are fewer."""
        return self.items[self.past(row, limit)]

    def seen(self, rows: np.ndarray, items: np.ndarray) -> np.ndarray:
        """Tell which items the rows' users have chosen before, in their whole history and not in the prompt alone.

        Args:
            rows: [B] event indices.
            items: [B, C] catalogue indices.

        Returns:
            [B, C] bool.
        """
        counts = rows - self.user_start[rows]
        owner = np.repeat(np.arange(len(rows)), counts)  # [S] the place in `rows` of each earlier event's row
        event = np.arange(counts.sum()) + np.repeat(rows - np.cumsum(counts), counts)
        size = max(items.max(initial=0), self.items.max()) + 1
        return np.isin(np.arange(len(rows))[:, None] * size + items, owner * size + self.items[event])

    def stretches(self, rows: np.ndarray, size: int) -> np.ndarray:
        """Rows whose stretches do not overlap, for a loss on every title; a stretch is ``size`` events and the target.

        Each user's stretches are laid from the last row backwards, so the oldest may be shorter.

        Args:
            rows: [R] event indices; a user's rows follow one another without gaps.
            size: Events of history in a stretch.

        Returns:
            [S] int64, event indices in ascending order.
        """
        rows = np.sort(rows)
        user_ends = np.flatnonzero(np.append(self.users[rows][1:] != self.users[rows][:-1], True))
        newest = np.repeat(rows[user_ends], np.diff(user_ends, prepend=-1))  # the last row of each row's user
        return rows[(newest - rows) % (size + 1) == 0]

    def describe(self) -> dict[str, int | float]:
        """Counts of events, of what was dropped and of the rows; shares are fractions of the rows."""
        position = np.arange(len(self.users)) - self.user_start  # of each event among its user's
        users, rows = int((position == 0).sum()), int((position > 0).sum())
        size, repeated = self.items.max() + 1, 0
        edges = [*np.unique(self.user_start[::_EVENTS]).tolist(), len(self.users)]
        for part in (slice(*edge) for edge in pairwise(edges)):  # whole users
            repeated += int(pd.Series(self.users[part].astype(np.int64) * size + self.items[part]).duplicated().sum())
        return {
            "interactions": len(self.users),
            "users": users,
            "users_without_history": users - int((position == 1).sum()),
            "rows": rows,
            "train_rows": len(self.train),
            "val_rows": len(self.val),
            "test_rows": len(self.test),
            "equal_time_share": self._equal_times / rows,
            "target_in_history_share": repeated / rows,
        }


def check_no_leak(
    users: np.ndarray, time: np.ndarray, place: np.ndarray, user_start: np.ndarray, parts: list[np.ndarray]
) -> None:
    """Check that no prompt can hold its target or a later event, and no train row anything of the held-out time.

    Args:
        users: [E] user of each sorted event.
        time: [E] time of each.
        place: [E] place of each in the file.
        user_start: [E] where the history of each begins.
        parts: For the temporal split, the places in time of the train, validation and test rows' targets.

    Raises:
        RuntimeError: see above; a time that is not a number is a cause, the others are faults of this program.
    """
    holds = all(early.max() < late.min() for early, late in pairwise(parts))
    for first in range(0, len(users), _EVENTS):
        before, after = slice(first, first + _EVENTS), slice(first + 1, first + _EVENTS + 1)
        count = len(users[after])  # one less than before at the end
        early, late = (tuple(array[part][:count] for array in (users, time, place)) for part in (before, after))
        later = (late[1] > early[1]) | ((late[1] == early[1]) & (late[2] > early[2]))
        own = users[user_start[before]] == users[before]
        no_later = user_start[before] <= np.arange(first, first + len(own))
        holds &= bool((later | (late[0] != early[0])).all() and own.all() and no_later.all())
    if not holds:
        raise RuntimeError(
            "a prompt would hold its target, a later event or another user's event, or a train row lies in the "
            "held-out time; check that every time is a number"
        )
