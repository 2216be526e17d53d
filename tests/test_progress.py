"""Output that goes to a file: a line now and then, no bars, no tips of the libraries."""

from __future__ import annotations

import re
from itertools import count
from pathlib import Path

import pytest

from callbacks import progress
from recsys.cli import main
from tests.test_cli import config, small  # noqa: F401 - a fixture


def test_lines_come_a_minute_apart_and_tell_what_is_left(monkeypatch, capsys) -> None:
    clock = iter([0.0, 30.0, 61.0, 100.0, 122.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    lines = progress.Lines("search", 4000)
    for done in (500, 1000, 1500, 2000):
        lines.tell(done)
    assert capsys.readouterr().err.splitlines() == [
        "search: 1,000 of 4,000 batches in 1.0 min, 3.0 min left",
        "search: 2,000 of 4,000 batches in 2.0 min, 2.0 min left",
    ]


def test_output_to_a_file_has_lines(small, tmp_path: Path, monkeypatch, capfd) -> None:  # noqa: F811
    clock = count(step=61)
    monkeypatch.setattr(progress.time, "monotonic", lambda: float(next(clock)))
    options = [option for option in small if "progress_bar" not in option]
    options += ["--negatives.batch_size=2", "--data.eval_batch_size=4"]
    main(["fit", config("debug.yaml"), *options])
    text = "".join(capfd.readouterr())
    for expected in (
        r"^validation: 1 of 2 batches in 1\.0 min, 1\.0 min left",
        r"^training, epoch 1 of 2: 1 of 1 batches",
        r"^training, epoch 2 of 2: 1 of 1 batches",
        r"^negatives: 3 of 4 batches",
    ):
        assert re.search(expected, text, re.MULTILINE), expected
    assert "\r" not in text
    assert "Tip" not in text
    assert "TPU" not in text
    assert "Writing model shards" not in text


@pytest.mark.parametrize("subcommand", ["test", "predict"])
def test_evaluation_has_lines(subcommand, small, tmp_path: Path, monkeypatch, capfd) -> None:  # noqa: F811
    clock = count(step=61)
    monkeypatch.setattr(progress.time, "monotonic", lambda: float(next(clock)))
    options = [option for option in small if "progress_bar" not in option]
    main([subcommand, config("debug.yaml"), *options, "--data.eval_batch_size=4"])
    name = {"test": "test", "predict": "prediction"}[subcommand]
    assert re.search(rf"^{name}: \d+ of \d+ batches", capfd.readouterr().err, re.MULTILINE)
