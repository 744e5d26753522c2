"""A path that a user gives: `~` is their home directory, whether or not a shell has seen it."""

from __future__ import annotations

import os
from pathlib import Path


def local_path(path: str | os.PathLike[str]) -> Path:
    """Return the path with `~` and `~user` expanded; of an unknown user it stays as it is."""
    return Path(os.path.expanduser(path))
