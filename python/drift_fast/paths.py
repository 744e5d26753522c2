"""A path that a user gives: `~` is their home directory, whether or not a shell has seen it."""

from __future__ import annotations

import os
from pathlib import Path


def local_path(path: str | os.PathLike[str]) -> Path:
    """Return the path with `~` and `~user` expanded; of an unknown user it stays as it is.

    Raises:
        TypeError: not a path.
    """
    if not isinstance(path, str | os.PathLike):
        kind = type(path).__name__
        hint = "; a Δ is written first, by Delta.save(path) or Delta.combine(…).save(path)"
        raise TypeError(
            f"expected a path, Hub id or URL, got {kind}{hint if hasattr(path, 'shapes') else ''}"
        )
    return Path(os.path.expanduser(path))
