"""The tables of a run in Markdown: aims and what was measured, then every row.

Owns wording only; every figure comes from the results. A ratio is a time divided by ours in the
same group, so more than one means slower than ours.
"""

from __future__ import annotations

import statistics
from typing import Any

from drift_fast.bench.results import Results, Row

GROUPS = {
    "process/statistics": "Statistics, warm page cache, whole processes",
    "process/delta": "Δ written, warm page cache, whole processes",
    "process/merge": "Merged model written (linear), warm page cache, whole processes",
    "inside/statistics": "Statistics, warm page cache, in process",
    "inside/delta": "Δ written, warm page cache, in process",
    "cold/read": "Cold sequential reads of both files",
    "cold/statistics": "Statistics, cold page cache, whole processes",
    "cold/delta": "Δ written, cold page cache, whole processes",
    "cold/merge": "Merged model written (linear), cold page cache, whole processes",
}
# What the rows and columns are called.
_WORDS = {
    "XOR control": "reads both files and combines them byte by byte, the least that any Δ takes: "
    "the limit of this machine, whose rate ours is a share of",
    "tuned PyTorch": "PyTorch as fast as we could write it by hand, tensor by tensor in buffers "
    "that are used again",
    "plain": "safetensors' safe_open and PyTorch as most would write it",
    "public way": "both models loaded with from_pretrained and subtracted, as the public code does",
    "warm, cold": "the files are in memory already, or have to come from disk",
    "in process": "without the start of Python; else the whole command is timed",
    "against ours": "seconds divided by ours: 2.00× took twice as long",
    "anonymous MB": "the part of the peak that is the process's own, without files that it maps",
}


def markdown(results: Results) -> str:
    """Return the whole report."""
    lines = [f"# {_title(results)}", "", *_result_first(results), _taken(results), ""]
    lines += [f"* {note}" for note in results.notes]
    if results.aims:
        lines += ["", "## Aims", "", "| aim | wanted | measured | |", "|---|---|---|---|"]
        lines += [_aim(aim) for aim in results.aims]
    if results.kind == "scaling":
        lines += ["", *_scaling(results)]
    else:
        for group, title in GROUPS.items():
            rows = [row for row in results.rows if row.group == group]
            if rows:
                lines += ["", f"## {title}", "", *_table(rows, results)]
    lines += ["", "## Words", "", *(f"* **{word}**: {text}" for word, text in _WORDS.items())]
    return "\n".join(lines) + "\n"


def _title(results: Results) -> str:
    pair = f"a pair of 2 × {results.nbytes / 2e9:.2f} GB in bfloat16 ({results.size})"
    return {
        "delta": f"Δ and statistics of {pair}",
        "scaling": f"Over thread counts: Δ and statistics of {pair}",
        "trace": f"Memory over time: Δ and statistics of {pair}",
    }[results.kind]


def _result_first(results: Results) -> list[str]:
    """Return the outcome in a sentence, as far as the rows for it ran."""
    said = []
    for part, what in (("statistics", "read for its statistics"), ("delta", "turned into Δ")):
        group = next((g for g in (f"process/{part}", f"inside/{part}") if _wall(results, g)), "")
        mine = _wall(results, group)
        if mine is None:
            continue
        tuned, limit = (_wall(results, group, who) for who in ("tuned", "xor"))
        text = f"the pair was {what} in {mine:.3g} s ({results.nbytes / mine / 1e9:.1f} GB/s)"
        text += f", {tuned / mine:.1f} times as fast as tuned PyTorch" if tuned else ""
        text += f", at {limit / mine:.0%} of the rate of the XOR control" if limit else ""
        said.append(text)
    wrong = [row.label for row in results.rows if row.who == "ours" and row.wrong]
    checked = any(row.who == "ours" and (row.error or row.compared) for row in results.rows)
    said += [f"WRONG RESULTS: {', '.join(wrong)}"] if wrong else []
    said += ["all of it is right against float64"] if checked and not wrong else []
    return [f"**{'; '.join(said)}.**".replace("**the", "**The"), ""] if said else []


