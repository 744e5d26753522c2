"""The machine's limit: reading both files, their XOR, and writing that XOR like a delta.

    python -P controls.py {read,xor,write,pick} REASONING MULTIMODAL [--threads N] [--way WAY] …

Owns the loops with the least work that read every byte of a pair and, in `write`, write half as
many. Each can be done in several ways; `pick` times them and names the fastest, which ours is
compared with. This file imports nothing from drift_fast, so that a control starts as fast as
possible. Shard k of one model is read beside shard k of the other, up to the end of the shorter
one.
"""

from __future__ import annotations

import argparse
import itertools
import json
import mmap
import multiprocessing
import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Words = npt.NDArray[np.uint64]

# Direct writing needs offsets and lengths that are multiples of the file system's blocks.
_ALIGNED = 4096
_READ_NBYTES = 8 << 20
# Passes of each way before one is picked.
_PASSES = 3


@dataclass(frozen=True)
class Way:
    """How a control reads and writes; `chunk` is in bytes of one model."""

    chunk: int
    mapped: bool = False
    forked: bool = False
    direct: bool = False


READ_WAYS = {"one after the other": 1, "both at a time": 2}
XOR_WAYS = {
    "mapped, 256 KiB": Way(256 << 10, mapped=True),
    "mapped, 1 MiB": Way(1 << 20, mapped=True),
    "pread, 256 KiB": Way(256 << 10),
    "pread, 512 KiB": Way(512 << 10),
    "pread, 1 MiB": Way(1 << 20),
    "pread by processes, 512 KiB": Way(512 << 10, forked=True),
}
WRITE_WAYS = {
    "pread, pwrite, 512 KiB": Way(512 << 10),
    "pread, pwrite, 1 MiB": Way(1 << 20),
    "pread, pwrite by processes, 512 KiB": Way(512 << 10, forked=True),
    "pread, direct pwrite, 1 MiB": Way(1 << 20, direct=True),
    "pread, direct pwrite, 4 MiB": Way(4 << 20, direct=True),
}


