"""What `pip install .` copies, and that the files around the package name the same versions."""

import re
import tomllib
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_every_package_is_installed() -> None:
    """An editable installation works with a package that is not listed, any other does not."""
    listed = PROJECT["tool"]["setuptools"]["packages"]
    found = {
        ".".join(path.parent.relative_to(ROOT).parts)
        for top in ("recsys", "callbacks")
        for path in (ROOT / top).rglob("__init__.py")
    }
    assert found | {"recsys_configs"} == set(listed)


def test_one_version_of_the_software_of_ruff_and_of_python() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    project = PROJECT["project"]
    assert (citation["title"], citation["version"], citation["license"]) == (
        project["name"],
        project["version"],
        project["license"],
    )
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    pinned = re.search(r"^ruff==(.*)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert pinned is not None
    assert [hook["rev"] for hook in hooks] == [f"v{pinned[1]}"]
    job = yaml.safe_load((ROOT / ".github" / "workflows" / "tests.yml").read_text())["jobs"]["tests"]
    assert f">={job['strategy']['matrix']['python'][0]}" == project["requires-python"]
    assert ".ci/run" in [step.get("run") for step in job["steps"]]
