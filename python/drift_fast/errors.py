"""The exceptions of the package; where Python has a fitting one, that is raised instead."""

from drift_fast._core import (
    AlignmentError,
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


class AmbiguousAlignmentError(AlignmentError):
    """Two models whose tensors can be matched in two ways that fit equally well."""


class DriftWarning(UserWarning):
    """Something that is allowed but rarely meant, such as a delta that is zero everywhere."""
