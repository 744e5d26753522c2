"""Compare statistics and Δ with float64 before anything is timed.

Owns the float64 reference of a pair, computed by numpy from the bytes on disk, and what counts as
wrong: a norm or cosine that is off by more than 1e-6, or a value of a sampled Δ that differs in any
bit from the float64 difference rounded once to bfloat16.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from drift_fast.bench.pair import Pair, shards

Bits = npt.NDArray[np.uint16]
Floats = npt.NDArray[np.float64]

TOLERANCE = 1e-6
# So many float64 values of both models and of Δ stay in cache.
_CHUNK = 1 << 16
_VERSION = 1


@dataclass(frozen=True)
class Verdict:
    """How far a result is from the reference; `wrong` is empty if it is right."""

    error: float | None = None
    values: int = 0
    wrong: str = ""


def truth(pair: Pair, *, threads: int) -> dict[str, list[float]]:
    """Return ‖Δ‖, ‖W_reason‖, ‖W_multimodal‖ and the cosine of each tensor, summed in float64.

    Keys are the multimodal checkpoint's names. The result is saved beside the pair.
    """
    kept = pair.reasoning.with_name("truth.json")
    stamp = [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in pair.files]
    try:
        stored = json.loads(kept.read_bytes())
        if stored["version"] == _VERSION and stored["files"] == stamp:
            return {str(name): [float(x) for x in row] for name, row in stored["rows"].items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        pass
    a, b = Stored(pair.reasoning), Stored(pair.multimodal)

    def row(name: str) -> list[float]:
        sums = np.zeros(4)
        for x, y in _chunks(a.bits(name), b.bits(pair.multimodal_name(name))):
            d = x - y
            # Not `@`: these threads would wait for each other if BLAS has threads of its own.
            sums += [np.einsum("i,i->", s, t) for s, t in ((d, d), (x, x), (y, y), (x, y))]
        norms = [math.sqrt(value) for value in sums[:3]]
        return [*norms, float(sums[3]) / (norms[1] * norms[2])]

    with ThreadPoolExecutor(threads) as pool:
        rows = dict(
            zip(map(pair.multimodal_name, pair.shapes), pool.map(row, pair.shapes), strict=True)
        )
    aside = kept.with_suffix(".incomplete")
    aside.write_text(json.dumps({"version": _VERSION, "files": stamp, "rows": rows}))
    os.replace(aside, kept)
    return rows


def check_statistics(
    found: Mapping[str, Sequence[float]], true: Mapping[str, Sequence[float]]
) -> Verdict:
    """Compare every tensor: norms by relative error, cosines by absolute error."""
    if found.keys() != true.keys():
        odd = sorted(found.keys() ^ true.keys())
        return Verdict(
            math.inf, wrong=f"{len(odd)} tensors are missing or not expected, {odd[0]} first"
        )
    worst, where = 0.0, ""
    for name, row in true.items():
        errors = [abs(x - y) / y for x, y in zip(found[name][:3], row[:3], strict=True)]
        errors.append(abs(found[name][3] - row[3]))
        # Comparing with NaN gives false.
        error = math.inf if any(map(math.isnan, errors)) else max(errors)
        if error > worst:
            worst, where = error, name
    wrong = "" if worst <= TOLERANCE else f"{where} is off by {worst:.1e}"
    return Verdict(worst, wrong=wrong)


def sample(pair: Pair, count: int = 8) -> list[str]:
    """Return text names: the embedding, the last tensor, and some others by a seed."""
    names = list(pair.shapes)
    rest = np.random.default_rng(0).permutation(np.array(names[1:-1]))[:count]
    return [names[0], *map(str, rest), names[-1]]


def check_delta(pair: Pair, directory: Path, names: Iterable[str]) -> Verdict:
    """Compare the sampled Δ in `directory`, under either checkpoint's names, bit for bit.

    −0 and +0 count as equal, since both can be the difference of equal values.
    """

    def compare(x: Floats, y: Floats, found: Bits) -> tuple[int, int, float]:
        wanted = round_to_bfloat16(x - y)
        different = (found != wanted) & ((found | wanted) != 0x8000)
        return int(np.count_nonzero(different)), 0, 0.0

    return _check_values(pair, directory, names, compare, exact=True)


def check_merge(
    pair: Pair, directory: Path, names: Iterable[str], weight: float, *, exact: bool
) -> Verdict:
    """Compare the sampled tensors of a linear merge, under either checkpoint's names.

    If `exact`, bit for bit. If not, one value in a thousand may differ by its last bit plus the
    rounding of both operands to float32, and the verdict's error is the largest difference
    relative to the sum of both magnitudes.
    """

    def compare(x: Floats, y: Floats, found: Bits) -> tuple[int, int, float]:
        wanted = round_to_bfloat16((1 - weight) * y + weight * x)
        different = int(np.count_nonzero(found != wanted))
        error = np.abs(widened(found) - widened(wanted))
        worst = float(np.max(error / (np.abs(x) + np.abs(y) + 1e-300), initial=0))
        allowance = 2**-7 * np.abs(widened(wanted)) + 2**-22 * (np.abs(x) + np.abs(y))
        return different, int(np.count_nonzero(~(error <= allowance))), worst

    return _check_values(pair, directory, names, compare, exact=exact)


def _check_values(
    pair: Pair,
    directory: Path,
    names: Iterable[str],
    compare: Callable[[Floats, Floats, Bits], tuple[int, int, float]],
    *,
    exact: bool,
) -> Verdict:
    """Return the first wrong tensor, or the number of right values.

    `compare` returns how many values differ, how many of them too much, and the largest error.
    """
    a, b, out = Stored(pair.reasoning), Stored(pair.multimodal), Stored(directory)
    values, worst = 0, 0.0
    for name in names:
        prefixed = pair.multimodal_name(name)
        place = prefixed if prefixed in out else name
        if place not in out:
            return Verdict(wrong=f"{prefixed} is missing")
        if out.shape(place) != ("BF16", pair.shapes[name]):
            return Verdict(wrong=f"{prefixed} is {out.shape(place)}")
        got, different, far = out.bits(place), 0, 0
        for start, (x, y) in enumerate(_chunks(a.bits(name), b.bits(prefixed))):
            found = compare(x, y, got[start * _CHUNK : start * _CHUNK + len(x)])
            different, far, worst = different + found[0], far + found[1], max(worst, found[2])
        values += len(got)
        if far or different > (0 if exact else len(got) // 1000 + 1):
            return Verdict(None, values, f"{different} of {len(got)} values of {prefixed} differ")
    return Verdict(worst or None, values)


def _chunks(left: Bits, right: Bits) -> Iterator[tuple[Floats, Floats]]:
    for start in range(0, len(left), _CHUNK):
        yield widened(left[start : start + _CHUNK]), widened(right[start : start + _CHUNK])


def widened(bits: Bits) -> Floats:
    """Return the values of bfloat16 bits."""
    values: Floats = (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return values


def round_to_bfloat16(values: Floats) -> Bits:
    """Round float64 values that are zero or normal in bfloat16, once, to nearest even."""
    bits = values.view(np.uint64)
    # 52 − 7 bits of the fraction are dropped; the carry may reach the exponent.
    bits = bits + np.uint64((1 << 44) - 1) + (bits >> np.uint64(45) & np.uint64(1))
    kept = (bits & ~np.uint64((1 << 45) - 1)).view(np.float64)
    high: Bits = (kept.astype(np.float32).view(np.uint32) >> np.uint32(16)).astype(np.uint16)
    return high


class Stored:
    """The tensors in a directory of safetensors files, mapped on access."""

    def __init__(self, directory: Path) -> None:
        self._places: dict[str, tuple[Path, int, int, str, tuple[int, ...]]] = {}
        for path in shards(directory):
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(length))
            for name, entry in header.items():
                if name == "__metadata__":
                    continue
                begin, end = (8 + length + offset for offset in entry["data_offsets"])
                shape = tuple(entry["shape"])
                self._places[name] = (path, begin, end - begin, entry["dtype"], shape)

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def shape(self, name: str) -> tuple[str, tuple[int, ...]]:
        """Return dtype and dimensions."""
        return self._places[name][3:]

    def bits(self, name: str) -> Bits:
        """Return the tensor's 16-bit words, mapped, as one dimension."""
        path, begin, nbytes, _, _ = self._places[name]
        return np.memmap(path, dtype=np.uint16, mode="r", offset=begin, shape=(nbytes // 2,))
