"""Every command in README, docs and the headers of configs parses as it stands; what a header offers runs in small.

Pages that are walked run as they stand, with their outputs; so does the notebook. And the site is built from them.
"""

from __future__ import annotations

import importlib
import inspect
import json
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from matplotlib import pyplot

from recsys.cli import configs_parser, main, recommend_parser
from recsys.tree import TokenTree, pass_mask, row_mask
from recsys.trie import Trie
from tests.test_configs import CONFIGS, SMALL, folder  # noqa: F401 - a fixture

ROOT = CONFIGS.parent
DOCS = ROOT / "docs"
WALKED = [DOCS / "extending.md", DOCS / "method.md", DOCS / "tutorial.md"]  # each in a new folder
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(set(DOCS.rglob("*.md")) - set(WALKED))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
MYDATA = re.search(r"```yaml\n(# mydata.yaml\n.*?)```", PAGES[0].read_text(), re.DOTALL)


def commands_of(page: Path) -> list[list[str]]:
    """The commands in a page's blocks of bash, and in its text between single backticks."""
    text = page.read_text()
    blocks = [block for language, block in FENCE.findall(text) if language == "bash"]
    return [words for block in blocks for words in commands_in(block)] + commands_between(FENCE.sub("", text))


def commands_between(text: str) -> list[list[str]]:
    """The commands in a text between single backticks."""
    found = re.findall(r"`((?:OMP_NUM_THREADS=1 )?(?:recsys|python) [^`]*)`", text)
    return commands_in("\n".join(" ".join(command.split()) for command in found))  # lines of a text may end in one


def commands_in(block: str) -> list[list[str]]:
    """The commands of lines of bash."""
    lines = block.replace("\\\n", " ").splitlines()
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
    parts = dict.fromkeys(("state_dict", "policy", "loops", "fingerprint"), "")
    for name in ("small", "tawin"):
        checkpoint = folder / "checkpoints" / name / "version_0" / "last.ckpt"
        checkpoint.parent.mkdir(parents=True)
        torch.save({**parts, "config": f"model: {model}\ndata: mydata.yaml\n"}, checkpoint)
    return folder


@pytest.mark.usefixtures("one_parser")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_of_pages_parse(
    page: Path, workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for words in commands_of(page):
        if words[:2] == ["recsys", "recommend"]:  # docs/recommendations.md's runs in test_trained.py
            assert not recommend_parser().parse_known_args(words[2:])[1]
        elif words[:2] == ["recsys", "configs"]:
            configs_parser().parse_args(words[2:])
        elif words[0] == "recsys":
            if "--help" not in words:
                prints_its_config(words[1:], capsys)
        elif words[0] == "torchrun":
            prints_its_config(words[words.index("recsys.cli") + 1 :], capsys)
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
            known = ("pip", "ruff", "mypy", "pytest", "tensorboard", "python", "pre-commit", "mkdocs")
            assert words[0] in known or "baselines" in words[0], words


@pytest.mark.usefixtures("one_parser")
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
    """The command with a small policy and few steps before its own options, but for its policy and its files."""
    split = (argument.split("=", 1) if argument.startswith("--") else [argument] for argument in arguments)
    words = [word for part in split for word in part]
    pairs = list(zip(words[1::2], words[2::2], strict=True))
    files = [f"{name}={value}" for name, value in pairs if name in ("--config", "--data")]
    others = [f"{name}={value}" for name, value in pairs if name not in ("--config", "--data", "--model.policy")]
    return [words[0], *files, policy, *small, *others]


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
    [training] = re.findall(r"```python\n(.*?)```", PAGES[0].read_text(), re.DOTALL)
    assert len(training.splitlines()) <= 24
    exec(compile(training, "README.md", "exec"), {})
    assert "recall@5: TAWin - warm start" in capsys.readouterr().out


def without_numbers(line: str) -> str:
    return " ".join(re.sub(r"[+-]?\d[\d.,]*", "0", line).split())


@pytest.mark.parametrize("page", WALKED, ids=lambda page: page.name)
def test_walking_through_a_page_gives_its_outputs(
    page: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Named blocks become files, commands and Python run; what the page shows of a run may differ in numbers."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    caplog.set_level("INFO")
    shown, printed = str, ""
    for language, text in FENCE.findall(page.read_text()):
        name = re.match(r"# (\w+\.\w+)\n", text)
        if name is not None:
            Path(name[1]).write_text(text)
        elif language == "python":
            exec(compile(text, page.name, "exec"), {})
            shown, printed = str, capsys.readouterr().out
        elif language == "bash":
            for words in commands_in(text):
                if words[0] == "python":
                    runpy.run_path(words[1])
                else:
                    assert words[0] == "recsys"
                    main(words[1:])
            shown, printed = without_numbers, "\n".join([*caplog.messages, capsys.readouterr().out])
        elif language == "csv":
            assert any(file.read_text().startswith(text) for file in Path().glob("*.csv")), text
        elif language == "text":
            found = {shown(line) for line in printed.splitlines()}
            assert [line for line in text.splitlines() if shown(line) not in found] == []
    for words in commands_between(FENCE.sub("", page.read_text())):
        if words[0] == "recsys" and "--help" not in words:
            prints_its_config(words[1:], capsys)


def test_the_notebook_prints_and_draws_what_it_holds(capsys: pytest.CaptureFixture[str]) -> None:
    pyplot.switch_backend("agg")
    namespace: dict[str, object] = {}
    for cell in json.loads((DOCS / "window.ipynb").read_text())["cells"]:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), "window.ipynb", "exec"), namespace)
            printed = [line for output in cell["outputs"] for line in output.get("text", [])]
            assert capsys.readouterr().out == "".join(printed)
            assert len(pyplot.get_fignums()) == sum("data" in output for output in cell["outputs"])
            pyplot.close("all")


