"""Text in aligned columns, for `table()` methods and the command line.

The text is the same on a terminal, in a pipe and in a file: no color, and no line is cut.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

# Wider than any line, so that rich neither wraps nor cuts one.
_WIDTH = 1_000_000


def render(columns: Sequence[str], rows: Iterable[Sequence[str]], align: str = "") -> str:
    """Return rows under the headers of their columns, with two spaces between columns.

    Without any header text there is no line of headers.

    align: `<` or `>` for each column, the left or the right; columns without one go to the left.
    """
    # Loaded here, so that importing the package stays light.
    from io import StringIO

    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=any(columns))
    for column, side in zip(columns, align.ljust(len(columns), "<"), strict=True):
        table.add_column(Text(column), justify="right" if side == ">" else "left", no_wrap=True)
    for row in rows:
        # Text, since rich would read brackets in a string as markup.
        table.add_row(*map(Text, row))
    stream = StringIO()
    Console(file=stream, width=_WIDTH, color_system=None, legacy_windows=False).print(table)
    return "\n".join(line.rstrip() for line in stream.getvalue().splitlines())
