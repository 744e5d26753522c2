"""The compiled module and the Python beside it agree on what they pass to each other."""

from __future__ import annotations

import hashlib
import importlib
import sys
import tokenize
from pathlib import Path

import pytest

import drift_fast
from drift_fast import _core

# The number of the interface, and `surface` of the stub that it belongs to.
RECORDED = (3, "ac41c70c1753cf97")


def surface(stub: Path) -> str:
    """Return a hash of what a stub declares: its words, without comments and layout."""
    layout = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}
    with stub.open("rb") as text:
        words = [
            token.string for token in tokenize.tokenize(text.readline) if token.type not in layout
        ]
    return hashlib.sha256("\n".join(words).encode()).hexdigest()[:16]


def test_a_changed_surface_has_a_number_of_its_own() -> None:
    number, recorded = RECORDED
    found = surface(Path(drift_fast.__file__).with_name("_core.pyi"))
    needed = number if found == recorded else max(number + 1, _core.interface)
    assert _core.interface == drift_fast._INTERFACE == needed, (
        "_core.pyi has changed: raise INTERFACE in rust/python/src/lib.rs and _INTERFACE in python/"
        f"drift_fast/__init__.py to {needed}, and write RECORDED = ({needed}, {found!r}) here"
    )
    assert found == recorded, f"write RECORDED = ({needed}, {found!r}) here"


@pytest.mark.parametrize("other", [0, drift_fast._INTERFACE - 1, drift_fast._INTERFACE + 1, None])
def test_a_compiled_module_of_another_interface_is_refused(
    other: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if other is None:
        monkeypatch.delattr(_core, "interface")
    else:
        monkeypatch.setattr(_core, "interface", other)
    monkeypatch.delitem(sys.modules, "drift_fast")
    with pytest.raises(ImportError) as refused:
        importlib.import_module("drift_fast")
    for part in (
        f"{_core.__file__} has interface {other}",
        f"needs interface {drift_fast._INTERFACE}",
        "pip install --force-reinstall",
        "--editable",
    ):
        assert part in str(refused.value)
