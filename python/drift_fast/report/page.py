"""One HTML file that needs no other: its styles, its scripts, and sections of text and tables.

Whatever comes from a file of unknown origin is escaped here, and the page may fetch nothing.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from typing import Any

from drift_fast._core import __version__

# A table's column holds text, counts or other numbers.
KINDS = {"text", "count", "number"}
_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"
)


@dataclass(frozen=True)
class Section:
    """A heading, and what is below it as HTML, which is taken as it is."""

    title: str
    parts: Sequence[str]

    def to_html(self) -> str:
        """Return the section as HTML."""
        return f"<section><h2>{escape(self.title)}</h2>\n{''.join(self.parts)}</section>"


def heading(text: str) -> str:
    """Return a heading within a section."""
    return f"<h3>{escape(text)}</h3>\n"


def note(text: str) -> str:
    """Return a remark."""
    return f'<p class="note">{escape(text)}</p>\n'


def sortable(columns: Mapping[str, str], rows: Iterable[Sequence[Any]], filtered: str) -> str:
    """Return a table that the page's script fills, sorts and filters.

    columns: their headers, each with one of `KINDS`.
    filtered: what the field to type into is for.
    """
    data = {
        "columns": list(columns.items()),
        "rows": [[_plain(cell) for cell in row] for row in rows],
    }
    heads = "".join(
        f'<th scope="col"{"" if kind == "text" else " class=number"}>'
        f'<button type="button">{escape(name)}</button></th>'
        for name, kind in columns.items()
    )
    label = escape(f"filter {filtered}", quote=True)
    return (
        f'<div class="sortable"><script type="application/json">{_json(data)}</script>'
        f'<div class="tools"><input type="search" placeholder="{label}" aria-label="{label}">'
        '<output></output><button type="button" class="all" hidden>show all</button></div>'
        f'<div class="box"><table><thead><tr>{heads}</tr></thead><tbody></tbody></table></div>'
        "<noscript>This table needs JavaScript.</noscript></div>\n"
    )


def page(title: str, sections: Sequence[Section], script: str) -> str:
    """Return the whole page; `script` is that of the library which draws the charts."""
    own = files("drift_fast.report")
    styles, behavior = ((own / name).read_text("utf-8") for name in ("page.css", "page.js"))
    body = "\n".join(section.to_html() for section in sections)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{styles}</style><script>{script}</script></head>\n"
        f"<body><h1>{escape(title)}</h1>\n{body}\n"
        f"<footer><p>drift_fast {escape(__version__)}. In a chart: point at it for values, drag to "
        "enlarge, click twice to go back, click a line's name to hide it.</p></footer>\n"
        f"<script>{behavior}</script></body></html>\n"
    )


def _json(value: Any) -> str:
    # No text may end the element that holds it.
    return json.dumps(value, allow_nan=False).replace("<", "\\u003c")


def _plain(cell: Any) -> Any:
    return None if isinstance(cell, float) and not math.isfinite(cell) else cell
