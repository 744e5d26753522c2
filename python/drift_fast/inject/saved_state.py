"""States that come back from a file of unknown origin: what each holds, and how one is refused."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

from msgspec import Meta

from drift_fast.config_files import convert
from drift_fast.errors import DriftError

T = TypeVar("T")

# A number of a state fits a float32, and a count a float64, exactly.
Number = Annotated[float, Meta(ge=-1e30, le=1e30)]
Count = Annotated[int, Meta(ge=0, le=2**53)]


@dataclass(frozen=True)
class InjectionState:
    """The state of an injection; `origin` is ⟨θ_0, Δ⟩ of each target."""

    version: int
    origin: dict[str, Number]
    control: dict[str, Any]


@dataclass(frozen=True)
class SavedAim:
    """What an aim has learned, by set of targets."""

    gain: list[Number]
    drive: list[Number]
    steps: Count
    learned: Count


@dataclass(frozen=True)
class ControlState:
    """The state of a control; lists are by target."""

    version: int
    step: Count
    names: list[str]
    settings: dict[str, Any]
    progress: list[Number] | None
    progress_step: Count
    stopped: list[bool] | None
    aim: SavedAim | None


@dataclass(frozen=True)
class MotionState:
    """The state of a planned motion; `origin` is ⟨θ_0, Δ⟩ of each target."""

    version: int
    taken: Count
    share: list[Number]
    plan: dict[str, Any]
    origin: dict[str, Number]


def read_state(state: object, kind: type[T], what: str) -> T:
    """Return the state of `what` as `kind`.

    Raises:
        DriftError: not such a state; the message names the field.
    """
    if not isinstance(state, Mapping):
        raise DriftError(
            f"expected {what}'s state as a dictionary, got {type(state).__name__}; pass what "
            "state_dict() returned"
        )
    try:
        return convert(dict(state), kind)
    except ValueError as error:
        raise damaged(what, str(error)) from error


def damaged(what: str, problem: str) -> DriftError:
    """Return the error to raise for a problem with the state of `what`."""
    return DriftError(
        f"{what}'s state is damaged: {problem}; resume from another checkpoint, or start without it"
    )


def check_version(what: str, found: int, expected: int) -> None:
    """Refuse the state of another version of this library.

    Raises:
        DriftError: with both versions.
    """
    if found != expected:
        raise DriftError(
            f"{what}'s state has version {found}, expected {expected}; resume with the version of "
            "drift_fast that saved it, or start without it"
        )


def check_targets(what: str, found: Collection[str], expected: Collection[str]) -> None:
    """Refuse the state of other targets.

    Raises:
        DriftError: with the first that differs.
    """
    odd = sorted(set(found) ^ set(expected))
    if odd:
        raise DriftError(
            f"the saved {what} and this one differ in {len(odd)} targets, {odd[0]} first; attach "
            "the same delta with the same modules=… and layers=… as the run that is resumed"
        )


def shown(value: Any) -> str:
    """Return a value for a message, cut short."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "…"


def first_difference(one: Sequence[str], other: Sequence[str]) -> str:
    """Return where two lists first differ, for a message; empty where one is longer."""
    both = enumerate(zip(one, other, strict=False))
    found = next(((at, a, b) for at, (a, b) in both if a != b), None)
    return "" if found is None else f" at {found[0]}: {shown(found[1])} and {shown(found[2])}"
