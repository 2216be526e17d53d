"""What `pip install .` copies."""

import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_every_package_is_installed() -> None:
    """An editable installation works with a package that is not listed, any other does not."""
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = {
        ".".join(path.parent.relative_to(ROOT).parts)
        for top in ("recsys", "callbacks")
        for path in (ROOT / top).rglob("__init__.py")
    }
    assert found | {"recsys_configs"} == set(listed)
