"""Fuzz what Python owns: reading a delta's directory, and merging two checkpoints.

usage: mutate.py {delta,merge} [--seconds N] [--seed N]

Bytes of the files of a valid delta, or of two valid checkpoints, are changed, cut, repeated and
exchanged at random. Every call either raises one of the documented errors or gives what the
unchanged files give, unless the values of a checkpoint were changed. Prints how many were tried;
ends with an error at the first that does something else, and leaves its files for a look.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from drift_fast import Delta, DriftError, compute_delta, merge
from support.synthetic import everything_under, write_pair

# What reading and writing are documented to raise.
DOCUMENTED = (DriftError, FileNotFoundError, FileExistsError, ValueError)
# Bytes that mean something in a header or in JSON.
MARKS = [b"{", b"}", b"[", b"]", b",", b":", b'"', b"\\", b"0", b"-1", b"1e999", b"null", b"\xff"]


def mutated(data: bytes, random_: random.Random) -> bytes:
    """Return bytes with one to three changes."""
    for _ in range(random_.randint(1, 3)):
        at, end = sorted(random_.randrange(len(data) + 1) for _ in range(2))
        if random_.random() < 0.2:
            data = data[:at] + random_.randbytes(len(data[at : at + 8])) + data[at + 8 :]
            continue
        # Mostly near the front, where headers are.
        if random_.random() < 0.5:
            at, end = at % 600, end % 600
            at, end = min(at, end), max(at, end)
        end = min(end, at + random_.choice([1, 2, 8, 64, 4096]))
        piece = data[at:end]
        data = data[:at] + random_.choice(
            [
                random_.randbytes(len(piece)) + data[end:],
                data[end:],
                piece + piece + data[end:],
                random_.choice(MARKS) + data[end:],
                random_.choice(MARKS) + data[at:],
                b"",
                str(random_.choice([0, 1, 2**31, 2**63, 2**64, -1])).encode() + data[end:],
            ]
        )
    return data


class Case(ABC):
    """Valid files, and what is done with a changed copy of them."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.valid = home / "valid"
        self.copy = home / "copy"

    def run(self, random_: random.Random) -> str:
        """Change a copy and use it; return what came of it."""
        shutil.rmtree(self.copy, ignore_errors=True)
        shutil.copytree(self.valid, self.copy)
        files = sorted(path for path in self.copy.rglob("*") if path.is_file())
        path = random_.choice(files)
        path.write_bytes(mutated(path.read_bytes(), random_))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self.use()
        except DOCUMENTED as error:
            if not str(error):
                raise AssertionError("an error without a message") from error
            return type(error).__name__
        self.check(path)
        return "accepted"

    @abstractmethod
    def use(self) -> None:
        """Use the changed copy; raise one of the documented errors, or accept it."""

    @abstractmethod
    def check(self, changed: Path) -> None:
        """Check what came of a copy that was accepted, in which this file was changed."""


class ReadDelta(Case):
    """A delta in two shards is opened and all of it read."""

    def __init__(self, home: Path) -> None:
        super().__init__(home)
        pair = write_pair(home / "pair")
        compute_delta(pair.reasoning, pair.multimodal, self.valid, max_shard_size="4KB")
        self.expected = self.read(self.valid)

    def read(self, directory: Path) -> dict[str, torch.Tensor]:
        delta = Delta.open(directory)
        str(delta), str(delta.stats), delta.coverage.fraction
        return {name: delta[name] for name in delta}

    def use(self) -> None:
        self.found = self.read(self.copy)

    def check(self, changed: Path) -> None:
        if self.found.keys() != self.expected.keys():
            raise AssertionError("other tensors than were written")
        for name, tensor in self.found.items():
            expected = self.expected[name]
            if (tensor.shape, tensor.dtype) != (expected.shape, expected.dtype):
                raise AssertionError(f"{name} has another shape or dtype than was written")
            # A shard with other values is refused by its checksums.
            if not torch.equal(tensor, expected):
                raise AssertionError(f"{name} has other values than were written")


class Merge(Case):
    """Two checkpoints, one in shards, are merged; a failure leaves nothing behind."""

    def __init__(self, home: Path) -> None:
        super().__init__(home)
        self.pair = write_pair(self.valid, shards=2)
        self.out = home / "out" / "merged"
        self.out.parent.mkdir()
        for directory in (self.pair.reasoning, self.pair.multimodal):
            (directory / "config.json").write_text('{"tie_word_embeddings": false}')
        self.expected = self.read(self.merged(self.valid))

    def merged(self, directory: Path) -> Path:
        shutil.rmtree(self.out, ignore_errors=True)
        sources = [
            directory / path.relative_to(self.valid)
            for path in (self.pair.reasoning, self.pair.multimodal)
        ]
        # Without tokenizers, and whatever the changed values resemble.
        merge("linear", *sources, self.out, weight=0.5, rows="index", check_weights=False)
        return self.out

    def read(self, directory: Path) -> dict[str, torch.Tensor]:
        weights = [file for file in directory.iterdir() if file.suffix == ".safetensors"]
        tensors = [item for file in weights for item in load_file(file).items()]
        if not tensors or len(tensors) != len(dict(tensors)):
            raise AssertionError("a merged model without tensors, or with one twice")
        return dict(tensors)

    def use(self) -> None:
        try:
            self.merged(self.copy)
        except BaseException:
            if everything_under(self.out.parent):
                raise AssertionError("a merge that failed left files behind") from None
            raise

    def check(self, changed: Path) -> None:
        for name, tensor in self.read(self.out).items():
            expected = self.expected.get(name)
            if changed.suffix == ".json" and (
                expected is None or not torch.equal(tensor, expected)
            ):
                raise AssertionError(f"{name} has other values, though no weight was changed")


CASES: dict[str, Callable[[Path], Case]] = {"delta": ReadDelta, "merge": Merge}


def main() -> None:
    """Run one target for some seconds."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("target", choices=sorted(CASES))
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    home = Path(tempfile.mkdtemp(prefix="drift-fast-fuzz-"))
    case = CASES[options.target](home)
    counts: dict[str, int] = {}
    end, tried = time.monotonic() + options.seconds, 0
    while time.monotonic() < end:
        seed = options.seed * 1_000_000_000 + tried
        try:
            outcome = case.run(random.Random(seed))
        except BaseException:
            print(f"{options.target}: failed at change {seed}; its files are in {case.copy}")
            raise
        counts[outcome] = counts.get(outcome, 0) + 1
        tried += 1
    shutil.rmtree(home)
    shown = ", ".join(f"{count} {name}" for name, count in sorted(counts.items()))
    print(f"{options.target}: {tried} changed inputs, none failed ({shown})")


if __name__ == "__main__":
    main()
