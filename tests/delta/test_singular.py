"""The largest singular values of Δ, from a sketch in the same pass.

Owns: that they are those of a matrix whose spectrum is known, that nothing which changes time
changes them, and that what was estimated says how far off it may be. The sketch itself is tested
in rust/core/src/sketch.rs.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from drift_fast import Delta, cli, compute_delta, inspect
from support.synthetic import refused, round_once, stored_bits, write_file

EVERYTHING: dict[str, Any] = {"modules": "re:.*", "check_weights": False, "rows": "index"}
# The sketch of a matrix holds a few hundred numbers for each of its columns.
ROOM = {"memory": "1GB"}
# Rows that do and that do not end where chunks of 2¹⁸ elements do, and ones longer than a chunk;
# more rows than columns; and what is no matrix.
SHAPES = {
    "model.layers.0.self_attn.q_proj.weight": (640, 1024),
    "model.layers.0.mlp.up_proj.weight": (1500, 333),
    "model.layers.0.mlp.down_proj.weight": (5, 300_000),
    "model.layers.0.self_attn.k_proj.weight": (7, 9),
    "model.layers.0.self_attn.k_proj.bias": (640,),
    "model.layers.0.input_layernorm.weight": (0, 4),
}
SPECTRUM = (3.0, 2.0, 0.5)


def low_rank(rng: np.random.Generator, rows: int, columns: int) -> Any:
    """Return a matrix whose singular values are those of SPECTRUM, and zeros."""
    left, _ = np.linalg.qr(rng.normal(size=(rows, len(SPECTRUM))))
    right, _ = np.linalg.qr(rng.normal(size=(columns, len(SPECTRUM))))
    return (left * SPECTRUM) @ right.T


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    rng = np.random.default_rng(0)
    directory = tmp_path_factory.mktemp("low-rank")
    sides: list[dict[str, Any]] = [{}, {}]
    for name, shape in SHAPES.items():
        matrix = len(shape) == 2 and math.prod(shape) > 0
        delta = low_rank(rng, *shape) if matrix else rng.normal(size=shape)
        # Weights of zero leave the difference as it is in float32.
        for side, values in zip(sides, (delta, np.zeros(shape)), strict=True):
            side[name] = stored_bits(round_once(values.reshape(-1), "F32"), "F32", shape)
    a, b = (write_file(directory / f"{n}.safetensors", s) for n, s in zip("ab", sides, strict=True))
    return a, b


def test_singular_values_of_a_low_rank_delta_are_exact(pair: tuple[Path, Path]) -> None:
    stats = inspect(*pair, singular=4, **ROOM, **EVERYTHING).stats
    for name, shape in SHAPES.items():
        row = stats[name]
        if len(shape) != 2 or not math.prod(shape):
            assert row.singular is None
            assert math.isnan(row.rank1_share)
            continue
        assert row.singular is not None
        assert np.allclose(row.singular, (*SPECTRUM, 0.0), atol=2e-3), name
        assert row.rank1_share == pytest.approx(9 / 13.25, abs=1e-3)
        assert row.singular_over_sq is not None
        assert row.singular_over_sq < 1e-3


def test_neither_threads_nor_memory_nor_reader_changes_them(pair: tuple[Path, Path]) -> None:
    def found(**options: Any) -> Any:
        return [
            row.singular for row in inspect(*pair, singular=3, **ROOM | options, **EVERYTHING).stats
        ]

    expected = found(threads=1)
    assert any(expected)
    for threads in (2, 3, 8):
        for reader in ("mmap", "pread"):
            assert found(threads=threads, reader=reader) == expected
    assert found(threads=8, memory="400MB") == expected


@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3", "int8"])
def test_a_delta_on_disk_keeps_the_singular_values_of_the_exact_one(
    pair: tuple[Path, Path], tmp_path: Path, dtype: str
) -> None:
    expected = inspect(*pair, singular=2, **ROOM, **EVERYTHING).stats
    compute_delta(*pair, tmp_path / dtype, singular=2, dtype=dtype, **ROOM, **EVERYTHING)
    for row in Delta.open(tmp_path / dtype).stats:
        assert row.singular == expected[row.name].singular
        assert row.singular_under_sq == expected[row.name].singular_under_sq


def test_noise_says_how_little_one_pass_can_tell(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    noise = rng.normal(size=(800, 600))
    exact = float(np.linalg.norm(noise, 2) ** 2)
    sides = [
        write_file(
            tmp_path / f"{n}.safetensors",
            {
                "model.layers.0.mlp.up_proj.weight": stored_bits(
                    round_once(values.reshape(-1), "F32"), "F32", noise.shape
                )
            },
        )
        for n, values in zip("ab", (noise, 0 * noise), strict=True)
    ]
    (row,) = inspect(*sides, singular=1, **EVERYTHING).stats
    assert row.singular is not None
    assert row.singular_over_sq is not None
    assert row.singular_under_sq is not None
    square = row.singular[0] ** 2
    assert square - 2 * row.singular_over_sq <= exact <= square + 2 * row.singular_under_sq
    # Nearly all of it is tail, which the bounds must show.
    assert row.singular_under_sq > 0.03 * row.delta_sq


def test_without_being_asked_for_there_are_none(pair: tuple[Path, Path], tmp_path: Path) -> None:
    compute_delta(*pair, tmp_path / "delta", **EVERYTHING)
    assert all(row.singular is None for row in Delta.open(tmp_path / "delta").stats)
    assert "singular" not in (tmp_path / "delta" / "drift.json").read_text()


def test_a_sketch_that_does_not_fit_the_memory_is_refused(pair: tuple[Path, Path]) -> None:
    with refused(ValueError, "too small", "down_proj", "memory="):
        inspect(*pair, singular=1, **EVERYTHING)


def test_nonsense_is_refused(pair: tuple[Path, Path], tmp_path: Path) -> None:
    for count in (0, -1, 41):
        with refused(ValueError, "singular", "40", str(count)):
            inspect(*pair, singular=count, **EVERYTHING)
        with refused(ValueError, "singular", "40", str(count)):
            compute_delta(*pair, tmp_path / "delta", singular=count, **EVERYTHING)


def test_the_command_shows_them_as_json(
    pair: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = map(str, pair)
    options = ["--modules", "re:.*", "--rows", "index", "--no-check-weights", "--json"]
    assert (
        cli.main(
            ["inspect", a, b, "--singular", "1", "--memory", "1GB", "--by", "tensor", *options]
        )
        == 0
    )
    rows = json.loads(capsys.readouterr().out)
    text = json.dumps(rows)
    assert '"singular": [3.0' in text or '"singular": [2.99' in text
