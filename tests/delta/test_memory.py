"""Anonymous memory stays flat however large the checkpoints are.

Pages of mapped files do not count: the kernel takes them back when it likes. Each command runs in
a process of its own, without torch, and is sampled from outside.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from support.memory import peak_of
from support.synthetic import write_sparse

MEGABYTE = 1_000_000
LIMIT_NBYTES = 100 * MEGABYTE


@pytest.fixture(scope="module")
def interpreter_nbytes() -> int:
    """The anonymous memory of an interpreter that does nothing, which is not the library's."""
    return peak_of("-c", "import time; time.sleep(0.1)")[0]


@pytest.fixture(
    scope="module", params=["one-tensor", pytest.param("many-tensors", marks=pytest.mark.slow)]
)
def gigabyte_pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """Two checkpoints of 1 GB each, as one embedding or as layers of 33 MB tensors."""
    directory = tmp_path_factory.mktemp(request.param)
    if request.param == "one-tensor":
        shapes = {
            "model.embed_tokens.weight": (122_000, 4096),
            "model.layers.0.self_attn.q_proj.weight": (64, 64),
        }
    else:
        shapes = {f"model.layers.{n}.mlp.up_proj.weight": (4096, 4096) for n in range(30)}
    return (
        write_sparse(directory / "a.safetensors", shapes, seed=1),
        write_sparse(directory / "b.safetensors", shapes, seed=2),
    )


def test_a_delta_of_a_gigabyte_pair_takes_less_than_100_megabytes(
    gigabyte_pair: tuple[Path, Path], interpreter_nbytes: int, tmp_path: Path
) -> None:
    a, b = map(str, gigabyte_pair)
    out = str(tmp_path / "delta")
    options = ["--modules", "all", "--rows", "index", "--threads", "8"]
    peak, samples = peak_of("-m", "drift_fast", "delta", a, b, "--out", out, *options)
    assert samples > 20, "too few samples to call it a peak"
    assert (tmp_path / "delta" / "drift.json").exists()
    assert peak - interpreter_nbytes < LIMIT_NBYTES, (
        f"{(peak - interpreter_nbytes) / MEGABYTE:.0f} MB"
    )


def test_statistics_of_a_gigabyte_pair_take_less_than_100_megabytes(
    gigabyte_pair: tuple[Path, Path], interpreter_nbytes: int
) -> None:
    a, b = map(str, gigabyte_pair)
    peak, _ = peak_of("-m", "drift_fast", "inspect", a, b, "--modules", "all", "--rows", "index")
    assert peak - interpreter_nbytes < LIMIT_NBYTES, (
        f"{(peak - interpreter_nbytes) / MEGABYTE:.0f} MB"
    )


@pytest.mark.slow
def test_memory_does_not_grow_with_the_checkpoint(interpreter_nbytes: int, tmp_path: Path) -> None:
    peaks = []
    for layers in (8, 96):
        shapes = {f"model.layers.{n}.mlp.up_proj.weight": (4096, 4096) for n in range(layers)}
        pair = [
            str(write_sparse(tmp_path / f"{layers}{side}.safetensors", shapes, seed=1))
            for side in "ab"
        ]
        peaks.append(
            peak_of("-m", "drift_fast", "inspect", *pair, "--threads", "2")[0] - interpreter_nbytes
        )
    assert peaks[1] < peaks[0] + 16 * MEGABYTE, peaks


def test_resident_pages_of_the_files_are_given_back(gigabyte_pair: tuple[Path, Path]) -> None:
    """The whole resident set stays below a quarter of what is read, mapped pages included."""
    a, b = map(str, gigabyte_pair)
    command = ["-m", "drift_fast", "inspect", a, b, "--modules", "all", "--rows", "index"]
    peak, _ = peak_of(*command, of="Rss")
    assert peak < 500 * MEGABYTE, f"{peak / MEGABYTE:.0f} MB resident"
