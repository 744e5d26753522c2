"""GPU and host memory of one process, item by item, with the formula of each.

Owns the formulas. All are estimates, which lay 1 to 8 % above four runs of 7B on one GPU
(benches/results/planner_h200_202611.md). P is the number of all elements, LoRA's factors included,
T of those that train, D of those of Δ, and n the number of GPUs. Not included: fragmentation beyond
the allowance, and what a framework keeps that is not named here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from drift_fast.planner.counts import Model
from drift_fast.planner.training import Training

# CUDA's context, kernels, NCCL's buffers, and a little fragmentation.
ALLOWANCE_NBYTES = 2_000_000_000
# The default of `Injection` for the part of an offloaded Δ that is on the device at a time.
PREFETCH_NBYTES = 1_000_000_000
# What examples/qwen2_5_vl_7b/zero2.json and zero3.json set, in elements.
BUCKET_NUMEL = 500_000_000
_LIVE_NUMEL = 1_000_000_000
# bitsandbytes keeps one float32 scale for 256 codes.
_STATE_8BIT = 1 + 4 / 256
# Elements of LoRA's factors that Δ is pulled back onto at a time, and bytes beside each: 4 of the
# result, 4 of a factor in two parts, and about 14 of products and of gradients beside them.
PULLED_NUMEL = 1 << 25
_PULLED_NBYTES = 22
# 64 int8 codes and one float16 scale.
_DELTA_INT8 = 66 / 64
_DELTA_ITEMSIZE = {"float32": 4}


@dataclass(frozen=True)
class MemoryItem:
    """Bytes of one thing, their formula, and whether they are in host memory."""

    name: str
    nbytes: float
    formula: str
    assumed: bool = False
    on_host: bool = False


@dataclass(frozen=True)
class Memory:
    """The memory of one process, on its GPU and in host memory."""

    device: list[MemoryItem]
    host: list[MemoryItem]
    residency: str
    why: str

    @property
    def device_nbytes(self) -> int:
        return round(sum(item.nbytes for item in self.device))

    @property
    def host_nbytes(self) -> int:
        return round(sum(item.nbytes for item in self.host))


def estimate(training: Training, model: Model, delta_numel: int, gpu_nbytes: int | None) -> Memory:
    """Return the memory of one process.

    residency "auto" becomes "device", or "host" if Δ does not fit into `gpu_nbytes` with the rest.
    """
    items = [*_states(training, model), *_passes(training, model)]
    items.append(
        MemoryItem("CUDA, NCCL, fragmentation", ALLOWANCE_NBYTES, "an allowance", assumed=True)
    )
    if training.lora_rank:
        pulled = min(PULLED_NUMEL, model.trained_numel(training))
        formula = f"{_PULLED_NBYTES}·T, or of {PULLED_NUMEL / 1e6:.0f} million elements"
        items.append(MemoryItem("Δ pulled back", _PULLED_NBYTES * pulled, formula))
    residency, why = training.residency, "given"
    if residency == "auto":
        residency, why = "device", "auto: beside the gradients"
        taken = sum(item.nbytes for item in items if not item.on_host)
        left = None if gpu_nbytes is None else gpu_nbytes - taken
        beside = sum(item.nbytes for item in _delta(training, "device", delta_numel))
        if left is not None and beside > left:
            residency, why = "host", "auto: beside the gradients it would not fit"
    items += _delta(training, residency, delta_numel)
    device = [item for item in items if not item.on_host]
    return Memory(device, [item for item in items if item.on_host], residency, why)


@dataclass(frozen=True)
class Sizes:
    """Numbers that the formulas of weights, gradients, states and the optimizer's step share."""

    total: int
    trained: int
    gpus: int
    # Bytes of an element of weights and gradients, of a frozen weight, and of all states of one.
    itemsize: int
    frozen: int
    state: float
    mixed: bool
    optimizer: str

    @classmethod
    def of(cls, training: Training, model: Model) -> Sizes:
        total, trained = model.numel(), model.trained_numel(training)
        itemsize = 2 if training.precision == "bf16" else 4
        state = {"adamw": 2 * itemsize, "adamw8bit": 2 * _STATE_8BIT, "sgd": 0}[training.optimizer]
        mixed, frozen = training.precision == "bf16-mixed", itemsize
        if training.lora_rank:
            # Trainers load frozen weights in bfloat16.
            total, frozen = total + trained, 4 if training.precision == "fp32" else 2
        return cls(
            total, trained, training.gpus, itemsize, frozen, state, mixed, training.optimizer
        )

    def weights(self, frozen: int) -> tuple[float, str]:
        """Return the bytes of all weights, of which those that do not train have some each."""
        nbytes = frozen * (self.total - self.trained) + self.itemsize * self.trained
        if frozen == self.itemsize:
            return nbytes, f"{frozen}·P"
        return nbytes, f"({self.itemsize}·T + {frozen}·(P−T))"

    @property
    def step_nbytes(self) -> float:
        """Bytes that clipping and the optimizer's step move: every state is read and written.

        So are weights; gradients are read for their norm, scaled, and read again.
        """
        return (6 * self.itemsize + 2 * self.state) * self.trained

    def states(self, share: int, over: str, *, on_host: bool = False) -> MemoryItem:
        """Return the optimizer's states for a share of the elements that train."""
        formula = f"{self.state:.3g}·T{over}, {self.optimizer}"
        if self.optimizer == "adamw":
            formula += f", fused: with foreach another {self.itemsize}·T{over} while it steps"
        nbytes = self.state * self.trained / share
        return MemoryItem("optimizer states", nbytes, formula, on_host=on_host)


