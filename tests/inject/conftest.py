"""A small model, and Δ of its layers, for the tests that need no others."""

from __future__ import annotations

from pathlib import Path

import pytest

import drift_fast
from support.injection_models import Backbone, delta_towards


@pytest.fixture
def model() -> Backbone:
    return Backbone()


@pytest.fixture
def delta(tmp_path: Path, model: Backbone) -> drift_fast.Delta:
    return delta_towards(tmp_path, model)
