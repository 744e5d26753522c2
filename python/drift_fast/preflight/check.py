"""Whether two models fit each other and what their Δ will cost, from configurations and headers.

Owns `check` and how its result is shown. It imports no torch and reads weights only as samples. A
pair that cannot be aligned is a finding here, not an error; what differences mean is for `rules` to
say.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, Unpack

from drift_fast.alignment.coverage import Coverage
from drift_fast.alignment.missed import describe_missed, missed
from drift_fast.alignment.model_pair import SAME, AlignedPair
from drift_fast.alignment.options import PairOptions, SelectionOptions
from drift_fast.alignment.pairing import survey_checkpoints
from drift_fast.alignment.refusals import Refusal, is_usable, why_not
from drift_fast.checkpoints.opened import PathLike, open_checkpoint
from drift_fast.config_files import printable
from drift_fast.names import kind_of, module_of
from drift_fast.options import takes
from drift_fast.preflight.cost import DeltaCost, estimate_cost
from drift_fast.preflight.fact import STATED, Fact
from drift_fast.preflight.findings import Finding, ModelSide
from drift_fast.preflight.options import CheckOptions, parse_rate
from drift_fast.preflight.rounding import SampledRounding, sample_rounding
from drift_fast.preflight.rules import compare
from drift_fast.tables import Block, Shown, Table

if TYPE_CHECKING:
    from drift_fast._keywords import CheckKeywords
    from drift_fast.preflight.lineage import Lineage

__all__ = ["Finding", "Preflight", "check"]

_VALUE_WIDTH = 44


@dataclass(frozen=True, repr=False)
class Preflight(Shown):
    """What `check` found; `coverage`, `prefixes` and `plan` are None if nothing matches.

    `selected` has the modules of each kind that is selected, with how many tensors each has.
    `rounding` is the share of ‖Δ‖ that is rounding of the two, None where no weights could be
    sampled. `lineage` says who comes from whom and which Δ to take, None without a base.
    """

    findings: list[Finding]
    selection: str
    pairs: int
    coverage: Coverage | None
    prefixes: tuple[str, str] | None
    plan: DeltaCost | None
    selected: dict[str, dict[str, int]] = field(default_factory=dict)
    rounding: SampledRounding | None = None
    lineage: Lineage | None = None

    @property
    def ok(self) -> bool:
        """Whether nothing breaks the method; notes are allowed."""
        return all(finding.severity != "breaks" for finding in self.findings)

    def records(self) -> list[dict[str, Any]]:
        """Return what was found of each subject; values without their origin."""
        rows = [finding.to_dict() for finding in self.findings]
        return [
            row | {side: row[side]["value"] for side in ("reasoning", "multimodal")} for row in rows
        ]

    def blocks(self) -> list[Block]:
        """Return the verdict, its reasons by weight, the facts side by side, and the plan."""
        reasons = [
            f"{row.severity}: {row.subject}: {_indented(row.message)}"
            for severity in ("breaks", "note")
            for row in self.findings
            if row.severity == severity
        ]
        blocks: list[Block] = ["\n".join([f"verdict: {self.headline()}", *reasons])]
        for between in dict.fromkeys(finding.between for finding in self.findings):
            rows = [finding for finding in self.findings if finding.between == between]
            blocks.append(_facts(rows, between))
        if self.plan is None:
            blocks.append(f"{self.selection}: nothing matches, so there is no Δ to plan for")
        else:
            selects = [
                f"{kind} selects {sum(modules.values())} tensors: {', '.join(modules)}"
                for kind, modules in self.selected.items()
            ]
            about = [
                f"{self.selection}: {self.coverage}",
                *(printable(line, 200) for line in selects),
            ]
            about += [] if self.rounding is None else [printable(str(self.rounding), 200)]
            blocks.append("\n".join([*about, *self.plan.lines()]))
        return blocks

    def headline(self) -> str:
        """Return whether the models fit each other."""
        count = {
            severity: sum(finding.severity == severity for finding in self.findings)
            for severity in ("breaks", "note")
        }
        notes = f"{count['note']} note{'' if count['note'] == 1 else 's'}"
        if self.ok:
            return f"the models fit each other, {notes}"
        return f"the models do not fit each other ({count['breaks']} breaks, {notes})"

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {
            "ok": self.ok,
            "selection": self.selection,
            "findings": [finding.to_dict() for finding in self.findings],
            "lineage": None if self.lineage is None else self.lineage.to_dict(),
            "pairs": self.pairs,
            "prefixes": None if self.prefixes is None else list(self.prefixes),
            "coverage": None if self.coverage is None else self.coverage.to_dict(),
            "selected": self.selected,
            "rounding": None if self.rounding is None else asdict(self.rounding),
            "plan": None if self.plan is None else asdict(self.plan),
        }


@takes(CheckOptions)
def check(
    reasoning: PathLike,
    multimodal: PathLike,
    model: PathLike | None = None,
    **options: Unpack[CheckKeywords],
) -> Preflight:
    """Compare two models by configuration and headers, and say what their Δ will cost.

    With `model`, the first two are an expert and its reference, both text models, and Δ is to be
    attached to the third: facts are compared from each to the next. A pair that cannot be aligned
    is a finding that breaks, not an error. If both checkpoints of Δ are on this machine, samples
    of their weights show how much of it is rounding.

    With `base`, samples of the weights of all three are compared, at most 256 tensors with 2,048
    elements each (24 with 4,096 of checkpoints on a server): `Preflight.lineage` says who comes
    from whom, and which Δ to take.

    `mapping` and `rows` are between the first two.

    Raises:
        FileNotFoundError: a source or a map file that is not there.
        CheckpointError: a checkpoint or a config.json that is not valid; the key is named.
        ValueError: an argument without meaning, or both `model` and `base`.
    """
    chosen = CheckOptions.from_keywords(options, function="check")
    if model is not None and chosen.base is not None:
        raise ValueError(
            "give MODEL or base, not both: with MODEL the second model is the reference already, "
            "and base is for a reasoning and a multimodal model"
        )
    pairing = PairOptions(**{name: getattr(chosen, name) for name in SelectionOptions.names()})
    given = [reasoning, multimodal] if model is None else [reasoning, multimodal, model]
    roles = ["reasoning", "multimodal"] if model is None else ["expert", "reference", "model"]
    sides = [
        ModelSide(role, open_checkpoint(source)) for source, role in zip(given, roles, strict=True)
    ]
    pair = survey_checkpoints(sides[0].opened, sides[1].opened, pairing)
    refusals = why_not(pair)
    findings = _findings(sides[0], sides[1], pair, refusals)
    if model is None and pair.is_one_model:
        findings.append(Finding("models", "breaks", Fact(), Fact(), SAME, (roles[0], roles[1])))
    if model is not None:
        # A Δ meets a parameter of its own shape, row i with row i.
        by_index = replace(pairing, mapping=None, rows="index")
        attached = survey_checkpoints(sides[1].opened, sides[2].opened, by_index)
        findings += _findings(sides[1], sides[2], attached, why_not(attached), attaches=True)
    lineage = None
    if chosen.base is not None:
        lineage = _lineage(sides[0], chosen.base, pair)
        findings.append(lineage.finding())
    if not is_usable(refusals):
        return Preflight(findings, str(pair.selection), 0, None, None, None, lineage=lineage)
    rounding = sample_rounding(pair)
    if rounding is not None:
        findings += rounding.findings((roles[0], roles[1]))
    return Preflight(
        findings,
        str(pair.selection),
        len(pair.pairs),
        pair.coverage,
        pair.alignment.prefixes,
        estimate_cost(pair, chosen.dtype, parse_rate(chosen.read_rate)),
        _selected(pair),
        rounding,
        lineage,
    )


def _lineage(reasoning: ModelSide, base: PathLike, pair: AlignedPair) -> Lineage:
    # Loaded here, since it is all that needs numpy.
    from drift_fast.preflight.lineage import trace

    return trace(reasoning, ModelSide("base", open_checkpoint(base)), pair)


def _selected(pair: AlignedPair) -> dict[str, dict[str, int]]:
    found: dict[str, dict[str, int]] = {}
    for name in sorted(one.name for one in pair.pairs):
        modules = found.setdefault(kind_of(name), {})
        modules[module_of(name)] = modules.get(module_of(name), 0) + 1
    return found


def _findings(
    first: ModelSide,
    second: ModelSide,
    pair: AlignedPair,
    refusals: Sequence[Refusal],
    *,
    attaches: bool = False,
) -> list[Finding]:
    first, second = replace(first, opened=pair.reasoning), replace(second, opened=pair.multimodal)
    prefixes = pair.alignment.prefixes if is_usable(refusals) else (None, None)
    reasoning, multimodal = (
        Fact("no prefix" if prefix == "" else prefix, STATED) for prefix in prefixes
    )
    alignment = Finding(
        "alignment",
        "breaks" if refusals else "same",
        reasoning,
        multimodal,
        str(refusals[0]) if refusals else "",
        (first.role, second.role),
    )
    found = [alignment]
    found += compare(first, second, pair, refusals, attaches=attaches, tokens=True)
    return found + _left_out(first, second, pair, attaches=attaches)


def _left_out(
    first: ModelSide, second: ModelSide, pair: AlignedPair, *, attaches: bool
) -> list[Finding]:
    """Return what no model loads, and what no preset selects, as notes."""
    between = (first.role, second.role)
    values = [Fact(len(side.opened.unloaded) or None, STATED) for side in (first, second)]
    found = []
    for side in (second,) if attaches else (first, second):
        reasons = Counter(side.opened.unloaded.values())
        if reasons:
            example = next(iter(side.opened.unloaded))
            listed = ", ".join(f"{why} ({count})" for why, count in reasons.items())
            message = f"{side.the} has tensors that no model loads, {example} first; {listed}"
            found.append(Finding("not loaded", "note", values[0], values[1], message, between))
    if names := missed(pair):
        nothing = Fact()
        message = describe_missed(names)
        found.append(Finding("of no preset", "note", nothing, nothing, message, between))
    return found


def _facts(rows: Sequence[Finding], between: tuple[str, str]) -> Table:
    cells = [
        (
            "" if row.severity == "same" else row.severity,
            row.subject,
            printable(str(row.reasoning), _VALUE_WIDTH),
            printable(str(row.multimodal), _VALUE_WIDTH),
        )
        for row in rows
        # The JSON alone lists what neither model has, such as experts. A row without facts of
        # either model is only a reason.
        if row.reasoning.known or row.multimodal.known
    ]
    return Table(("", "", *between), cells)


def _indented(message: str) -> str:
    """Keep the lines of a message together, and what strangers put into it off the terminal."""
    return "\n  ".join(printable(line, 2000) for line in message.split("\n"))
