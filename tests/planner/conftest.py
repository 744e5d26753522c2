"""The multimodal model of the recipe, counted once."""

from __future__ import annotations

from typing import Any

import pytest

from drift_fast.planner.counts import read_model
from support.planner_models import (
    MULTIMODAL,
)


@pytest.fixture(scope="module")
def seven() -> Any:
    pytest.importorskip("transformers")
    return read_model(MULTIMODAL)
