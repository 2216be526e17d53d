"""``recsys predict``: whose lists, which items, and the file, against exact scores of the whole catalogue."""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import LambdaCallback

from callbacks import PredictionWriter
from recsys.data import HistoryDataModule, PromptTemplate, Requests, Table
from recsys.module import Recommender
from recsys.objectives import TAWin
from recsys.policy import TinyPolicy
from recsys.types import UserError
from recsys.window import Window
from tests.conftest import TITLES
from tests.naive import all_logprobs

ITEMS = [f"i{i}" for i in range(len(TITLES))]


class Prediction:
    """One ``predict`` of an untrained policy on the walks round the catalogue; writes ``lists.parquet`` by default."""

    def __init__(self, tables: dict[str, str], folder: Path, data: dict[str, Any] | None = None, **asked: Any) -> None:
        self.model = Recommender(TinyPolicy(hidden_size=32), TAWin(), num_beams=len(TITLES), cutoffs=(1, 5))
        prompt = {"template": "Seen:\n{history}", "max_history": 4, "max_tokens": 128}
        self.data = HistoryDataModule(Table(**tables), PromptTemplate(**prompt), **(data or {}))
        self.file = folder / asked.pop("name", "lists.parquet")
        self.writer = PredictionWriter(path=str(self.file), **asked)
        self.trainer = Trainer(
            callbacks=[self.writer],
            logger=False,
            use_distributed_sampler=False,
            enable_progress_bar=False,
            enable_checkpointing=False,
            accelerator="cpu",
        )

    def run(self) -> Prediction:
        self.trainer.predict(self.model, self.data, return_predictions=False)
        return self

    @property
    def frame(self) -> pd.DataFrame:
        return pd.read_parquet(self.file)


def walk(user: int) -> list[int]:
    """The items of one of the tables' users, oldest first."""
    return [(3 * user + step) % len(TITLES) for step in range(12)]


def expected(prediction: Prediction, history: list[int], k: int, out: set[int]) -> pd.DataFrame:
    """The list after a history, without items ``out`` and those with their titles, by one full row per item."""
    data, policy = prediction.data, prediction.model.policy
    tokens = [*data.tokenizer("Seen:\n").input_ids, *chain.from_iterable(data.item_tokens[i] for i in history[-4:])]
    with torch.no_grad():
        scores = all_logprobs(policy, tokens, data.item_tokens, "trie")
    titles = {TITLES[i] for i in out}
    order = [i for i in scores.argsort(descending=True, stable=True).tolist() if TITLES[i] not in titles][:k]
    return pd.DataFrame({"title": [TITLES[i] for i in order], "logprob": scores[order].numpy()})


def check(found: pd.DataFrame, wanted: pd.DataFrame) -> None:
    assert found["rank"].tolist() == list(range(1, len(wanted) + 1))
    np.testing.assert_allclose(found["logprob"], wanted["logprob"], atol=1e-4)
    assert found["title"].tolist() == wanted["title"].tolist()
    assert found["item_id"].map(lambda item: TITLES[ITEMS.index(item)]).tolist() == wanted["title"].tolist()
    assert found["item_id"].is_unique


def test_each_user_gets_the_best_of_what_is_new_to_them_after_all_of_their_events(tables, tmp_path: Path) -> None:
    prediction = Prediction(tables, tmp_path, k=5).run()
    lists = dict(list(prediction.frame.groupby("user_id", sort=False)))
    assert list(lists) == [f"u{user}" for user in range(30)]
    for user in ("u0", "u1", "u17", "u29"):  # u1 and u17 saw one of two items with the same title
        found = lists[user]
        history = walk(int(user[1:]))
        check(found, expected(prediction, history, 5, set(history)))
    assert [path.name for path in tmp_path.iterdir()] == ["lists.parquet"]  # no parts are left


@pytest.mark.parametrize("exact", [False, True])
def test_users_stock_and_seen_items(exact: bool, tables, tmp_path: Path) -> None:
    stock = [0, 2, 5, 9, 11, 15]  # of 2 and 3, which share a title, one is in stock
    (tmp_path / "stock.csv").write_text("item_id,title\n" + "".join(f"i{i},x\n" for i in stock) + "i777,new\n")
    (tmp_path / "users.txt").write_text("u7\nu3\n")
    asked = {"users": str(tmp_path / "users.txt"), "only_items": str(tmp_path / "stock.csv"), "exclude_seen": False}
    prediction = Prediction(tables, tmp_path, **asked)
    prediction.model.exact = exact
    found = prediction.run().frame
    assert found["user_id"].tolist() == ["u7"] * 6 + ["u3"] * 6
    for user, some in found.groupby("user_id"):
        out = {i for i in range(20) if i not in stock} - {3}
        wanted = expected(prediction, walk(int(user[1:])), 20, out)
        check(some, wanted.drop_duplicates("title"))
        assert set(some["item_id"]) == {f"i{i}" for i in stock}


