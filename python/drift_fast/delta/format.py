"""The files of a delta on disk: names and version; docs/format.md describes them."""

from __future__ import annotations

FORMAT_VERSION = 1
DESCRIPTION = "drift.json"
INDEX = "delta.safetensors.index.json"
