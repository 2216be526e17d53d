"""The benchmarks run, on tiny sizes, and what they compare agrees."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from recsys.data import HistoryDataModule, PromptTemplate, Table


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
