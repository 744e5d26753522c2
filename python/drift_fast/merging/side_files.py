"""Which side files of the multimodal model a merge copies, and which are left behind.

The core lists the names of side files: settings, text, tokenizers and licenses, never a file with
code or weights. Owns where such a file may be: a link is followed within the model's directory and
into the blobs of the Hub's cache, and nowhere else, since a merged model may be published.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from drift_fast._core import is_side_file, side_file_names
from drift_fast.errors import CheckpointError, DriftWarning

if TYPE_CHECKING:
    from drift_fast.checkpoints.opened import Opened

_INDEX = "model.safetensors.index.json"
# Far more than a tokenizer of a quarter of a million tokens takes.
_LIMIT_NBYTES = 500_000_000


@dataclass(frozen=True)
class SideFiles:
    """Files to copy, with their sizes, and the names of those that are left behind."""

    files: dict[str, tuple[Path, int]]
    left_behind: list[str]
    # Those left behind that have a side file's name, but are links to somewhere else.
    outside: list[str]

    @property
    def code(self) -> list[str]:
        """The files left behind that a model with remote code may need."""
        return [name for name in self.left_behind if name.endswith(".py")]

    def read(self, name: str) -> bytes:
        """Return a file's bytes.

        Raises:
            CheckpointError: its size has changed.
        """
        path, nbytes = self.files[name]
        try:
            data = path.read_bytes()
        except OSError as error:
            # Python names the file only where it cannot be opened.
            raise OSError(error.errno, f"cannot be read: {error.strerror}", str(path)) from error
        if len(data) != nbytes:
            raise CheckpointError(
                f"{path}: had {nbytes} bytes when the merge began and has {len(data)} now; run "
                "again once nothing writes to it"
            )
        return data


def find_side_files(multimodal: Opened) -> SideFiles:
    """Return the side files beside a multimodal model's weights.

    Raises:
        FileNotFoundError: there is no config.json, without which the result does not load.
        CheckpointError: a file is far too large, or a server fails.
    """
    directory, remote = multimodal.directory, multimodal.source.remote
    if remote is not None:
        for name in side_file_names():
            remote.optional_file(name)
    weights = {Path(file).name for file in multimodal.checkpoint.files()} | {_INDEX}
    files: dict[str, tuple[Path, int]] = {}
    left_behind, outside = [], []
    for path in sorted(directory.iterdir()):
        name = path.name
        if name in weights or name.startswith("."):
            continue
        if is_side_file(name) and path.is_file() and _is_within(path, directory):
            nbytes = path.stat().st_size
            if nbytes > _LIMIT_NBYTES:
                raise CheckpointError(
                    f"{path}: has {nbytes:,} bytes, more than any such file needs "
                    f"({_LIMIT_NBYTES:,}); move it away"
                )
            files[name] = (path, nbytes)
        elif not name.endswith(".ranges.json"):
            left_behind.append(f"{name}/" if path.is_dir() else name)
            if is_side_file(name) and path.is_symlink():
                outside.append(name)
    if "config.json" not in files:
        linked = "config.json" in outside
        raise FileNotFoundError(
            f"{directory}: there is no config.json{' but a link to elsewhere' if linked else ''} "
            "beside the multimodal weights, so the merged model could not be loaded; "
            + (
                "copy the directory with `cp -rL`, which copies what links lead to, and give that"
                if linked
                else "give the directory that save_pretrained wrote"
            )
        )
    return SideFiles(files, left_behind, outside)


def _is_within(path: Path, directory: Path) -> bool:
    """Whether a file's bytes are in the model's directory, or in its Hub cache's blobs."""
    found, home = path.resolve(), directory.resolve()
    # …/models--NAME/snapshots/REVISION/config.json is a link to …/models--NAME/blobs/HASH.
    snapshots = home.parent
    of_a_cache = snapshots.name == "snapshots" and found.parent == snapshots.parent / "blobs"
    return found.is_relative_to(home) or of_a_cache


def warn_of_what_stays(found: SideFiles) -> None:
    """Warn about code of the model and about links to elsewhere: neither is copied."""
    if found.code:
        warnings.warn(
            f"the multimodal model comes with code ({', '.join(found.code)}), which is never "
            "copied: if the model needs it, put it beside the merged one before loading that",
            DriftWarning,
            stacklevel=3,
        )
    if found.outside:
        warnings.warn(
            f"not copied, since they are links out of the multimodal model's directory: "
            f"{', '.join(found.outside)}; put the files themselves there if they belong to it",
            DriftWarning,
            stacklevel=3,
        )
