"""Write docs/families.md: which families are aligned, which are refused and why, as measured here.

Owns the table; the families, and what must hold for each, are in tests/support/families.py.
`python docs/make_families.py` runs every check and writes; `--check` runs them and compares.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import drift_fast

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "tests"))

from support import families  # noqa: E402

TABLE = HERE / "families.md"
HEADER = (
    "family",
    "text model",
    "prefix on disk",
    "prefix in memory",
    "tensors matched",
    "experts: text → multimodal → in memory",
    "result",
)
ABOUT = """# Families

What `python docs/make_families.py` found with transformers {version}. Each family is built tiny
from its transformers classes, its vision tower as wide and deep as the language model. The text
model has random weights; each element of the multimodal model is its match plus a difference of its
own, so a wrong match, expert, half or orientation gives a different Δ. *Aligned* means that every
element of the backbone has exactly that Δ, that each tensor of either checkpoint is accounted for
once, and that an injection moves every parameter of the loaded model by its own Δ and no other,
whichever of the known layouts is on disk or in memory.

{table}

Prefixes are those of the numbered layers; *tensors matched* counts the tensors of the multimodal
checkpoint. Experts are stored *per expert* (one tensor for each of gate, up and down), *fused*
([expert, out, in]) or fused and *transposed* ([expert, in, out]).
"""


def faults(planted: Any, deltas: dict[str, Any]) -> Iterator[str]:
    """Yield what is wrong with deltas from each layout on disk, in them and where they arrive."""
    for disk, delta in deltas.items():
        stored = planted.layouts[disk]
        yield from families.misplaced(planted, stored, delta)
        yield from families.miscounted(planted, stored, delta.coverage)
    yield from families.mismatched(planted, deltas)


def measure(family: Any, directory: Path) -> tuple[str, str]:
    """Return the verdict with its reason, and how many tensors were matched of how many."""
    planted = families.plant(family, directory)
    deltas = {}
    try:
        for way, stored in planted.layouts.items():
            deltas[way] = drift_fast.compute_delta(
                planted.reasoning.path, stored.path, modules="all", rows="index", dtype="float32"
            )
        wrong = next(faults(planted, deltas), None)
    except (drift_fast.AlignmentError, drift_fast.CoverageError) as error:
        unnamed = [name for name in family.names if name not in str(error)]
        if family.expected == "refused" and not unnamed:
            return f"refused: {family.note}", "none"
        return f"refused: {first_sentence(error)}", "none"
    matched = f"{len(deltas['saved'])} of {len(planted.multimodal.parts)}"
    if wrong is not None:
        return f"wrong: {wrong}", matched
    return "aligned" + (f": {family.note}" if family.note else ""), matched


def first_sentence(error: Exception) -> str:
    """Return how a message begins, on one line and without the paths of this run."""
    text = re.sub(r"\S*/\S+( and \S*/\S+)?:? ?", "", str(error).replace("\n", " "))
    return re.split(r"(?<=\w)\. |; ", text)[0].replace("|", "/")[:200]


def row(family: Any) -> tuple[str, ...] | None:
    """Measure one family; None where the installed transformers lacks it."""
    if family.missing:
        return None
    with tempfile.TemporaryDirectory() as directory:
        verdict, matched = measure(family, Path(directory) / "measured")
        planted = families.plant(family, Path(directory) / "described")
    layouts = planted.layouts
    experts = "none"
    if planted.reasoning.experts != "none":
        sides = (planted.reasoning, layouts["saved"], layouts["memory"])
        experts = " → ".join(side.experts for side in sides)
    return (
        family.name,
        family.text_name,
        code(container(layouts["saved"].parts)),
        code(container(layouts["memory"].parts)),
        matched,
        experts,
        verdict,
    )


def container(parts: dict[str, frozenset[str]]) -> str:
    """Return what stands before the number of a layer."""
    found = {
        match[0]
        for name, held in parts.items()
        if held and (match := re.match(r".*?(?=\.\d+\.)", name))
    }
    return ", ".join(sorted(found))


def code(text: str) -> str:
    return f"`{text}`"


def render(rows: list[tuple[str, ...]]) -> str:
    lines = [HEADER, tuple("---" for _ in HEADER), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def verdicts(text: str) -> dict[tuple[str, str], str]:
    """Return the verdict of each row of a written table, without its reason."""
    found = {}
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        if line.startswith("|") and len(cells) == len(HEADER):
            found[cells[0], cells[1]] = cells[-1].partition(":")[0]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument(
        "--check", action="store_true", help="fail if the committed verdicts are not those found"
    )
    arguments = parser.parse_args()
    rows = [found for family in families.FAMILIES if (found := row(family))]
    table = render(rows)
    if not arguments.check:
        if len(rows) < len(families.FAMILIES):
            sys.exit(
                f"transformers {families.transformers.__version__} lacks "
                f"{len(families.FAMILIES) - len(rows)} families; write the table with a newer one"
            )
        version = families.transformers.__version__
        TABLE.write_text(ABOUT.format(version=version, table=table), encoding="utf-8")
        return
    committed = verdicts(TABLE.read_text(encoding="utf-8"))
    differing = [
        f"{family} with {text}: {committed.get((family, text), 'no row')} in {TABLE.name}, "
        f"{verdict} here"
        for (family, text), verdict in verdicts(table).items()
        if committed.get((family, text)) != verdict
    ]
    if differing:
        sys.exit("\n".join(differing))


if __name__ == "__main__":
    main()
