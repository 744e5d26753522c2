"""The memory option: what buffers take is bounded and reported, and changes no bit."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from drift_fast import Delta, compute_delta, inspect
from drift_fast._core import Checkpoint, DeltaWriter
from drift_fast._core import stream as stream_pairs
from drift_fast.cli import main as cli
from support.memory import peak_of
from support.synthetic import (
    FLOAT_DTYPES,
    Stored,
    contents,
    refused,
    round_once,
    stored_bits,
    write_file,
    write_sparse,
)

if TYPE_CHECKING:
    from drift_fast._core import Moments

MEGABYTE = 1_000_000
SHAPES: dict[str, tuple[int, ...]] = {
    "scalar": (),
    "empty": (0, 3),
    "one": (1,),
    "odd": (77, 31),
    "chunk": (1 << 18,),
    "more": (513, 512),
    "huge": (2003, 1024),
    "last": (5, 1, 3),
}
ALL: dict[str, Any] = {"modules": "re:.*", "rows": "index", "check_weights": False}


def checkpoint(path: Path, seed: int, shapes: dict[str, tuple[int, ...]]) -> Path:
    """Write tensors whose dtypes take turns, the empty ones included."""
    rng = np.random.default_rng(seed)
    tensors: dict[str, Stored] = {}
    for number, (name, shape) in enumerate(shapes.items()):
        dtype = FLOAT_DTYPES[(number + seed) % len(FLOAT_DTYPES)]
        bits = round_once(rng.normal(0, 1, shape).reshape(-1), dtype)
        tensors[name] = stored_bits(bits, dtype, shape)
    return write_file(path, tensors)


@pytest.fixture(scope="module")
def many_shapes(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    directory = tmp_path_factory.mktemp("shapes")
    return (
        checkpoint(directory / "a.safetensors", 0, SHAPES),
        checkpoint(directory / "b.safetensors", 1, SHAPES),
    )


def stream(
    sources: tuple[Path, Path], out: Path, *, reader: str = "pread", **options: Any
) -> tuple[dict[str, bytes], list[Moments], int]:
    """Write a delta of every tensor and return the bytes of its files, the moments and the peak."""
    a, b = (Checkpoint(path, reader=reader) for path in sources)
    writer = DeltaWriter(
        {
            "target": out,
            "overwrite": True,
            "max_shard_nbytes": 3 * MEGABYTE,
            "description_nbytes": 0,
        },
        [(name, list(shape)) for name, shape in SHAPES.items()],
        "bfloat16",
    )
    pairs: Any = [(name, name) for name in SHAPES]
    limits: Any = options
    try:
        moments, peak_nbytes = stream_pairs(a, b, pairs, limits, writer=writer)
        writer.commit(b"{}")
    finally:
        writer.abort()
    return contents(out), moments, peak_nbytes


@pytest.mark.parametrize("memory", [6 * MEGABYTE, 20 * MEGABYTE, None])
@pytest.mark.parametrize("reader", ["mmap", "pread"])
def test_no_option_changes_a_bit(
    many_shapes: tuple[Path, Path], tmp_path: Path, reader: str, memory: int | None
) -> None:
    expected = stream(many_shapes, tmp_path / "one", threads=1)
    assert len(expected[0]) > 3, "several shards"
    for threads in range(1, 9):
        found = stream(
            many_shapes,
            tmp_path / "other",
            reader=reader,
            threads=threads,
            memory=memory,
            prefetch=(0, 1 << 20, None)[threads % 3],
        )
        assert found[:2] == expected[:2], (threads, memory)
        assert 0 < found[2] <= (memory or found[2])


@pytest.fixture(scope="module")
def layers(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A pair of 32 MB: 8 tensors of 2 million values on either side."""
    directory = tmp_path_factory.mktemp("layers")
    shapes = {f"model.layers.{n}.mlp.up_proj.weight": (1024, 2048) for n in range(8)}
    return (
        write_sparse(directory / "a.safetensors", shapes, seed=1),
        write_sparse(directory / "b.safetensors", shapes, seed=2),
    )


@pytest.mark.parametrize("memory", ["2MB", 5_000_000, "64MB"])
@pytest.mark.parametrize("threads", [1, 3, 16])
@pytest.mark.parametrize("reader", ["mmap", "pread"])
def test_buffers_take_no_more_than_allowed(
    layers: tuple[Path, Path], out: Path, memory: int | str, threads: int, reader: str
) -> None:
    allowed = memory if isinstance(memory, int) else int(memory[:-2]) * MEGABYTE
    options: dict[str, Any] = {"memory": memory, "threads": threads, "reader": reader}
    report = inspect(*layers, **options)
    delta = compute_delta(*layers, out, **options)
    again = Delta.open(out).save(out.with_name("copy"), memory=memory)
    for peak in (report.peak_nbytes, delta.peak_nbytes, again.peak_nbytes):
        assert peak is not None
        assert 0 < peak <= allowed
    # Half a mebibyte of each side and, in a file, of Δ.
    least = (1 << 20) if reader == "pread" else 0
    assert report.peak_nbytes >= least
    assert contents(out.with_name("copy")) == contents(out)


