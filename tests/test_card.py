"""The data card against counts made one row at a time."""

import numpy as np
import pandas as pd
import pytest

from recsys.data import (
    BatchDataset,
    HistoryDataModule,
    PromptTemplate,
    Source,
    SourceData,
    card_markdown,
    card_text,
    data_card,
)
from recsys.types import UserError
from tests.helpers_tokenizer import ByteTokenizer

TITLES = ["Alien", "Alien", "Up", "Brazil, the final cut", "Brazil, the short one", "M", "Nobody's"]


class Log(Source):
    """Three users with many events and ties, two late ones, and one with one event; the last item is not used."""

    def load(self):
        rng = np.random.default_rng(0)
        user = np.concatenate([rng.integers(0, 3, 80), rng.choice([0, 3, 4], 20), [5]])
        item = np.concatenate([rng.integers(0, 4, 80), rng.integers(0, 6, 21)])
        time = np.sort(np.concatenate([rng.integers(0, 60, 80), rng.integers(60, 90, 21)]))
        log = pd.DataFrame({"user": user.astype(str), "item": item.astype(str), "time": time})
        log["rating"] = rng.choice([1.0, 4.5, np.nan], len(log))
        tables = SourceData(log, pd.DataFrame({"item": list("0123456"), "title": TITLES}), "log", "items")
        tables.dropped = {"users with too few events": 7}
        return tables


@pytest.fixture(params=["temporal", "leave_one_out"])
def data(request):
    template = PromptTemplate(
        "Seen: {history}", entry="{rating}* {title}", max_history=5, max_tokens=60, max_title_tokens=6
    )
    sizes = {"batch_size": 3, "eval_batch_size": 4}
    counts = {"warm_start_stretches": 5, "policy_stretches": 7, "val_rows": 3, "test_rows": None}
    module = HistoryDataModule(Log(), template, request.param, **sizes, **counts)
    module.tokenize(ByteTokenizer())
    return module


def test_card(data):
    card, h = data_card(data), data.histories
    log = Log().load().interactions
    parts = {"train": h.train, "validation": h.val, "test": h.test}
    rows = [row for part in parts.values() for row in part]
    assert (card["items"], card["items that nobody chose"], card["items that share their title"]) == (7, 1, 2)
    assert (card["users"], card["users without history"], card["interactions"]) == (6, 1, 101)
    assert card["dropped by the source"] == {"users with too few events": 7}
    assert card["share of user-item pairs (density)"] == 101 / 42
    assert card["rows"] == {name: len(part) for name, part in parts.items()}
    before = {}
    ties = repeats = 0
    for user, item, time in log[["user", "item", "time"]].sort_values("time", kind="stable").to_numpy():
        past = before.setdefault(user, [])
        ties += bool(past) and past[-1][1] == time
        repeats += item in [i for i, _ in past]
        past.append((item, time))
    assert card["share of rows at the time of the one before"] == ties / len(rows)
    assert card["share of targets already in the history"] == repeats / len(rows)
    for name in ("validation", "test"):
        users, items = set(h.users[parts[name]]), h.items[parts[name]]
        new = users - set(h.users[h.train])
        assert card["share of users unseen in training"][name] == len(new) / len(users)
        assert card["share of targets unseen in training"][name] == np.mean([i not in h.items[h.train] for i in items])
    lengths = {"history length": [row - min(np.flatnonzero(h.users == h.users[row])) for row in rows]}
    # "Brazil, the final cut" needs "Brazil, the f" to differ; "Nobody's" is cut; a newline ends each.
    lengths["title length in tokens, end included"] = [6, 6, 3, 14, 14, 2, 7]
    prompts = {row: len(data.encoder.encode(h.items[h.past(row, 5)], h.entry[h.past(row, 5)]).tokens) for row in rows}
    lengths["prompt length in tokens"] = list(prompts.values())
    for name, values in lengths.items():
        expected = {"mean": np.mean(values), "median": np.median(values), "95 %": np.quantile(values, 0.95)}
        assert card[name] == pytest.approx(expected | {"max": max(values)})
    assert card["titles cut"] == 3
    drawn = {"warm start": 5, "policy": 7, "validation": 3, "test": len(h.test)}
    assert card["drawn for an epoch"] == drawn


def test_padding_is_that_of_the_batches(data):
    loaders = {
        "warm start": data.dataset(data.plan(0, True), True),
        "policy": data.dataset(data.plan(0, False), False),
        "validation": data.batches(data.evaluation_rows("val"), 4),
        "test": data.batches(data.evaluation_rows("test"), 4),
    }
    card = data_card(data)["share of padding in the batches"]
    for name, loader in loaders.items():
        batches = [loader[i] for i in range(len(loader))] if isinstance(loader, BatchDataset) else list(loader)
        padded, real = sum(b.tokens.numel() for b in batches), sum(b.length.sum().item() for b in batches)
        assert card[name] == pytest.approx(1 - real / padded), name
    assert card["policy"] > 0


def test_a_card_is_written_in_columns_or_as_markdown():
    card = {"items": 1682, "share of rows": {"a": 0.0625, "b": 0.0}, "length": {"mean": 5.25, "max": 1000}, "cut": 0}
    assert card_text(card).splitlines() == [
        "items          1,682",
        "share of rows  a 6.25%, b 0.00%",
        "length         mean 5.2, max 1,000",
        "cut            0",
    ]
    lines = card_markdown(card).splitlines()
    assert lines[:3] == ["| data | |", "|---|---|", "| items | 1,682 |"]
    assert len(lines) == 6


def test_a_field_that_the_source_lacks_stops_the_load():
    with pytest.raises(UserError, match=r"data\.prompt\.entry uses \{category\}"):
        HistoryDataModule(Log(), PromptTemplate(entry="{title}{category}")).load()
