"""A plan as figures, each with its origin, and how they are shown as text and JSON.

Invariant: no figure without an origin.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from drift_fast.config_files import printable
from drift_fast.tables import Block, Shown, Table

if TYPE_CHECKING:
    from drift_fast.planner.options import PlanOptions

Origin = Literal["configuration", "headers", "given", "measured", "estimated", "assumed", "unknown"]
Unit = Literal["bytes", "seconds", "elements", "tokens", "steps", "operations", "share", ""]
_SOURCE_WIDTH = 400


@dataclass(frozen=True)
class Figure:
    """One number of a plan.

    `origin` is `configuration` or `headers` of a model, `given` by the caller, `measured` (`source`
    names the results file, row and hardware), `estimated` (`source` is the formula), `assumed`, or
    `unknown` (the value is None, and `source` says what would make it known).
    """

    section: str
    name: str
    value: int | float | str | None
    unit: Unit
    origin: Origin
    source: str

    def shown(self) -> str:
        """Return the value as text."""
        value = self.value
        if value is None:
            return "not known"
        if isinstance(value, str):
            return value
        if self.unit == "bytes":
            return sized(value)
        if self.unit == "seconds":
            return duration(value)
        if self.unit == "share":
            return f"{value:.1%}"
        if self.unit in ("elements", "operations"):
            return large(value)
        text = f"{value:,}" if isinstance(value, int) else f"{value:.3g}"
        return f"{text} {self.unit}".strip()


@dataclass(frozen=True, repr=False)
class TrainingPlan(Shown):
    """What `plan` found: figures in the order of the table, warnings, and what would help.

    `fits` is None if no GPU memory was given. `remedies` are changes that make the run fit.
    `unused` are keys of a configuration that no figure depends on. `run` is what was planned.
    """

    figures: Sequence[Figure]
    warnings: Sequence[str]
    fits: bool | None
    remedies: Sequence[str]
    unused: Sequence[str]
    run: PlanOptions

    def __getitem__(self, name: str) -> Figure:
        """Return the figure with this name.

        Raises:
            KeyError: there is none.
        """
        for figure in self.figures:
            if figure.name == name:
                return figure
        raise KeyError(name)

    def headline(self) -> str:
        """Return whether the run fits, how far it moves, and how many warnings there are."""
        fits = {
            True: "the run fits",
            False: "the run does not fit",
            None: "no GPU memory given, so not known whether the run fits",
        }[self.fits]
        far = next((figure.shown() for figure in self.figures if figure.name == "λ"), "not known")
        count = len(self.warnings)
        return f"{fits}, λ {far}, {count or 'no'} warning{'' if count == 1 else 's'}"

    def records(self) -> list[dict[str, Any]]:
        """Return every figure with its origin."""
        return [asdict(figure) for figure in self.figures]

    def blocks(self) -> list[Block]:
        """Return the verdict with warnings and remedies, then the figures, section by section."""
        notes = [f"verdict: {self.headline()}", *(f"warning: {text}" for text in self.warnings)]
        if self.remedies:
            notes += ["It would fit", *(f"  {text}" for text in self.remedies)]
        if self.unused:
            notes.append(f"not used here: {printable(', '.join(self.unused), 400)}")
        blocks: list[Block] = ["\n".join(notes)]
        for section in dict.fromkeys(figure.section for figure in self.figures):
            rows = [figure for figure in self.figures if figure.section == section]
            cells = [
                (row.name, row.shown(), f"{row.origin}: {printable(row.source, _SOURCE_WIDTH)}")
                for row in rows
            ]
            blocks.append(Table(("", "", ""), cells, "<><", section))
        return blocks

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {
            "figures": self.records(),
            "warnings": list(self.warnings),
            "fits": self.fits,
            "remedies": list(self.remedies),
            "unused": list(self.unused),
        }


def sized(nbytes: float) -> str:
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= scale:
            return f"{nbytes / scale:.2f} {unit}"
    return f"{nbytes:.0f} bytes" if nbytes else "nothing"


def duration(seconds: float) -> str:
    if seconds < 1:
        return f"{seconds * 1e3:.3g} ms"
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def large(value: float) -> str:
    for unit, scale in (("P", 1e15), ("T", 1e12), ("billion", 1e9), ("million", 1e6)):
        if value >= scale:
            return f"{value / scale:,.2f} {unit}"
    return f"{value:,.0f}"
