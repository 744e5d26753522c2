"""Every stack gives the optimizer the gradient that float64 says, whatever the split of the batch.

The stacks, the problem and the tolerances are in tests/parity; docs/parity.md is the whole matrix.
Rows that need other processes or long compilations are slow.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
import torch

from parity.run import Entry, Result, build_worlds, entries, error_of, measure
from parity.stacks import BY_NAME, STACKS, Stack
from parity.world import NONE, SCALES, World

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

TABLE = Path(__file__).parents[2] / "docs" / "parity.md"
FAST = [stack for stack in STACKS if stack.fast]
SLOW = [stack for stack in STACKS if not stack.fast]
# Both kinds of arithmetic: whole tensors, and shards with sums over processes.
CONTROLLED = ("plain loop", "FSDP2, 2 processes")
# Sixteen sequences are not three equal micro-batches.
IMPOSSIBLE = Entry("plain loop", NONE, 3)
STRENGTHS = {"left out": None, "one per cent stronger": 1.01}

Measure = Callable[[Stack], list[Result]]


def named(stack: Stack) -> str:
    return stack.name


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, World]:
    return build_worlds(tmp_path_factory.mktemp("worlds"), FAST)


def wanted(stack: Stack) -> Iterator[Entry]:
    yield from entries(stack)
    if stack.name in CONTROLLED:
        for strength in STRENGTHS.values():
            yield from entries(stack, scales=SCALES, accumulations=[4], strength=strength)
    if stack.name == IMPOSSIBLE.stack:
        yield IMPOSSIBLE


@pytest.fixture(scope="module")
def measured(worlds: Mapping[str, World]) -> Measure:
    """Fast rows that can share processes do, for their imports take longer than their steps."""
    results: dict[Entry, Result] = {}

    def of(stack: Stack) -> list[Result]:
        if not any(entry.stack == stack.name for entry in results):
            together = [s for s in FAST if s.processes == stack.processes]
            asked = [entry for s in together for entry in wanted(s)]
            results.update(zip(asked, measure(asked, worlds, limit=240), strict=True))
        return [result for entry, result in results.items() if entry.stack == stack.name]

    return of


def assert_passed(results: list[Result]) -> None:
    assert results
    failed = [result for result in results if not result.passed]
    if failed:
        lines = [str(result) for result in failed]
        pytest.fail("\n".join([*lines, failed[0].output]), pytrace=False)


@pytest.mark.parametrize("stack", FAST, ids=named)
def test_a_stack_gives_the_injected_gradient_of_the_whole_batch(
    measured: Measure, stack: Stack
) -> None:
    row = entries(stack)
    assert_passed([result for result in measured(stack) if result.entry in row])


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("stack", SLOW, ids=named)
def test_a_stack_that_takes_longer_does_so_too(tmp_path: Path, stack: Stack) -> None:
    for package in stack.needs:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    assert_passed(measure(entries(stack), build_worlds(tmp_path, [stack])))


@pytest.mark.parametrize("control", STRENGTHS)
@pytest.mark.parametrize("name", CONTROLLED)
def test_another_strength_is_noticed_in_every_cell(
    measured: Measure, name: str, control: str
) -> None:
    results = [r for r in measured(BY_NAME[name]) if r.entry.strength == STRENGTHS[control]]
    assert {result.entry.scale for result in results} == set(SCALES)
    for result in results:
        assert result.error is not None, str(result)
        assert result.error > 100 * BY_NAME[name].tolerance, str(result)


def test_a_parameter_outside_the_delta_is_compared_too(worlds: Mapping[str, World]) -> None:
    world = worlds["even"]
    plain, expected = world.expected("weights", NONE), world.expected("weights", "adaptive")
    outside = "model.layers.1.input_layernorm.weight"
    assert torch.equal(plain[outside], expected[outside])
    found = expected | {outside: expected[outside] * 1.01}
    error, worst = error_of(found, expected)
    assert worst == outside
    assert error == pytest.approx(0.01)
    with pytest.raises(AssertionError, match="not finite"):
        error_of(expected | {outside: expected[outside] * torch.nan}, expected)
    with pytest.raises(AssertionError, match="in one only"):
        error_of({outside: expected[outside]}, expected)


def test_every_scale_expects_another_gradient(worlds: Mapping[str, World]) -> None:
    for world in worlds.values():
        for first in (NONE, *SCALES):
            for second in (NONE, *SCALES):
                if first != second:
                    error, _ = error_of(
                        world.expected("weights", first), world.expected("weights", second)
                    )
                    assert error > 0.1, (first, second)


def test_processes_that_do_not_end_are_a_failure_of_all_their_cells(
    worlds: Mapping[str, World],
) -> None:
    asked = entries(BY_NAME["FSDP2, 2 processes"])
    results = measure(asked, worlds, limit=0.2)
    assert [result.entry for result in results] == asked
    assert {result.failure for result in results} == {"no result: still running after 0.2 s"}
    assert not any(result.passed for result in results)


def test_a_failure_in_training_is_that_of_its_cell(measured: Measure) -> None:
    stack = BY_NAME[IMPOSSIBLE.stack]
    by_entry = {result.entry: result for result in measured(stack)}
    failed = by_entry.pop(IMPOSSIBLE)
    assert failed.failure.startswith("AssertionError")
    assert "micro_batches" in failed.output
    assert not failed.passed
    assert all(result.error is not None for result in by_entry.values())


def test_an_error_beyond_the_tolerance_has_not_passed() -> None:
    stack = BY_NAME["plain loop"]
    assert Result(IMPOSSIBLE, error=stack.tolerance).passed
    assert not Result(IMPOSSIBLE, error=1.01 * stack.tolerance).passed


def test_a_row_that_rounds_by_design_has_not_passed_without_an_error() -> None:
    entry = Entry("Δ resident: device-int8", "adaptive", 1)
    exact, rounded = Result(entry, error=3e-6), Result(entry, error=5e-3)
    assert not exact.passed
    assert "nothing was rounded" in exact.fault
    assert rounded.passed


def test_the_table_has_a_row_for_every_stack() -> None:
    rows = [line for line in TABLE.read_text(encoding="utf-8").splitlines() if "|" in line]
    names = [line.split("|")[1].strip() for line in rows[2:]]
    assert names == [stack.name for stack in STACKS]