def test_rows_of_a_split_come_with_their_targets(tables, tmp_path: Path) -> None:
    prediction = Prediction(tables, tmp_path, {"val_rows": 4}, rows="val", k=3).run()
    log = prediction.data.histories
    lists = dict(list(prediction.frame.groupby("row", sort=False)))
    assert list(lists) == prediction.data.evaluation_rows("val").tolist()
    for row, found in lists.items():
        history = log.items[log.user_start[row] : row].tolist()
        check(found, expected(prediction, history, 3, set(history)))
        assert set(found["target_item_id"]) == {f"i{log.items[row]}"}


def test_histories_of_users_that_training_never_saw(tables, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    events = [("zoe", "i5", 3), ("zoe", "i4", 1), ("yan", "i9", 2), ("zoe", "nowhere", 2), ("xi", "i888", 1)]
    frame = pd.DataFrame(events, columns=["user_id", "item_id", "timestamp"])
    frame.to_csv(tmp_path / "new.csv", index=False)
    with caplog.at_level("INFO"):
        prediction = Prediction(tables, tmp_path, histories=str(tmp_path / "new.csv"), k=4).run()
    assert "2 of 5 events are left out: their items, first 'nowhere', are not in the catalogue" in caplog.text
    assert "1 of 3 users are left out" in caplog.text
    lists = dict(list(prediction.frame.groupby("user_id", sort=False)))
    assert list(lists) == ["zoe", "yan"]
    check(lists["zoe"], expected(prediction, [4, 5], 4, {4, 5}))
    check(lists["yan"], expected(prediction, [9], 4, {9}))


def test_ratings_and_categories_stand_in_the_prompts_of_new_histories(tmp_path: Path) -> None:
    items = pd.DataFrame({"item_id": ITEMS, "title": TITLES, "genre": ["A", "B"] * 10})
    items.to_csv(tmp_path / "items.csv", index=False)
    log = pd.DataFrame([(f"u{u}", f"i{t}", t, 3) for u in range(4) for t in range(12)])
    log.columns = ["user_id", "item_id", "timestamp", "stars"]
    log.to_csv(tmp_path / "log.csv", index=False)
    log.head(2).assign(user_id="new", stars=[5, None]).to_csv(tmp_path / "new.csv", index=False)
    names = {"rating": "stars", "category": "genre", "cache_dir": str(tmp_path / "cache")}
    source = Table(str(tmp_path / "log.csv"), str(tmp_path / "items.csv"), **names)
    data = HistoryDataModule(source, PromptTemplate("Seen:\n{history}", entry="{title}{category} {rating}\n"))
    data.tokenize(TinyPolicy().tokenizer)
    for requests, text in (
        (Requests.of_file(data, str(tmp_path / "new.csv")), "Seen:\nToy Story\nA 5\nToy\n"),
        (Requests.of_histories(data, {1: ["Toy Story", "i1"]}), "Seen:\nToy Story\nToy\n"),  # without ratings
        (Requests.of_users(data, ["u2"]), "B 3\n"),
        (Requests.of_rows(data, "val"), ""),
    ):
        [batch] = requests.batches(4)
        assert {field.dtype for field in vars(batch).values()} == {torch.int64}
        assert {part.dtype for part in requests.seen(batch.row.numpy())} == {np.dtype(np.int64)}
        assert data.tokenizer.decode(batch.tokens[0, : batch.length[0]]).endswith(text)


class Killed(Exception):
    pass


def test_an_interrupted_prediction_goes_on_where_it_ended(tables, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("callbacks.prediction_writer.PART", 8)
    monkeypatch.setattr("recsys.data.requests.PART", 8)
    small = {"eval_batch_size": 4}
    whole = Prediction(tables, tmp_path, small, name="whole.parquet").run().frame
    first = Prediction(tables, tmp_path, small)
    answer, calls = first.model.answer, []

    def dies(*args):
        if len(calls) == 5:  # in the middle of the third part
            raise Killed
        calls.append(args)
        return answer(*args)

    first.model.answer = dies
    with pytest.raises(Killed):
        first.run()
    assert not first.file.exists()
    parts = tmp_path / "lists.parquet.parts"
    assert sorted(path.name for path in parts.iterdir()) == ["000000.parquet", "000001.parquet", "settings.json"]

    with pytest.raises(UserError, match=r"lists\.parquet\.parts has parts of another prediction"):
        Prediction(tables, tmp_path, small, k=3).run()
    second = Prediction(tables, tmp_path, small)
    asked = []
    second.model.answer = lambda batch, *rest: (
        asked.append(batch.row.tolist()) or type(second.model).answer(second.model, batch, *rest)
    )
    second.run()
    assert sorted(chain(*asked)) == list(range(16, 30))
    pd.testing.assert_frame_equal(second.frame, whole)
    assert not parts.exists()


def test_a_prediction_that_only_lacks_its_end_is_joined(tables, tmp_path: Path, monkeypatch) -> None:
    first = Prediction(tables, tmp_path)
    monkeypatch.setattr("callbacks.prediction_writer.write", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        first.run()
    monkeypatch.undo()
    assert len(Prediction(tables, tmp_path).run().frame) >= 30 * 7


def test_a_prediction_that_was_cut_short_makes_no_file(tables, tmp_path: Path) -> None:
    cut = Prediction(tables, tmp_path, {"eval_batch_size": 8})
    cut.trainer.limit_predict_batches = 2
    with pytest.raises(UserError, match="lacks 1 of 1 parts: run the command again"):
        cut.run()
    assert not cut.file.exists()


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_processes_share_the_parts_and_take_as_many_batches(world_size: int, tables, monkeypatch) -> None:
    monkeypatch.setattr("recsys.data.requests.PART", 8)
    data = HistoryDataModule(Table(**tables), PromptTemplate("Seen:\n{history}"))
    data.tokenize(TinyPolicy().tokenizer)
    rows = [[batch.row.tolist() for batch in data.requests.batches(3, r, world_size)] for r in range(world_size)]
    assert len({len(batches) for batches in rows}) == 1
    real = [[row for batch in batches for row in batch if row >= 0] for batches in rows]
    assert sorted(chain(*real)) == list(range(30))
    assert all(not {row // 8 for row in a} & {row // 8 for row in b} for a in real for b in real if a is not b)


def test_what_a_spreadsheet_would_compute_stays_text(tables, tmp_path: Path) -> None:
    titles = ["=1+1", "+cmd", "-2", "@x", 'A "b", c', "Ça"]
    pd.DataFrame({"item_id": range(6), "title": titles}).to_csv(tmp_path / "items.csv", index=False)
    log = pd.DataFrame([(u, (u + t) % 6, t) for u in range(9) for t in range(3)])
    log.set_axis(["user_id", "item_id", "timestamp"], axis=1).to_csv(tmp_path / "log.csv", index=False)
    files = {"interactions": str(tmp_path / "log.csv"), "items": str(tmp_path / "items.csv")}
    files["cache_dir"] = str(tmp_path / "cache")
    frames = {}
    for name, read in {
        "lists.csv": lambda path: pd.read_csv(path, dtype={"item_id": str, "user_id": str}),
        "lists.jsonl": lambda path: pd.read_json(path, lines=True, dtype={"item_id": str, "user_id": str}),
        "lists.parquet": pd.read_parquet,
    }.items():
        prediction = Prediction(files, tmp_path, {}, name=name, exclude_seen=False)
        prediction.model.window, prediction.model.num_beams = Window(k=2), None
        frames[name] = read(prediction.run().file)
    whole = frames["lists.parquet"]
    assert set(whole["title"]) == set(titles)
    pd.testing.assert_frame_equal(frames["lists.jsonl"], whole, check_dtype=False, rtol=1e-4)
    safe = whole.assign(title=whole["title"].map(lambda title: f"'{title}" if title[0] in "=+-@" else title))
    pd.testing.assert_frame_equal(frames["lists.csv"], safe, check_dtype=False, rtol=1e-4)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"users": ["u1", "nobody"]}, r"user 'nobody' is not in the data \(1 such users in all\)"),
        ({"users": []}, "no history to recommend for"),
        ({"users": ["u1"], "rows": "val"}, r"predictions\.users and predictions\.rows are set: give one of them"),
        ({"users": "nowhere.txt"}, r"nowhere\.txt: not readable"),
        ({"only_items": "nowhere.csv"}, r"nowhere\.csv: no such file"),
        ({"k": 0}, r"predictions\.k must be at least 1"),
        ({"name": "lists.xlsx"}, r"lists\.xlsx: the name should end in"),
    ],
)
def test_mistakes_are_named_before_the_policy_is_loaded(asked, message: str, tables, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("recsys.policy.TinyPolicy.load", None)
    with pytest.raises(UserError, match=message):
        Prediction(tables, tmp_path, **asked).run()


def test_weights_that_are_not_finite_are_refused(tables, tmp_path: Path) -> None:
    prediction = Prediction(tables, tmp_path)
    prediction.model.policy.build(torch.device("cpu"))
    prediction.model.policy.head.weight.data.fill_(torch.nan)
    with pytest.raises(UserError, match="scores of a real prompt are not numbers: its weights are not finite"):
        prediction.run()


def test_weights_that_a_checkpoint_spoilt_are_refused(tables, tmp_path: Path) -> None:
    def load(trainer: Trainer, module: Recommender) -> None:  # a checkpoint's come after the check of a real prompt
        module.policy.head.weight.data.fill_(torch.nan)

    prediction = Prediction(tables, tmp_path)
    prediction.trainer.callbacks.append(LambdaCallback(on_predict_start=load))
    with pytest.raises(UserError, match="the weights are not finite: they are never saved; use an earlier checkpoint"):
        prediction.run()
