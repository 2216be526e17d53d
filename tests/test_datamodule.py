import pickle
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from recsys.data import Columns, HistoryDataModule, PromptTemplate, Source, SourceData
from recsys.policy import byte_tokenizer
from recsys.types import UserError
from tests.helpers_tokenizer import ByteTokenizer


class Simulated(Source):
    """12 users with 20 events each, on 9 items with titles of 1 to 9 letters."""

    def load(self):
        rng = np.random.default_rng(0)
        log = pd.DataFrame({Columns.USER: [f"u{u}" for u in range(12)] * 20})
        log[Columns.ITEM] = rng.integers(0, 9, len(log)).astype(str)
        log[Columns.TIME] = rng.permutation(len(log))
        items = pd.DataFrame({Columns.ITEM: [str(i) for i in range(9)], Columns.TITLE: ["x" * i for i in range(1, 10)]})
        return SourceData(log, items, "log", "items")


class Model(LightningModule):
    """Remembers the rows it trained on, in order; the first ``warm_epochs`` train on stretches."""

    def __init__(self, warm_epochs=0, fail_at=None):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.tokenizer = ByteTokenizer()
        self.warm_epochs = warm_epochs
        self.fail_at = fail_at
        self.seen = []
        self.evaluated = []

    def phase_at(self, epoch):
        warm_start = epoch < self.warm_epochs
        return SimpleNamespace(warm_start=warm_start, start=0 if warm_start else self.warm_epochs)

    def training_step(self, batch, batch_idx):
        if len(self.seen) == self.fail_at:
            raise RuntimeError("a step failed")
        self.seen.append((self.current_epoch, batch.row.tolist()))
        return self.weight * batch.tokens.float().mean()

    def validation_step(self, batch, batch_idx):
        self.evaluated += batch.row.tolist()

    def predict_step(self, batch, batch_idx):
        return batch.row.tolist()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def data(**kwargs):
    kwargs = {"batch_size": 4, "eval_batch_size": 5, "policy_stretches": 25} | kwargs
    return HistoryDataModule(Simulated(), PromptTemplate("Seen: {history}", max_history=4), **kwargs)


def ready(rank=0, world_size=1, module=None, **kwargs):
    """A data module that is set up as if one of several processes."""
    module = module or data(**kwargs)
    module.trainer = SimpleNamespace(
        global_rank=rank,
        world_size=world_size,
        current_epoch=0,
        reload_dataloaders_every_n_epochs=1,
        lightning_module=Model(),
        _accelerator_connector=SimpleNamespace(use_distributed_sampler=False),
    )
    module.setup("fit")
    return module


def rows_of(loader):
    return [row for batch in loader for row in batch.row.tolist()]


