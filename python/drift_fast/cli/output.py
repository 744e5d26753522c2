"""What several commands print: results and JSON on standard output, remarks on standard error.

On a terminal results are in color and tables within its width, by rich. Elsewhere every line is
plain and whole, as `str` of the result has it. `NO_COLOR` and `FORCE_COLOR` are obeyed.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, TextIO

from drift_fast.config_files import json_text
from drift_fast.tables import Block, Table

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.text import Text

    from drift_fast.delta.compute import Report
    from drift_fast.delta.delta import Delta

# What stands out, and how. The first words of lines, verdicts, and the shades of a heat map.
_STYLES = {
    "drift.bad": "bold red",
    "drift.good": "bold green",
    "drift.note": "yellow",
    "drift.next": "bold cyan",
    "drift.low": "blue",
    "drift.middle": "green",
    "drift.high": "yellow",
}
_WORDS = (
    r"(?m)^verdict: (?:(?P<bad>the \w+ do(?:es)? not fit.*)|(?P<good>the \w+ fits?\b.*))$",
    r"(?m)^(?:drift-fast: )?(?:(?P<bad>breaks|refused)|(?P<note>note|warning)|(?P<next>next))\b",
    r"(?P<low>[▁▂▃]+)|(?P<middle>[▄▅]+)|(?P<high>[▆▇█]+)",
)
# A terminal that is not there, behind a pipe that takes color.
_WIDE = 1 << 16
# Characters of a column of text that a narrow terminal leaves it at least.
_NARROW = 16


def show(*blocks: Block, file: TextIO | None = None, spelled: Callable[[str], str] = str) -> None:
    """Print texts, as `spelled` returns them, and tables, with an empty line between them."""
    stream = file or sys.stdout
    blocks = tuple(spelled(block) if isinstance(block, str) else block for block in blocks)
    if not (stream.isatty() or os.environ.get("FORCE_COLOR", "0") not in ("", "0")):
        print("\n\n".join(map(str, blocks)), file=stream)
        return
    # Loaded here, so that what is read by programs does not wait for it.
    from rich.console import Console
    from rich.theme import Theme

    console = Console(
        file=stream,
        color_system=None if os.environ.get("NO_COLOR") else "auto",
        width=None if stream.isatty() or "COLUMNS" in os.environ else _WIDE,
        highlight=False,
        theme=Theme(_STYLES),
    )
    for at, block in enumerate(blocks):
        if at:
            console.print()
        if isinstance(block, str):
            # The terminal breaks long lines itself, so that a command can be copied from it.
            console.print(_lit(block), soft_wrap=True)
            continue
        if block.title:
            console.print(_lit(block.title), soft_wrap=True)
        for each in _fitted(block, console.width):
            console.print(each)


def _lit(text: str) -> Text:
    """Return a text, as it is, with what stands out in color."""
    from rich.text import Text

    lit = Text(text)
    for words in _WORDS:
        lit.highlight_regex(words, style_prefix="drift.")
    return lit


def _fitted(table: Table, width: int) -> Iterator[RenderableType]:
    """Yield a table in as many parts as the width takes, each with its first columns again.

    Text is broken within its column; what goes to the right, such as numbers, never is.
    """
    from rich.cells import cell_len
    from rich.padding import Padding
    from rich.table import Table as RichTable

    indent = 2 if table.title else 0
    sides = table.align.ljust(len(table.columns), "<")
    widths = [max(map(cell_len, cells)) for cells in zip(table.columns, *table.rows, strict=True)]
    least = [n if side == ">" else min(n, _NARROW) for n, side in zip(widths, sides, strict=True)]
    # What each part begins with: the texts before the first number, which say what a row is about.
    named = (sides + ">").index(">")
    parts: list[list[int]] = [[]]
    for at in range(named, len(widths)):
        taken = indent + sum(least[each] + 2 for each in (*range(named), *parts[-1]))
        if parts[-1] and taken + least[at] > width:
            parts.append([])
        parts[-1].append(at)
    for part in parts:
        shown = [*range(named), *part]
        drawn = RichTable(
            box=None,
            show_header=any(table.columns),
            header_style="bold",
            pad_edge=False,
            padding=(0, 2, 0, 0),
        )
        for at in shown:
            drawn.add_column(
                _lit(table.columns[at]),
                justify="right" if sides[at] == ">" else "left",
                no_wrap=sides[at] == ">",
                overflow="fold",
            )
        for row in table.rows:
            drawn.add_row(*(_lit(row[at]) for at in shown))
        yield Padding(drawn, (0, 0, 0, indent), expand=False)


def print_json(value: Any) -> None:
    """Print plain values as JSON, in UTF-8 whatever the terminal's encoding is."""
    text = json_text(value)
    sys.stdout.flush()
    if (buffer := getattr(sys.stdout, "buffer", None)) is not None:
        buffer.write(text)
    else:
        sys.stdout.write(text.decode())


def remark(text: str) -> None:
    """Print a line on standard error."""
    show(f"drift-fast: {text}", file=sys.stderr)


def report_transfers(sources: Mapping[str, Any]) -> None:
    """Say what was downloaded."""
    for source in sources.values():
        if source.get("transfer"):
            remark(f"{source['url']}: {source['transfer']['report']}")


def next_step(*commands: str) -> None:
    """Say what to do now, after a result that a person reads."""
    show("\n".join(f"next: {command}" for command in commands))


def peak(nbytes: int | None) -> str:
    """Return how much memory the buffers took, in words."""
    return f"buffers took {(nbytes or 0) / 1e6:.1f} MB at most"


def statistics_json(found: Delta | Report, out: str | None) -> dict[str, Any]:
    """Return what `delta` and `inspect` print as JSON."""
    stats = found.stats
    return {
        "out": out,
        "sources": found.sources,
        "coverage": found.coverage.to_dict(),
        "peak_nbytes": found.peak_nbytes,
        "total": stats.total.to_dict(),
        "modules": [row.to_dict() for row in stats.by_module()],
        "layers": [row.to_dict() for row in stats.by_layer()],
        "tensors": [row.to_dict() for row in stats],
    }
