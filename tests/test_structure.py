"""Modules do not import each other in a circle, in Python or in Rust.

`make lint` checks the order of the folders; this looks at single modules, and counts imports inside
functions too. Imports for type checking only are left out, as they do not run.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CRATES = ["rust/core/src", "rust/python/src"]
Graph = dict[str, set[str]]


def circle(graph: Mapping[str, set[str]]) -> list[str]:
    """Return the modules of one circle, or nothing if there is none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


# ------------------------------------------------------------------ Python


def run_time_nodes(node: ast.AST) -> Iterator[ast.AST]:
    """Walk a syntax tree without the bodies of `if TYPE_CHECKING:`."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"):
            for other in child.orelse:
                yield from (other, *run_time_nodes(other))
        else:
            yield child
            yield from run_time_nodes(child)


def imported(tree: ast.AST, modules: Mapping[str, Path]) -> Iterator[str]:
    """Yield the modules that a module imports: `from package import module` is the module."""
    for node in run_time_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in modules)
        elif isinstance(node, ast.ImportFrom) and node.module in modules and not node.level:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in modules else node.module


def python_imports(folder: Path) -> Graph:
    """Return what each module of the package in `folder` imports of it."""
    modules = {}
    for path in folder.rglob("*.py"):
        parts = path.relative_to(folder.parent).with_suffix("").parts
        modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    assert modules, f"no modules in {folder}"
    return {
        name: set(imported(ast.parse(path.read_text()), modules)) - {name}
        for name, path in modules.items()
    }


def test_python_modules_do_not_import_each_other_in_a_circle() -> None:
    graph = python_imports(ROOT / "python" / "drift_fast")
    assert len(graph) > 100
    assert circle(graph) == []


def test_imports_are_absolute() -> None:
    for path in (ROOT / "python").rglob("*.py"):
        relative = [
            node.lineno
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.ImportFrom) and node.level
        ]
        assert not relative, f"{path} imports relatively in lines {relative}"


# ------------------------------------------------------------------ Rust


def expanded(tree: str) -> Iterator[tuple[str, ...]]:
    """Yield the paths of a use tree: `a::{b, c::d}` is a::b and a::c::d."""
    tree = re.sub(r"\s+as\s+\w+", "", tree).strip()
    head, brace, rest = tree.partition("{")
    if not brace:
        yield tuple(part.strip() for part in tree.split("::"))
        return
    before = tuple(part.strip() for part in head.split("::") if part.strip())
    depth, start = 0, 0
    inner = rest[: rest.rindex("}")]
    for place, character in enumerate(inner + ","):
        depth += (character == "{") - (character == "}")
        if character == "," and depth == 0:
            if inner[start:place].strip():
                yield from (before + path for path in expanded(inner[start:place]))
            start = place + 1


def without_comments_and_tests(text: str) -> str:
    """Cut off the module of unit tests at the end of a file, which may use anything."""
    text = re.sub(r"//.*", "", text)
    return re.split(r"#\[cfg\(test\)\]\s*(?:pub(?:\([^)]*\))?\s+)?mod\s+\w+\s*\{", text)[0]


def rust_uses(folder: Path) -> Graph:
    """Return which modules of a crate each uses by `use` and by paths that begin with `crate::`."""
    modules = {}
    for path in folder.rglob("*.rs"):
        parts = path.relative_to(folder).with_suffix("").parts
        if "tests" not in parts:
            modules[tuple(p for p in parts if p not in ("mod", "lib"))] = path
    assert modules, f"no modules in {folder}"
    graph: Graph = {}
    for name, path in modules.items():
        text = without_comments_and_tests(path.read_text())
        trees = re.findall(r"^\s*(?:pub(?:\([^)]*\))?\s+)?use\s+([^;]+);", text, re.M)
        trees += re.findall(r"\b((?:crate|super)(?:::\w+)+)", re.sub(r"\buse\s+[^;]+;", "", text))
        found = {module_of(name, used, modules) for tree in trees for used in expanded(tree)}
        # A file may use what the mod.rs of its folder holds; modules that nest are one unit there.
        others = {one for one in found if one and one != name[: len(one)]}
        graph["::".join(name) or "lib"] = {"::".join(one) for one in others}
    return graph


def module_of(
    name: tuple[str, ...], used: tuple[str, ...], modules: Mapping[tuple[str, ...], Path]
) -> tuple[str, ...]:
    """Return the module that a path leads to, seen from the module `name`; () is none of ours.

    What a folder's mod.rs only passes on counts as a use of the folder, not of the file below.
    """
    if used[0] == "crate":
        whole = used[1:]
    elif used[0] in ("self", "super"):
        base = name
        while used and used[0] in ("self", "super"):
            base = base if used[0] == "self" else base[:-1]
            used = used[1:]
        whole = base + used
    else:
        whole = name + used
        if name + used[:1] not in modules:
            return ()
    while whole and whole not in modules:
        whole = whole[:-1]
    return whole


@pytest.mark.parametrize("crate", CRATES)
def test_rust_modules_do_not_use_each_other_in_a_circle(crate: str) -> None:
    graph = rust_uses(ROOT / crate)
    assert len(graph) > 5
    assert any(graph.values())
    assert circle(graph) == []


# ------------------------------------------------------------------ the test's own eyes


def test_a_circle_is_seen(tmp_path: Path) -> None:
    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "one.py").write_text("def late():\n    from package.two import x\n")
    (package / "two.py").write_text("from package import one\n")
    assert set(circle(python_imports(package))) == {"package.one", "package.two"}
    (package / "two.py").write_text(
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from package import one\n"
    )
    assert circle(python_imports(package)) == []


def test_a_circle_is_seen_in_rust(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "lib.rs").write_text("mod one;\nmod deep;\n")
    (tmp_path / "one.rs").write_text("use std::fs;\nuse crate::deep::{other, two::{self, X as Y}};")
    (tmp_path / "deep" / "mod.rs").write_text("pub mod two;\n")
    (tmp_path / "deep" / "two.rs").write_text("fn f() { super::super::one::g() }\n")
    assert set(circle(rust_uses(tmp_path))) == {"one", "deep::two"}
    (tmp_path / "deep" / "two.rs").write_text("#[cfg(test)]\nmod tests {\n use crate::one;\n}\n")
    assert circle(rust_uses(tmp_path)) == []
