"""Every policy, data and trainer config, put into the full-scale run: it parses and runs a few steps in small."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from recsys.cli import main
from recsys.data.sources import movielens
from tests.test_sources_published import review_2018, write_json

CONFIGS = Path(__file__).parent.parent / "configs"
LARGE = "--config=configs/large.yaml"  # of the copy in the working directory, from where its data files count
TINY = '--model.policy={"class_path": "recsys.policy.TinyPolicy", "init_args": {"hidden_size": 32}}'
SMALL = [
    "--model.warm_start_epochs=1",
    "--data.batch_size=4",
    "--data.eval_batch_size=4",
    "--data.warm_start_stretches=4",
    "--data.policy_stretches=4",
    "--data.val_rows=4",
    "--data.test_rows=4",
    "--trainer.max_epochs=2",
    "--trainer.enable_progress_bar=false",
    "--trainer.accelerator=cpu",
]
ITEMS, USERS, EVENTS = 60, 24, 15  # each user walks on, so each item is chosen six times


def of(folder: str) -> list[str]:
    return sorted(path.name for path in (CONFIGS / folder).glob("*.yaml"))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with small files in the place of each published set."""
    start = 1_500_000_000  # July 2017
    log = [(f"u{u}", f"B{(7 * u + t) % ITEMS}", start + 100 * t + u) for u in range(USERS) for t in range(EVENTS)]
    amazon, yelp = tmp_path / "data" / "amazon", tmp_path / "data" / "yelp"
    amazon.mkdir(parents=True)
    yelp.mkdir()
    for name in ("Industrial_and_Scientific", "Office_Products", "Toys_and_Games"):
        write_json(amazon / f"{name}_5.json.gz", [review_2018(*event, 5.0) for event in log])
        metadata = [{"asin": f"B{i}", "title": f"Thing {i}", "category": ["Things"]} for i in range(ITEMS)]
        write_json(amazon / f"meta_{name}.json.gz", metadata)
    places = [{"business_id": f"B{i}", "name": f"Place {i}", "categories": "Food"} for i in range(ITEMS)]
    write_json(yelp / "yelp_academic_dataset_business.json", places)
    visits = [
        {
            "user_id": user,
            "business_id": item,
            "stars": 4.0,
            "date": f"2018-01-01 00:{time // 60 % 60:02}:{time % 60:02}",
        }
        for user, item, time in log
    ]
    write_json(yelp / "yelp_academic_dataset_review.json", visits)
    ratings = "".join(f"{user}\t{item}\t3\t{time}\n" for user, item, time in log)
    (tmp_path / "ml-100k.inter").write_text(f"user_id:token\titem_id:token\trating:float\ttimestamp:float\n{ratings}")
    films = "".join(f"B{i}\tFilm {i}\t1995\tAction\n" for i in range(ITEMS))
    (tmp_path / "ml-100k.item").write_text(
        f"item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq\n{films}"
    )
    monkeypatch.setattr(movielens, "fetch_all", lambda *_: [tmp_path / "ml-100k.inter", tmp_path / "ml-100k.item"])
    monkeypatch.setenv("HOME", str(tmp_path))  # of the cache of converted files
    monkeypatch.chdir(tmp_path)
    shutil.copytree(CONFIGS, "configs")
    return tmp_path


@pytest.mark.parametrize("data", of("data"))
def test_every_data_config_runs(data: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["fit", LARGE, f"--data=configs/data/{data}", TINY, *SMALL])
    out = capsys.readouterr().out
    for phase in ("start", "warm start", "TAWin"):
        assert any(line.lstrip().startswith(f"{phase}  ") for line in out.splitlines()), phase
    assert list(folder.glob("checkpoints/large/version_0/last.ckpt"))
    assert (CONFIGS / "data" / data).read_text().startswith("#"), "a config says what it is for"


def printed(args: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    with pytest.raises(SystemExit) as stop:
        main(["fit", *args, "--print_config"])
    assert stop.value.code == 0
    return yaml.safe_load(capsys.readouterr().out)


@pytest.mark.parametrize("base", ["large.yaml", "tawin.yaml"])
@pytest.mark.parametrize("data", of("data"))
def test_a_data_config_replaces_that_of_the_run(
    base: str, data: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = printed([f"--config=configs/{base}", f"--data=configs/data/{data}"], capsys)
    own = yaml.safe_load((CONFIGS / base).read_text()) | {"data": f"data/{data}"}
    (folder / "configs" / "own.yaml").write_text(yaml.safe_dump(own))
    assert given["data"] == printed(["--config=configs/own.yaml"], capsys)["data"]


@pytest.mark.parametrize(
    ("policy", "local_model"),
    [(name, "qwen2" if "qwen" in name else "llama") for name in of("policy")],
    indirect=["local_model"],
)
def test_every_policy_config_runs(
    policy: str, local_model: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the settings of the config, on small weights of the same architecture."""
    config = yaml.safe_load((CONFIGS / "policy" / policy).read_text())
    config["init_args"]["model"] = local_model
    main(["fit", LARGE, f"--model.policy={json.dumps(config)}", *SMALL, "--trainer.num_sanity_val_steps=0"])
    assert "TAWin" in capsys.readouterr().out
    assert list(folder.glob("checkpoints/large/version_0/last.adapter/adapter_model.safetensors"))


@pytest.mark.parametrize("name", of("policy"))
def test_policy_configs_parse_as_they_are(name: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = printed([LARGE, f"--model.policy=configs/policy/{name}"], capsys)["model"]["policy"]
    wanted = yaml.safe_load((CONFIGS / "policy" / name).read_text())
    assert found["init_args"]["model"] == wanted["init_args"]["model"]
    assert found["init_args"]["quantization"] == "nf4"


@pytest.mark.parametrize("name", of("trainer"))
def test_trainer_configs_parse(name: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = printed([LARGE, f"--config=configs/trainer/{name}"], capsys)["trainer"]
    for key, value in yaml.safe_load((CONFIGS / "trainer" / name).read_text())["trainer"].items():
        if isinstance(value, dict):  # a class, to which the parser adds its defaults
            assert found[key]["class_path"] == value["class_path"]
        else:
            assert found[key] == value
    assert found["max_epochs"] == 10  # the rest is the run's own
