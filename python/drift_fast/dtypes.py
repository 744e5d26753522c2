"""The dtypes that a delta is stored as, under the names that torch and safetensors give them."""

from __future__ import annotations

DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
# On disk only; they come out as bfloat16.
COMPRESSED = {"int8": "I8"}
STORED_DTYPES = DTYPES | COMPRESSED
# Elements of an int8 delta that share a scale.
INT8_BLOCK = 64

# Types that an earlier version stored a delta as, and what to write now.
RETIRED = {"float8_e4m3": "pass dtype='int8', which takes as many bytes, or 'bfloat16'"}

# Rounding changes ‖Δ‖² by far less than this; a larger loss is underflow. In int8 the largest
# element of a block loses half a step of 127 at most, and all others less than that together.
_LOST = {"int8": 2**-5}
_LOST_OF_16_BITS = 2**-7


def share_lost(dtype: str) -> float:
    """Return the share of ‖Δ‖² that rounding to `dtype` may take away at most."""
    return _LOST.get(dtype, _LOST_OF_16_BITS)


def check_stored_dtype(dtype: str) -> str:
    """Return a type that a delta can be stored in, or refuse it with those there are."""
    if dtype in RETIRED:
        raise ValueError(f"storing Δ as {dtype} is gone: {RETIRED[dtype]}")
    if dtype not in STORED_DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(STORED_DTYPES)}, got {dtype!r}")
    return dtype


def tensor_dtype(stored: str) -> str:
    """Return what tensors come out as of a delta stored in `stored`."""
    return "bfloat16" if stored in COMPRESSED else stored
