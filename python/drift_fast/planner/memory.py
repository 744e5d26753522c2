"""GPU and host memory of one process, part by part, with the formula of each.

Owns the formulas; all are estimates, and none was measured at 7B. P is all elements, T those that
train, n the number of GPUs. What they leave out: fragmentation beyond the allowance, and what a
framework keeps that is not named here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from drift_fast.planner.counts import VISION, Model
from drift_fast.planner.training import Training

# CUDA's context, kernels, NCCL's buffers, and a little fragmentation.
ALLOWANCE_NBYTES = 2_000_000_000
# What `Injection` keeps on the device of a Δ that lives elsewhere, unless told otherwise.
PREFETCH_NBYTES = 1_000_000_000
# What examples/qwen2_5_vl_7b/zero2.json and zero3.json state, in elements.
BUCKET_NUMEL = 500_000_000
_LIVE_NUMEL = 1_000_000_000
# bitsandbytes keeps one float32 scale for 256 codes.
_STATE_8BIT = 1 + 4 / 256
# 64 int8 codes and one float16 scale.
_DELTA_INT8 = 66 / 64
_DELTA_ITEMSIZE = {"float32": 4}


@dataclass(frozen=True)
class Part:
    """Bytes of one thing, and how they follow."""

    name: str
    nbytes: float
    formula: str
    assumed: bool = False


@dataclass(frozen=True)
class Memory:
    """What one process holds on its GPU and in host memory."""

    device: list[Part]
    host: list[Part]
    residency: str
    why: str

    @property
    def device_nbytes(self) -> int:
        return round(sum(part.nbytes for part in self.device))

    @property
    def host_nbytes(self) -> int:
        return round(sum(part.nbytes for part in self.host))


def estimate(training: Training, model: Model, delta_numel: int, gpu_nbytes: int | None) -> Memory:
    """Return the memory of one process.

    residency "auto" becomes "device", or "host" where Δ does not fit beside the rest of
    `gpu_nbytes`.
    """
    base = list(_states(training, model)) + list(_passes(training, model))
    base.append(Part("CUDA, NCCL, fragmentation", ALLOWANCE_NBYTES, "an allowance", assumed=True))
    device = [part for part in base if not part.name.startswith("host: ")]
    host = [
        Part(part.name.removeprefix("host: "), part.nbytes, part.formula)
        for part in base
        if part.name.startswith("host: ")
    ]
    residency, why = training.residency, "given"
    if residency == "auto":
        residency, why = "device", "auto: beside the gradients"
        left = None if gpu_nbytes is None else gpu_nbytes - sum(part.nbytes for part in device)
        beside = sum(part.nbytes for part in _delta(training, "device", delta_numel))
        if left is not None and beside > left:
            residency, why = "host", "auto: beside the gradients it would not fit"
    for part in _delta(training, residency, delta_numel):
        if part.name.startswith("host: "):
            host.append(Part(part.name.removeprefix("host: "), part.nbytes, part.formula))
        else:
            device.append(part)
    return Memory(device, host, residency, why)


def _states(training: Training, model: Model) -> Iterator[Part]:
    """Yield weights, gradients and the optimizer's states."""
    total = model.numel()
    vision = model.by_kind()[VISION]
    trained = total if training.trained == "all" else total - vision
    frozen = total - trained
    n, sharding = training.gpus, training.sharding
    mixed = training.precision == "bf16-mixed"
    itemsize = 2 if training.precision == "bf16" else 4
    state = {"adamw": 2 * itemsize, "adamw8bit": 2 * _STATE_8BIT, "sgd": 0}[training.optimizer]
    all_host = "host: " if training.offload == "all" else ""
    some_host = "host: " if training.offload != "none" else ""
    if sharding in ("none", "ddp"):
        yield Part("weights", itemsize * total, f"{itemsize}·P")
        if mixed:
            yield Part("bfloat16 copies", 2 * trained, "2·T, which autocast holds until backward")
        yield Part("gradients", itemsize * trained, f"{itemsize}·T")
        if sharding == "ddp" and n > 1:
            yield Part(
                "DDP's buckets", itemsize * trained, f"{itemsize}·T, as the Trainer sets DDP up"
            )
        yield Part("optimizer states", state * trained, f"{state:.3g}·T, {training.optimizer}")
    elif sharding == "fsdp2":
        kept = itemsize * trained + (2 if mixed else itemsize) * frozen
        yield Part(
            f"{all_host}weights", kept / n, f"({itemsize}·T + {2 if mixed else itemsize}·(P−T))/n"
        )
        yield Part(f"{all_host}gradients", itemsize * trained / n, f"{itemsize}·T/n")
        yield Part(
            f"{all_host}optimizer states",
            state * trained / n,
            f"{state:.3g}·T/n, {training.optimizer}",
        )
        wide = 2 if training.precision != "fp32" else 4
        yield Part(
            "gathered weights",
            wide * (2 * model.layer_numel() + model.outside_numel()),
            f"{wide}·(two decoder layers + what lies in no layer)",
        )
    else:
        stage = int(sharding[-1])
        low = 2 if mixed else 4
        share = n if stage == 3 else 1
        yield Part(
            f"{all_host if stage == 3 else ''}weights",
            low * total / share,
            f"{low}·P" + ("/n" if share > 1 else ""),
        )
        if some_host:
            yield Part("host: gradients", 4 * trained / n, "4·T/n")
        else:
            parts = n if stage >= 2 else 1
            yield Part(
                "gradients", low * trained / parts, f"{low}·T" + ("/n" if stage >= 2 else "")
            )
            if mixed:
                yield Part("gradients at the step", 4 * trained / n, "4·T/n, in float32")
        if mixed:
            yield Part(f"{some_host}float32 weights", 4 * trained / n, "4·T/n")
        yield Part(
            f"{some_host}optimizer states",
            state * trained / n,
            f"{state:.3g}·T/n, {training.optimizer}",
        )
        bucket = min(BUCKET_NUMEL, trained)
        if n > 1 or stage == 3:
            yield Part("buckets", 2 * low * bucket, f"2·{low}·{BUCKET_NUMEL:.0e}, or 2·{low}·T")
        if stage == 3:
            live = min(_LIVE_NUMEL, total)
            yield Part("gathered weights", low * live, f"{low}·{_LIVE_NUMEL:.0e}, or {low}·P")