def _states(training: Training, model: Model) -> Iterator[MemoryItem]:
    """Yield weights, gradients and the optimizer's states."""
    sizes = Sizes.of(training, model)
    if training.sharding in ("none", "ddp"):
        yield from _replicated(sizes, ddp=training.sharding == "ddp")
    elif training.sharding == "fsdp2":
        wide = 2 if training.precision != "fp32" else 4
        yield from _fsdp2(sizes, on_host=training.offload == "all")
        yield MemoryItem(
            "gathered weights",
            wide * (2 * model.layer_numel() + model.outside_numel()),
            f"{wide}·(two decoder layers + what is outside the layers)",
        )
    else:
        yield from _zero(sizes, int(training.sharding[-1]), training.offload)


def _replicated(sizes: Sizes, *, ddp: bool) -> Iterator[MemoryItem]:
    itemsize, trained = sizes.itemsize, sizes.trained
    yield MemoryItem("weights", *sizes.weights(sizes.frozen))
    if sizes.mixed:
        yield MemoryItem("bfloat16 copies", 2 * trained, "2·T, which autocast holds until backward")
    yield MemoryItem("gradients", itemsize * trained, f"{itemsize}·T")
    if ddp and sizes.gpus > 1:
        yield MemoryItem(
            "DDP's buckets", itemsize * trained, f"{itemsize}·T, as the Trainer sets DDP up"
        )
    yield sizes.states(1, "")


def _fsdp2(sizes: Sizes, *, on_host: bool) -> Iterator[MemoryItem]:
    itemsize, n = sizes.itemsize, sizes.gpus
    kept, formula = sizes.weights(2 if sizes.mixed else itemsize)
    yield MemoryItem("weights", kept / n, f"{formula}/n", on_host=on_host)
    yield MemoryItem("gradients", itemsize * sizes.trained / n, f"{itemsize}·T/n", on_host=on_host)
    yield sizes.states(n, "/n", on_host=on_host)


def _zero(sizes: Sizes, stage: int, offload: str) -> Iterator[MemoryItem]:
    n, trained = sizes.gpus, sizes.trained
    low = 2 if sizes.mixed else 4
    offloaded = offload != "none"
    share = n if stage == 3 else 1
    yield MemoryItem(
        "weights",
        low * sizes.total / share,
        f"{low}·P" + ("/n" if share > 1 else ""),
        on_host=offload == "all" and stage == 3,
    )
    if offloaded:
        yield MemoryItem("gradients", 4 * trained / n, "4·T/n", on_host=True)
    else:
        shares = n if stage >= 2 else 1
        formula = f"{low}·T" + ("/n" if stage >= 2 else "")
        yield MemoryItem("gradients", low * trained / shares, formula)
        if sizes.mixed:
            yield MemoryItem("gradients at the step", 4 * trained / n, "4·T/n, in float32")
    if sizes.mixed:
        yield MemoryItem("float32 weights", 4 * trained / n, "4·T/n", on_host=offloaded)
    yield sizes.states(n, "/n", on_host=offloaded)
    if n > 1 or stage == 3:
        bucket = min(BUCKET_NUMEL, trained)
        yield MemoryItem("buckets", 2 * low * bucket, f"2·{low}·{BUCKET_NUMEL:.0e}, or 2·{low}·T")
    if stage == 3:
        live = min(_LIVE_NUMEL, sizes.total)
        yield MemoryItem("gathered weights", low * live, f"{low}·{_LIVE_NUMEL:.0e}, or {low}·P")


