"""The benchmarks run, on tiny sizes, and what they compare agrees."""

from __future__ import annotations

import importlib
import inspect
import re
import runpy
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from transformers import AutoTokenizer

from recsys.cli import main as cli_main
from recsys.data import HistoryDataModule, PromptTemplate, Table
from recsys.window import DEFAULT_CUTOFFS


@pytest.fixture
def benchmark_main(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Callable[..., None]]:
    folder = Path(__file__).parents[1] / "benchmarks"
    monkeypatch.syspath_prepend(folder)  # the scripts import each other by name, and so do their processes

    def load(name: str) -> Callable[..., None]:
        for module in ("measure", name):
            monkeypatch.delitem(sys.modules, module, raising=False)
        module = importlib.import_module(name)
        assert Path(module.__file__).parent == folder
        return module.main

    return load


def test_groups(benchmark_main, tables: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.chdir(tmp_path)
    settings = {
        "model": {
            "policy": {"class_path": "recsys.policy.TinyPolicy", "init_args": {"hidden_size": 32}},
            "warm_start": {
                "class_path": "recsys.objectives.SupervisedFineTuning",
                "init_args": {"learning_rate": 0.01},
            },
            "warm_start_epochs": 2,
            "objective": {"class_path": "recsys.objectives.TAWin"},
            "window": {"k": 3},
        },
        "data": {
            "source": {"class_path": "recsys.data.Table", "init_args": tables},
            "prompt": {"max_history": 4, "max_tokens": 128},
        },
        "trainer": {"max_epochs": 2, "enable_progress_bar": False, "accelerator": "cpu"},
        "logger": {"name": "small"},
    }
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(settings))
    cli_main(["fit", "--config", "small.yaml"])
    capsys.readouterr()
    checkpoint = ["--ckpt_path", "checkpoints/small/version_0/last.ckpt", "--stretches", "12"]
    monkeypatch.setattr(sys, "argv", ["groups.py", *checkpoint, "--config", "small.yaml"])
    benchmark_main("groups")()
    out = capsys.readouterr().out
    both, one, other, same = re.search(
        r"exact and shared: open in both (\d+), .* (\d+) and (\d+); (.*)% of", out
    ).groups()
    assert int(both) > 0
    assert (one, other, same) == ("0", "0", "100.00")
    exact = re.findall(r"  (?:exact|shared): open in both (\d+), in one alone (\d+) and (\d+); (.*)% of", out)
    assert [line[1:] for line in exact] == [("0", "0", "100.00")] * 2
    ratios = [float(line.split()[-1]) for line in out.splitlines() if line.startswith(("refresh ", "step with"))]
    assert len(ratios) == 2
    assert min(ratios) >= 1  # no fewer rows than the least
    steps = re.findall(r"step on \d+ stretches: (\d+)", out)
    updates = re.findall(r"metrics by \d+ rows: (\d+)", out)
    assert len(set(steps)) == len(set(updates)) == 1  # waits do not grow with the batch


@pytest.mark.parametrize("shared", [False, True])
def test_trie(benchmark_main, capsys: pytest.CaptureFixture[str], shared: bool):
    benchmark_main("trie")(
        items=(50, 400), shared=shared, codes=300, users=2, beams=3, depths=(0, 3), hidden=4, repeats=1
    )
    out = capsys.readouterr().out
    kind = "shared" if shared else "uniform"
    assert [line.split()[:2] for line in out.splitlines() if "of the process" in line] == [
        [kind, "50"],
        [kind, "400"],
        ["codes", "300"],
    ]
    assert out.count("paths and input agree") == 3
    assert out.count("legal tokens agree") == 2
    assert "DIFFER" not in out
    assert out.count("step: dictionary") == 2 * 3  # two depths and the mean, for each size
    assert out.count("50 -> 400 items at depth") == 2


