"""A checkpoint is all that is needed: from the command line, from Python, and in plain PEFT, with the same scores."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml

from recsys import TrainedRecommender
from recsys.cli import main
from recsys.types import UserError
from tests.test_cli import ROOT, lines_of_failure

TITLES = ["Toy Story", "Heat", "Heat", "Toy", *(f"Film {i}" for i in range(16))]
CHECKPOINT = "checkpoints/small/version_0/last.ckpt"
PAGE = (ROOT / "docs" / "recommendations.md").read_text()


@pytest.fixture(scope="module")
def trained(local_model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which a few steps of an adapter were trained."""
    folder = tmp_path_factory.mktemp("trained")
    pd.DataFrame({"item_id": [f"i{i}" for i in range(20)], "title": TITLES}).to_csv(folder / "items.csv", index=False)
    events = pd.DataFrame([(f"u{u}", f"i{(3 * u + t) % 20}", t) for u in range(20) for t in range(10)])
    events.set_axis(["user_id", "item_id", "timestamp"], axis=1).to_csv(folder / "log.csv", index=False)
    files = {"interactions": "log.csv", "items": "items.csv", "cache_dir": str(folder / "cache")}
    source = {"class_path": "recsys.data.Table", "init_args": files}
    prompt = {"template": "The user watched:\n{history}", "max_history": 4, "max_tokens": 128}
    (folder / "data.yaml").write_text(yaml.safe_dump({"source": source, "prompt": prompt, "val_rows": 4}))
    policy = {"model": local_model, "quantization": "none", "dtype": "float32", "lora": {"r": 2}}
    policy = {"class_path": "recsys.policy.LLMPolicy", "init_args": policy}
    options = [f"--model.policy={json.dumps(policy)}", "--model.window.k=3"]
    run = [
        "--data=data.yaml",
        "--logger.name=small",
        "--trainer.accelerator=cpu",
        "--trainer.enable_progress_bar=false",
    ]
    few = ["--model.num_beams=20", "--trainer.max_epochs=1", "--trainer.limit_train_batches=2"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        main(["fit", f"--config={ROOT / 'configs/debug.yaml'}", *options, *run, *few])
    shutil.copytree(local_model, folder / "models" / "base")
    (folder / "titles.txt").write_text("\n".join(dict.fromkeys(TITLES)))
    return folder


pytestmark = pytest.mark.parametrize("local_model", ["llama"], indirect=True)


def test_checkpoint_alone_predicts_and_recommends_what_python_does(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(trained)
    shutil.rmtree("runs")
    main(["predict", "--ckpt_path", CHECKPOINT, "--predictions.k=6"])
    assert "wrote checkpoints/small/version_0/last.predictions.parquet: " in capsys.readouterr().out.splitlines()[-1]
    lists = pd.read_parquet("checkpoints/small/version_0/last.predictions.parquet")
    histories = pd.read_csv("log.csv").groupby("user_id", sort=False)["item_id"].agg(list).to_dict()
    found = TrainedRecommender.from_checkpoint(CHECKPOINT).recommend(histories, k=6)
    pd.testing.assert_frame_equal(found, lists, check_dtype=False, atol=1e-4)

    main(["recommend", CHECKPOINT, "i3", "Heat", " Film  1", "--k", "6", "--model.num_beams=20"])
    header, *lines = capsys.readouterr().out.splitlines()
    assert header.split() == ["rank", "logprob", "item_id", "title"]
    found = TrainedRecommender.from_checkpoint(CHECKPOINT).recommend({1: ["i3", "i1", "i5"]}, k=6)
    assert [line.split()[2] for line in lines] == found["item_id"].tolist()
    assert found["user_id"].tolist() == [1] * 6
    assert not {"i1", "i2", "i3", "i5"} & set(found["item_id"])


def test_the_python_of_the_page_runs_and_plain_peft_has_the_same_scores(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(trained)
    ours, plain = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(ours.splitlines()) <= 10
    names: dict = {}
    exec(compile(ours, "recommendations.md", "exec"), names)
    exec(compile(plain, "recommendations.md", "exec"), other := {})
    vocab = TrainedRecommender.from_checkpoint(CHECKPOINT, "--model.normalization=vocab")
    for recommender, normalization in ((names["recommender"], "trie"), (vocab, "vocab")):
        frame = recommender.recommend({0: ["Toy Story", "Heat"]}, k=20, exclude_seen=False)
        titles = [other["titles"][other["catalogue"].index(title)] for title in frame["title"]]
        expected = [other["logprob"](title, normalization) for title in titles]
        assert len(frame) == 20
        np.testing.assert_allclose(frame["logprob"], expected, atol=1e-4)
    capsys.readouterr()


def test_mistakes(trained: Path, monkeypatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    monkeypatch.chdir(trained)
    line = lines_of_failure(["recommend", CHECKPOINT, "Toy Storey"], capsys)
    assert "no item has the id or title 'Toy Storey'; the closest titles are 'Toy Story'" in line
    assert "ckpt_path: no such file: nowhere.ckpt" in lines_of_failure(["recommend", "nowhere.ckpt", "Heat"], capsys)
    assert "no such file: nowhere.ckpt" in lines_of_failure(["predict", "--ckpt_path=nowhere.ckpt"], capsys)
    assert "is broken or no checkpoint" in lines_of_failure(["predict", "--ckpt_path=items.csv"], capsys)
    bare = torch.load(CHECKPOINT, weights_only=True)
    bare.pop("config")
    torch.save(bare, tmp_path / "bare.ckpt")
    assert "bare.ckpt holds no settings" in lines_of_failure(["test", f"--ckpt_path={tmp_path}/bare.ckpt"], capsys)
    recommender = TrainedRecommender.from_checkpoint(CHECKPOINT)
    for histories, asked, message in (
        ({"x": []}, {}, "the history of 'x' is empty"),
        ({}, {}, "no history"),
        ({"x": ["i1"]}, {"k": 0}, "at least 1"),
        ({"x": ["i1"]}, {"only_items": ["a"]}, "none of the items is in the catalogue"),
    ):
        with pytest.raises(UserError, match=message):
            recommender.recommend(histories, **asked)
