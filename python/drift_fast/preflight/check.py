"""Whether two models fit each other and what their Δ will cost, from configurations and headers.

Owns the preflight: opening, pairing, the plan and how all of it is shown. Reads neither weights nor
torch. A pair that cannot be aligned is a finding here, not an error; what the differences mean is
`compare`'s.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from drift_fast.alignment.coverage import Coverage
from drift_fast.alignment.embeddings import Rows
from drift_fast.alignment.mapping import MappingLike
from drift_fast.alignment.pairing import Pairing, pair_checkpoints
from drift_fast.checkpoints.config_json import Configuration
from drift_fast.checkpoints.opened import Opened, PathLike, open_checkpoint
from drift_fast.config_files import printable
from drift_fast.dtypes import check_stored_dtype
from drift_fast.errors import AlignmentError, CoverageError
from drift_fast.preflight.facts import STATED, Fact
from drift_fast.preflight.rules import Finding, Side, compare
from drift_fast.selection import Layers, Modules, Selection
from drift_fast.sizes import parse_size

__all__ = ["Finding", "Plan", "Preflight", "check"]

# What the README's table shows for either command, whatever the size of the checkpoints.
_COMPUTE_MEMORY_NBYTES = 20_000_000
# Bytes of an element on disk and on the device, where what is compressed is bfloat16.
ITEMSIZE = {
    "bfloat16": (2.0, 2),
    "float16": (2.0, 2),
    "float32": (4.0, 4),
    "int8": (1 + 2 / 64, 2),
}
_VALUE_WIDTH = 44


@dataclass(frozen=True)
class Plan:
    """What computing Δ and training with it takes, in bytes, and seconds at an assumed rate.

    `read_nbytes` are of the first and of the second checkpoint. `seconds` is reading both and
    writing Δ at `rate_nbytes` a second. `training_memory_nbytes` is Δ on the device, beside the
    weights; `compute_memory_nbytes` was measured and does not depend on the size.
    """

    dtype: str
    delta_nbytes: int
    read_nbytes: tuple[int, int]
    compute_memory_nbytes: int
    training_memory_nbytes: int
    rate_nbytes: int
    seconds: float
    download_nbytes: int

    def lines(self) -> list[str]:
        """Return the plan as text, a line for each resource."""
        first, second = map(_nbytes, self.read_nbytes)
        return [
            f"disk      {_nbytes(self.delta_nbytes)} for Δ in {self.dtype}",
            f"reading   {first} of the first checkpoint and {second} of the second",
            f"download  {_nbytes(self.download_nbytes)}",
            f"time      {_seconds(self.seconds)} to read and write at {_nbytes(self.rate_nbytes)} "
            "per second, a rate assumed and not measured",
            f"memory    about {_nbytes(self.compute_memory_nbytes)} to compute, whatever the size",
            f"training  {_nbytes(self.training_memory_nbytes)} for Δ on the device, beside the "
            "weights",
        ]


@dataclass(frozen=True)
class Preflight:
    """What `check` found; `coverage`, `prefixes` and `plan` are None where nothing pairs."""

    findings: list[Finding]
    selection: str
    pairs: int
    coverage: Coverage | None
    prefixes: tuple[str, str] | None
    plan: Plan | None

    @property
    def ok(self) -> bool:
        """Whether nothing breaks the method; notes are allowed."""
        return all(finding.severity != "breaks" for finding in self.findings)

    def table(self) -> str:
        """Return the facts side by side, what the differences mean, and the plan, as text."""
        blocks = []
        for between in dict.fromkeys(finding.between for finding in self.findings):
            rows = [finding for finding in self.findings if finding.between == between]
            blocks.append(_aligned(rows, between))
            meanings = [
                f"{row.severity}: {row.subject}: {_indented(row.message)}"
                for severity in ("breaks", "note")
                for row in rows
                if row.severity == severity
            ]
            if meanings:
                blocks.append("\n".join(meanings))
        if self.plan is None:
            blocks.append(f"{self.selection}: nothing pairs, so there is no Δ to plan for")
        else:
            blocks.append("\n".join([f"{self.selection}: {self.coverage}", *self.plan.lines()]))
        return "\n\n".join([*blocks, self._verdict()])

    def _verdict(self) -> str:
        count = {
            severity: sum(finding.severity == severity for finding in self.findings)
            for severity in ("breaks", "note")
        }
        notes = f"{count['note']} note{'' if count['note'] == 1 else 's'}"
        if self.ok:
            return f"verdict: the models fit each other, {notes}"
        return f"verdict: the models do not fit each other ({count['breaks']} breaks, {notes})"

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {
            "ok": self.ok,
            "selection": self.selection,
            "findings": [finding.to_dict() for finding in self.findings],
            "pairs": self.pairs,
            "prefixes": None if self.prefixes is None else list(self.prefixes),
            "coverage": None if self.coverage is None else self.coverage.to_json(),
            "plan": None if self.plan is None else asdict(self.plan),
        }


def check(
    reasoning: PathLike,
    multimodal: PathLike,
    model: PathLike | None = None,
    *,
    modules: Modules = ("attn", "mlp"),
    layers: Layers = None,
    mapping: MappingLike | None = None,
    rows: Rows = None,
    dtype: str = "bfloat16",
    read_rate: int | str = "1GB",
) -> Preflight:
    """Compare two models by configuration and headers, and say what their Δ will cost.

    With `model`, the first two are an expert and its reference, both text models, and Δ is to be
    attached to the third: facts are compared from each to the next. A pair that cannot be aligned
    is a finding that breaks, not an error.

    Args:
        modules, layers, dtype: as in `compute_delta`.
        mapping, rows: as in `compute_delta`, between the first two.
        read_rate: bytes a second, or text such as "1GB" or "500MB", that time is estimated with.

    Raises:
        FileNotFoundError: a source or a map file that is not there.
        CheckpointError: a checkpoint or a config.json that is not valid; the key is named.
        ValueError: an argument without meaning.
    """
    check_stored_dtype(dtype)
    selection, rate_nbytes = Selection.parse(modules, layers), _rate(read_rate)
    given = [reasoning, multimodal] if model is None else [reasoning, multimodal, model]
    roles = ["reasoning", "multimodal"] if model is None else ["expert", "reference", "model"]
    sides = [_open(source, role) for source, role in zip(given, roles, strict=True)]
    opened = [side.opened for side in sides]
    pairing, refusal = _pair(opened[0], opened[1], selection, mapping, rows)
    findings = _findings(sides[0], sides[1], selection, pairing, refusal)
    if model is not None:
        # A Δ meets a parameter of its own shape, row i with row i.
        attached, refusal = _pair(opened[1], opened[2], selection, None, "index")
        findings += _findings(sides[1], sides[2], selection, attached, refusal, attaches=True)
    return Preflight(
        findings,
        str(selection),
        0 if pairing is None else len(pairing.pairs),
        None if pairing is None else pairing.coverage,
        None if pairing is None else pairing.prefixes,
        None if pairing is None else _plan(pairing, sides[1].opened, dtype, rate_nbytes),
    )


def _open(given: PathLike, role: str) -> Side:
    opened = open_checkpoint(given)
    return Side(role, opened, Configuration.read(opened.directory))


def _pair(
    first: Opened,
    second: Opened,
    selection: Selection,
    mapping: MappingLike | None,
    rows: Rows,
) -> tuple[Pairing | None, str]:
    """Return the pairing as far as it goes, and why it is refused where it is."""
    refusal = ""
    for strict in (True, False):
        try:
            pairing = pair_checkpoints(
                first, second, selection, strict=strict, mapping=mapping, rows=rows
            )
        except (AlignmentError, CoverageError) as error:
            # The strict refusal names the cause; what is left of it otherwise may not.
            refusal = refusal or str(error)
        else:
            return pairing, refusal
    return None, refusal


def _findings(
    first: Side,
    second: Side,
    selection: Selection,
    pairing: Pairing | None,
    refusal: str,
    *,
    attaches: bool = False,
) -> list[Finding]:
    prefixes = [Fact(None, STATED)] * 2
    if pairing is not None:
        prefixes = [Fact(prefix or "no prefix", STATED) for prefix in pairing.prefixes]
    alignment = Finding(
        "alignment",
        "breaks" if refusal else "same",
        prefixes[0],
        prefixes[1],
        refusal,
        (first.role, second.role),
    )
    coverage = None if pairing is None else pairing.coverage
    stated = pairing is not None and pairing.stated
    compared = compare(
        first, second, selection, coverage, refusal, attaches=attaches, stated=stated
    )
    return [alignment, *compared]


def _plan(pairing: Pairing, second: Opened, dtype: str, rate_nbytes: int) -> Plan:
    of_second = sum(second.nbytes(pair.name) for pair in pairing.pairs)
    on_disk, on_device = ITEMSIZE[dtype]
    numel = sum(math.prod(pairing.shapes[pair.name]) for pair in pairing.pairs)
    delta_nbytes = math.ceil(on_disk * numel)
    return Plan(
        dtype=dtype,
        delta_nbytes=delta_nbytes,
        read_nbytes=(pairing.nbytes - of_second, of_second),
        compute_memory_nbytes=_COMPUTE_MEMORY_NBYTES,
        training_memory_nbytes=on_device * numel,
        rate_nbytes=rate_nbytes,
        seconds=(pairing.nbytes + delta_nbytes) / rate_nbytes,
        download_nbytes=_download_nbytes(pairing),
    )


def _download_nbytes(pairing: Pairing) -> int:
    """Return what of the pairs lies on a server and has not been downloaded."""
    checkpoints = (pairing.reasoning, pairing.multimodal)
    opened = zip(pairing.sources, checkpoints, pairing.needed(), strict=True)
    total = 0
    for source, checkpoint, needed in opened:
        if source.remote is None:
            continue
        from drift_fast.checkpoints.remote.sparse import SparseShard, merged, missing, nbytes_of

        ranges: dict[Path, list[tuple[int, int]]] = {}
        for name in needed:
            path, start, end = checkpoint.place(name)
            ranges.setdefault(Path(path), []).append((start, end))
        for path, wanted in ranges.items():
            shard = SparseShard.load(path)
            held = [] if shard is None else shard.ranges
            total += nbytes_of(missing(merged(wanted), held))
            if shard is not None:
                shard.close()
    return total


def _rate(given: int | str) -> int:
    try:
        return parse_size(str(given).removesuffix("/s"))
    except ValueError as error:
        raise ValueError(
            f"a rate must be bytes a second such as 500000000, '500MB' or '1GB', got {given!r}"
        ) from error


def _aligned(rows: Sequence[Finding], between: tuple[str, str]) -> str:
    cells = [("", "", *between)] + [
        (
            "" if row.severity == "same" else row.severity,
            row.subject,
            printable(str(row.reasoning), _VALUE_WIDTH),
            printable(str(row.multimodal), _VALUE_WIDTH),
        )
        for row in rows
        # What neither model has, experts say, is in the JSON only.
        if row.severity != "same" or row.reasoning.known or row.multimodal.known
    ]
    widths = [max(len(row[column]) for row in cells) for column in range(4)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in cells
    )


def _indented(message: str) -> str:
    """Keep the lines of a message together, and what strangers put into it off the terminal."""
    return "\n  ".join(printable(line, 2000) for line in message.split("\n"))


def _nbytes(nbytes: int) -> str:
    if nbytes == 0:
        return "nothing"
    for unit, scale in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if nbytes >= scale:
            return f"{nbytes / scale:.2f} {unit}".replace(".00 ", " ")
    return f"{nbytes} bytes"


def _seconds(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes / 60:.1f} h"