def layer_nbytes_per_token(model: Model, itemsize: int) -> tuple[float, str] | None:
    """Return what backward keeps of one decoder layer for one token, where its sizes are known.

    For a layer as Llama's and Qwen's: RMSNorm in float32, attention that keeps no scores
    (FlashAttention, SDPA), and a gated MLP. h is the hidden size, a heads and k key-value heads
    times their dimension, i the intermediate size (of the experts that a token is sent to), b bytes
    of an element: two norms keep (4 + b)·h each, what they return is read by the projections
    (b·h each), attention keeps b·(2a + 2k), the MLP b·4i.
    """
    hidden, heads = model.size("hidden size"), model.size("attention heads")
    keys, width = model.size("KV heads"), model.size("head dimension")
    inner, b = _inner(model), itemsize
    if hidden is None or heads is None or keys is None or width is None or inner is None:
        return None
    nbytes = 2 * (4 + b) * hidden + 2 * b * hidden + b * (2 * heads + 2 * keys) * width
    return nbytes + 4 * b * inner, f"2·(4+{b})·h + 2·{b}·h + {b}·(2a+2k) + 4·{b}·i"


def _inner(model: Model) -> int | None:
    inner = model.size("intermediate size")
    chosen = model.size("experts per token")
    of_expert = model.configuration.backbone.size("moe_intermediate_size")
    if chosen and isinstance(of_expert, int):
        return chosen * of_expert
    return inner


def _passes(training: Training, model: Model) -> Iterator[Part]:
    """Yield what one forward and backward pass keeps."""
    tokens = training.batch * (training.max_tokens or training.tokens)
    b = 4 if training.precision == "fp32" else 2
    layers, vocabulary = model.size("layers"), model.size("vocabulary size")
    hidden = model.size("hidden size")
    found = layer_nbytes_per_token(model, b)
    if found is not None and layers and hidden:
        of_layer, formula = found
        if training.gradient_checkpointing:
            yield Part(
                "activations",
                tokens * (layers * b * hidden + of_layer),
                f"tokens·({b}·h·layers + one layer of {formula})",
            )
        else:
            yield Part("activations", tokens * layers * of_layer, f"tokens·layers·({formula})")
    if vocabulary:
        yield Part(
            "logits",
            tokens * (b + 12) * vocabulary,
            f"tokens·({b} + 4 + 4 + 4)·vocabulary: logits, in float32, log-probabilities, gradient",
        )


def _delta(training: Training, residency: str, numel: int) -> Iterator[Part]:
    """Yield Δ of one process: its rows under sharding, all of it elsewhere."""
    share = numel / (training.gpus if training.sharded else 1)
    rows = "D/n" if training.sharded else "D"
    itemsize = _DELTA_ITEMSIZE.get(training.dtype, 2)
    int8 = residency.endswith("int8")
    whole = (_DELTA_INT8 if int8 else itemsize) * share
    formula = f"{_DELTA_INT8:.3g}·{rows}" if int8 else f"{itemsize}·{rows}"
    if residency.startswith("device"):
        yield Part("Δ", whole, formula)
    elif residency.startswith("host"):
        yield Part("host: Δ", whole, f"{formula}, page-locked")
    if residency != "device":
        yield Part("Δ on its way", min(PREFETCH_NBYTES, itemsize * share), "prefetch=1GB, or Δ")
