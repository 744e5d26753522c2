"""Pairs of checkpoints that take some time to read, and no disk."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.synthetic import write_sparse


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A pair of 256 GB that takes no disk and, to read, longer than any test."""
    directory = tmp_path_factory.mktemp("endless")
    shapes = {f"model.layers.{n}.self_attn.q_proj.weight": (1 << 14, 1 << 14) for n in range(512)}
    return write_sparse(directory / "a.safetensors", shapes), write_sparse(
        directory / "b.safetensors", shapes
    )


@pytest.fixture(scope="module")
def brief(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A pair of 1 GB in all, which takes some tenths of a second to read."""
    directory = tmp_path_factory.mktemp("brief")
    shapes = {f"model.layers.{n}.self_attn.q_proj.weight": (1 << 13, 1 << 12) for n in range(8)}
    return (
        write_sparse(directory / "a.safetensors", shapes, seed=1),
        write_sparse(directory / "b.safetensors", shapes, seed=2),
    )