def test_the_peak_is_that_of_a_chunk_whatever_the_size_of_the_pair(
    layers: tuple[Path, Path], tmp_path: Path
) -> None:
    shapes = {f"model.layers.{n}.mlp.up_proj.weight": (1024, 2048) for n in range(32)}
    larger = [write_sparse(tmp_path / f"{seed}.safetensors", shapes, seed=seed) for seed in (1, 2)]
    peaks = [inspect(*pair, threads=1).peak_nbytes for pair in (layers, larger)]
    assert peaks[0] == peaks[1]


def test_too_little_memory_says_the_least_and_that_does(layers: tuple[Path, Path]) -> None:
    with refused(ValueError, "too small", "up_proj", "one thread needs"):
        inspect(*layers, memory="1MB")
    with pytest.raises(ValueError, match="memory=") as caught:
        inspect(*layers, memory="1MB")
    least = re.search(r"memory=(\d+)", str(caught.value))
    assert least is not None
    assert inspect(*layers, memory=int(least[1]), threads=8).peak_nbytes == int(least[1])
    with refused(ValueError, "too small"):
        inspect(*layers, memory=int(least[1]) - 1)


def test_memory_that_is_no_size_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    for memory in ("much", 0, "-5MB"):
        with refused(ValueError, "size"):
            inspect(tmp_path / "none", tmp_path / "none", memory=memory)
        with refused(ValueError, "size"):
            compute_delta(tmp_path / "none", tmp_path / "none", memory=memory)


def test_too_little_memory_leaves_nothing_behind(layers: tuple[Path, Path], out: Path) -> None:
    with refused(ValueError, "too small"):
        compute_delta(*layers, out, memory=1000)
    assert list(out.parent.iterdir()) == []
    delta = compute_delta(*layers, memory=1000)
    with refused(ValueError, "too small"):
        delta.save(out)
    assert list(out.parent.iterdir()) == []
    assert delta.peak_nbytes is None
    assert (delta.save(out, memory="64MB").peak_nbytes or 0) == delta.peak_nbytes


def test_a_delta_is_copied_piece_by_piece(
    many_shapes: tuple[Path, Path], layers: tuple[Path, Path], out: Path
) -> None:
    shapes = {f"model.layers.0.{name}.weight": shape for name, shape in SHAPES.items()}
    first, second = (checkpoint(out.with_name(f"{n}.safetensors"), n, shapes) for n in (0, 1))
    delta = compute_delta(first, second, out, **ALL)
    seen: list[Any] = []
    copy = delta.save(out.with_name("copy"), memory=1001, on_progress=seen.append)
    assert contents(copy.path or out) == contents(out)
    assert copy.peak_nbytes == 1001
    assert (seen[-1].tensors, seen[-1].nbytes) == (len(SHAPES), seen[-1].total_nbytes)
    with refused(ValueError, "too small"):
        delta.save(out.with_name("third"), memory=1)
    assert not out.with_name("third").exists()


def test_the_command_takes_a_memory_and_prints_the_peak(
    layers: tuple[Path, Path], out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = map(str, layers)
    assert cli.main(["inspect", a, b, "--memory", "5MB", "--threads", "1"]) == 0
    assert capsys.readouterr().out.count("\nbuffers took 1.1 MB at most\n") == 1
    assert cli.main(["delta", a, b, "-o", str(out), "--memory", "5MB", "--threads", "1"]) == 0
    assert capsys.readouterr().out.count(f"written to {out}; buffers took 1.6 MB at most\n") == 1
    assert cli.main(["inspect", a, b, "--json", "--threads", "1"]) == 0
    assert 1 << 20 <= json.loads(capsys.readouterr().out)["peak_nbytes"] < 1.1 * (1 << 20)
    assert cli.main(["inspect", a, b, "--memory", "1KB"]) == 1
    assert "too small" in capsys.readouterr().err


@pytest.mark.slow
def test_a_process_takes_the_same_memory_for_a_pair_four_times_as_large(tmp_path: Path) -> None:
    peaks = []
    for count in (8, 32):
        shapes = {f"model.layers.{n}.mlp.up_proj.weight": (4096, 4096) for n in range(count)}
        pair = [
            str(write_sparse(tmp_path / f"{count}-{seed}.safetensors", shapes, seed=seed))
            for seed in (1, 2)
        ]
        options = ("--no-check-weights", "--threads", "8", "--memory", "16MB")
        peaks.append(peak_of("-m", "drift_fast", "inspect", *pair, *options)[0])
    assert abs(peaks[1] - peaks[0]) < 10 * MEGABYTE, peaks
