"""Results as blocks of text and tables: printed in aligned columns, and in a notebook as HTML.

The text has no color, and no line is cut; `cli.output` shows the same blocks on a terminal. In HTML
every text is escaped, since names come from files of unknown origin.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from textwrap import indent
from typing import TYPE_CHECKING, Any, TypeAlias
from unicodedata import east_asian_width

if TYPE_CHECKING:
    import pandas

_TITLE = 'style="text-align:left;font-weight:600"'
_SIDES = {"<": "left", ">": "right;white-space:nowrap"}


@dataclass(frozen=True)
class Table:
    """Rows under the headers of their columns, indented under a title if there is one.

    align: as for `render`.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    align: str = ""
    title: str = ""

    def __str__(self) -> str:
        text = render(self.columns, self.rows, self.align)
        return f"{self.title}\n{indent(text, '  ')}" if self.title else text

    def to_html(self) -> str:
        """Return the table as HTML, in a box that scrolls where it is long or wide."""
        sides = self.align.ljust(len(self.columns), "<")

        def row(tag: str, cells: Sequence[str]) -> str:
            return "".join(
                f'<{tag} style="text-align:{_SIDES[side]}">{escape(cell)}</{tag}>'
                for cell, side in zip(cells, sides, strict=True)
            )

        title = f"<caption {_TITLE}>{escape(self.title)}</caption>" if self.title else ""
        head = f"<thead><tr>{row('th', self.columns)}</tr></thead>" if any(self.columns) else ""
        body = "".join(f"<tr>{row('td', cells)}</tr>" for cells in self.rows)
        return (
            '<div class="drift-table" style="max-height:36em;overflow:auto"><table>'
            f"{title}{head}<tbody>{body}</tbody></table></div>"
        )


Block: TypeAlias = str | Table


class Shown(ABC):
    """A result with a short `repr`, a whole report as `str`, and the same as HTML in notebooks."""

    __slots__ = ()

    @abstractmethod
    def headline(self) -> str:
        """Return what is most worth knowing, in a line."""

    @abstractmethod
    def blocks(self) -> list[Block]:
        """Return the report, paragraph by paragraph."""

    @abstractmethod
    def records(self) -> list[dict[str, Any]]:
        """Return one row of plain values for each thing that this is about."""

    def table(self) -> str:
        """Return the whole report as text."""
        return "\n\n".join(map(str, self.blocks()))

    def to_pandas(self) -> pandas.DataFrame:
        """Return a data frame with one row for each thing that this is about.

        Raises:
            ImportError: pandas is not installed.
        """
        try:
            import pandas
        except ImportError as error:
            raise ImportError("to_pandas() needs pandas: pip install pandas") from error
        return pandas.DataFrame(self.records())

    def __str__(self) -> str:
        return self.table()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.headline()})"

    def _repr_html_(self) -> str:
        return to_html(self.blocks())


def to_html(blocks: Iterable[Block]) -> str:
    """Return blocks as HTML, with every text escaped."""
    return "\n".join(
        block.to_html()
        if isinstance(block, Table)
        else f'<p style="white-space:pre-wrap;overflow-wrap:anywhere">{escape(block)}</p>'
        for block in blocks
    )


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
