"""The command line: every shipped config parses and runs a step, and a user's mistake is one line."""

from __future__ import annotations

import importlib.metadata
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from recsys.cli import main

ROOT = Path(__file__).parent.parent
CONFIGS = sorted(path.name for path in (ROOT / "configs").glob("*.yaml"))


@pytest.fixture
def small(tables, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Overrides that put any config on the small policy and the small tables, in a folder of its own."""
    (tmp_path / "data.yaml").write_text(
        yaml.safe_dump(
            {
                "source": {"class_path": "recsys.data.Table", "init_args": tables},
                "prompt": {"max_history": 4, "max_tokens": 128},
                "batch_size": 8,
                "policy_stretches": 8,
                "warm_start_stretches": 8,
                "val_rows": 8,
                "test_rows": 8,
            }
        )
    )
    monkeypatch.chdir(tmp_path)
    return [
        "--data=data.yaml",
        "--model.policy=recsys.policy.TinyPolicy",
        "--model.policy.init_args.hidden_size=32",
        "--model.window.k=3",
        "--trainer.enable_progress_bar=false",
        "--trainer.accelerator=cpu",
    ]


def config(name: str) -> str:
    return f"--config={ROOT / 'configs' / name}"


@pytest.mark.parametrize("name", CONFIGS)
def test_shipped_configs_parse_as_they_are(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["fit", f"--config={ROOT / 'configs' / name}", "--print_config"])
    assert stop.value.code == 0
    found = yaml.safe_load(capsys.readouterr().out)
    assert found["trainer"]["reload_dataloaders_every_n_epochs"] == 1
    assert not found["trainer"]["callbacks"]  # the user's own
    assert (ROOT / "configs" / name).read_text().startswith("#"), "a config says what it is for"


def test_two_processes_train_and_one_of_them_has_no_row_to_find_negatives_for(small: list[str], tmp_path: Path) -> None:
    """A single stretch: the second process searches, and scores under the reference, for no row at all."""
    processes = ["--trainer.devices=2", "--trainer.strategy=ddp", "--trainer.max_epochs=3", "--data.policy_stretches=1"]
    command = [sys.executable, "-m", "recsys.cli", "fit", config("debug.yaml"), *small, *processes]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "wpauc: TAWin - warm start" in done.stdout


@pytest.mark.parametrize("name", CONFIGS)
def test_shipped_configs_run(name: str, small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["fit", config(name), *small])
    assert "validation after" in capsys.readouterr().out
    assert list(tmp_path.glob("checkpoints/*/version_0/last.ckpt"))
    assert list(tmp_path.glob("runs/*/version_0/config.yaml"))


def test_fit_then_resume_test_and_predict(small: list[str], tmp_path: Path) -> None:
    debug = config("debug.yaml")
    main(["fit", debug, *small])
    [events] = tmp_path.glob("runs/*/version_0/events*")
    written = events.read_bytes()
    assert b"objective/learning_rate" in written  # set, so in the HParams tab
    assert b"data/num_workers" not in written  # at its default
    [checkpoint] = tmp_path.glob("checkpoints/*/version_0/last.ckpt")
    main(["fit", debug, *small, f"--ckpt_path={checkpoint}", "--trainer.max_epochs=3"])
    assert list(tmp_path.glob("checkpoints/*/version_1/last.ckpt"))
    main(["test", debug, *small, f"--ckpt_path={checkpoint}"])
    [ranks] = tmp_path.glob("runs/*/version_2/ranks/test.parquet")
    rows = pd.read_parquet(ranks)
    events = EventAccumulator(str(ranks.parents[1])).Reload()
    for name, mean in {
        "test": rows["recall@10"].mean(),
        "test_user_mean": rows.groupby("user_id")["recall@10"].mean().mean(),
    }.items():
        assert events.Scalars(f"{name}/recall@10")[-1].value == pytest.approx(mean)
    main(["predict", debug, *small, f"--ckpt_path={checkpoint}"])
    frame = pd.read_parquet(checkpoint.with_name("last.predictions.parquet"))
    assert frame["user_id"].nunique() == 30
    assert frame.groupby("user_id").size().isin([7, 8]).all()  # 12 of 20 are seen, or 13 where two share a title
    of_rows = ["--predictions.rows=test", "--predictions.exclude_seen=false", "--predictions.k=20"]
    main(["predict", debug, *small, f"--ckpt_path={checkpoint}", *of_rows, "--predictions.path=rows.parquet"])
    frame = pd.read_parquet("rows.parquet").merge(rows[["row", "rank"]], on="row")
    assert len(frame) == 8 * 20
    found = frame[frame["item_id"] == frame["target_item_id"]]
    assert found["rank_x"].tolist() == pytest.approx(found["rank_y"], abs=1)  # a tie counts one half


@pytest.mark.parametrize("name", CONFIGS)
def test_data_prints_the_card_and_loads_no_model(
    name: str, small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("recsys.policy.TinyPolicy.load", None)
    before = {path.name for path in tmp_path.iterdir()}
    main(["data", config(name), *small])
    card = dict(re.split(r"  +", line) for line in capsys.readouterr().out.splitlines())
    assert card["items"] == "20"
    assert card["rows"] == "train 264, validation 33, test 33"
    assert {path.name for path in tmp_path.iterdir()} == before  # no folder of a run


def lines_of_failure(args: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as stop:
        main(args)
    assert stop.value.code == 1
    error = capsys.readouterr().err
    assert "Traceback" not in error
    [line] = [line for line in error.splitlines() if line.startswith("recsys: error: ")]
    return line


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("source.init_args.filters.k_core=-1", "filters.k_core must be at least 0"),
        ("source.init_args.filters.min_rating=.inf", "filters.min_rating must be a number"),
        ("source.init_args.filters.end=nan", "filters.end must be a number or an ISO 8601 date"),
        ("source.init_args.encoding=null", "encoding None"),
        ("source.init_args.cache_dir=null", "cache_dir must name a folder"),
        ("source.init_args.time=when", "column 'when' is missing"),
        ("prompt.max_tokens=100000000000000000000", "max_tokens must be at most"),
    ],
)
def test_nonsense_in_an_option_of_the_data_is_one_line(
    option: str, message: str, small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before anything is converted."""
    folder = [] if "cache_dir" in option else [f"--data.source.init_args.cache_dir={tmp_path / 'none'}"]
    assert message in lines_of_failure(["data", config("debug.yaml"), *small, *folder, f"--data.{option}"], capsys)
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("k", [1, 5, 20, 50])
def test_k_alone_is_enough_with_every_shipped_config(
    k: int, small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_films(tmp_path, items=100)
    short = ["--model.warm_start_epochs=0", "--trainer.limit_train_batches=1", "--trainer.max_epochs=1"]
    for name in CONFIGS:
        main(["fit", config(name), *small, f"--model.window.k={k}", *short])
        assert f"recall@{k}: " in capsys.readouterr().out, name
        assert list(tmp_path.glob(f"checkpoints/{name.removesuffix('.yaml')}/version_0/best-*.ckpt"))


@pytest.mark.parametrize("k", [1, 5, 20, 50])
def test_k_through_fit_test_and_predict(
    k: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a catalogue of 100 titles, with the debug config as it is but for its data."""
    write_films(tmp_path, items=100)
    monkeypatch.chdir(tmp_path)
    arguments = [config("debug.yaml"), "--data=data.yaml", f"--model.window.k={k}", "--trainer.accelerator=cpu"]
    main(["fit", *arguments])
    assert f"recall@{k}: TAWin - warm start = " in capsys.readouterr().out
    checkpoint = f"--ckpt_path={tmp_path}/checkpoints/debug/version_0/last.ckpt"
    main(["test", *arguments, checkpoint])
    ranks = pd.read_parquet(tmp_path / "runs/debug/version_1/ranks/test.parquet")
    assert {f"recall@{k}", "wpauc"} <= set(ranks.columns)
    main(["predict", *arguments, checkpoint, f"--predictions.k={k}"])
    found = pd.read_parquet(tmp_path / "checkpoints/debug/version_0/last.predictions.parquet")
    assert (found.groupby("user_id").size() == k).all()


def write_films(folder: Path, items: int) -> None:
    events = [(f"u{u}", f"i{(7 * u + t) % items}", 100 * t + u) for u in range(24) for t in range(10)]
    pd.DataFrame(events, columns=["user_id", "item_id", "timestamp"]).to_csv(folder / "log.csv", index=False)
    titles = pd.DataFrame({"item_id": [f"i{i}" for i in range(items)], "title": [f"Film {i}" for i in range(items)]})
    titles.to_csv(folder / "items.csv", index=False)
    files = {"interactions": "log.csv", "items": "items.csv", "cache_dir": str(folder / "cache")}
    source = {"class_path": "recsys.data.Table", "init_args": files}
    rows = dict.fromkeys(("policy_stretches", "warm_start_stretches", "val_rows", "test_rows"), 8)
    (folder / "data.yaml").write_text(yaml.safe_dump({"source": source, "prompt": {"max_history": 4}, **rows}))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--model.window.half_width=12", "--model.num_beams=12"], "set model.num_beams to 16 or more"),
        (["--model.cutoffs=[1, 50]"], "cutoffs has 50, but the catalogue has 20 items"),
        (["--model.window.k=18"], "set model.window.k to 17 or less"),
        (["--negatives.mode=random"], "negatives.mode is random, but model.objective"),
        (["--negatives.count=3"], "set negatives.count to 6 or more"),
        (["--model.window.alpha=0.1"], "model.window has k and alpha"),
        (["--checkpoint.monitor=val/recall@7"], "AdapterCheckpoint monitors 'val/recall@7', which no metric has"),
        (["--checkpoint.monitor=val_loss"], "AdapterCheckpoint monitors 'val_loss', which no metric has"),
        (["--ckpt_path=nowhere.ckpt"], "no such file: nowhere.ckpt"),
        (["--data.source.init_args.items=nowhere.csv"], "nowhere.csv: no such file"),
        (["--data.source.init_args.title=name"], "column 'name' is missing"),
        (["--data.val_rows=0"], "data.val_rows"),
        (["--data.prompt.template=no place"], "history"),
    ],
)
def test_mistakes_are_one_line(
    overrides: list[str], message: str, small: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in lines_of_failure(["fit", config("debug.yaml"), *small, *overrides], capsys)


def test_contradictions_are_refused_before_data_or_model_are_touched(
    small: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("recsys.data.HistoryDataModule.load", None)
    monkeypatch.setattr("recsys.policy.TinyPolicy.load", None)
    for overrides, message in (
        (["--model.window.k=20", "--model.num_beams=25"], "num_beams is 25: set model.num_beams to 31"),
        (["--model.window.k=20", "--negatives.count=30"], "count is 30: set negatives.count to 31"),
        (["--model.cutoffs=[40]", "--model.num_beams=25"], "set model.num_beams to 40"),
        (["--checkpoint.monitor=val/recall@7"], "val/recall@7"),
    ):
        assert re.search(message, lines_of_failure(["fit", config("debug.yaml"), *small, *overrides], capsys))


POLICY, OBJECTIVE = "--model.policy.init_args.", "--model.objective.init_args."


@pytest.mark.parametrize(
    "override",
    [
        *(f"{OBJECTIVE}learning_rate={value}" for value in ("-1", ".nan", ".inf")),
        *(f"--model.warm_start.init_args.learning_rate={value}" for value in ("-1", ".nan", ".inf")),
        *(f"{OBJECTIVE}{name}={value}" for name in ("kl_coef", "anchor_coef") for value in ("-1", ".nan", ".inf")),
        *(f"{OBJECTIVE}{name}={value}" for name in ("clip_eps", "temperature") for value in ("0", ".nan", ".inf")),
        *(f"{POLICY}{name}=0" for name in ("hidden_size", "layers", "heads")),
        f"{POLICY}hidden_size=33",
        *(f"{POLICY}lora={value}" for value in ("{r: 0}", "{alpha: -1}", "{target_modules: []}")),
        *(f"--model.window.half_width={value}" for value in ("0", ".nan", ".inf")),
        *(f"--model.lr_warmup={value}" for value in ("-1", ".nan", ".inf")),
        "--model.warm_start_epochs=-1",
        "--model.cutoffs=[]",
        "--model.cutoffs=[0]",
        "--model.num_beams=0",
        *(f"--negatives.{name}=0" for name in ("count", "every_n_epochs", "every_n_steps", "batch_size")),
    ],
)
def test_a_senseless_number_is_refused_before_data_or_model_are_touched(
    override: str, small: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("recsys.data.HistoryDataModule.load", None)
    monkeypatch.setattr("recsys.policy.TinyPolicy.load", None)
    name = override.split("=")[0].rsplit(".", 1)[1]
    assert name in lines_of_failure(["fit", config("debug.yaml"), *small, override], capsys)


def test_an_unknown_item_is_named_with_its_file_and_row(
    small: list[str], tables: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = Path(tables["interactions"]).read_text().splitlines()
    lines[4] = "u0,i999,5"
    (tmp_path / "broken.csv").write_text("\n".join(lines))
    override = f"--data.source.init_args.interactions={tmp_path / 'broken.csv'}"
    line = lines_of_failure(["fit", config("debug.yaml"), *small, override], capsys)
    assert "broken.csv, row 5" in line
    assert "i999" in line


def test_existing_predictions_are_not_overwritten(
    small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.csv").write_text("precious")
    line = lines_of_failure(["predict", config("debug.yaml"), *small, "--predictions.path=mine.csv"], capsys)
    assert "mine.csv exists already" in line
    assert (tmp_path / "mine.csv").read_text() == "precious"


def printed(args: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    with pytest.raises(SystemExit) as stop:
        main([*args, "--print_config"])
    assert stop.value.code == 0
    return yaml.safe_load(capsys.readouterr().out)


def test_a_part_that_is_replaced_inherits_nothing(
    small: list[str], tables: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = {"data": {"source": {"class_path": "recsys.data.Table", "init_args": {**tables, "filters": {"k_core": 5}}}}}
    base["data"] |= {"batch_size": 3, "prompt": {"max_history": 2}}
    policy = {"class_path": "recsys.policy.LLMPolicy", "init_args": {"model": "x", "lora": {"r": 4}}}
    objective = {"class_path": "recsys.objectives.TAWin", "init_args": {"learning_rate": 0.5, "gate": "none"}}
    base["model"] = {"policy": policy, "objective": objective}
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(base))
    (tmp_path / "second.yaml").write_text(yaml.safe_dump({"data": "data.yaml", "model": {"num_beams": 7}}))
    fit = ["fit", "--config=base.yaml"]
    for more in (["--data=data.yaml"], ["--data", "data.yaml"], ["--config=second.yaml"]):
        data = printed([*fit, *more], capsys)["data"]
        assert data["source"]["init_args"]["filters"] is None
        assert (data["batch_size"], data["prompt"]["max_history"], data["eval_batch_size"]) == (8, 4, 16)
    model = printed([*fit, "--model.policy", "recsys.policy.TinyPolicy", "--model.policy.init_args.heads=4"], capsys)
    assert model["model"]["policy"]["init_args"]["lora"] is None
    assert model["model"]["policy"]["init_args"]["heads"] == 4
    assert model["model"]["objective"]["init_args"]["learning_rate"] == 0.5
    given = {"class_path": "recsys.objectives.TAWin", "init_args": {"temperature": 2.0}}
    same = printed([*fit, f"--model.objective={json.dumps(given)}"], capsys)["model"]["objective"]["init_args"]
    assert (same["gate"], same["temperature"], same["learning_rate"]) == ("threshold", 2.0, 1e-4)


@pytest.mark.parametrize(
    ("option", "part"),
    [
        ("--model.objective.init_args.learning_rate=5e-4", "--model.objective=recsys.objectives.TAWin"),
        ("--data.batch_size=3", "--data=data.yaml"),
        ("--data.batch_size=3", "--config=second.yaml"),
        ("--data.batch_size=3", "-c=second.yaml"),
        ("--model.policy.init_args.heads=4", '--model.policy={"class_path": "recsys.policy.TinyPolicy"}'),
    ],
)
def test_an_option_that_a_part_behind_it_would_drop_is_refused(
    small: list[str], option: str, part: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("second.yaml").write_text(yaml.safe_dump({"data": "data.yaml"}))
    fit = ["fit", config("debug.yaml"), "--data=data.yaml"]
    with pytest.raises(SystemExit) as stop:
        main([*fit, option, part])
    assert stop.value.code == 1
    lost, replacing = option.partition("=")[0], part.partition("=")[0]
    assert f"{lost} stands before {replacing}" in capsys.readouterr().err
    assert printed([*fit, part, option], capsys)
    changes = '--model.objective={"init_args": {"clip_eps": 0.3}}'  # names no class, so it drops nothing
    found = printed([*fit, "--model.objective.init_args.learning_rate=5e-4", changes], capsys)["model"]["objective"]
    assert (found["init_args"]["learning_rate"], found["init_args"]["clip_eps"]) == (5e-4, 0.3)


def test_a_config_that_is_no_text_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "weights.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--config", str(tmp_path / "weights.yaml")])
    assert stop.value.code == 1
    assert f"recsys: error: --config {tmp_path / 'weights.yaml'}: 'utf-8'" in capsys.readouterr().err


def test_settings_inside_a_part_change_it(
    small: list[str], tables: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "more.yaml").write_text(yaml.safe_dump({"data": {"batch_size": 3}, "model": {"window": {"k": 4}}}))
    changed = ["--config=more.yaml", "--data.prompt.max_history=9", '--data.prompt={"max_tokens": 99}']
    found = printed(["fit", config("debug.yaml"), *small, *changed], capsys)
    assert found["data"]["batch_size"] == 3
    assert (found["data"]["prompt"]["max_history"], found["data"]["prompt"]["max_tokens"]) == (9, 99)
    assert found["data"]["source"]["init_args"]["items"] == tables["items"]
    assert found["model"]["window"]["k"] == 4
    assert found["model"]["objective"]["init_args"]["kl_coef"] == 0.01


def test_named_parts_and_the_users_own_callbacks(small: list[str], tmp_path: Path) -> None:
    own = "--trainer.callbacks+=lightning.pytorch.callbacks.LearningRateMonitor"
    parts = ["--checkpoint.save_top_k=0", "--checkpoint.dirpath=kept", "--report.examples=1", "--logger.name=mine"]
    main(["fit", config("debug.yaml"), *small, own, *parts, "--logger.save_dir=logs"])
    saved = yaml.safe_load((tmp_path / "logs/mine/version_0/config.yaml").read_text())
    assert [callback["class_path"] for callback in saved["trainer"]["callbacks"]] == [own.split("=")[1]]
    assert {path.name for path in (tmp_path / "kept/mine/version_0").iterdir()} == {"last.ckpt", "last.adapter"}
    main(["predict", config("debug.yaml"), *small, "--predictions.path=elsewhere/lists.csv", "--trainer.logger=false"])
    assert (tmp_path / "elsewhere/lists.csv").is_file()


def test_every_subcommand_takes_the_config_that_a_run_saved(
    small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["fit", config("debug.yaml"), *small])
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")  # what it read lies where it lay
    saved = f"--config={tmp_path}/runs/debug/version_0/config.yaml"
    for subcommand in ("data", "cost", "fit", "validate", "test", "predict"):
        main([subcommand, saved])
    assert "share of padding" in capsys.readouterr().out
    for version in range(4):  # and so do those that they saved
        main(["data", f"--config={tmp_path}/elsewhere/runs/debug/version_{version}/config.yaml"])


def test_classes_of_the_working_directory_are_found(
    small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine_here.py").write_text(
        "from recsys import TAWin, Table\n\n\nclass Mine(TAWin):\n    pass\n\n\nclass MySource(Table):\n    pass\n"
    )
    rest = ["--trainer.max_epochs=1", "--model.warm_start_epochs=0", "--trainer.accelerator=cpu"]
    script = Path(sys.executable).with_name("recsys")  # `python -c` would put the working directory on the path
    command = [str(script), "fit", config("debug.yaml"), *small, *rest]
    own = ["--model.objective", "mine_here.Mine", "--data.source.class_path=mine_here.MySource"]
    result = subprocess.run([*command, *own], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert " Mine " in result.stdout


def test_paths_in_a_yaml_file_count_from_that_file(
    small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "small_set").mkdir()
    write_films(tmp_path / "small_set", items=30)
    monkeypatch.chdir(tmp_path)
    main(["data", config("debug.yaml"), "--data=small_set/data.yaml", "--trainer.accelerator=cpu"])
    assert re.search(r"^items +30$", capsys.readouterr().out, re.M)
    model = {"class_path": "recsys.policy.LLMPolicy", "init_args": {"model": "weights", "adapter": "a"}}
    (tmp_path / "small_set" / "weights").mkdir()
    (tmp_path / "small_set" / "policy.yaml").write_text(yaml.safe_dump(model))
    found = printed(["fit", config("debug.yaml"), "--model.policy=small_set/policy.yaml"], capsys)["model"]["policy"]
    assert found["init_args"]["model"] == str(tmp_path / "small_set" / "weights")
    assert found["init_args"]["adapter"] == str(tmp_path / "small_set" / "a")
    hub = {"class_path": "recsys.data.HubDataset", "init_args": {"interactions": "weights", "items": "me/elsewhere"}}
    (tmp_path / "small_set" / "hub.yaml").write_text(yaml.safe_dump({"source": hub}))
    found = printed(["fit", config("debug.yaml"), "--data=small_set/hub.yaml"], capsys)["data"]["source"]["init_args"]
    assert found["interactions"] == str(tmp_path / "small_set" / "weights")
    assert found["items"] == "me/elsewhere"


def test_the_shipped_configs_can_be_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    main(["configs"])
    copied = {str(path.relative_to("configs")) for path in Path("configs").rglob("*.yaml")}
    assert copied == {str(path.relative_to(ROOT / "configs")) for path in (ROOT / "configs").rglob("*.yaml")}
    assert "configs exists already" in lines_of_failure(["configs"], capsys)
    main(["configs", "elsewhere/mine"])
    assert Path("elsewhere/mine/tawin.yaml").read_text() == (ROOT / "configs" / "tawin.yaml").read_text()
    with pytest.raises(SystemExit, match="0"):
        main(["configs", "--help"])
    assert "the new folder" in capsys.readouterr().out


def test_the_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out.split()[-1] == importlib.metadata.version("recsys-tawin")
