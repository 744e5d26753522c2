"""Measured rates, each with the results file and the row that it comes from.

Invariant: every number here is in the committed file that it names, which
tests/planner/test_counts.py reads back.
"""

from __future__ import annotations

from dataclasses import dataclass

_DELTA = "benches/results/delta-1.5B_2core_202611.md"
_INJECTION = "benches/results/injection_h100_202611.md"
_HOST = "benches/results/injection_h200_202611.md"
_LORA = "benches/results/multi_gpu_lora_2xh200_202611.md"
H100 = "one H100 80 GB, torch 2.11"
H200 = "one H200, torch 2.11"
TWO_CORES = "two cores, virtual disk"

# bfloat16 without sparsity, from NVIDIA's data sheet of the H100 SXM.
H100_FLOPS = 989.4e12

# The measured model, as the file says: Qwen2.5-VL-7B's decoder layers, attention + MLP.
_LAYERS, _HIDDEN, _INNER, _KEYS = 28, 3584, 18944, 512
_ATTENTION_NUMEL = _LAYERS * (2 * _HIDDEN * (_HIDDEN + _KEYS) + _HIDDEN + 2 * _KEYS)
_MLP_NUMEL = _LAYERS * 3 * _HIDDEN * _INNER
_TOKENS = 2048


@dataclass(frozen=True)
class Speed:
    """How fast one GPU computes.

    `peak` is in operations per second. `share` is the part of it that a run reaches, and `source`
    says where that share comes from.
    """

    peak: float
    share: float
    source: str


@dataclass(frozen=True)
class Measured:
    """One row of a results file: its section and first cell, and the cells that are used."""

    file: str
    section: str
    row: str
    cells: tuple[float, ...]
    hardware: str

    @property
    def source(self) -> str:
        return f"{self.file}, {self.section}, “{self.row}” ({self.hardware})"


@dataclass(frozen=True)
class Streaming(Measured):
    """Δ computed and written; the cell is GB per second, read from both checkpoints."""

    @property
    def nbytes_per_second(self) -> float:
        return self.cells[0] * 1e9


@dataclass(frozen=True)
class Injecting(Measured):
    """A forward and backward pass with and without an injection, in ms."""

    numel: int = _ATTENTION_NUMEL + _MLP_NUMEL

    @property
    def seconds(self) -> float:
        """What one injection adds."""
        return (self.cells[0] - self.cells[1]) / 1e3

    @property
    def nbytes_per_second(self) -> float:
        """The rate at which an adaptive injection reads g twice and Δ once, and then g += c·Δ."""
        return 6 * 2 * self.numel / self.seconds

    @property
    def seconds_per_numel(self) -> float:
        return self.seconds / self.numel


def _injecting(row: str, with_ms: float, without_ms: float, numel: int | None = None) -> Injecting:
    given = {} if numel is None else {"numel": numel}
    return Injecting(_INJECTION, "All of the last run", row, (with_ms, without_ms), H100, **given)


def _from_host(row: str, with_ms: float, without_ms: float) -> Injecting:
    return Injecting(_HOST, "The second run", row, (with_ms, without_ms), H200)


COLD = Streaming(
    _DELTA, "Δ written, cold page cache, whole processes", "drift-fast delta", (1.21,), TWO_CORES
)
WARM = Streaming(
    _DELTA, "Δ written, warm page cache, whole processes", "drift-fast delta", (3.04,), TWO_CORES
)
# Statistics only read, so this bounds the rate of a Δ that is read in each step.
READ = Streaming(
    _DELTA, "Statistics, cold page cache, whole processes", "drift-fast inspect", (1.63,), TWO_CORES
)

BOTH = _injecting("drift_fast, adaptive, attention + MLP", 218.3, 192.3)
ATTENTION = _injecting("drift_fast, adaptive, attention only", 197.7, 193.9, _ATTENTION_NUMEL)
BY_RESIDENCY = {
    "device": BOTH,
    "device-int8": _injecting("drift_fast, adaptive, attention + MLP, device-int8", 257.0, 193.1),
    "host": _from_host("drift_fast, adaptive, attention + MLP, host, 1GB ahead", 410.8, 186.0),
    "host-int8": _from_host(
        "drift_fast, adaptive, attention + MLP, host-int8, 1GB ahead", 324.9, 184.9
    ),
}
LORA = Injecting(_LORA, "One process alone", "drift_fast, adaptive", (197.3, 184.9), H200)
EVERY = (COLD, WARM, READ, ATTENTION, LORA, *BY_RESIDENCY.values())


def injecting(residency: str, *, attention_only: bool) -> Injecting | None:
    """Return the row to scale an injection from; None if nothing was measured."""
    if residency == "device" and attention_only:
        return ATTENTION
    return BY_RESIDENCY.get(residency)


def utilization(*, lora: bool = False) -> tuple[float, str]:
    """Return the share of an H100's peak that the measured pass without injection reached.

    It counts 6 operations for each of the layers' elements and each token, 4 where LoRA leaves them
    frozen. The pass has no head, vision tower, optimizer or communication, so a real run reaches
    less.
    """
    row, each = (LORA, 4) if lora else (BOTH, 6)
    done = each * row.numel * _TOKENS / (row.cells[1] / 1e3)
    return done / H100_FLOPS, f"{each}·N·tokens in {row.cells[1]} ms, {row.source}"