def layer_nbytes_per_token(
    model: Model, itemsize: int, lora_rank: int = 0, *, mixed: bool = False
) -> tuple[float, str] | None:
    """Return what backward keeps of one decoder layer for one token, if its sizes are known.

    For a layer like those of Llama and Qwen: RMSNorm in float32, attention that keeps no scores
    (FlashAttention, SDPA), and a gated MLP. h is the hidden size; a and k are heads and key-value
    heads times their dimension; i is the intermediate size (of the experts that a token uses); b is
    the bytes of an element. Two norms keep (4 + b)·h each, and their outputs b·h each for the
    projections; attention keeps b·(2a + 2k), the MLP b·4i.

    LoRA of rank r on its seven matrices: between A and B b·7r are kept. Frozen norms keep b·h less
    each. With mixed precision PEFT widens what comes to an adapter, so each keeps a copy of its
    own, 3h + a more in all.
    """
    hidden, heads = model.size("hidden size"), model.size("attention heads")
    keys, width = model.size("KV heads"), model.size("head dimension")
    inner, b = _inner(model), itemsize
    if hidden is None or heads is None or keys is None or width is None or inner is None:
        return None
    nbytes = 2 * (4 + b) * hidden + 2 * b * hidden + b * (2 * heads + 2 * keys) * width
    nbytes, formula = nbytes + 4 * b * inner, f"2·(4+{b})·h + 2·{b}·h + {b}·(2a+2k) + 4·{b}·i"
    if not lora_rank:
        return nbytes, formula
    if mixed:
        return nbytes + b * (hidden + heads * width + 7 * lora_rank), f"{formula} + {b}·(h+a+7r)"
    return nbytes + b * (7 * lora_rank - 2 * hidden), f"{formula} + {b}·(7r−2h)"


def _inner(model: Model) -> int | None:
    inner = model.size("intermediate size")
    chosen = model.size("experts per token")
    of_expert = model.configuration.backbone.size("moe_intermediate_size")
    if chosen and isinstance(of_expert, int):
        return chosen * of_expert
    return inner


def _passes(training: Training, model: Model) -> Iterator[MemoryItem]:
    """Yield what one forward and backward pass keeps in memory."""
    tokens = training.batch * (training.max_tokens or training.tokens)
    b = 4 if training.precision == "fp32" else 2
    layers, vocabulary = model.size("layers"), model.size("vocabulary size")
    hidden = model.size("hidden size")
    mixed = training.precision == "bf16-mixed"
    found = layer_nbytes_per_token(model, b, training.lora_rank, mixed=mixed)
    if found is not None and layers and hidden:
        of_layer, formula = found
        if training.gradient_checkpointing:
            yield MemoryItem(
                "activations",
                tokens * (layers * b * hidden + of_layer),
                f"tokens·({b}·h·layers + one layer of {formula})",
            )
        else:
            yield MemoryItem(
                "activations", tokens * layers * of_layer, f"tokens·layers·({formula})"
            )
    if vocabulary:
        yield MemoryItem(
            "logits",
            tokens * (b + 12) * vocabulary,
            f"tokens·({b} + 4 + 4 + 4)·vocabulary: logits, in float32, log-probabilities, gradient",
        )


def _delta(training: Training, residency: str, numel: int) -> Iterator[MemoryItem]:
    """Yield Δ in one process: its rows under sharding, all of Δ without."""
    share = numel / (training.gpus if training.sharded else 1)
    rows = "D/n" if training.sharded else "D"
    itemsize = _DELTA_ITEMSIZE.get(training.dtype, 2)
    int8 = residency.endswith("int8")
    whole = (_DELTA_INT8 if int8 else itemsize) * share
    formula = f"{_DELTA_INT8:.3g}·{rows}" if int8 else f"{itemsize}·{rows}"
    if residency.startswith("device"):
        yield MemoryItem("Δ", whole, formula)
    elif residency.startswith("host"):
        yield MemoryItem("Δ", whole, f"{formula}, page-locked", on_host=True)
    if residency != "device":
        ahead = min(PREFETCH_NBYTES, itemsize * share)
        yield MemoryItem("Δ on its way", ahead, "prefetch=1GB, or Δ")
