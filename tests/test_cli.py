"""The command line: every shipped config parses and runs a step, and a user's mistake is one line."""

from __future__ import annotations

import re
from pathlib import Path

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
                "rows_per_epoch": 8,
                "windows_per_epoch": 8,
                "val_rows": 8,
                "test_rows": 8,
            }
        )
    )
    monkeypatch.chdir(tmp_path)
    return [
        "--data=data.yaml",
        '--model.policy={"class_path": "recsys.policy.TinyPolicy", "init_args": {"hidden_size": 32}}',
        '--model.window={"k": 3, "half_width": 2, "alpha": null, "d": null}',
        "--model.beams=12",
        "--model.cutoffs=[1, 5, 10]",
        "--trainer.enable_progress_bar=false",
        "--trainer.accelerator=cpu",
    ]


def config_with(name: str, folder: Path, negatives: int = 8) -> str:
    """Write a copy of a shipped config whose groups fit the small catalogue; configs name files beside them."""
    config = yaml.safe_load((ROOT / "configs" / name).read_text())
    config["model"].pop("policy")
    config.pop("data")
    for callback in config["trainer"]["callbacks"]:
        if callback["class_path"] == "callbacks.BeamNegatives":
            callback.setdefault("init_args", {})["num_negatives"] = negatives
    (folder / name).write_text(yaml.safe_dump(config))
    return f"--config={folder / name}"


@pytest.mark.parametrize("name", CONFIGS)
def test_shipped_configs_parse_as_they_are(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["fit", f"--config={ROOT / 'configs' / name}", "--print_config"])
    assert stop.value.code == 0
    config = yaml.safe_load(capsys.readouterr().out)
    assert config["trainer"]["reload_dataloaders_every_n_epochs"] == 1
    assert (ROOT / "configs" / name).read_text().startswith("#"), "a config says what it is for"


@pytest.mark.parametrize("name", CONFIGS)
def test_shipped_configs_run(name: str, small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["fit", config_with(name, tmp_path), *small])
    assert "validation after" in capsys.readouterr().out
    assert list(tmp_path.glob("checkpoints/*/version_0/last.ckpt"))
    assert list(tmp_path.glob("runs/*/version_0/config.yaml"))


def test_fit_then_resume_test_and_predict(small: list[str], tmp_path: Path) -> None:
    config = config_with("debug.yaml", tmp_path)
    main(["fit", config, *small])
    [events] = tmp_path.glob("runs/*/version_0/events*")
    assert b"model/objective/init_args/gate" in events.read_bytes()  # hyperparameters, for the HParams tab
    [checkpoint] = tmp_path.glob("checkpoints/*/version_0/last.ckpt")
    main(["fit", config, *small, f"--ckpt_path={checkpoint}", "--trainer.max_epochs=3"])
    assert list(tmp_path.glob("checkpoints/*/version_1/last.ckpt"))
    main(["test", config, *small, f"--ckpt_path={checkpoint}"])
    [ranks] = tmp_path.glob("runs/*/version_2/ranks/test.parquet")
    rows = pd.read_parquet(ranks)
    events = EventAccumulator(str(ranks.parents[1])).Reload()
    for name, mean in {
        "test": rows["recall@10"].mean(),
        "test_user_mean": rows.groupby("user_id")["recall@10"].mean().mean(),
    }.items():
        assert events.Scalars(f"{name}/recall@10")[-1].value == pytest.approx(mean)
    main(["predict", config, *small, f"--ckpt_path={checkpoint}"])
    frame = pd.read_parquet(tmp_path / "predictions" / "part-000.parquet")
    assert len(frame) == 8
    assert set(frame["row"]) == set(rows["row"])
    assert frame["row"].is_unique
    for _, row in frame.iterrows():
        assert len(set(row["item_ids"])) == len(row["item_ids"]) == 12
        assert list(row["scores"]) == sorted(row["scores"], reverse=True)
        assert row["user_id"].startswith("u")
        assert row["target_item_id"].startswith("i")


@pytest.mark.parametrize("name", CONFIGS)
def test_data_prints_the_card_and_loads_no_model(
    name: str, small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("recsys.policy.TinyPolicy.load", None)
    before = {path.name for path in tmp_path.iterdir()} | {name}
    main(["data", config_with(name, tmp_path), *small])
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
    ("override", "message"),
    [
        ("--model.window.half_width=12", "model.beams"),
        ("--model.cutoffs=[1, 50]", "cutoffs: 50"),
        ("--ckpt_path=nowhere.ckpt", "no such file: nowhere.ckpt"),
        ("--data.source.init_args.items=nowhere.csv", "nowhere.csv: no such file"),
        ("--data.source.init_args.title=name", "column 'name' is missing"),
        ("--data.val_rows=0", "data.val_rows"),
        ("--data.prompt.template=no place", "history"),
    ],
)
def test_mistakes_are_one_line(
    override: str, message: str, small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in lines_of_failure(["fit", config_with("debug.yaml", tmp_path), *small, override], capsys)


def test_an_unknown_item_is_named_with_its_file_and_row(
    small: list[str], tables: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = Path(tables["interactions"]).read_text().splitlines()
    lines[4] = "u0,i999,5"
    (tmp_path / "broken.csv").write_text("\n".join(lines))
    override = f"--data.source.init_args.interactions={tmp_path / 'broken.csv'}"
    line = lines_of_failure(["fit", config_with("debug.yaml", tmp_path), *small, override], capsys)
    assert "broken.csv, row 5" in line
    assert "i999" in line


def test_existing_predictions_are_not_overwritten(
    small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "predictions").mkdir()
    (tmp_path / "predictions" / "part-000.parquet").write_text("precious")
    line = lines_of_failure(["predict", config_with("debug.yaml", tmp_path), *small], capsys)
    assert "exists already" in line
    assert (tmp_path / "predictions" / "part-000.parquet").read_text() == "precious"
