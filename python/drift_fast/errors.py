"""The exceptions of the package; where Python has a fitting one, that is raised instead."""

from drift_fast._core import (
    AlignmentError,
    AmbiguousAlignmentError,
    CheckpointError,
    CoverageError,
    DriftError,
    NonFiniteError,
)

__all__ = [
    "AlignmentError",
    "AmbiguousAlignmentError",
    "CheckpointError",
    "CoverageError",
    "DriftError",
    "DriftWarning",
    "NonFiniteError",
]


class DriftWarning(UserWarning):
    """Something that is allowed but rarely meant, such as a delta that is zero everywhere."""
