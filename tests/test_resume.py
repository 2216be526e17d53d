"""What survives: a kill, a full disk, changed data, weights that are not finite, and two runs at once."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd
import pytest
import torch
from lightning.pytorch import Callback
from safetensors import SafetensorError

from callbacks import BeamNegatives
from recsys.cli import main
from recsys.data import PromptTemplate
from recsys.objectives import GRPO
from recsys.runs import RunLogger
from recsys.types import UserError
from tests.conftest import Run
from tests.test_cli import config, lines_of_failure, small  # noqa: F401 - a fixture

POLICY = {"objective": GRPO(learning_rate=1e-2), "warm_start_epochs": 0}
QUICK = {"num_sanity_val_steps": 0, "limit_val_batches": 1}


class At(Callback):
    """Does something in a hook, when so many optimiser steps are done."""

    def __init__(self, hook: str, step: int, action) -> None:
        def act(trainer, module, *args) -> None:
            if trainer.global_step == step and not trainer.sanity_checking:
                action(trainer, module)

        setattr(self, hook, act)


def fail(*args) -> None:
    raise KeyError("stopped")


def loaded(path: Path) -> dict:
    return torch.load(path, weights_only=False)


# --------------------------------------------------------------------------------------------- changed data


@pytest.fixture(scope="module")
def stopped(tables, tmp_path_factory) -> str:
    """A checkpoint from inside an epoch."""
    run = Run(tables, tmp_path_factory.mktemp("stopped"), model=POLICY, callbacks=[At("on_train_batch_end", 2, fail)])
    with pytest.raises(KeyError):
        run.fit()
    return str(run.checkpoints / "last.ckpt")


def changed(tables: dict[str, str], folder: Path, change: str) -> dict[str, str]:
    """Copies of the tables with a change."""
    items, log = pd.read_csv(tables["items"]), pd.read_csv(tables["interactions"])
    if change == "order":
        items = items[::-1]
    elif change == "items":
        items = pd.concat([items, pd.DataFrame({"item_id": ["i98", "i99"], "title": ["New", "Newer"]})])
    elif change == "users":
        new = log[log.user_id == "u0"].assign(user_id="new")
        log = pd.concat([new, log])
    items.to_csv(folder / "items.csv", index=False)
    log.to_csv(folder / "log.csv", index=False)
    files = {"items": "items.csv", "interactions": "log.csv", "cache_dir": "cache"}
    return {name: str(folder / file) for name, file in files.items()}


@pytest.mark.parametrize(
    ("change", "data", "named"),
    [
        ("order", {}, "catalogue"),
        ("items", {}, "catalogue was 20 items.* and is 22 items"),
        ("users", {}, "interactions was 360.* and is 372"),
        ("", {"split": "leave_one_out"}, "split was temporal"),
        ("", {"seed": 1}, "seed was 0 and is 1"),
        (
            "",
            {"prompt": PromptTemplate("Seen:\n{history}", max_history=3, max_tokens=128)},
            "max_history was 4 and is 3",
        ),
    ],
)
def test_training_resumes_on_the_same_data_alone(tables, tmp_path, stopped, change, data, named) -> None:
    with pytest.raises(UserError, match=named):
        Run(changed(tables, tmp_path, change), tmp_path, model=POLICY, data=data).fit(ckpt_path=stopped)


def test_new_interactions_can_be_ranked_and_another_prompt_cannot(tables, tmp_path: Path, stopped: str) -> None:
    new = Run(changed(tables, tmp_path, "users"), tmp_path, model=POLICY)
    assert new.trainer.validate(new.model, new.data, ckpt_path=stopped, verbose=False)
    other = Run(tables, tmp_path, model=POLICY, data={"prompt": PromptTemplate("Once:\n{history}", max_tokens=128)})
    with pytest.raises(UserError, match=r"prompt\.template was 'Seen"):
        other.trainer.validate(other.model, other.data, ckpt_path=stopped)


def test_a_resumed_run_says_which_settings_it_changes(tables, tmp_path: Path, stopped: str, caplog) -> None:
    model = {"objective": GRPO(learning_rate=1e-3), "warm_start_epochs": 0}
    with caplog.at_level("INFO"):
        Run(tables, tmp_path, model=model, max_epochs=1, **QUICK).fit(ckpt_path=stopped)
    assert "model.objective.learning_rate 0.001 (was 0.01)" in caplog.text


@pytest.mark.parametrize("kind", ["cut", "foreign", "text", "older"])
def test_a_file_that_is_no_checkpoint_is_one_line(kind, stopped, small, tmp_path, capsys, monkeypatch) -> None:  # noqa: F811
    monkeypatch.setattr("recsys.data.HistoryDataModule.load", None)
    path, content = tmp_path / "a.ckpt", Path(stopped).read_bytes()
    if kind == "foreign":
        torch.save({"weights": torch.zeros(2)}, path)
    elif kind == "older":
        torch.save({k: v for k, v in loaded(Path(stopped)).items() if k != "fingerprint"}, path)
    else:
        path.write_bytes(content[: len(content) // 2] if kind == "cut" else b"epoch,loss\n1,2\n")
    for subcommand in ("fit", "test"):
        line = lines_of_failure([subcommand, config("debug.yaml"), *small, f"--ckpt_path={path}"], capsys)
        assert str(path) in line


# --------------------------------------------------------------------------------------------- last and best


def test_last_and_best_are_the_newest_run_s(small, tmp_path: Path, capsys) -> None:  # noqa: F811
    run = [config("debug.yaml"), *small]
    for which in ("last", "best"):
        assert "no run below" in lines_of_failure(["validate", *run, f"--ckpt_path={which}"], capsys)
    main(["fit", *run])
    capsys.readouterr()
    main(["fit", *run, "--trainer.max_epochs=1"])
    printed = re.search(r"^best by val/wpauc (.*): (.*)\nlast: (.*)\n\Z", capsys.readouterr().out, re.M)
    score, best, last = printed.groups()
    newest = tmp_path / "checkpoints/debug/version_1"
    assert (tmp_path / last) == newest / "last.ckpt"
    assert [tmp_path / best] == list(newest.glob("best-*.ckpt"))
    trained = [path for path in (tmp_path / "runs/debug/version_1/ranks").iterdir() if path.name != "step0.parquet"]
    assert float(score) == pytest.approx(max(pd.read_parquet(p)["wpauc"].mean() for p in trained), abs=1e-4)
    shutil.copytree(newest, tmp_path / "checkpoints/other/version_7")  # of another name
    capsys.readouterr()
    main(["validate", *run, "--ckpt_path=last"])
    assert str(newest.relative_to(tmp_path) / "last.ckpt") in capsys.readouterr().out
    main(["test", *run, "--ckpt_path=best"])
    assert "debug/version_1/best-" in capsys.readouterr().out
    main(["fit", *run, "--ckpt_path=last", "--trainer.max_epochs=2"])
    [resumed] = [p for p in (tmp_path / "checkpoints/debug").iterdir() if p.name not in ("version_0", "version_1")]
    assert loaded(resumed / "last.ckpt")["global_step"] == 2 * loaded(newest / "last.ckpt")["global_step"]


# --------------------------------------------------------------------------------------------- signals


def kill(number: int):
    return lambda *args: os.kill(os.getpid(), number)


@pytest.mark.parametrize("place", ["on_train_batch_end", "on_validation_batch_start", "search"])
def test_sigterm_saves_and_exits_with_143(place, small, tmp_path: Path, monkeypatch) -> None:  # noqa: F811
    if place == "search":
        found = BeamNegatives.groups_of
        monkeypatch.setattr(BeamNegatives, "groups_of", lambda *args: (kill(signal.SIGTERM)(), found(*args))[1])
    else:
        callback = At(place, 1, kill(signal.SIGTERM))
        monkeypatch.setattr(BeamNegatives, place, getattr(callback, place), raising=False)
        monkeypatch.setattr(BeamNegatives, place, lambda self, *args: getattr(callback, place)(*args), raising=False)
    with pytest.raises(SystemExit) as stop:
        main(["fit", config("debug.yaml"), *small, "--negatives.batch_size=1", "--data.eval_batch_size=2"])
    assert stop.value.code == 143
    assert list(tmp_path.glob("checkpoints/debug/version_0/last.ckpt"))


@pytest.mark.parametrize("subcommand", ["validate", "test", "predict"])
def test_sigterm_ends_what_only_ranks(subcommand: str, small, tmp_path: Path, monkeypatch) -> None:  # noqa: F811
    run = [config("debug.yaml"), *small, "--data.eval_batch_size=2"]
    main(["fit", *run])
    begun = []

    def stop(self, trainer, module, batch, number, *args) -> None:
        begun.append(number)
        kill(signal.SIGTERM)()

    hook = {"validate": "validation"}.get(subcommand, subcommand)
    monkeypatch.setattr(BeamNegatives, f"on_{hook}_batch_start", stop, raising=False)
    with pytest.raises(SystemExit) as ended:
        main([subcommand, *run, "--ckpt_path=last"])
    assert ended.value.code == 143
    assert begun == [0]
    assert not list(tmp_path.rglob("*.predictions.parquet"))


def test_sigterm_ends_all_processes(small, tmp_path: Path) -> None:  # noqa: F811
    """Lightning's own handler broadcasts wherever the process is, and waits for ever."""
    args = ["fit", config("debug.yaml"), *small, "--trainer.strategy=ddp", "--trainer.devices=2"]
    args += ["--trainer.max_epochs=2000", "--model.warm_start_epochs=1000", "--trainer.check_val_every_n_epoch=1000"]
    run = subprocess.Popen([sys.executable, "-m", "recsys.cli", *args], start_new_session=True)
    try:
        path = tmp_path / "checkpoints/debug/version_0/last.ckpt"
        until = time.monotonic() + 120
        while not path.is_file() and run.poll() is None and time.monotonic() < until:
            time.sleep(0.1)
        os.killpg(run.pid, signal.SIGTERM)
        assert run.wait(60) == 143
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(run.pid, signal.SIGKILL)
    assert loaded(path)["global_step"] > 0


