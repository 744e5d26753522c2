"""Disks that fill and sources that change in the middle: an error, and nothing left behind."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from drift_fast import CheckpointError, compute_delta, inspect
from drift_fast._core import Checkpoint, DeltaWriter, stream
from drift_fast.progress_bar import Progress
from support.disks import MEGABYTE
from support.synthetic import everything_under, round_once, stored_bits, write_file, write_sparse


def write_layers(path: Path, noise: float, count: int, *shape: int) -> Path:
    rng = np.random.default_rng(0)
    tensors = {}
    for number in range(count):
        values = rng.normal(0, 1, shape) + noise * rng.normal(0, 1, shape)
        bits = round_once(values.reshape(-1), "BF16")
        tensors[f"model.layers.{number}.mlp.up_proj.weight"] = stored_bits(bits, "BF16", shape)
    return write_file(path, tensors)


def write_sources(directory: Path, count: int, *shape: int) -> tuple[Path, Path]:
    return (
        write_layers(directory / "a.safetensors", 0.0, count, *shape),
        write_layers(directory / "b.safetensors", 0.1, count, *shape),
    )


def full(error: OSError, free: int) -> None:
    """Check that an error says how much is needed and how much is free."""
    assert error.errno == errno.ENOSPC
    found = re.search(r"the delta needs (\d+) bytes but .* has (\d+) free", str(error))
    assert found is not None, error
    assert int(found[2]) == pytest.approx(free, abs=2 * MEGABYTE)


def test_a_delta_that_does_not_fit_is_refused_before_anything_is_read(
    small_disk: Path, tmp_path: Path
) -> None:
    sources = write_sources(tmp_path, 5, 1024, 1024)
    seen: list[Progress] = []
    with pytest.raises(OSError, match="delta needs") as caught:
        compute_delta(*sources, small_disk / "delta", on_progress=seen.append)
    full(caught.value, 8 * MEGABYTE)
    assert not [progress for progress in seen if progress.stage == "reading"]
    assert everything_under(small_disk) == set()


def test_index_and_description_are_part_of_what_is_needed(small_disk: Path, tmp_path: Path) -> None:
    """Tensors of one value: nearly all is names."""
    count = 8_000
    sources = write_sources(tmp_path, count, 1)
    with pytest.raises(OSError, match="delta needs") as caught:
        compute_delta(*sources, small_disk / "delta", check_weights=False)
    full(caught.value, 8 * MEGABYTE)
    assert everything_under(small_disk) == set()
    delta = compute_delta(*sources, tmp_path / "delta", check_weights=False)
    written = sum(path.stat().st_size for path in (tmp_path / "delta").iterdir())
    needed = re.search(r"needs (\d+) bytes", str(caught.value))
    assert needed is not None
    assert len(delta) == count
    assert written <= int(needed[1]) < 5 * written


def test_a_disk_that_fills_meanwhile_gives_the_same_error_and_nothing_is_left_behind(
    small_disk: Path, tmp_path: Path
) -> None:
    sources = write_sources(tmp_path, 3, 1024, 1024)
    stranger = small_disk / "stranger"

    def fill(progress: Progress) -> None:
        if progress.stage == "reading" and not stranger.exists():
            with stranger.open("wb", buffering=0) as file, suppress(OSError):
                while True:
                    file.write(bytes(4096))

    with pytest.raises(OSError, match="delta needs") as caught:
        compute_delta(*sources, small_disk / "delta", on_progress=fill)
    full(caught.value, 6 * MEGABYTE)
    assert everything_under(small_disk) == {"stranger"}


def test_a_file_that_may_not_grow_so_large_is_refused_with_the_remedy(
    limit_files: Callable[[int], None], tmp_path: Path, out: Path
) -> None:
    sources = write_sources(tmp_path, 2, 1024, 1024)
    limit_files(3 * MEGABYTE)
    with pytest.raises(OSError, match="max_shard_size") as caught:
        compute_delta(*sources, out)
    assert caught.value.errno == errno.EFBIG
    assert everything_under(out.parent) == set()
    compute_delta(*sources, out, max_shard_size=2 * MEGABYTE)


@pytest.mark.parametrize("threads", [1, 4])
def test_a_write_that_fails_in_the_middle_says_what_is_needed(
    limit_files: Callable[[int], None], tmp_path: Path, out: Path, threads: int
) -> None:
    sources = write_sources(tmp_path, 4, 1024, 1024)
    a, b = map(Checkpoint, sources)
    names = [name for name, *_ in a.tensors()]
    writer = DeltaWriter(
        {
            "target": out,
            "overwrite": False,
            "max_shard_nbytes": 1 << 30,
            "description_nbytes": 0,
        },
        [(name, [1024, 1024]) for name in names],
        "bfloat16",
    )
    limit_files(3 * MEGABYTE)
    pairs: Any = [(name, name) for name in names]
    with pytest.raises(OSError, match="the delta needs 8") as caught:
        stream(a, b, pairs, {"threads": threads, "memory": 8 * MEGABYTE}, writer=writer)
    assert caught.value.errno == errno.EFBIG
    writer.abort()
    assert everything_under(out.parent) == set()


def append(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"\0")


def touch(path: Path) -> None:
    """Move the time of the last change by a microsecond."""
    stat = path.stat()
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1000))


def replace(path: Path) -> None:
    """Put a file of the same bytes and times in its place."""
    stat = path.stat()
    copy = path.with_name("copy")
    copy.write_bytes(path.read_bytes())
    os.utime(copy, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    copy.replace(path)


@pytest.mark.parametrize("change", [append, touch, replace])
@pytest.mark.parametrize("reader", ["mmap", "pread", "auto"])
@pytest.mark.parametrize("side", [0, 1])
def test_a_source_that_changes_while_it_is_read_gives_an_error_and_no_delta(
    tmp_path: Path, out: Path, change: Callable[[Path], None], reader: str, side: int
) -> None:
    sources = write_sources(tmp_path, 2, 64, 64)

    def interfere(progress: Progress) -> None:
        if progress.stage == "reading" and not changed:
            changed.append(sources[side])
            change(sources[side])

    changed: list[Path] = []
    with pytest.raises(CheckpointError, match="changed while it was being read") as caught:
        compute_delta(*sources, out, reader=reader, on_progress=interfere)
    assert str(sources[side]) in str(caught.value)
    assert changed
    assert everything_under(out.parent) == set()


def test_statistics_of_a_source_that_changes_are_refused_too(tmp_path: Path) -> None:
    sources = write_sources(tmp_path, 2, 64, 64)
    with pytest.raises(CheckpointError, match="changed while it was being read"):
        inspect(*sources, on_progress=lambda _: append(sources[0]))


@pytest.mark.parametrize("call", [compute_delta, inspect])
def test_a_file_cut_off_while_it_is_read_gives_an_error_and_no_delta(
    tmp_path: Path, out: Path, call: Callable[..., object]
) -> None:
    """Two sparse gigabytes, so that most of it is still to be read when the first tick comes."""
    shapes = {f"model.layers.{n}.mlp.up_proj.weight": (4096, 4096) for n in range(30)}
    sources = [write_sparse(tmp_path / f"{name}.safetensors", shapes) for name in "ab"]

    def cut(progress: Progress) -> None:
        if progress.stage == "reading":
            os.truncate(sources[0], 1 << 20)

    options: dict[str, Any] = {"reader": "pread", "check_weights": False, "on_progress": cut}
    if call is compute_delta:
        options["out"] = out
    with pytest.raises((OSError, CheckpointError), match=r"did it shrink|changed while"):
        call(*sources, **options)
    assert everything_under(out.parent) == set()
