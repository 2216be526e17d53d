"""Types of the options that name what is to be read: inside a YAML file, paths count from that file.

On the command line, and in Python, they count from the working directory. What a run writes always does.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, TypeAlias

from jsonargparse.typing import register_type

if TYPE_CHECKING:
    InputPath: TypeAlias = str
    NameOrFolder: TypeAlias = str
else:

    class InputPath(str):
        """A file or folder to read."""

    class NameOrFolder(str):
        """A folder of a model or of data, or the name of one on the hub."""


def _absolute(path: str) -> InputPath:
    """Return an absolute path; jsonargparse calls this in the folder of the YAML file that holds ``path``."""
    return InputPath(os.path.abspath(os.path.expanduser(path)))


def _absolute_if_folder(name: str) -> NameOrFolder:
    return NameOrFolder(_absolute(name) if os.path.isdir(os.path.expanduser(name)) else name)


register_type(InputPath, serializer=str, deserializer=_absolute)
register_type(NameOrFolder, serializer=str, deserializer=_absolute_if_folder)
