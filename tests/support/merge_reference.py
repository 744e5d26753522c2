"""An independent float64 restatement of merging, from the papers' equations, for tests only.

Owns: linear interpolation and task arithmetic (Ilharco et al., arXiv 2212.04089), TIES (Yadav et
al., arXiv 2306.01708), DARE (Yu et al., arXiv 2311.03099) and spherical interpolation (Shoemake,
1985), in NumPy float64, whole tensors at a time, by sorting and masking. Does not own: anything the
library computes; it imports nothing from drift_fast.

Letters: R the reasoning model, M the multimodal model, B the base or None, w and v their weights.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]


def linear(r: Array, m: Array, b: None, *, w: float, **_: Any) -> Array:
    return (1 - w) * m + w * r


def task_arithmetic(r: Array, m: Array, b: Array | None, *, w: float, v: float, **_: Any) -> Array:
    if b is None:
        return m + w * (r - m)
    return b + w * (r - b) + v * (m - b)


def layer_swap(r: Array, m: Array, b: None, **_: Any) -> Array:
    return r.copy()


def slerp(r: Array, m: Array, b: None, *, w: float, **_: Any) -> Array:
    """Shoemake's formula on the tensors as they are; beyond a cosine of 0.9995 a straight line."""
    norms = np.sqrt(np.sum(r * r)) * np.sqrt(np.sum(m * m))
    cosine = np.sum(r * m) / norms if norms > 0 else np.nan
    if not abs(cosine) <= 0.9995:
        return (1 - w) * m + w * r
    angle = np.arccos(cosine)
    return (np.sin((1 - w) * angle) * m + np.sin(w * angle) * r) / np.sin(angle)


def top(task: Array, density: float) -> Mask:
    """The k largest finite magnitudes, all that equal the k-th, and what is not finite."""
    magnitudes = np.abs(task)
    finite = np.sort(magnitudes[np.isfinite(magnitudes)])
    k = max(1, int(density * finite.size))
    return np.asarray(~(magnitudes < finite[finite.size - k]))


def elect(tasks: list[Array]) -> Array:
    """TIES, section 3: the sign of the sum, and the mean of what has that sign."""
    stacked = np.stack(tasks)
    sign = np.sign(stacked.sum(axis=0))
    agree = (np.sign(stacked) == sign) & (sign != 0)
    count = np.maximum(agree.sum(axis=0), 1)
    return np.asarray(np.where(agree, stacked, 0).sum(axis=0) / count)


def ties(
    r: Array, m: Array, b: Array | None, *, w: float, v: float, density: float, **_: Any
) -> Array:
    if b is None:
        return m + w * np.where(top(r - m, density), r - m, 0)
    first, second = (np.where(top(x - b, density), x - b, 0) for x in (r, m))
    return b + elect([w * first, v * second])


def kept(seed: int, name: str, model: str, shape: tuple[int, ...], density: float) -> Mask:
    """Which elements DARE keeps: SplitMix64's numbers of a key that SHA-256 makes of the rest."""
    digest = hashlib.sha256(
        seed.to_bytes(8, "little") + model.encode() + b"\0" + name.encode()
    ).digest()
    key = np.uint64(int.from_bytes(digest[:8], "little"))
    numel = int(np.prod(shape))
    with np.errstate(over="ignore"):
        z = key + np.arange(1, numel + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    uniform = (z >> np.uint64(11)).astype(np.float64) / 2**53
    return np.asarray(uniform < density).reshape(shape)


def _dropped(
    r: Array, m: Array, b: Array | None, density: float, seed: int, name: str
) -> list[Array]:
    from_ = m if b is None else b
    tasks = [(r - from_, "reasoning"), (m - from_, "multimodal")]
    return [
        np.where(kept(seed, name, model, task.shape, density), task / density, 0)
        for task, model in tasks
    ]


def dare_linear(
    r: Array,
    m: Array,
    b: Array | None,
    *,
    w: float,
    v: float,
    density: float,
    seed: int,
    name: str,
) -> Array:
    first, second = _dropped(r, m, b, density, seed, name)
    return m + w * first if b is None else b + w * first + v * second


def dare_ties(
    r: Array,
    m: Array,
    b: Array | None,
    *,
    w: float,
    v: float,
    density: float,
    seed: int,
    name: str,
) -> Array:
    first, second = _dropped(r, m, b, density, seed, name)
    return m + w * first if b is None else b + elect([w * first, v * second])


METHODS: dict[str, Callable[..., Array]] = {
    "linear": linear,
    "task_arithmetic": task_arithmetic,
    "ties": ties,
    "dare_linear": dare_linear,
    "dare_ties": dare_ties,
    "layer_swap": layer_swap,
    "slerp": slerp,
}
