"""Importing the package loads nothing that a run may not need."""

from __future__ import annotations

import ast
import json
import sys
from pathlib import Path

import pytest

import drift_fast
from drift_fast import _core
from support.processes import run

HEAVY = {
    "asyncio",
    "concurrent.futures",
    "dataclasses",
    "difflib",
    "email",
    "http.client",
    "inspect",
    "json",
    "logging",
    "multiprocessing",
    "numpy",
    "pathlib",
    "socket",
    "ssl",
    "torch",
    "transformers",
    "urllib.request",
}


def loaded_after(code: str) -> set[str]:
    """Return what a fresh interpreter, which reads no site packages' hooks, has loaded."""
    program = f"import sys; before = set(sys.modules); {code}\nimport json\n"
    program += "print(json.dumps(sorted(set(sys.modules) - before - {'json'})))"
    path = json.dumps(sys.path)
    done = run(sys.executable, "-S", "-c", f"import sys; sys.path[:] = {path}\n{program}")
    return set(json.loads(done.stdout))


def test_nothing_heavy_is_loaded_by_importing_the_package() -> None:
    loaded = loaded_after("import drift_fast")
    assert "drift_fast._core" in loaded
    # json is what the answer itself is written with.
    assert not loaded & (HEAVY - {"json"})
    assert not {name for name in loaded if name.startswith("drift_fast.")} - {
        "drift_fast._core",
        "drift_fast.errors",
    }


def test_neither_torch_nor_a_client_is_loaded_by_what_computes_a_delta() -> None:
    loaded = loaded_after("from drift_fast import Delta, compute_delta, inspect, combine, schedule")
    assert "drift_fast.delta.delta" in loaded
    unneeded = {"asyncio", "concurrent.futures", "difflib", "email", "http.client", "numpy"}
    unneeded |= {"socket", "ssl", "torch", "transformers", "urllib.request"}
    unneeded |= {"drift_fast.delta.process_group", "drift_fast.checkpoints.remote"}
    assert not loaded & unneeded


@pytest.mark.parametrize("name", drift_fast.__all__)
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(drift_fast, name) is not None
    assert name in dir(drift_fast)


def test_a_name_that_is_not_there_is_no_attribute() -> None:
    with pytest.raises(AttributeError, match="no attribute 'absent'"):
        drift_fast.absent  # noqa: B018


def test_type_checkers_see_every_public_name_at_its_own_module() -> None:
    tree = ast.parse(Path(drift_fast.__file__).read_text(encoding="utf-8"))
    guarded = next(
        node
        for node in tree.body
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    )
    seen = {
        alias.name: node.module
        for node in ast.walk(guarded)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    eager = {name for name in drift_fast.__all__ if name == "__version__" or "Error" in name}
    assert set(drift_fast.__all__) - eager - {"DriftWarning"} == set(seen)
    for name, module in seen.items():
        if name != "schedule":
            assert drift_fast._LAZY[name] == module


def parsed(name: str) -> ast.Module:
    return ast.parse((Path(drift_fast.__file__).parent / name).read_text(encoding="utf-8"))


def imported(body: list[ast.stmt]) -> dict[str, str]:
    """Return the module that each name is imported from, as `__init__.py` writes it."""
    return {
        alias.asname or alias.name: str(statement.module)
        for statement in body
        if isinstance(statement, ast.ImportFrom)
        for alias in statement.names
    }


def test_a_type_checker_sees_every_public_name_where_it_is_loaded_from() -> None:
    body = parsed("__init__.py").body
    (typed,) = (
        statement
        for statement in body
        if isinstance(statement, ast.If) and ast.unparse(statement.test) == "TYPE_CHECKING"
    )
    lazy = imported(typed.body)
    eager = set(imported(body)) & set(drift_fast.__all__)
    assert eager.isdisjoint(lazy)
    assert eager | set(lazy) == set(drift_fast.__all__)
    # A module is not an attribute of one: `__getattr__` imports it.
    assert lazy.pop("schedule") == "drift_fast.inject"
    assert lazy == drift_fast._LAZY


def test_the_stub_has_every_name_of_the_compiled_module() -> None:
    body = parsed("_core.pyi").body
    (listed,) = (
        ast.literal_eval(statement.value)
        for statement in body
        if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == "__all__"
    )
    assert listed == sorted(listed)
    assert set(listed) == set(_core.__all__)
    assert set(listed) - {"__version__"} == {name for name in dir(_core) if name[0] != "_"}
