"""Text in aligned columns, for `table()` methods and the command line.

The text is the same on a terminal, in a pipe and in a file: no color, and no line is cut.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from unicodedata import east_asian_width


def render(columns: Sequence[str], rows: Iterable[Sequence[str]], align: str = "") -> str:
    """Return rows under the headers of their columns, with two spaces between columns.

    Without any header text there is no line of headers.

    align: `<` or `>` for each column, the left or the right; columns without one go to the left.
    """
    lines = [*([tuple(columns)] if any(columns) else []), *map(tuple, rows)]
    widths = [max(map(_width, cells), default=0) for cells in zip(*lines, strict=True)]
    sides = align.ljust(len(columns), "<")

    def aligned(cell: str, side: str, width: int) -> str:
        space = " " * (width - _width(cell))
        return space + cell if side == ">" else cell + space

    return "\n".join("  ".join(map(aligned, line, sides, widths)).rstrip() for line in lines)


def _width(cell: str) -> int:
    """Return how many columns of a terminal a text takes."""
    return sum(2 if east_asian_width(character) in "WF" else 1 for character in cell)