def spans(reasoning: Path, multimodal: Path) -> list[tuple[Path, Path, int]]:
    """Return the shards that are read beside each other, and how many bytes of each."""
    sides = (sorted(path.glob("*.safetensors")) for path in (reasoning, multimodal))
    return [
        (left, right, min(left.stat().st_size, right.stat().st_size) // 8 * 8)
        for left, right in zip(*sides, strict=False)
    ]


def read(reasoning: Path, multimodal: Path, *, way: str) -> None:
    """Read every shard from beginning to end, one model after the other or both at once."""
    files = [sorted(path.glob("*.safetensors")) for path in (reasoning, multimodal)]
    groups = files if READ_WAYS[way] == 2 else [[*files[0], *files[1]]]

    def work(paths: list[Path]) -> None:
        buffer = mmap.mmap(-1, _READ_NBYTES)
        for path in paths:
            with path.open("rb", buffering=0) as file:
                if hasattr(os, "posix_fadvise"):
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
                while file.readinto(buffer):
                    pass

    _on_threads(work, groups)


class Xor:
    """XOR of both models on `threads` threads, into cache only or into files under `out`.

    Buffers are allocated and touched here; `run` opens the files again each time. Files under `out`
    are allocated at full size, written in place, and flushed with their directory, as for a delta.
    """

    def __init__(
        self, reasoning: Path, multimodal: Path, *, threads: int, way: str, out: Path | None = None
    ) -> None:
        self._way = (XOR_WAYS if out is None else WRITE_WAYS)[way]
        self._spans = spans(reasoning, multimodal)
        self._threads = threads
        self._out = out
        self._buffers = [_Buffers(self._way.chunk) for _ in range(threads)]

    def run(self) -> None:
        """Do one pass."""
        chunks = [
            (index, start, min(self._way.chunk, nbytes - start))
            for index, (_, _, nbytes) in enumerate(self._spans)
            for start in range(0, nbytes, self._way.chunk)
        ]
        files = [
            _Files(span, self._way, self._out, index) for index, span in enumerate(self._spans)
        ]
        try:
            if self._way.forked:
                self._fork(files, chunks)
            else:
                # `next` is atomic here, since it holds the interpreter's lock.
                order = itertools.count()

                def work(buffers: _Buffers) -> None:
                    while (at := next(order)) < len(chunks):
                        index, start, nbytes = chunks[at]
                        files[index].xor(start, nbytes, buffers)

                _on_threads(work, self._buffers)
        finally:
            for file in files:
                file.close()
        if self._out is not None:
            _flush(self._out)

    def _fork(self, files: list[_Files], chunks: list[tuple[int, int, int]]) -> None:
        def work(part: int) -> None:
            for index, start, nbytes in chunks[part :: self._threads]:
                files[index].xor(start, nbytes, self._buffers[part])

        fork = multiprocessing.get_context("fork")
        children = [fork.Process(target=work, args=(part,)) for part in range(self._threads)]
        for child in children:
            child.start()
        for child in children:
            child.join()
        if any(child.exitcode for child in children):
            raise OSError("a process of the control failed")


@dataclass
class _Buffers:
    """One thread's memory, aligned to pages and touched."""

    nbytes: int
    left: Words = field(init=False)
    right: Words = field(init=False)
    out: Words = field(init=False)

    def __post_init__(self) -> None:
        self.left, self.right, self.out = (
            np.frombuffer(mmap.mmap(-1, self.nbytes), dtype=np.uint64) for _ in range(3)
        )
        for buffer in (self.left, self.right, self.out):
            buffer.fill(1)


class _Files:
    """Two open shards, and the file that their XOR is written to."""

    def __init__(
        self, span: tuple[Path, Path, int], way: Way, out: Path | None, number: int
    ) -> None:
        left, right, nbytes = span
        self._inputs = [os.open(path, os.O_RDONLY) for path in (left, right)]
        self._maps: list[Words] = []
        if way.mapped:
            self._maps = [
                np.frombuffer(mmap.mmap(fd, nbytes, prot=mmap.PROT_READ), dtype=np.uint64)
                for fd in self._inputs
            ]
        self._outputs: list[int] = []
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
            path = out / f"xor-{number}"
            self._outputs.append(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644))
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(self._outputs[0], 0, nbytes)
            if way.direct:
                self._outputs.append(os.open(path, os.O_WRONLY | os.O_DIRECT))

    def xor(self, start: int, nbytes: int, buffers: _Buffers) -> None:
        words = nbytes // 8
        if self._maps:
            left, right = (view[start // 8 : start // 8 + words] for view in self._maps)
        else:
            left, right = buffers.left[:words], buffers.right[:words]
            for fd, buffer in zip(self._inputs, (left, right), strict=True):
                # A regular file gives all bytes, except at its end or on an interruption.
                if os.preadv(fd, [buffer.data], start) != nbytes:
                    raise OSError(f"fewer than {nbytes} bytes at {start}")
        out = buffers.out[:words]
        np.bitwise_xor(left, right, out=out)
        if self._outputs:
            direct = nbytes % _ALIGNED == 0
            rest = out.view(np.uint8).data
            if os.pwrite(self._outputs[-1 if direct else 0], rest, start) != nbytes:
                raise OSError(f"fewer than {nbytes} bytes were written at {start}")

    def close(self) -> None:
        self._maps.clear()
        if self._outputs:
            os.fsync(self._outputs[0])
        for fd in (*self._inputs, *self._outputs):
            os.close(fd)


def _flush(directory: Path) -> None:
    fd = os.open(directory, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)


def pick(reasoning: Path, multimodal: Path, *, threads: int, out: Path | None) -> dict[str, float]:
    """Return the median seconds of each way, fastest first, without those that fail.

    Ways take turns, so that no way always runs on a disk that is still busy with earlier writes. A
    way fails if the file system has no direct writing, or the machine no forks.
    """
    found: dict[str, list[float]] = {way: [] for way in (XOR_WAYS if out is None else WRITE_WAYS)}
    for _ in range(_PASSES):
        for way in list(found):
            try:
                control = Xor(reasoning, multimodal, threads=threads, way=way, out=out)
                start = time.perf_counter()
                control.run()
                found[way].append(time.perf_counter() - start)
            except (OSError, ValueError, AttributeError):
                del found[way]
            finally:
                if out is not None:
                    shutil.rmtree(out, ignore_errors=True)
    medians = {way: statistics.median(seconds) for way, seconds in found.items()}
    return dict(sorted(medians.items(), key=lambda item: item[1]))


def _on_threads(work: Callable[[Any], None], parts: Sequence[Any]) -> None:
    with ThreadPoolExecutor(len(parts)) as pool:
        list(pool.map(work, parts))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=("read", "xor", "write", "pick"))
    parser.add_argument("reasoning", type=Path)
    parser.add_argument("multimodal", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--way")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    pair = options.reasoning, options.multimodal
    if options.what == "read":
        read(*pair, way=options.way)
    elif options.what == "pick":
        json.dump(pick(*pair, threads=options.threads, out=options.out), sys.stdout)
    else:
        Xor(*pair, threads=options.threads, way=options.way, out=options.out).run()


if __name__ == "__main__":
    main()