def _wall(results: Results, group: str, who: str = "ours") -> float | None:
    return results.wall(f"{group}/{who}")


def _taken(results: Results) -> str:
    machine, versions = results.hardware, dict(results.versions)
    memory = machine["memory_nbytes"]
    had = f"{memory / 2**30:.0f} GiB of memory, " if memory else ""
    own = versions.pop("drift_fast")
    commit = versions.pop("commit", "")
    libraries = ", ".join(f"{name} {version}" for name, version in versions.items())
    how = f"Medians (min to max) of {results.repeats}; rows ran in turn. Compare ratios, not times."
    if results.kind == "trace":
        how = "Each command was watched once and timed once."
    return (
        f"`{results.command}`, {results.date}. {machine['processor']}, {machine['cores']} cores, "
        f"{had}{machine['system']}, {machine['file_system']}; drift_fast {own}"
        f"{f' ({commit})' if commit else ''}, {libraries}. {how}"
    )


def _aim(aim: dict[str, Any]) -> str:
    verdict = {True: "met", False: "**missed**", None: ""}[aim["met"]]
    return f"| {aim['aim']} | {aim['wanted']} | {aim['measured'] or 'not measured'} | {verdict} |"


def _table(rows: list[Row], results: Results) -> list[str]:
    base = next((row.wall for row in rows if row.who == "ours"), None)
    inside = rows[0].group.startswith("inside")
    head = "| | wall s | against ours | CPU s | GB/s |"
    lines = [
        head + ("" if inside else " peak MB | anonymous MB | result |"),
        "|---" * (5 if inside else 8) + "|",
    ]
    for row in rows:
        cells = [row.label, *_times(row, base, results.nbytes)]
        if not inside:
            cells += [_mega(row.peak_nbytes), _mega(row.peak_anonymous_nbytes), _result(row)]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _times(row: Row, base: float | None, nbytes: int) -> list[str]:
    if row.wall is None:
        return [row.absent or "not timed", "", "", ""]
    spread = f" ({min(row.walls):.3f} to {max(row.walls):.3f})" if len(row.walls) > 1 else ""
    return [
        f"{row.wall:.3f}{spread}",
        f"{row.wall / base:.2f}×" if base else "",
        f"{statistics.median_high(row.cpus):.2f}",
        f"{nbytes / row.wall / 1e9:.2f}",
    ]


def _result(row: Row) -> str:
    if row.wrong:
        return f"**wrong**: {row.wrong}"
    if row.error is not None:
        return f"within {row.error:.1e}"
    return f"exact in {row.compared:,} values" if row.compared else ""


def _mega(nbytes: int | None) -> str:
    return "" if nbytes is None else f"{nbytes / 1e6:,.0f}"


def _scaling(results: Results) -> list[str]:
    parts = results.timed_inside()
    head = ["threads"]
    for part in parts:
        what = "statistics" if part == "statistics" else "Δ written"
        control = "XOR" if part == "statistics" else "XOR written"
        head += [f"{what} GB/s", f"{control} GB/s", "rate against XOR", "against one thread"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    first: dict[str, float] = {}
    for threads in dict.fromkeys(row.threads for row in results.rows if "@" in row.key):
        cells = [str(threads)]
        for part in parts:
            mine, xor = (results.wall(f"inside/{part}/{who}@{threads}") for who in ("ours", "xor"))
            if mine is None or xor is None:
                cells += ["", "", "", ""]
                continue
            first.setdefault(part, mine)
            rates = [f"{results.nbytes / wall / 1e9:.2f}" for wall in (mine, xor)]
            cells += [*rates, f"{xor / mine:.0%}".replace("%", " %"), f"{first[part] / mine:.2f}×"]
        lines.append("| " + " | ".join(cells) + " |")
    return lines
