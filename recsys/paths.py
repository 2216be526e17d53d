"""Types of the options that name what is to be read: inside a YAML file, paths count from that file.

On the command line, and in Python, they count from the working directory. What a run writes always does.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, TypeAlias

from jsonargparse.typing import register_type

if TYPE_CHECKING:
    InputPath: TypeAlias = str
    ModelName: TypeAlias = str
else:

    class InputPath(str):
        """A file or folder to read."""

    class ModelName(str):
        """A folder of a ``transformers`` model, or the name of one elsewhere."""


def _absolute(path: str) -> InputPath:
    """Return an absolute path; jsonargparse calls this in the folder of the YAML file that holds ``path``."""
    return InputPath(os.path.abspath(os.path.expanduser(path)))


def _absolute_if_folder(name: str) -> ModelName:
    return ModelName(_absolute(name) if os.path.isdir(os.path.expanduser(name)) else name)


register_type(InputPath, serializer=str, deserializer=_absolute)
register_type(ModelName, serializer=str, deserializer=_absolute_if_folder)
