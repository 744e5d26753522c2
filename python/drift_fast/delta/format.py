"""The files of a delta on disk: names, version and checksums; docs/format.md describes them."""

from __future__ import annotations

FORMAT_VERSION = 1
DESCRIPTION = "drift.json"
INDEX = "delta.safetensors.index.json"

# The checksum that `drift.json` has of each block of a tensor's bytes.
CHECKSUM = "crc32"
BLOCK_NBYTES = 1 << 20

# What to do about a delta that is not whole.
AGAIN = "compute the delta again: drift-fast delta REASONING MULTIMODAL --out DIRECTORY --overwrite"


def stored_names(name: str, stored_dtype: str) -> list[str]:
    """Return the names of the tensors on disk that hold one Δ, in the order of a file."""
    return [name, f"{name}.scale"] if stored_dtype == "int8" else [name]
