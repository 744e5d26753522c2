"""What several commands print: JSON and notes on standard output, remarks on standard error."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from drift_fast.config_files import json_text

if TYPE_CHECKING:
    from drift_fast.delta.compute import Report
    from drift_fast.delta.delta import Delta


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
    print(f"drift-fast: {text}", file=sys.stderr)


def report_transfers(sources: Mapping[str, Any]) -> None:
    """Say what was downloaded."""
    for source in sources.values():
        if source.get("transfer"):
            remark(f"{source['url']}: {source['transfer']['report']}")


def next_step(*commands: str) -> None:
    """Say what to do now, after a result that a person reads."""
    print("\n".join(f"next: {command}" for command in commands))


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