def trainer(tmp_path, *callbacks, **kwargs):
    defaults = {"max_epochs": 2, "num_sanity_val_steps": 0, "limit_val_batches": 0}
    return Trainer(
        **(defaults | kwargs),
        accelerator="cpu",
        callbacks=list(callbacks),
        default_root_dir=tmp_path,
        reload_dataloaders_every_n_epochs=1,
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=bool(callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def test_the_titles_tokens_are_kept_in_the_folder_that_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("recsys.data.tokens.KEPT", 2)
    for folder in (None, str(tmp_path / "kept")):
        module = data(cache_dir=folder)
        module.tokenize(byte_tokenizer())
        assert (tmp_path / "kept").exists() == (folder is not None)
    assert len(list((tmp_path / "kept").glob("titles-*.parquet"))) == 1


# ---------------------------------------------------------------------------------------------- batches


@pytest.mark.parametrize("num_workers", [0, 2])
def test_batch_fields(num_workers):
    module = ready(num_workers=num_workers)
    rows = module.histories.val[:7]
    seen = []
    for batch in module.batches(rows, 3):
        for i, row in enumerate(batch.row.tolist()):
            history = module.histories.history(row, 4)
            text = "Seen: " + "".join("x" * (item + 1) + "\n" for item in history)
            assert bytes(batch.tokens[i, : batch.length[i]].tolist()).decode() == text
            assert not batch.tokens[i, batch.length[i] :].any()
            assert batch.titles[i, : len(history)].tolist() == history.tolist()
            assert (batch.titles[i, len(history) :] == -1).all()
            assert (batch.event == -1).all()
            starts = batch.start[i, : len(history)]
            assert (batch.tokens[i, starts] == ord("x")).all()
            assert (batch.tokens[i, starts - 1] != ord("x")).all()
            assert batch.target[i] == module.histories.items[row]
            seen.append(row)
        assert {field.dtype for field in vars(batch).values()} == {torch.int64}
    assert sorted(seen) == sorted(rows)


def test_filler_rows_are_marked():
    """Three rows in batches of one for two processes: the fourth batch repeats a row as a filler."""
    module = ready()
    rows = module.histories.test[:3]
    batches = [batch for rank in range(2) for batch in module.batches(rows, 1, rank=rank, world_size=2)]
    assert sorted(batch.row.item() for batch in batches) == [-1, *sorted(rows)]
    assert all(batch.length.item() > 6 for batch in batches)


def test_dataset_is_picklable():
    module = ready()
    dataset = module.batches(module.histories.val, 4).dataset
    assert torch.equal(pickle.loads(pickle.dumps(dataset))[0].tokens, dataset[0].tokens)


# ------------------------------------------------------------------------------------------ data module


def test_load_needs_no_tokenizer_and_happens_once(monkeypatch):
    module = data()
    module.load()
    monkeypatch.setattr(module.source, "load", None)
    module.load()
    assert len(module.catalog) == 9
    assert module.user_ids[module.histories.users[0]] == "u0"
    assert module.user_ids.dtype == object  # a categorical would put all users into every file of results
    assert module.histories.describe()["interactions"] == 240


def test_stretches_hold_each_title_with_its_event():
    """A title is a row to train on if it is one of the phase and another stands before it."""
    module = ready(fresh_share=0.25)
    h = module.histories
    for warm_start in (True, False):
        rows, named = set(module.train_rows(warm_start).tolist()), []
        plan = module.plan(0, warm_start)
        dataset = module.dataset(plan, warm_start)
        for batch, stretches in zip(map(dataset.__getitem__, range(len(plan))), plan, strict=True):
            assert batch.row.tolist() == stretches.tolist()
            for i, row in enumerate(stretches.tolist()):
                events = list(range(h.history_start(np.array([row]), 4)[0], row + 1))
                text = "Seen: " + "".join("x" * (h.items[e] + 1) + "\n" for e in events)
                assert bytes(batch.tokens[i, : batch.length[i]].tolist()).decode() == text
                assert batch.titles[i, : len(events)].tolist() == h.items[events].tolist()
                assert (batch.tokens[i, batch.start[i, : len(events)]] == ord("x")).all()
                assert (batch.titles[i, len(events) :] == -1).all()
                expected = [e if e in rows and e > events[0] else -1 for e in events]
                assert batch.event[i].tolist() == expected + [-1] * (batch.event.shape[1] - len(events))
                named += [e for e in expected if e >= 0]
                assert batch.target[i] == h.items[row]
        assert len(named) == len(set(named)) > 30


def test_stretches_of_an_epoch():
    module = ready()
    drawn = [module.stretches(epoch, warm_start=False) for epoch in (0, 0, 1)]
    assert np.array_equal(drawn[0], drawn[1])
    assert set(drawn[0]) != set(drawn[2])
    assert len(set(drawn[0])) == 25
    every = module.histories.stretches(module.histories.train, 4)
    assert set(drawn[0]) <= set(every)
    assert sorted(rows_of(module.train_dataloader())) == sorted(drawn[0])
    assert set(ready(policy_stretches=None).stretches(0, False)) == set(module.stretches(0, True)) == set(every)
    assert set(ready(seed=1).stretches(0, False)) != set(drawn[0])
    assert len(ready(warm_start_stretches=3).stretches(0, True)) == 3


@pytest.mark.parametrize("world_size", [1, 2])
def test_coming_stretches_are_those_of_the_next_batches_of_all_processes(world_size):
    module = ready()
    plans = [module.plan(1, False, rank, world_size) for rank in range(world_size)]
    expected = sorted(row for plan in plans for batch in plan[2:4] for row in batch)
    assert module.coming(1, False, world_size, slice(2, 4)).tolist() == sorted(set(expected))


def test_fresh_rows_are_the_latest_and_not_learnt_from_before():
    module = ready(fresh_share=0.25, policy_stretches=None)
    h = module.histories
    fresh, stretches = set(module.train_rows(warm_start=False)), module.stretches(0, warm_start=True)
    assert len(fresh) == len(h.train) // 4
    assert fresh == set(h.train[-len(fresh) :])
    learnt = {event for row in stretches for event in range(h.history_start(np.array([row]), 4)[0], row + 1)}
    assert not learnt & fresh
    assert learnt >= set(h.train[: -len(fresh)])  # every other target is in one
    for share in (-0.1, 1.0):
        with pytest.raises(UserError, match=r"data\.fresh_share must be at least 0 and below 1"):
            data(fresh_share=share)


def test_evaluation_rows_are_spread_over_time():
    module = ready(val_rows=4, test_rows=1000)
    assert sorted(rows_of(module.val_dataloader())) == sorted(module.histories.val[[0, 5, 11, 16]])  # of 22
    assert sorted(rows_of(module.test_dataloader())) == sorted(module.histories.test)


@pytest.mark.parametrize(
    "name", ["batch_size", "eval_batch_size", "policy_stretches", "warm_start_stretches", "val_rows"]
)
def test_sizes_must_be_positive(name):
    with pytest.raises(UserError, match=f"data.{name} must be at least 1"):
        data(**{name: 0})
    with pytest.raises(UserError, match=f"data.{name} must be at most"):
        data(**{name: 10**20})
    with pytest.raises(UserError, match=r"data\.num_workers must be at least 0"):
        data(num_workers=-1)


def test_trainer_settings_are_checked(tmp_path):
    with pytest.raises(UserError, match="reload_dataloaders_every_n_epochs"):
        Trainer(accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False).fit(Model(), data())
    module = ready()
    module.trainer.world_size = 2
    module.trainer._accelerator_connector.use_distributed_sampler = True
    with pytest.raises(UserError, match="use_distributed_sampler"):
        module.setup("validate")


def test_fit_trains_on_the_stretches_of_each_phase_and_validates(tmp_path):
    model, module = Model(warm_epochs=1), data(val_rows=7)
    trainer(tmp_path, limit_val_batches=1.0, max_epochs=3).fit(model, module)
    rows = [{row for e, batch in model.seen if e == epoch for row in batch} for epoch in range(3)]
    assert rows == [set(module.stretches(0, True)), *(set(module.stretches(epoch, False)) for epoch in (0, 1))]
    assert len(model.evaluated) == 3 * 7


def test_a_phase_draws_the_same_batches_whenever_it_starts(tmp_path):
    late, first = Model(warm_epochs=3), Model()
    trainer(tmp_path, max_epochs=5).fit(late, data(warm_start_stretches=9))
    trainer(tmp_path, max_epochs=2).fit(first, data())
    assert [(epoch - 3, rows) for epoch, rows in late.seen if epoch >= 3] == first.seen
    stretches = [[rows for e, rows in late.seen if e == epoch] for epoch in range(3)]
    assert stretches[0] != stretches[1] != stretches[2]


def test_predict_covers_every_user(tmp_path):
    model, module = Model(), data()
    predicted = trainer(tmp_path).predict(model, module)
    assert sorted(np.concatenate(predicted)) == list(range(module.histories.users.max() + 1))


def test_overfit_batches_repeats_one_batch(tmp_path):
    model = Model()
    trainer(tmp_path, overfit_batches=1, max_epochs=1).fit(model, data())
    assert len(model.seen) == 1


# --------------------------------------------------------------------------------------------- resuming


class SaveEverywhere(Callback):
    """Saves a checkpoint after each batch, validation and epoch, with what the model had seen by then."""

    def __init__(self, folder):
        self.folder = folder
        self.saved = []

    def save(self, name, trainer, model):
        path = self.folder / f"{name}-{len(model.seen)}.ckpt"
        trainer.save_checkpoint(path)
        self.saved.append((path, len(model.seen)))

    def on_train_batch_end(self, trainer, model, *_):
        self.save("batch", trainer, model)

    def on_validation_end(self, trainer, model):
        self.save("validation", trainer, model)

    def on_train_epoch_end(self, trainer, model):
        self.save("epoch", trainer, model)


@pytest.mark.parametrize(
    ("settings", "num_workers"),
    [({}, 0), ({"limit_train_batches": 3}, 0), ({"max_steps": 11, "max_epochs": -1}, 0), ({}, 1)],
    ids=["epochs", "limited", "steps", "workers"],
)
def test_a_resumed_run_sees_exactly_the_remaining_batches(tmp_path, settings, num_workers):
    """Whenever a checkpoint is saved. Validation runs several times in an epoch."""
    settings = {"limit_val_batches": 1, "val_check_interval": 3} | settings
    whole, save = Model(warm_epochs=1), SaveEverywhere(tmp_path)
    trainer(tmp_path, save, **settings).fit(whole, data(num_workers=num_workers))
    assert len(save.saved) > len(whole.seen)
    for path, done in save.saved[3:4] if num_workers else save.saved:
        resumed = Model(warm_epochs=1)
        trainer(tmp_path, **settings).fit(resumed, data(num_workers=num_workers), ckpt_path=path, weights_only=False)
        assert resumed.seen == whole.seen[done:], path.name


def test_a_failed_step_is_tried_again(tmp_path):
    whole = Model()
    trainer(tmp_path).fit(whole, data())
    failing = Model(fail_at=9)
    checkpoint = ModelCheckpoint(tmp_path, save_on_exception=True, save_top_k=0, save_last=True)
    with pytest.raises(RuntimeError, match="a step failed"):
        trainer(tmp_path, checkpoint).fit(failing, data())
    path = tmp_path / "epoch=1-step=9.ckpt"
    resumed = Model()
    trainer(tmp_path).fit(resumed, data(), ckpt_path=path, weights_only=False)
    assert failing.seen + resumed.seen == whole.seen


def test_resuming_inside_an_epoch_with_other_batches_is_an_error(tmp_path):
    save = SaveEverywhere(tmp_path)
    trainer(tmp_path, save).fit(Model(), data())
    with pytest.raises(UserError, match=r"after batch 2 of an epoch of 7 batches, but the epoch now has 13"):
        trainer(tmp_path).fit(Model(), data(batch_size=2), ckpt_path=save.saved[1][0], weights_only=False)
