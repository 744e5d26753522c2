"""Stands in for drift_fast and does nothing, so that a script is the stack's own."""

import contextlib
import types


def attach(*args, **options):
    """Attach nothing."""
    return Injection()


@contextlib.contextmanager
def Injection(*args, **options):  # noqa: N802
    """Inject nothing."""
    yield types.SimpleNamespace(step=lambda: None, metrics=lambda: {"progress": 0.0})
