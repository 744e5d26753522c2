"""How a delta is stored: types, file names, what rounding may lose, and sizes given as text.

Owns these constants and no more; reads and writes nothing.
"""

from __future__ import annotations

import os
import re

FORMAT_VERSION = 1
DESCRIPTION = "drift.json"
INDEX = "delta.safetensors.index.json"
DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
# On disk only; they come out as bfloat16.
COMPRESSED = {"float8_e4m3": "F8_E4M3", "int8": "I8"}
STORED_DTYPES = DTYPES | COMPRESSED
# Elements of an int8 delta that share a scale.
INT8_BLOCK = 64
# What buffers take in all, unless told otherwise.
MEMORY = "64MB"

# Rounding changes ‖Δ‖² by far less than this; a larger loss is underflow. Of E4M3, four significant
# bits, every element can lose a sixteenth; of int8 the largest of a block half a step of 127, and
# all others less than that together.
_LOST = {"float8_e4m3": 1 - (15 / 16) ** 2, "int8": 2**-5}
_LOST_OF_16_BITS = 2**-7


def share_lost(dtype: str) -> float:
    """Return the share of ‖Δ‖² that rounding to `dtype` may take away at most."""
    return _LOST.get(dtype, _LOST_OF_16_BITS)


def check_stored_dtype(dtype: str) -> str:
    """Return a type that a delta can be stored in, or refuse it with those there are."""
    if dtype not in STORED_DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(STORED_DTYPES)}, got {dtype!r}")
    return dtype


def tensor_dtype(stored: str) -> str:
    """Return what tensors come out as of a delta stored in `stored`."""
    return "bfloat16" if stored in COMPRESSED else stored


def thread_count(threads: int | None) -> int:
    """Return the number of threads, by default that of the processors this process may use."""
    if threads is None:
        affinity = getattr(os, "sched_getaffinity", None)
        return len(affinity(0)) if affinity else os.cpu_count() or 1
    if threads < 1:
        raise ValueError(f"threads must be at least 1, got {threads}")
    return threads


_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_size(size: int | str) -> int:
    """Return bytes from a number or from text such as "500MB" or "4GiB".

    Raises:
        ValueError: neither, or not positive.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", str(size))
    if found is None or found[2].upper() not in _UNITS:
        raise ValueError(f"a size must look like 5000000, '500MB' or '4GiB', got {size!r}")
    nbytes = int(float(found[1]) * _UNITS[found[2].upper()])
    if nbytes < 1:
        raise ValueError(f"a size must be positive, got {size!r}")
    return nbytes
