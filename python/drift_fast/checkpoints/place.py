"""The names in a directory, or in a repository of the Hub, and what they say about checkpoints."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{1,9})-of-(?P<count>\d{1,9})\.safetensors")
# More names than these say no more about what a directory is.
_NAMES_LIMIT = 10_000
FOLDERS_LIMIT = 100
# macOS writes its own notes on a file beside it, where a disk has no place for them.
_MACOS = "._"


@dataclass(frozen=True)
class Place:
    """A directory, or the files of a repository, by names.

    `called` is what messages call it, and `inside` opens a folder of it. `path` is None where it is
    not on this machine; then the command that downloads a folder takes the place of its path.
    """

    called: str
    files: Sequence[str]
    folders: Sequence[str]
    inside: Callable[[str], Place] = field(repr=False)
    path: Path | None = None

    @classmethod
    def on_disk(cls, path: Path) -> Place:
        """Return a directory of this machine.

        Raises:
            OSError: it cannot be listed.
        """
        with os.scandir(path) as entries:
            some = (entry for entry in entries if not entry.name.startswith(_MACOS))
            kinds = {entry.name: entry.is_dir() for entry in islice(some, _NAMES_LIMIT)}
        return cls(
            str(path),
            sorted(name for name, is_folder in kinds.items() if not is_folder),
            sorted(name for name, is_folder in kinds.items() if is_folder),
            lambda name: cls.on_disk(path / name),
            path,
        )

    @classmethod
    def on_the_hub(cls, repo: str, paths: Iterable[str], called: str = "") -> Place:
        """Return a repository of the Hub, given the paths of its files."""
        paths = [path for path in paths if not path.startswith(_MACOS)]

        def inside(folder: str) -> Place:
            start = f"{folder}/"
            below = [path.removeprefix(start) for path in paths if path.startswith(start)]
            return cls.on_the_hub(repo, below, f"{called or repo}/{folder}")

        return cls(
            called or repo,
            sorted(path for path in paths if "/" not in path),
            sorted({path.partition("/")[0] for path in paths if "/" in path}),
            inside,
        )

    @cached_property
    def series(self) -> dict[tuple[str, int], list[int]]:
        """The numbers of shards, by the stem of their names and how many there should be."""
        found: dict[tuple[str, int], list[int]] = {}
        for name in self.files:
            if match := SHARD.fullmatch(name):
                place = match["stem"], int(match["count"])
                found.setdefault(place, []).append(int(match["number"]))
        return found

    @property
    def holds_checkpoint(self) -> bool:
        """Whether the file that a checkpoint begins with is there; a link may lead nowhere."""
        found = [name for name in (SINGLE, INDEX) if name in self.files]
        return any(self.path is None or (self.path / name).exists() for name in found)

    @property
    def opens(self) -> bool:
        """Whether it seems to be a checkpoint, by its names."""
        whole = [len(numbers) == count for (_, count), numbers in self.series.items()]
        return self.holds_checkpoint or whole == [True]

    def opening(self, folders: Iterable[str]) -> list[str]:
        """Return those of some folders, the first hundred, that seem to be checkpoints."""
        return [name for name in islice(folders, FOLDERS_LIMIT) if self.below(name).opens]

    def below(self, *folders: str) -> Place:
        """Return a folder of a folder of it, and so on; each name may be a path."""
        place = self
        for name in "/".join(folders).split("/"):
            place = place.inside(name)
        return place

    def give(self, *folders: str) -> str:
        """Return what to do with a folder in order to open it."""
        inner = "/".join(folders)
        if self.path is not None:
            return f"give {inner}: {self.path / inner}"
        return (
            f"download it with `hf download {self.called} --include {shlex.quote(inner + '/*')} "
            f"--local-dir .` and give {inner}"
        )

    def quoted(self, folder: str = "") -> str:
        """Return the path of it, or of a folder, for a command."""
        return shlex.quote(str(Path(self.called) / folder))

    def with_ending(self, *endings: str) -> list[str]:
        """Return the files whose names end like that."""
        return [name for name in self.files if name.endswith(endings)]