def test_the_drawn_mask_is_that_of_a_pass() -> None:
    """The drawing in docs/architecture.md, from the code that makes masks."""
    titles, end, prompt = {1: "Heat", 2: "Star", 3: "Trek", 4: "Wars"}, 9, ["the", "user"]
    trie = Trie.from_sequences([[1, end], [2, 3, end], [2, 4, end]])
    items = torch.arange(3)[None]
    rows = {}
    for normalization, least in {"vocab": 1, "trie": 2}.items():
        tree = TokenTree.of(items, trie, lambda node, least=least: trie.degree(node) >= least)
        rows[normalization] = [titles[int(token)] for token in trie.tokens[tree.node[0]]]
        if normalization == "vocab":
            start = torch.full_like(tree.node, len(prompt))
            mask = pass_mask(len(prompt), row_mask(start, len(prompt), tree.lineage(), len(rows["vocab"])))[0, 0]
            positions = (start + trie.depth(tree.node) - 1).tolist()
    assert rows["trie"] == ["Star"]
    assert positions == [[2, 2, 3, 3]]
    names = [*prompt, *rows["vocab"]]
    drawn = ["".join(f"{name:6}" for name in ["", *names])]
    drawn += [
        f"{name:6}" + "".join("■     " if sees else "·     " for sees in row)
        for name, row in zip(names, mask, strict=True)
    ]
    text = "\n".join(line.rstrip() for line in drawn)
    assert text in (DOCS / "architecture.md").read_text(), text


def test_the_site_has_every_page_and_name_and_needs_no_network(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    built = subprocess.run(build, cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    pages = {path.parent.name: path.read_text() for path in tmp_path.rglob("index.html")}
    for name, html in pages.items():
        fetched = re.findall(r"<(?:script|link|img|iframe)[^>]* (?:src|href)=\"?(?:https?:)?//[^>]*>", html)
        assert [tag for tag in fetched if "canonical" not in tag] == [], name
        # formulas and the references of docstrings are written out
        assert not re.search(r"```|\$`|:(?:func|class|mod|meth):", html), name
    packages = ("recsys.functional", "recsys.metrics", "recsys.objectives", "recsys.policy", "recsys.data", "callbacks")
    for package in map(importlib.import_module, packages):
        for name in package.__all__:
            member = getattr(package, name)
            if inspect.isclass(member) or inspect.isroutine(member):
                homes = (package.__name__, member.__module__)  # a function that is named like its module has the second
                assert any(f'id="{home}.{name}"' in pages["api"] for home in homes), name
