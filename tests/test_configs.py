"""Every policy, data and trainer config, put into the full-scale run: it parses and runs a few steps in small."""

from __future__ import annotations

import gzip
import json
import re
import shutil
import subprocess
import sys
from datetime import UTC, datetime
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


def published(log: list[tuple[str, str, int]]) -> dict[str, list[str]]:
    """Lines of files in the formats of those that the comments of the configs name, with the same events in each."""
    posted = [datetime.fromtimestamp(time, UTC).strftime("Posted %B %-d, %Y.") for _, _, time in log]
    reviews = [
        {"item_id": item, "posted": day, "recommend": True} for (_, item, _), day in zip(log, posted, strict=True)
    ]
    reviews[0]["posted"] = "Posted July 3."
    games = [
        {"publisher": "X", "genres": ["Action", "Indie"], "app_name": f"Game {i}", "id": f"B{i}"} for i in range(ITEMS)
    ]
    items = range(ITEMS)
    return {
        "ml-1m/ratings.dat": [f"{user}::{item}::5::{time}" for user, item, time in log],
        "ml-1m/movies.dat": [f'B{i}::Léon "{i}" (1994)::Crime|Drama' for i in items],
        "ml-32m/ratings.csv": ["userId,movieId,rating,timestamp", *(f"{u},{i},4.5,{t}" for u, i, t in log)],
        "ml-32m/movies.csv": ["movieId,title,genres", *(f'B{i},"Film, ""A"" {i} (1995)",Drama|War' for i in items)],
        "amazon/Video_Games.jsonl.gz": [
            json.dumps({"rating": 5.0, "title": "!", "parent_asin": i, "user_id": u, "timestamp": 1000 * t + 7})
            for u, i, t in log
        ],
        "amazon/meta_Video_Games.jsonl.gz": [
            json.dumps(
                {"main_category": "Games", "title": f"Game {i}", "parent_asin": f"B{i}", "categories": ["Games"]}
            )
            for i in items
        ],
        "goodbooks-10k/ratings.csv": ["user_id,book_id,rating", *(f"{u},{i},5" for u, i, _ in log)],
        "goodbooks-10k/books.csv": [
            "book_id,goodreads_book_id,authors,original_title,title,language_code",
            *(f'B{i},27,"J.K. Rowling, Mary GrandPr",,"The Games (The Games, #{i})",eng' for i in items),
        ],
        "book-crossing/BX-Book-Ratings.csv": [
            '"User-ID";"ISBN";"Book-Rating"\r',
            *(f'"{u}";"{i}";"0"\r' for u, i, _ in [*log, ("u1", "034545104X", 0)]),
        ],
        "book-crossing/BX-Books.csv": [
            '"ISBN";"Book-Title";"Book-Author";"Year-Of-Publication"\r',
            *(f'"B{i}";"Lon \\"the\\" R&amp;D {i}";"A";"2002"\r' for i in items),
            '"078946697X";"DK Readers: X-Men (Level 4)\\";Michael Teitelbaum";"2000"\r',
        ],
        "steam/australian_user_reviews.json.gz": [
            str({"user_id": f"u{u}", "user_url": "x", "reviews": reviews[u * EVENTS : (u + 1) * EVENTS]})
            for u in range(USERS)
        ],
        "steam/steam_games.json.gz": [*map(str, [*games, games[0], {"app_name": "Without an id"}, {"id": "B60"}])],
    }


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with small files in the place of each published set."""
    start = 1_500_000_000  # July 2017
    log = [(f"u{u}", f"B{(5 * u + t) % ITEMS}", start + 100 * t + u) for u in range(USERS) for t in range(EVENTS)]
    amazon, yelp = tmp_path / "data" / "amazon", tmp_path / "data" / "yelp"
    amazon.mkdir(parents=True)
    yelp.mkdir()
    for name, lines in published(log).items():
        path = tmp_path / "data" / name
        path.parent.mkdir(exist_ok=True)
        text = "".join(f"{line}\n" for line in lines)
        path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode("latin-1"))
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
def test_every_data_config_reads_its_files(data: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """After the program that its comment holds, if any."""
    text = (CONFIGS / "data" / data).read_text()
    assert text.startswith("#"), "a config says what it is for"
    program = "\n".join(re.findall(r"^#   (.*)$", text, re.M))
    if program:
        command = ["bash", "-c"] if "sed" in program else [sys.executable, "-c"]
        name = "book-crossing" if "sed" in program else "steam"
        subprocess.run([*command, program], cwd=folder / "data" / name, check=True)
    main(["data", LARGE, f"--data=configs/data/{data}", TINY])
    found = dict(re.split(" {2,}", line, maxsplit=1) for line in capsys.readouterr().out.splitlines() if "  " in line)
    assert found["items"] == str(ITEMS)
    assert found["users"] == str(USERS)
    assert found["interactions"] == str(USERS * EVENTS - (data == "steam.yaml"))


@pytest.mark.parametrize("data", ["movielens100k.yaml", "yelp.yaml"])
def test_data_configs_run(data: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["fit", LARGE, f"--data=configs/data/{data}", TINY, *SMALL])
    out = capsys.readouterr().out
    for phase in ("start", "warm start", "TAWin"):
        assert any(line.lstrip().startswith(f"{phase}  ") for line in out.splitlines()), phase
    assert list(folder.glob("checkpoints/large/version_0/last.ckpt"))


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


def test_null_of_a_filter_on_the_command_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bounds = ["start", "end", "min_rating"]
    options = [f"--data.source.init_args.filters.{name}=null" for name in bounds]
    filters = printed([LARGE, "--data.source.init_args.filters.min_rating=3", *options], capsys)["data"]["source"][
        "init_args"
    ]["filters"]
    assert [filters[name] for name in bounds] == [None] * 3
    assert filters["k_core"] == 5


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
