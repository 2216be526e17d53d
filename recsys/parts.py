"""Command lines in which a part that is replaced inherits nothing.

A part is a group of settings that makes one object: the data, the policy, an objective. jsonargparse lays each file and
each class that is named over what was there before, so a second data file would keep the first one's filters. Here,
whatever names a part's file or class puts the part back to its defaults first; settings inside a part still change it.
"""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ActionConfigFile

from recsys.types import UserError

GROUPS = ("model", "data", "trainer", "logger", "negatives", "checkpoint", "report", "predictions")
CLASSES = ("model.policy", "model.objective", "model.warm_start", "data.source", "trainer.logger", "trainer.strategy")

_ABSENT = object()


class ReplaceParts(ActionConfigFile):
    """``--config``: puts a part that the file replaces back to its defaults before the file is applied."""

    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: str | None = None) -> None:
        """Apply one file, or one text of YAML."""
        for part in _replaced(values):
            if part in cfg:
                if part in GROUPS:
                    cfg[part] = parser.get_defaults()[part]
                else:
                    cfg.pop(part)
        super().__call__(parser, cfg, values, option_string)


def as_configs(arguments: list[str]) -> list[str]:
    """Write each argument that replaces a part (``--data FILE``, ``--model.policy CLASS``) as a ``--config``.

    Raises:
        UserError: if an option inside a part stands before what replaces the part, and so would be lost.
    """
    result: list[str] = []
    before: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        name, given, value = argument.partition("=")
        part = name.removeprefix("--")
        words = [argument]
        if name in ("--config", "-c"):
            words += [] if given else islice(rest, 1)
            value = value if given else words[-1]
            _refuse_lost(before, _replaced(value), f"{name} {value}")
        elif name.startswith("--") and part in (*GROUPS, *CLASSES):
            value = value if given else next(rest, "")
            loaded = _load(value)
            if _replaces(loaded):
                _refuse_lost(before, [part], name)
                for key in reversed(part.split(".")):
                    loaded = {key: loaded}
                words = [f"--config={yaml.safe_dump(loaded, default_flow_style=True, width=10**6).strip()}"]
            else:
                words = [f"{name}={value}"]
        before.append(name)
        result += words
    return result


def _refuse_lost(before: list[str], parts: list[str], replacing: str) -> None:
    for option in before:
        if option.startswith(tuple(f"--{part}." for part in parts)):
            raise UserError(f"{option} stands before {replacing}, which replaces what it sets: put it behind")


def _is_file(value: str) -> bool:
    try:
        return Path(value).is_file()
    except OSError:  # a text that is too long for a path
        return False


def _replaced(config: str) -> list[str]:
    """Return the parts that a file, or a text of YAML, replaces."""
    try:
        tree = _load(Path(config).read_text() if _is_file(config) else config)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--config {config}: {error}") from error
    return [part for part in (*GROUPS, *CLASSES) if _replaces(_get(tree, part))]


def _load(text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text  # jsonargparse says what is wrong with it


def _get(tree: Any, key: str) -> Any:
    for name in key.split("."):
        if not isinstance(tree, dict) or name not in tree:
            return _ABSENT
        tree = tree[name]
    return tree


def _replaces(value: Any) -> bool:
    """Whether a part's value names its file or its class, and does not only change settings inside it."""
    return value is not _ABSENT and (not isinstance(value, dict) or "class_path" in value)
