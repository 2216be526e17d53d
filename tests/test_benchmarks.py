"""The benchmarks run, on tiny sizes, and what they compare agrees."""

from __future__ import annotations

import importlib
import inspect
import json
import re
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jsonargparse
import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from transformers import AutoTokenizer

from recsys.cli import main as cli_main
from recsys.data import HistoryDataModule, PromptTemplate, Table
from recsys.objectives import ScoredGroups, TAWin
from recsys.window import Window


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


@pytest.fixture
def comparison(tables: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Shared arguments of small runs below the working directory."""
    root = Path(__file__).parents[1]
    fit = [f"--config={root}/configs/debug.yaml", "--trainer.num_sanity_val_steps=0", "--data.test_rows=null"]
    fit += ["--data.source=recsys.data.Table", "--data.source.init_args.interactions={folder}/interactions.csv"]
    fit += [f"--data.source.init_args.{key}={tables[key]}" for key in ("items", "cache_dir")]
    fit += ["--model.num_beams=12", "--model.cutoffs=[1,5,10]", "--model.window.k=3"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(root))
    return fit


SFT = "--model.objective=recsys.objectives.SupervisedFineTuning"
RATE = "model.objective.init_args.learning_rate"


def test_compare_tunes_on_validation_shares_the_warm_start_and_repeats_no_run(
    benchmark_main, comparison: list[str], tables: dict[str, str], capsys
):
    main = benchmark_main("compare")
    arguments = [SFT, "--data.policy_stretches=null"]
    variants = {"SFT": sys.modules["compare"].Variant(arguments, [[{RATE: 1e-9}, {RATE: 3e-3}]])}
    options = {"seeds": (3,), "cutoffs": (1, 5), "warm_start": ["--trainer.max_epochs=1"], "tune": "recall@5"}
    options |= {"folder": str(Path(tables["interactions"]).parent), "test": True, "jobs": 2}
    main(comparison, variants, "runs/sweep", **options)
    printed = [line[9:] for line in capsys.readouterr().out.splitlines() if ":" in line[:3]]
    validated = {}
    for rate in ("1e-09", "0.003"):
        [ranks] = Path(f"runs/sweep/SFT/learning_rate={rate}/seed3/version_0/ranks").glob("*.parquet")
        validated[rate] = (pd.read_parquet(ranks)["rank"] <= 5).mean()
    assert validated["1e-09"] != validated["0.003"]
    best = max(validated, key=validated.__getitem__)
    assert sorted(printed) == [
        "fit runs/sweep/SFT/learning_rate=0.003/seed3",
        "fit runs/sweep/SFT/learning_rate=1e-09/seed3",
        "fit runs/sweep/warm start/seed3",
        f"test runs/sweep/SFT/learning_rate={best}/seed3",
        "test runs/sweep/warm start/seed3",
    ]
    table = Path("runs/sweep/table.md").read_text().splitlines()
    assert [line.split("|")[2].strip() for line in table[2:4]] == ["", f"learning_rate={best}"]
    recall = {}
    for line, label in zip(table[7:9], ("", f"learning_rate={best}"), strict=True):
        name, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        [test] = Path("runs/sweep", name, label, "seed3").glob("version_*/ranks/test.parquet")
        recall[name] = [pd.read_parquet(test)[f"recall@{k}"].mean() for k in (1, 5)]
        assert [float(cell) for cell in cells] == pytest.approx(recall[name], abs=1e-4)
    assert list(recall) == ["warm start", "SFT"]
    change = float(table[-1].split("|")[3].strip().split()[0].strip("*"))
    assert change == pytest.approx(recall["SFT"][1] - recall["warm start"][1], abs=1e-4)
    start, lazy = (
        torch.load(f"checkpoints/sweep/{run}/seed3/version_0/last.ckpt", weights_only=True)["state_dict"]
        for run in ("warm start", "SFT/learning_rate=1e-09")
    )
    assert all((start[name] - weight).abs().max() < 1e-6 for name, weight in lazy.items())
    main(comparison, variants, "runs/sweep", **options)
    assert " fit " not in capsys.readouterr().out
    [other] = {"1e-09", "0.003"} - {best}
    main(comparison, variants, "runs/sweep", chosen={"SFT": {RATE: float(other)}}, **options)
    assert f"| SFT | learning_rate={other} |" in Path("runs/sweep/table.md").read_text()
    with pytest.raises(SystemExit, match="only: SFT is needed too"):
        main(comparison, variants | {"other": variants["SFT"]}, "none", only=("other",), against=("SFT",), **options)
    assert not Path("none").exists()
    with pytest.raises(SystemExit, match="warm start/seed3: made with other arguments"):
        main([*comparison, "--trainer.log_every_n_steps=2"], variants, "runs/sweep", **options)
    Path(f"runs/sweep/SFT/learning_rate={best}/seed3/cost.json").unlink()  # as if it had been stopped
    main(comparison, variants, "runs/sweep", **options)
    assert capsys.readouterr().out.count(" fit ") == 1
    assert Path(f"checkpoints/sweep/SFT/learning_rate={best}/seed3/version_0/last.ckpt").is_file()  # nothing is lost


def test_compare_gives_each_variant_the_stretches_that_fit_the_time(
    benchmark_main, comparison: list[str], tables: dict[str, str], capsys
):
    main = benchmark_main("compare")
    variant = sys.modules["compare"].Variant
    variants = {"TAWin": variant(), "NLL": variant([SFT]), "NLL as long": variant([SFT], as_many_as="TAWin")}
    options = {"seeds": (3,), "cutoffs": (1, 5), "warm_start": ["--trainer.max_epochs=1"], "warm_start_epochs": 1}
    options |= {"folder": str(Path(tables["interactions"]).parent), "data": "sweep"}
    options |= {"seconds": 0.2, "pilot": 24, "against": ("NLL",)}
    main(comparison, variants, "runs/{data}", **options)
    piloted = yaml.safe_load(Path("runs/sweep/TAWin/pilot/seed3/version_0/config.yaml").read_text())
    assert piloted["data"]["policy_stretches"] == 24
    stretches = {}
    for name, of in {"TAWin": "TAWin", "NLL": "NLL", "NLL as long": "TAWin"}.items():
        speed = json.loads(Path(f"runs/sweep/{of}/pilot/seed3/cost.json").read_text())["seconds a stretch"]
        [config] = Path(f"runs/sweep/{name}").glob("stretches=*/seed3/version_0/config.yaml")
        settings = yaml.safe_load(config.read_text())
        epochs = settings["trainer"]["max_epochs"] - 1
        stretches[name] = epochs * settings["data"]["policy_stretches"]
        assert 0.2 / speed - 1 <= stretches[name] < 0.2 / speed + epochs + 1
    assert stretches["TAWin"] == stretches["NLL as long"]
    curve = pd.read_csv("runs/sweep/curve.csv")
    assert set(curve["run"]) == {"warm start", "TAWin", "NLL as long"}
    assert Path("runs/sweep/curve.png").stat().st_size > 10_000
    capsys.readouterr()
    benchmark_main("growth")({"tiny": "runs/sweep"}, "TAWin", "runs/growth", k=5, seeds=(3,))
    [budget] = (path.name.removeprefix("stretches=") for path in Path("runs/sweep/TAWin").glob("stretches=*"))
    assert f"| {int(budget):,} |" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="runs/sweep/SFT: no run"):
        benchmark_main("growth")({"tiny": "runs/sweep"}, "SFT", "runs/growth")


@pytest.mark.usefixtures("one_parser")
@pytest.mark.parametrize("name", ["anatomy", "normalization", "synthetic", "window"])
def test_compared_variants_are_configs_that_measure_what_is_shown_and_all_different(
    benchmark_main, name: str, monkeypatch: pytest.MonkeyPatch, capsys
):
    root = Path(__file__).parents[1]
    monkeypatch.chdir(root)
    options = yaml.safe_load((root / "benchmarks" / f"{name}.yaml").read_text())
    if "fit+" in options:  # it goes on top of another
        below = yaml.safe_load((root / "benchmarks" / "window.yaml").read_text())
        options = below | options | {"fit": below["fit"] + options["fit+"]}
    fit = [argument.replace("{data}", options.get("data", "")) for argument in options["fit"]]
    shown = inspect.signature(benchmark_main("compare")).parameters["cutoffs"].default
    configs: dict[str, list[str]] = {}
    for variant, given in options["variants"].items():
        grid = [] if "like" in given else given.get("grid") or options.get("grid", [])
        cells = [{}, *(cell for choice in grid for cell in choice)]
        for cell in cells:
            settings = [f"--{option}={value}" for option, value in cell.items()]
            with pytest.raises(SystemExit) as ended:
                cli_main(["fit", *fit, *given.get("arguments", []), *settings, "--print_config"])
            assert ended.value.code == 0, variant
            config = capsys.readouterr().out
            length = yaml.safe_load(config)["model"]["num_beams"]
            assert length is None or length >= max(shown), variant
            if not cell and "as_many_as" not in given:
                configs.setdefault(config, []).append(variant)
    assert all(len(same) == 1 for same in configs.values()), configs


@pytest.mark.parametrize("rows", ["at", "above", "both"])
@pytest.mark.parametrize("form", ["linear", "logistic", "likelihood"])
def test_anatomy_is_the_gradient_of_its_loss_on_its_rows(benchmark_main, rows: str, form: str) -> None:
    benchmark_main("compare")
    objective = importlib.import_module("anatomy").Anatomy(rows=rows, form=form, clip_eps=10.0)
    window = Window(k=4, half_width=2).resolve(200)  # negatives 3 to 6
    torch.manual_seed(0)
    negatives = torch.randn(60, 8).double().sort(descending=True).values
    scores = torch.cat([torch.randn(60, 1).double() * 1.5, negatives], 1).requires_grad_()
    parts = objective.loss(ScoredGroups(scores, scores.detach(), None, window))
    trained = objective.trains(scores.detach(), window)
    (got,) = torch.autograd.grad((parts["loss"] * trained).sum(), scores)

    for row in range(60):
        s = scores[row].detach().clone().requires_grad_()
        above = int((s[1:] > s[0]).sum())
        limits = {"at": (2, 6), "above": (0, 1), "both": (0, 6)}[rows]
        surrogate = {
            "linear": (s[3:7] - s[0]).mean() * 8**0.5 / 9,
            "logistic": 2 * torch.log(1 + torch.exp(s[3:7] - s[0])).mean() * 8**0.5 / 9,
            "likelihood": -s[0],
        }[form]
        (want,) = torch.autograd.grad(surrogate * (limits[0] <= above <= limits[1]), s)
        torch.testing.assert_close(got[row], want)
    assert 0 < int(trained.sum()) < 60
    if (rows, form) == ("at", "linear"):
        given = ScoredGroups(scores.detach(), scores.detach(), None, window)
        torch.testing.assert_close(objective.advantages(given), TAWin().advantages(given))


def test_report_against_counts_and_a_loop(benchmark_main, tmp_path: Path, capsys):
    """Two runs of three seeds: levels and differences by counting, intervals by drawing rows and seeds one by one."""
    rng = np.random.default_rng(0)
    ranks = {name: rng.integers(1, 130, (3, 400)).astype(float) for name in ("NLL", "TAWin")}
    ranks["TAWin"][ranks["TAWin"] > 110] = np.inf  # not in the list
    files: dict[str, list[str]] = {name: [] for name in ranks}
    for name, seeds in ranks.items():
        for seed, values in enumerate(seeds):
            path = tmp_path / f"{name}{seed}.parquet"
            pd.DataFrame({"row": np.arange(400), "rank": values}).to_parquet(path)
            files[name].append(str(path))
    main = benchmark_main("report")
    main(files, str(tmp_path / "out"), against="NLL", windows={"TAWin": (5, 15)})
    table = capsys.readouterr().out.splitlines()
    hits = {
        name: np.array([[[rank <= k for k in (5, 10, 20, 50)] for rank in s] for s in r]) for name, r in ranks.items()
    }
    for line, name in zip(table[2:4], ranks, strict=True):
        assert [float(cell) for cell in line.split("|")[2:-1]] == pytest.approx(hits[name].mean((0, 1)), abs=1e-4)
    difference = hits["TAWin"].astype(float) - hits["NLL"]
    draws = []
    for _ in range(2000):
        rows = rng.integers(400, size=400)
        draws.append(np.mean([difference[seed, rows] for seed in rng.integers(3, size=3)], axis=(0, 1)))
    for place, cell in enumerate(table[-1].split("|")[2:-1]):
        mean, low, high = (float(number) for number in re.findall(r"[+-][\d.]+", cell))
        assert mean == pytest.approx(difference.mean((0, 1))[place], abs=1e-4)
        assert (low, high) == pytest.approx(np.quantile(draws, [0.025, 0.975], axis=0)[:, place], abs=0.004)
        assert ("**" in cell) == (low > 0 or high < 0)
    curve = pd.read_csv(tmp_path / "out" / "curve.csv")
    assert curve["k"].tolist() == list(range(1, 101))
    assert curve["change"][49] == pytest.approx(difference[..., 3].mean(), abs=1e-4)
    main({"NLL": files["NLL"]}, str(tmp_path / "alone"), against="NLL")
    assert [path.name for path in (tmp_path / "alone").iterdir()] == ["table.md"]
    pd.DataFrame({"row": np.arange(1, 401), "rank": 1.0}).to_parquet(files["NLL"][0])
    with pytest.raises(SystemExit, match="the rows differ"):
        main(files, str(tmp_path / "out"), against="NLL")


def test_report_has_no_number_beyond_the_end_of_a_list(benchmark_main, tmp_path: Path, capsys):
    rng = np.random.default_rng(0)
    files: dict[str, list[str]] = {}
    for name, lengths in {"short": (60, 20), "long": (60, 60)}.items():
        for seed, length in enumerate(lengths):
            rank = rng.integers(1, 100, 200).astype(float)
            frame = pd.DataFrame({"row": np.arange(200), "rank": np.where(rank <= length, rank, np.inf)})
            frame.attrs["list_length"] = length
            files.setdefault(name, []).append(str(tmp_path / f"{name}{seed}.parquet"))
            frame.to_parquet(files[name][-1])
    benchmark_main("report")(files, str(tmp_path / "out"), against="long")
    table = [[cell.strip() for cell in line.split("|")[2:-1]] for line in capsys.readouterr().out.strip().splitlines()]
    known = [[cell != "-" for cell in table[line]] for line in (2, 3, -1)]  # at R@5, 10, 20 and 50
    assert known == [[True, True, True, False], [True] * 4, [True, True, True, False]]
    curve = pd.read_csv(tmp_path / "out" / "curve.csv").set_index("k")["change"]
    assert curve.loc[:20].notna().all()
    assert curve.loc[21:].isna().all()


def test_a_variant_takes_no_setting_that_its_arguments_give(benchmark_main, tmp_path: Path):
    benchmark_main("compare")
    compare = sys.modules["compare"]
    anchor = "model.objective.init_args.anchor_coef"
    variants = {"TAWin": compare.Variant(), "no anchor": compare.Variant([f"--{anchor}=0"], like="TAWin")}
    sweep = compare.Sweep(tmp_path, (), variants, (0,), {}, 0, None, 1, ThreadPoolExecutor(1))
    found = compare.choose(sweep, [], (1.0,), "wpauc", {"TAWin": {RATE: 1e-3, anchor: 0.1}})
    assert found == {"TAWin": {RATE: 1e-3, anchor: 0.1}, "no anchor": {RATE: 1e-3}}


def test_arguments_are_added_to_those_of_a_comparison(benchmark_main, monkeypatch: pytest.MonkeyPatch, capsys):
    """As the pages of results do, which show numbers of all test rows."""
    config = Path(__file__).parents[1] / "benchmarks" / "window.yaml"
    shared = yaml.safe_load(config.read_text())["fit"]
    added = ["--fit+=--data.val_rows=8000", "--fit+=--data.test_rows=null"]
    monkeypatch.setattr(sys, "argv", ["compare.py", f"--config={config}", *added, "--print_config"])
    main = benchmark_main("compare")
    with pytest.raises(SystemExit):
        jsonargparse.auto_cli(main, as_positional=False)
    given = yaml.safe_load(capsys.readouterr().out)["fit"]
    assert given == [*shared, "--data.val_rows=8000", "--data.test_rows=null"]


def test_growth_counts_what_each_length_changed(benchmark_main, tmp_path: Path, capsys):
    rng = np.random.default_rng(0)
    share = {}
    for run, shift in {"warm start": 4, "TAWin/stretches=1600": 0, "TAWin/stretches=800": 2}.items():
        for seed in (0, 1):
            ranks = rng.integers(1, 21, 500) + shift
            share.setdefault(run, []).append(np.mean([rank <= 10 for rank in ranks]))
            folder = tmp_path / run / f"seed{seed}"
            (folder / "version_0" / "ranks").mkdir(parents=True)
            (folder / "cost.json").write_text(json.dumps({"version": "version_0"}))
            for step, values in {9: ranks[::-1] + 1, 10: ranks}.items():  # the last validation counts
                frame = pd.DataFrame({"row": np.arange(500), "rank": values.astype(float)})
                frame.to_parquet(folder / "version_0" / "ranks" / f"step{step}.parquet")
    benchmark_main("growth")({"32 x 2": str(tmp_path)}, "TAWin", str(tmp_path / "out"), seeds=(0, 1))
    level = {run: np.mean(shares) for run, shares in share.items()}
    lines = capsys.readouterr().out.splitlines()[2:4]
    for line, stretches in zip(lines, (800, 1600), strict=True):
        size, start, length, change = (cell.strip() for cell in line.strip("|").split("|"))
        assert (size, length) == ("32 x 2", f"{stretches:,}")
        assert float(start) == pytest.approx(level["warm start"], abs=1e-4)
        gain = level[f"TAWin/stretches={stretches}"] - level["warm start"]
        assert float(change.split()[0]) == pytest.approx(gain, abs=1e-4)
    assert (tmp_path / "out" / "growth.png").stat().st_size > 10_000


def test_growth_takes_no_run_among_several_of_one_length(benchmark_main, tmp_path: Path):
    benchmark_main("growth")
    phases = sys.modules["growth"].phases
    for label in ("rate=1,stretches=8", "rate=1,stretches=16"):
        (tmp_path / "TAWin" / label / "seed0").mkdir(parents=True)
        (tmp_path / "TAWin" / label / "seed0" / "cost.json").touch()
    assert phases(tmp_path, "TAWin") == {8: "rate=1,stretches=8", 16: "rate=1,stretches=16"}
    (tmp_path / "TAWin" / "rate=1,stretches=8").rename(tmp_path / "TAWin" / "rate=2,stretches=16")
    with pytest.raises(SystemExit, match="as many stretches: rate=1,stretches=16, rate=2,stretches=16"):
        phases(tmp_path, "TAWin")


def test_a_failed_warm_start_ends_a_comparison_before_its_seed_comes(benchmark_main, tmp_path: Path, monkeypatch):
    benchmark_main("compare")
    compare = sys.modules["compare"]
    trained = []

    def train(run, start: Path | None) -> None:
        trained.append((run.variant, run.seed))
        if (run.variant, run.seed) == (compare.WARM_START, 1):
            raise SystemExit("the warm start failed")

    monkeypatch.setattr(compare.Run, "train", train)
    monkeypatch.setattr(compare.Run, "checkpoint", tmp_path / "last.ckpt")
    warm = {seed: compare.Run(tmp_path, compare.WARM_START, (), seed) for seed in (0, 1)}
    with ThreadPoolExecutor(1) as pool:
        sweep = compare.Sweep(tmp_path, (), {"NLL": compare.Variant()}, (0, 1), warm, 1, None, 1, pool)
        sweep.warm_up()
        with pytest.raises(SystemExit, match="the warm start failed"):
            sweep.train([compare.Run(tmp_path, "NLL", (), 0)])
    assert trained == [(compare.WARM_START, 0), (compare.WARM_START, 1)]


def test_compare_starts_nothing_after_a_failure(benchmark_main):
    benchmark_main("compare")
    started: list[int] = []

    def run(task: int) -> None:
        started.append(task)
        if task == 1:
            raise SystemExit("the run failed")
        time.sleep(1.5 if task == 0 else 0.3)

    with pytest.raises(SystemExit, match="the run failed"), ThreadPoolExecutor(2) as pool:
        sys.modules["compare"].parallel(pool, run, range(10))
    assert set(started) <= {0, 1, 2, 3}  # the failed run's place may be filled before the others are called off


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


@pytest.mark.parametrize("sampled", [None, 5])
def test_baselines(sampled: int | None, benchmark_main, tables: dict[str, str], capsys: pytest.CaptureFixture[str]):
    pytest.importorskip("rectools", reason="needs an environment of its own, see benchmarks/baselines.py")
    data = HistoryDataModule(Table(**tables), PromptTemplate())
    benchmark_main("baselines")(data, seeds=(0, 1), epochs=(1, 2), history=6, newest=(1, 3, 9), sampled=sampled)
    printed = capsys.readouterr()
    lines = [[cell.strip() for cell in line.split("|")] for line in printed.out.splitlines() if line]
    models = [line for line in lines if line[1] in ("popularity", "item-kNN", "SASRec")]
    assert [line[2] for line in models] == ["1", "1", "2"] * 2  # seeds; of validation, then of test
    assert {line[6] for line in models} == {"1.0000"}  # R@20 of 20 items
    h = data.histories
    events = np.unique(np.concatenate([np.arange(h.user_start[row], row + 1) for row in h.train]))
    counts = np.bincount(h.items[events], minlength=len(data.catalog))
    own = counts[h.items[h.test]][:, None]
    recall = ((10 - (counts > own).sum(1)) / (counts == own).sum(1)).clip(0, 1).mean()  # ties share their places
    assert models[3][5].split()[0] == f"{recall:.4f}"
    chosen = np.zeros((len(h.user_start), len(data.catalog)))  # by the event that ends the user's train rows
    for row in h.train:
        chosen[h.user_start[row], h.items[h.user_start[row] : row + 1]] = 1
    chosen = chosen[chosen.any(1)]
    cosine = chosen.T @ chosen / np.maximum(np.outer(*[np.sqrt((chosen**2).sum(0))] * 2), 1e-12)
    recalls = []
    for count in (1, 3, 9):
        hits = []
        for row in h.val:
            scores = sum(cosine[item] for item in h.items[max(h.user_start[row], row - count) : row])
            hits.append((scores > scores[h.items[row]] + 1e-9).sum() < 10)
        recalls.append(f"{count} {np.mean(hits):.4f}")
    assert f"item-kNN, newest events: R@10 {', '.join(recalls)}\n" in printed.err


def test_beams(benchmark_main, tables: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    """A beam as wide as the catalogue finds the exact lists; the lists of one that found others would differ."""
    root = Path(__file__).parents[1]
    monkeypatch.chdir(tmp_path)
    config = [f"--config={root}/configs/debug.yaml", "--data.source=recsys.data.Table", "--model.window.k=3"]
    config += [f"--data.source.init_args.{key}={tables[key]}" for key in ("interactions", "items", "cache_dir")]
    config += ["--model.policy.init_args.hidden_size=32", "--trainer.limit_train_batches=1"]
    cli_main(["fit", *config, "--trainer.enable_progress_bar=false", "--trainer.max_epochs=1"])
    capsys.readouterr()
    arguments = ["--ckpt_path", "checkpoints/debug/version_0/last.ckpt", "--users", "9", "--k", "3"]
    monkeypatch.setattr(sys, "argv", ["beams.py", *arguments, "--beams", "3", "20", *config])
    benchmark_main("beams")()
    narrow, wide, exact = (line.split("|")[1:4] for line in capsys.readouterr().out.splitlines()[-3:])
    assert wide[1:] == exact[1:] == [" 100.0% ", " 100.0% "]
    assert narrow[0] == " 3 "
    assert 0 < float(narrow[1].strip(" %")) <= 100


def test_noise(benchmark_main, tables: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    """Halves of equal rows: no noise. The gradient of the policy loss raises WPAUC on its own rows."""
    root = Path(__file__).parents[1]
    monkeypatch.chdir(tmp_path)
    config = [f"--config={root}/configs/debug.yaml", "--data.source=recsys.data.Table", "--model.window.k=3"]
    config += [f"--data.source.init_args.{key}={tables[key]}" for key in ("interactions", "items", "cache_dir")]
    config += ["--model.policy.init_args.hidden_size=32", "--data.warm_start_stretches=null"]
    cli_main(["fit", *config, "--trainer.enable_progress_bar=false", "--trainer.max_epochs=1"])
    capsys.readouterr()
    arguments = ["--ckpt_path", "checkpoints/debug/version_0/last.ckpt", "--stretches", "60", "--checked", "4"]
    monkeypatch.setattr(sys, "argv", ["noise.py", *arguments, "--steps", "1e-6", "3e-3", *config])
    main = benchmark_main("noise")
    module = sys.modules["noise"]
    main()
    out = capsys.readouterr().out.splitlines()
    assert re.match(r"\d+ rows, [1-9]\d* groups trained by TAWin; Dial: K 3", out[0])
    assert [line.split("|")[1].strip() for line in out[4:6]] == ["policy loss", "NLL"]
    tiny, step = (line.split("|")[1:-1] for line in out[-2:])
    assert float(tiny[1].split()[0]) == float(tiny[2].split()[0]) == 0
    assert float(step[1].split()[0]) > 0
    generator = torch.Generator().manual_seed(0)
    signal, noise = torch.randn(20_000, generator=generator), 3 * torch.randn(2, 20_000, generator=generator)
    same = module.described([[signal], [signal]], rows=100)
    assert same[1:] == ("1.000", "0")
    length, cosine, scale = module.described([[signal + part] for part in noise], rows=100)
    assert float(length) == pytest.approx(signal.norm().item(), rel=0.15)
    assert float(cosine) == pytest.approx(0.1, abs=0.02)
    assert float(scale) == pytest.approx(9 * 100 / 2, rel=0.3)  # noise of half of the rows is nine times the signal
    assert module.described([[signal], [-signal]], rows=100)[2] == "no end in sight"