def test_metrics(benchmark_main, capsys: pytest.CaptureFixture[str]):
    benchmark_main("metrics")(users=60, alternative_users=40, listed=20, batch=7, repeats=2)
    out = capsys.readouterr().out
    names = [line.split("users")[0].split() for line in out.splitlines() if " us/user" in line]
    assert names[:3] == [["Recall(10)", "60"], ["NDCG(10)", "60"], ["WPAUC(10", "+-", "5)", "60"]]
    assert names[3:5] == [["Recall(10)", "40"], ["NDCG(10)", "40"]]
    assert [name for name, _ in names[5:]] == [
        "RetrievalRecall(10)",
        "RetrievalHitRate(10)",
        "RetrievalNormalizedDCG(10)",
    ]
    assert out.count("16 / 16 / 16 B") == 5  # ours: constant
    assert "2,800 / 8,400 / 16,000 B" in out  # theirs: 20 bytes for each of 7, 21 and 40 users' 20 candidates
    assert out.count(": agrees with") == 3
    assert "DIFFERS" not in out
    assert out.splitlines()[-1].endswith("value 0.000000")


def test_compare_tunes_on_validation_shares_the_warm_start_and_repeats_no_run(
    benchmark_main, tables: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    root = Path(__file__).parents[1]
    source = ("interactions", "items", "cache_dir")
    fit = [f"--config={root}/configs/debug.yaml", "--trainer.num_sanity_val_steps=0", "--data.test_rows=null"]
    fit += ["--data.source=recsys.data.Table", *(f"--data.source.init_args.{k}={tables[k]}" for k in source)]
    fit += ["--model.num_beams=12", "--model.cutoffs=[1,5,10]", "--model.window.k=3"]
    sft = ["--model.objective=recsys.objectives.SupervisedFineTuning"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(root))
    options = {"seeds": (3,), "metrics": ("recall@1", "recall@5"), "warm_start": ["--trainer.max_epochs=1"]}
    options |= {"learning_rates": (1e-9, 3e-3), "tune": "recall@5", "test": True, "jobs": 2}
    main = benchmark_main("compare")
    main(fit, {"SFT": sft}, "runs/sweep", **options)
    printed = [line[9:] for line in capsys.readouterr().out.splitlines() if ":" in line[:3]]
    validated = {}
    for rate in ("1e-09", "0.003"):
        [ranks] = Path(f"runs/sweep/SFT/lr{rate}/seed3/version_0/ranks").glob("*.parquet")
        validated[rate] = (pd.read_parquet(ranks)["rank"] <= 5).mean()
    assert validated["1e-09"] != validated["0.003"]
    best = max(validated, key=validated.__getitem__)
    assert sorted(printed) == [
        "fit runs/sweep/SFT/lr0.003/seed3",
        "fit runs/sweep/SFT/lr1e-09/seed3",
        "fit runs/sweep/warm start/seed3",
        f"test runs/sweep/SFT/lr{best}/seed3",
        "test runs/sweep/warm start/seed3",
    ]
    table = Path("runs/sweep/table.md").read_text().splitlines()
    assert table[0].startswith("| 1 seeds, 33 rows | lr | recall@1 | recall@5 |")
    recall = {}
    for line in table[2:4]:
        name, rate, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        folder = Path("runs/sweep", name, *([f"lr{rate}"] if rate else []), "seed3")
        ranks = pd.read_parquet(folder / "version_1" / "ranks" / "test.parquet")
        recall[name] = [ranks[f"recall@{k}"].mean() for k in (1, 5)]
        assert [float(cell) for cell in cells[:2]] == pytest.approx(recall[name], abs=1e-4)
    assert list(recall) == ["warm start", "SFT"]
    change = float(table[-1].split("|")[3].strip().split()[0].strip("*"))
    assert change == pytest.approx(recall["SFT"][1] - recall["warm start"][1], abs=1e-4)
    start, lazy = (
        torch.load(f"checkpoints/sweep/{run}/seed3/version_0/last.ckpt", weights_only=True)["state_dict"]
        for run in ("warm start", "SFT/lr1e-09")
    )
    assert all((start[name] - weight).abs().max() < 1e-6 for name, weight in lazy.items())
    main(fit, {"SFT": sft}, "runs/sweep", **options)
    assert capsys.readouterr().out.startswith("| 1 seeds")
    shutil.rmtree("runs/sweep/SFT/lr1e-09")  # its checkpoints would be taken for those of the run that repeats it
    with pytest.raises(SystemExit, match="checkpoints/sweep/SFT/lr1e-09/seed3/version_0: left by"):
        main(fit, {"SFT": sft}, "runs/sweep", **options)


def test_compare_takes_another_folder_and_further_arguments(benchmark_main, monkeypatch: pytest.MonkeyPatch, capsys):
    benchmark_main("compare")
    folder = Path(__file__).parents[1] / "benchmarks"
    command = ["compare.py", f"--config={folder / 'objectives.yaml'}", "--out=runs/x", "--fit+=--data=y.yaml"]
    monkeypatch.setattr(sys, "argv", [*command, "--print_config"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(folder / "compare.py"), run_name="__main__")
    assert ended.value.code == 0
    config = yaml.safe_load(capsys.readouterr().out)
    assert config["out"] == "runs/x"
    assert config["fit"] == [*yaml.safe_load((folder / "objectives.yaml").read_text())["fit"], "--data=y.yaml"]


@pytest.mark.parametrize("name", ["fresh", "normalization", "objectives", "synthetic"])
def test_compared_variants_are_configs_that_measure_what_is_shown_and_all_different(
    benchmark_main, name: str, monkeypatch: pytest.MonkeyPatch, capsys
):
    root = Path(__file__).parents[1]
    monkeypatch.chdir(root)
    options = yaml.safe_load((root / "benchmarks" / f"{name}.yaml").read_text())
    shown = options.get("metrics") or inspect.signature(benchmark_main("compare")).parameters["metrics"].default
    cutoffs = {int(metric.split("@")[1]) for metric in shown if "@" in metric}
    configs: dict[str, str] = {}
    for variant, arguments in options["variants"].items():
        with pytest.raises(SystemExit) as ended:
            cli_main(["fit", *options["fit"], *arguments, "--print_config"])
        assert ended.value.code == 0, variant
        config = capsys.readouterr().out
        assert cutoffs <= {*(yaml.safe_load(config)["model"]["cutoffs"] or DEFAULT_CUTOFFS)}, variant
        configs[config] = variant
    assert list(configs.values()) == list(options["variants"])


@pytest.mark.parametrize("name", ["amazon-industrial", "amazon-office"])
def test_other_data_keeps_the_sizes_of_what_it_replaces(name: str, monkeypatch: pytest.MonkeyPatch, capsys):
    root = Path(__file__).parents[1]
    monkeypatch.chdir(root)
    fit = yaml.safe_load((root / "benchmarks" / "objectives.yaml").read_text())["fit"]
    found = []
    for other in ([], [f"--data=benchmarks/{name}.yaml"]):
        with pytest.raises(SystemExit) as ended:
            cli_main(["fit", *fit, *other, "--print_config"])
        assert ended.value.code == 0
        found.append(yaml.safe_load(capsys.readouterr().out))
    small, amazon = found
    files = {key: str(root / "data" / name / f"{key}.csv") for key in ("interactions", "items")}
    assert amazon["data"]["source"]["init_args"].items() >= files.items()
    changed = {key for key, value in amazon["data"].items() if value != small["data"][key]}
    assert changed == {"source", "prompt", "fresh_share", "val_rows", "policy_stretches"}  # all validation rows
    assert amazon["data"]["val_rows"] is None
    del small["data"], amazon["data"]
    assert amazon == small


def test_compare_starts_nothing_after_a_failure(benchmark_main):
    benchmark_main("compare")
    started: list[int] = []

    def run(task: int) -> None:
        started.append(task)
        if task == 1:
            raise SystemExit("the run failed")
        time.sleep(1.5 if task == 0 else 0.3)

    with pytest.raises(SystemExit, match="the run failed"):
        sys.modules["compare"].parallel(run, range(10), jobs=2)
    assert set(started) <= {0, 1, 2, 3}  # the failed run's place may be filled before the others are called off


def test_compare_marks_differences_whose_interval_excludes_zero(benchmark_main):
    benchmark_main("compare")
    differences = sys.modules["compare"].differences
    rng = np.random.default_rng(0)
    start = rng.normal(size=(2, 400, 2))
    noise = rng.normal(size=400)
    noise -= noise.mean()
    other = start + np.stack([0.2 + noise, 0.05 + noise], 1)  # the same in both seeds: the rows alone vary
    [row] = differences({"a": start, "b": other}, "a", ("m", "n")).splitlines()[2:]
    sure, unsure = row.strip("|").split("|")[1:]
    assert sure.split()[0] == "**+0.2000**"
    assert unsure.split()[0] == "+0.0500"
    low, high = (float(x) for x in sure.split("[")[1].rstrip("] ").split(","))
    error = noise.std() / 20
    assert (low, high) == pytest.approx((0.2 - 1.96 * error, 0.2 + 1.96 * error), abs=0.1 * error)


def test_synthetic_rows_follow_the_distribution_whose_recall_is_printed(
    benchmark_main, local_model: str, tmp_path: Path, capsys
):
    tokenizer = AutoTokenizer.from_pretrained(local_model)
    tokenizer.add_tokens([f"title{letter}" for letter in "abcdef"])
    tokenizer.save_pretrained(tmp_path / "words")
    main, options = benchmark_main("synthetic"), {"actions": 4, "tokenizer": str(tmp_path / "words")}
    out = tmp_path / "data"
    with pytest.raises(SystemExit, match="6 words of one token for 7 items"):
        main(out, users=20_000, items=7, **options)
    main(out, users=20_000, items=6, **options)
    printed = {k: float(v) for k, v in re.findall(r"recall@(\d+) (\S+?)(?:,|$)", capsys.readouterr().out.strip())}
    actions = pd.read_csv(out / "interactions.csv")
    assert actions["time"].is_monotonic_increasing
    assert set(pd.read_csv(out / "items.csv")["title"]) == {f"title{letter}" for letter in "abcdef"}
    histories = np.stack(actions.groupby("user_id", sort=False)["item_id"].apply(np.array).to_list())
    assert histories.shape == (20_000, 4)
    assert histories.ravel().tolist() == actions["item_id"].tolist()  # users come one after the other
    counts = pd.crosstab(histories[:, :-1].ravel(), histories[:, 1:].ravel()).to_numpy()
    after = np.sort(counts, axis=1)[:, ::-1]  # how often each item's most frequent successors came
    best = after.cumsum(axis=1).sum(axis=0) / counts.sum()
    assert printed == {"1": pytest.approx(best[0], abs=0.01), "5": pytest.approx(best[4], abs=0.01)}
    assert printed["1"] > 1.5 / 6  # far from uniform
    assert np.abs(np.bincount(histories[:, 0]) - np.bincount(histories[:, 3])).max() < 0.02 * 20_000  # stationary
    with pytest.raises(SystemExit, match="is not empty"):
        main(out, users=20_000, items=6, **options)


def test_baselines(benchmark_main, tables: dict[str, str], capsys: pytest.CaptureFixture[str]):
    pytest.importorskip("rectools", reason="needs an environment of its own, see benchmarks/baselines.py")
    data = HistoryDataModule(Table(**tables), PromptTemplate())
    benchmark_main("baselines")(data, seeds=(0, 1), epochs=(1, 2), history=6)
    lines = [[cell.strip() for cell in line.split("|")] for line in capsys.readouterr().out.splitlines() if line]
    models = [line for line in lines if line[1] in ("popularity", "item-kNN", "SASRec")]
    assert [line[2] for line in models] == ["1", "1", "2"] * 2  # seeds; of validation, then of test
    assert {line[6] for line in models} == {"1.0000"}  # R@20 of 20 items
    h = data.histories
    events = np.unique(np.concatenate([np.arange(h.user_start[row], row + 1) for row in h.train]))
    counts = np.bincount(h.items[events], minlength=len(data.catalog))
    own = counts[h.items[h.test]][:, None]
    recall = ((10 - (counts > own).sum(1)) / (counts == own).sum(1)).clip(0, 1).mean()  # ties share their places
    assert models[3][5].split()[0] == f"{recall:.4f}"