def test_sigint_exits_with_130(small, tmp_path: Path, monkeypatch) -> None:  # noqa: F811
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has background jobs ignore it
    monkeypatch.setattr(BeamNegatives, "on_train_batch_end", lambda *args: kill(signal.SIGINT)(), raising=False)
    with pytest.raises(SystemExit) as stop:
        main(["fit", config("debug.yaml"), *small])
    signal.signal(signal.SIGINT, before)  # Lightning ignores it from then on
    assert stop.value.code == 130
    assert list(tmp_path.glob("checkpoints/debug/version_0/last.ckpt"))


# --------------------------------------------------------------------------------------------- what is saved when


@pytest.mark.parametrize("epoch", [1, 2])
def test_an_interrupted_validation_begins_again(tables, tmp_path: Path, epoch: int) -> None:
    options = {"model": POLICY, "data": {"eval_batch_size": 8}, "max_epochs": 2}
    whole = Run(tables, tmp_path / "whole", **options).fit()
    batches = []

    def stop(*args) -> None:
        batches.append(args)
        if len(batches) == 3:
            raise KeyError

    cut = Run(tables, tmp_path / "cut", **options)
    cut.trainer.callbacks.insert(0, At("on_validation_batch_end", whole.trainer.global_step * epoch // 2, stop))
    with pytest.raises(KeyError):
        cut.fit()
    rest = Run(tables, tmp_path / "rest", **options).fit(ckpt_path=str(cut.checkpoints / "last.ckpt"))
    for expected, found in zip(whole.report.validations, rest.report.validations, strict=True):
        assert (found.step, len(found.row)) == (expected.step, len(whole.data.histories.val))
        assert found.mean("ndcg@10") == pytest.approx(expected.mean("ndcg@10"))
    assert rest.trainer.callback_metrics["val/ndcg@10"].item() == pytest.approx(expected.mean("ndcg@10"))


@pytest.mark.parametrize(
    "trainer", [{"check_val_every_n_epoch": 2, "max_epochs": 3}, {"max_steps": 6}, {"val_check_interval": 3}]
)
def test_the_end_is_validated_and_saved(tables, tmp_path: Path, trainer) -> None:
    run = Run(tables, tmp_path, model=POLICY, **trainer).fit()
    last = loaded(run.checkpoints / "last.ckpt")
    assert run.report.validations[-1].step == last["global_step"] == run.trainer.global_step
    assert last["callbacks"]["RankingReport"]["validations"][-1]["step"] == run.trainer.global_step
    for name, weight in run.weights.items():
        assert torch.equal(last["state_dict"][f"policy.{name}"], weight)


def test_gradients_of_an_unfinished_step_are_computed_again(tables, tmp_path: Path) -> None:
    options = {"model": POLICY, "accumulate_grad_batches": 3, "max_epochs": 1, **QUICK}
    whole = Run(tables, tmp_path / "whole", **options).fit()
    path = tmp_path / "mid.ckpt"

    def stop(trainer, module) -> None:
        if trainer.fit_loop.batch_idx == 1:
            trainer.save_checkpoint(path)
            raise KeyError

    with pytest.raises(KeyError):
        Run(tables, tmp_path / "cut", **options, callbacks=[At("on_train_batch_end", 0, stop)]).fit()
    resumed = Run(tables, tmp_path / "rest", **options).fit(ckpt_path=str(path))
    for name, weight in whole.weights.items():
        assert torch.equal(resumed.weights[name], weight), name


def test_what_was_never_validated_is_not_the_best(tables, tmp_path: Path) -> None:
    run = Run(tables, tmp_path, model=POLICY, callbacks=[At("on_train_batch_end", 2, fail)])
    with pytest.raises(KeyError):
        run.fit()
    assert {path.name for path in run.checkpoints.iterdir()} == {"last.ckpt", "last.adapter"}


def test_what_is_not_finite_is_not_saved(tables, tmp_path: Path, monkeypatch) -> None:
    def poison(trainer, module) -> None:
        with torch.no_grad():
            next(iter(module.policy.trainable().values())).fill_(float("nan"))

    run = Run(tables, tmp_path, model=POLICY, callbacks=[At("on_train_batch_end", 8, poison)], **QUICK)
    spoilt = {"val/wpauc": torch.tensor(float("nan")), "epoch": torch.tensor(0), "step": torch.tensor(0)}
    monkeypatch.setattr(run.checkpoint, "_monitor_candidates", lambda trainer: spoilt)
    with pytest.raises(UserError, match="the weights are not finite after optimiser step 8"):
        run.fit()
    last = loaded(run.checkpoints / "last.ckpt")
    assert last["global_step"] == 4
    assert all(weight.isfinite().all() for weight in last["state_dict"].values())
    assert not list(run.checkpoints.glob("best-*"))


@pytest.mark.parametrize(("minutes", "steps", "saved"), [(1e-9, None, 3), (None, 2, 2)])
def test_the_last_is_saved_by_time_and_by_steps(tables, tmp_path: Path, minutes, steps, saved: int) -> None:
    run = Run(tables, tmp_path, model=POLICY, callbacks=[At("on_train_batch_start", 3, fail)], **QUICK)
    run.checkpoint.every_n_minutes, run.checkpoint.every_n_steps = minutes, steps
    run.checkpoint.save_on_exception = False
    with pytest.raises(KeyError):
        run.fit()
    assert loaded(run.checkpoints / "last.ckpt")["global_step"] == saved


@pytest.mark.parametrize("mode", ["beam", "mixed"])
def test_a_refresh_goes_on_with_the_rows_that_it_has(tables, tmp_path: Path, monkeypatch, mode) -> None:
    def run(folder: str, limit: int | None = None, **kwargs) -> tuple[Run, int]:
        run, calls = Run(tables, tmp_path / folder, model=POLICY, max_epochs=1, **QUICK), []
        run.negatives.__init__(count=8, mode=mode, batch_size=4)
        run.checkpoint.every_n_minutes, run.checkpoint.save_on_exception = 1e-9, False
        found = BeamNegatives.groups_of

        def counted(*args):
            if len(calls) == limit:
                raise KeyError
            calls.append(args)
            return found(*args)

        monkeypatch.setattr(run.negatives, "groups_of", lambda *args: counted(run.negatives, *args))
        if limit is None:
            run.fit(**kwargs)
        else:
            with pytest.raises(KeyError):
                run.fit(**kwargs)
        return run, len(calls)

    whole, calls = run("whole")
    cut, done = run("cut", 5)
    rest, left = run("rest", ckpt_path=str(cut.checkpoints / "last.ckpt"))
    assert (calls, done, left) == (8, 5, 3)
    assert torch.equal(whole.negatives.groups.items, rest.negatives.groups.items)
    for name, weight in whole.weights.items():
        assert torch.equal(rest.weights[name], weight), name


def test_a_full_disk_leaves_the_checkpoint_before(tables, tmp_path: Path, monkeypatch) -> None:
    """Nor does it matter that there is no room for temporary files elsewhere."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    run = Run(tables, tmp_path, model=POLICY, max_epochs=1, **QUICK).fit()
    before = {path: path.read_bytes() for path in run.checkpoints.rglob("*") if path.is_file()}

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("recsys.atomic._flush", full)
    with pytest.raises(UserError, match=r"last.ckpt cannot be saved \(No space left on device\)"):
        run.checkpoint.save(run.trainer)
    assert {path: path.read_bytes() for path in run.checkpoints.rglob("*") if path.is_file()} == before

    def full_too(folder: Path) -> None:
        raise SafetensorError("I/O error: No space left on device")

    monkeypatch.undo()
    monkeypatch.setattr(run.model.policy, "save_adapter", full_too)
    with pytest.raises(UserError, match=r"last.ckpt cannot be saved \(I/O error: No space left on device\)"):
        run.checkpoint.save(run.trainer)


def test_a_disk_that_is_full_of_events_is_one_line(small, monkeypatch, capsys) -> None:  # noqa: F811
    def full(*args) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("tensorboard.summary.writer.record_writer.RecordWriter.write", full)
    line = lines_of_failure(["fit", config("debug.yaml"), *small], capsys)
    assert "No space left on device: nothing more can be written there" in line


# --------------------------------------------------------------------------------------------- folders


def test_runs_that_start_together_have_folders_of_their_own(tables, tmp_path: Path) -> None:
    loggers = [RunLogger(str(tmp_path / "runs"), "same") for _ in range(2)]
    assert [logger.version for logger in loggers] == [0, 1]
    runs = [Run(tables, tmp_path, logger=False, fast_dev_run=False) for _ in range(2)]
    for run in runs:
        run.checkpoint.setup(run.trainer, run.model, "fit")
    assert len({run.checkpoints for run in runs}) == 2


def test_a_run_without_a_logger_or_for_trial_leaves_no_files_behind(small, tmp_path: Path) -> None:  # noqa: F811
    before = {path.name for path in tmp_path.iterdir()}
    main(["fit", config("debug.yaml"), *small, "--trainer.fast_dev_run=1"])
    assert {path.name for path in tmp_path.iterdir()} == before
    for version in range(2):
        main(["fit", config("debug.yaml"), *small, "--trainer.logger=false"])
        files = {path.name for path in (tmp_path / f"checkpoints/run/version_{version}").iterdir()}
        assert {"config.yaml", "ranks", "last.ckpt"} <= files
    assert {path.name for path in tmp_path.iterdir()} == before | {"checkpoints"}


@pytest.mark.parametrize(
    "option",
    [
        "report.resamples=0",
        "report.examples=-1",
        "trainer.max_epochs=-1",
        "trainer.check_val_every_n_epoch=0",
        "trainer.accumulate_grad_batches=0",
        "trainer.num_nodes=99999999999999999999",
        "trainer.val_check_interval=0",
        "trainer.val_check_interval=1.5",
        "checkpoint.save_top_k=-2",
        "checkpoint.mode=best",
        "checkpoint.every_n_minutes=0",
        "checkpoint.every_n_train_steps=0",
        "checkpoint.filename=last",
        "checkpoint.monitor=recall@10",
        "checkpoint.dirpath=data.yaml/below",
        "logger.save_dir=data.yaml",
        "logger.max_queue=0",
        "model.warm_start_epochs=-1",
        "model.lr_warmup=2",
    ],
)
def test_options_are_checked_before_anything_is_loaded(option, small, monkeypatch, capsys) -> None:  # noqa: F811
    monkeypatch.setattr("recsys.data.HistoryDataModule.load", None)
    monkeypatch.setattr("recsys.policy.TinyPolicy.load", None)
    line = lines_of_failure(["fit", config("debug.yaml"), *small, f"--{option}"], capsys)
    assert option.split("=")[0].split(".")[1] in line


def test_an_interval_beyond_the_epoch_is_refused(small, capsys, monkeypatch) -> None:  # noqa: F811
    monkeypatch.setattr("recsys.policy.TinyPolicy.load", None)
    line = lines_of_failure(["fit", config("debug.yaml"), *small, "--trainer.val_check_interval=99"], capsys)
    assert "trainer.val_check_interval is 99, but an epoch has 1 batch" in line
