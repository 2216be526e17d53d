"""Every command in README, docs and the headers of configs parses as it stands; what a header offers runs in small."""

from __future__ import annotations

import importlib
import json
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest
import torch
import yaml

from recsys.cli import main, recommend_parser
from tests.test_configs import CONFIGS, SMALL, folder  # noqa: F401 - a fixture

ROOT = CONFIGS.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MYDATA = re.search(r"```yaml\n(# mydata.yaml\n.*?)```", PAGES[0].read_text(), re.DOTALL)


def commands_of(page: Path) -> list[list[str]]:
    """The commands in a page's blocks of bash, and in its text between single backticks."""
    text = page.read_text()
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    rest = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    lines += re.findall(r"`((?:OMP_NUM_THREADS=1 )?(?:recsys|python) [^`]*)`", rest)
    parts = [part.strip() for line in lines for part in line.split("&&")]
    split = [shlex.split(part, comments=True) for part in parts if part]
    return [words[1:] if words[0].startswith("OMP_NUM") else words for words in split if words]


def options_of(page: Path) -> list[list[str]]:
    """The options that a page's text offers by themselves, between single backticks."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    return [shlex.split(words) for words in re.findall(r"`(--[a-z_.]+[+=][^`]*)`", text)]


def offered_by(config: Path) -> list[list[str]]:
    """The commands in a config's header; what begins with an option goes behind the config itself."""
    found = []
    for line in config.read_text().splitlines():
        if not line.startswith("#"):
            break
        line = line.lstrip("# ").split("  #")[0]
        if line.startswith("recsys "):
            found.append(shlex.split(line)[1:])
        elif "--" in line:
            options = shlex.split(line[line.index(" --") :])
            found.append(["fit", f"--config={config.relative_to(ROOT)}", *options])
    return found


def prints_its_config(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> dict:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main([*arguments, "--print_config"])
    assert stop.value.code == 0, arguments
    return yaml.safe_load(capsys.readouterr().out)


@pytest.fixture
def workplace(folder: Path) -> Path:  # noqa: F811
    """A working directory with what the commands name: data of one's own, a run's config."""
    assert MYDATA is not None
    (folder / "mydata.yaml").write_text(MYDATA[1])
    saved = folder / "runs" / "tawin" / "version_0" / "config.yaml"
    saved.parent.mkdir(parents=True)
    model = "{policy: recsys.policy.TinyPolicy, objective: recsys.objectives.TAWin}"
    saved.write_text(f"model: {model}\ndata: ../../../mydata.yaml\n")
    checkpoint = folder / "checkpoints" / "small" / "version_0" / "last.ckpt"
    checkpoint.parent.mkdir(parents=True)
    parts = dict.fromkeys(("state_dict", "policy", "loops", "fingerprint"), "")
    torch.save({**parts, "config": f"model: {model}\ndata: mydata.yaml\n"}, checkpoint)
    return folder


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_of_pages_parse(
    page: Path, workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for words in commands_of(page):
        if words[:2] == ["recsys", "recommend"]:  # docs/recommendations.md's runs in test_trained.py
            assert not recommend_parser().parse_known_args(words[2:])[1]
        elif words[0] == "recsys":
            if "--help" not in words and words[1] != "configs":
                prints_its_config(words[1:], capsys)
        elif words[:1] == ["python"] and words[1].startswith("benchmarks/"):
            if importlib.util.find_spec("trl") is None and words[1] == "benchmarks/training.py":
                continue
            monkeypatch.chdir(ROOT)
            monkeypatch.syspath_prepend(ROOT / "benchmarks")
            monkeypatch.setattr(sys, "argv", [*words[1:], "--print_config"])
            with pytest.raises(SystemExit) as ended:
                runpy.run_path(words[1], run_name="__main__")
            assert ended.value.code == 0, words
            capsys.readouterr()
            monkeypatch.chdir(workplace)
        else:
            known = ("pip", "ruff", "mypy", "pytest", "tensorboard", "python")
            assert words[0] in known or "baselines" in words[0], words


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "docs" / "configuration.md"], ids=lambda page: page.name)
def test_options_of_pages_are_settings_of_every_config(
    page: Path, workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (workplace / "mysource.py").write_text("from recsys import Table\n\n\nclass MySource(Table):\n    pass\n")
    for config in sorted(CONFIGS.glob("*.yaml")):
        trains = yaml.safe_load(config.read_text())["model"]["objective"]["class_path"]
        for words in options_of(page):
            if words[0].startswith("--model.objective.init_args") and not trains.endswith("TAWin"):
                continue  # the pages offer these for TAWin; its options are no other objective's
            prints_its_config(["fit", f"--config=configs/{config.name}", *words], capsys)


def in_small(arguments: list[str], policy: str, small: list[str]) -> list[str]:
    """The command with a small policy and few steps before its own options, but for the policy that it names."""
    split = (argument.split("=", 1) if argument.startswith("--") else [argument] for argument in arguments)
    words = [word for part in split for word in part]
    pairs = list(zip(words[1::2], words[2::2], strict=True))
    configs = [f"{name}={value}" for name, value in pairs if name == "--config"]
    others = [f"{name}={value}" for name, value in pairs if name not in ("--config", "--model.policy")]
    return [words[0], *configs, policy, *small, *others]


@pytest.mark.parametrize("config", sorted(CONFIGS.rglob("*.yaml")), ids=lambda path: path.name)
@pytest.mark.parametrize("local_model", ["llama"], indirect=True)
def test_what_the_header_of_a_config_offers_runs(
    config: Path,
    local_model: str,
    folder: Path,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    """On small data, a small model and in few steps; what needs eight GPUs is parsed alone."""
    chosen = {"class_path": "recsys.policy.LLMPolicy", "init_args": {"model": local_model, "lora": {"r": 2}}}
    policy = f"--model.policy={json.dumps(chosen)}"
    offered = offered_by(config)
    assert offered or config.parent != CONFIGS
    for arguments in offered:
        settings = prints_its_config(arguments, capsys)
        if settings["trainer"]["accelerator"] == "gpu":
            continue
        small = [option for option in SMALL if settings["model"]["warm_start"] or "warm_start" not in option]
        if any("adapter=" in argument for argument in arguments):
            main(in_small(arguments[:2], policy, small))  # makes the adapter
        main(in_small(arguments, policy, small))
    capsys.readouterr()


def test_the_python_of_the_readme_runs(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    metrics, training = re.findall(r"```python\n(.*?)```", PAGES[0].read_text(), re.DOTALL)
    assert len(metrics.splitlines()) <= 12
    assert len(training.splitlines()) <= 24
    exec(compile(metrics, "README.md", "exec"), {})
    assert capsys.readouterr().out.splitlines()[1:] == ["recall@2 0.5", "wpauc 0.5"]
    exec(compile(training, "README.md", "exec"), {})
    assert "recall@5: TAWin - warm start" in capsys.readouterr().out
