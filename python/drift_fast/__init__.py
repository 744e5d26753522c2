"""Move reasoning into a multimodal model by biasing fine-tuning along Δ = reasoning − multimodal.

`compute_delta` streams the reasoning delta of two checkpoints without loading either; `Injection`
and `attach` feed it into the gradients of an ordinary training run.

Importing this package loads the compiled module and the errors; everything else is loaded on first
use, and torch when a tensor is first asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from drift_fast import _core
from drift_fast._core import __version__

# What the compiled module takes and returns, and what it means. Raise it with every change, here
# and in rust/python/src/lib.rs: a module of another number would misread what it is given.
_INTERFACE = 3
if (_found := getattr(_core, "interface", None)) != _INTERFACE:
    raise ImportError(
        f"{_core.__file__} has interface {_found}, but {__file__} needs interface {_INTERFACE}: "
        "the two are of different versions of drift_fast. Install both together, with "
        "`pip install --force-reinstall --no-deps drift-fast`, or in a checkout with "
        "`pip install --no-deps --editable .`, which compiles the first anew"
    )

from drift_fast.errors import (  # noqa: E402
    AlignmentError,
    CheckpointError,
    CoverageError,
    DriftError,
    DriftWarning,
    NonFiniteError,
)

if TYPE_CHECKING:
    from drift_fast.alignment.report import Alignment, align
    from drift_fast.delta.compute import Report, compute_delta, inspect
    from drift_fast.delta.delta import Delta, combine
    from drift_fast.inject import schedule
    from drift_fast.inject.config import InjectionConfig
    from drift_fast.inject.injection import Injection
    from drift_fast.inject.motion.motion import PlannedMotion
    from drift_fast.inject.predict import predict_progress, rms
    from drift_fast.inject.targets import match_parameters
    from drift_fast.integrations.attach import attach
    from drift_fast.integrations.trainer_motion import attach_motion
    from drift_fast.merging.merge import Merged, merge
    from drift_fast.planner.planning import plan
    from drift_fast.planner.report import TrainingPlan
    from drift_fast.preflight.check import Preflight, check
    from drift_fast.protection.protect import protect
    from drift_fast.report.write import write_report

__all__ = [
    "Alignment",
    "AlignmentError",
    "CheckpointError",
    "CoverageError",
    "Delta",
    "DriftError",
    "DriftWarning",
    "Injection",
    "InjectionConfig",
    "Merged",
    "NonFiniteError",
    "PlannedMotion",
    "Preflight",
    "Report",
    "TrainingPlan",
    "__version__",
    "align",
    "attach",
    "attach_motion",
    "check",
    "combine",
    "compute_delta",
    "inspect",
    "match_parameters",
    "merge",
    "plan",
    "predict_progress",
    "protect",
    "rms",
    "schedule",
    "write_report",
]

# Where each name is, loaded on first use (PEP 562).
_LAZY = {
    "Delta": "drift_fast.delta.delta",
    "Report": "drift_fast.delta.compute",
    "compute_delta": "drift_fast.delta.compute",
    "inspect": "drift_fast.delta.compute",
    "combine": "drift_fast.delta.delta",
    "Merged": "drift_fast.merging.merge",
    "merge": "drift_fast.merging.merge",
    "Alignment": "drift_fast.alignment.report",
    "Preflight": "drift_fast.preflight.check",
    "align": "drift_fast.alignment.report",
    "check": "drift_fast.preflight.check",
    "Injection": "drift_fast.inject.injection",
    "InjectionConfig": "drift_fast.inject.config",
    "match_parameters": "drift_fast.inject.targets",
    "attach": "drift_fast.integrations.attach",
    "attach_motion": "drift_fast.integrations.trainer_motion",
    "PlannedMotion": "drift_fast.inject.motion.motion",
    "predict_progress": "drift_fast.inject.predict",
    "rms": "drift_fast.inject.predict",
    "TrainingPlan": "drift_fast.planner.report",
    "plan": "drift_fast.planner.planning",
    "protect": "drift_fast.protection.protect",
    "write_report": "drift_fast.report.write",
}


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name == "schedule":
        value: Any = import_module("drift_fast.inject.schedule")
    elif name in _LAZY:
        value = getattr(import_module(_LAZY[name]), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
