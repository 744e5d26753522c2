"""What is compared, and what each method may tune.

Owns names, labels and search spaces; trains nothing. A control and a protected variant take the
settings of the method they are `like`, so that only their Δ differs.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final, Literal

import numpy as np

Family = Literal["reference", "merge, then SFT", "injection", "motion", "mixed", "control"]
# expert − base, expert − multimodal, and both with the expert of another lineage.
Direction = Literal["R-B", "R-V", "O-B", "O-V", "O-OB"]
Control = Literal["shuffled", "unrelated", "reversed"]


@dataclass(frozen=True)
class Protection:
    """What is taken out of Δ: the span of gradients, per tensor or one of all tensors together.

    `of` says of what: reading samples, the fine-tuning set's own, or random directions.
    """

    directions: int = 3
    of: Literal["reading", "stories", "random"] = "reading"
    span: Literal["each", "one"] = "each"


@dataclass(frozen=True, kw_only=True)
class Method:
    """One way from the multimodal model to one that reasons.

    `merges` adds λ·Δ before training, `injects` and `moves` during it; `options` are those of
    `drift_fast.Injection`. `share` of λ in a mixed method is merged, the rest injected to a cap.
    """

    label: str
    family: Family
    delta: Direction = "R-B"
    merges: bool = False
    injects: bool = False
    moves: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)
    space: Mapping[str, Sequence[float]] = field(default_factory=dict)
    control: Control | None = None
    protection: Protection | None = None
    # How many parts of the run have a protection of their own, measured where the weights are.
    parts: int = 1
    # The first layer whose Δ is used.
    first_layer: int = 0
    # Which layers' λ is larger, in proportion to depth; its mean stays.
    depth: Literal["late", "early"] | None = None
    # How many of the largest directions of multimodal − base each matrix of Δ loses on both sides.
    spared: int = 0
    like: str | None = None
    # What the fine-tuning run itself is like.
    reading: float = 0.0
    lora: bool = False
    dtype: Literal["float32", "bfloat16"] = "float32"

    def trials(self, number: int) -> list[dict[str, float]]:
        """Return so many settings of the space, half as many again for what injection must beat.

        Each value of each setting is tried as often as any other, give or take one.
        """
        if self.family == "merge, then SFT":
            number += number // 2
        grid = list(itertools.product(*self.space.values()))
        rng = np.random.default_rng(sum(map(ord, self.label)))
        rows = set(grid)
        # Columns that hold each value equally often are put in a random order until no row repeats.
        while number < len(grid):
            columns = [
                rng.permutation([values[at % len(values)] for at in range(number)]).tolist()
                for values in self.space.values()
            ]
            rows = set(zip(*columns, strict=True))
            if len(rows) == number:
                break
        return [dict(zip(self.space, row, strict=True)) for row in sorted(rows)]


_RATES: Final = (5e-6, 1e-5, 2e-5, 4e-5, 8e-5, 1.6e-4)
_WEIGHTS: Final = (0.25, 0.5, 0.75, 1.0)
_INJECTION: Final = {"rate": _RATES, "alpha": (0.25, 0.5, 1.0, 2.0, 4.0)}
_CAPPED: Final = {"rate": _RATES, "cap": (0.3, 0.5, 0.7, 0.9)}

METHODS: Final[dict[str, Method]] = {
    "as_is": Method(label="multimodal model as is", family="reference"),
    "sft": Method(label="SFT", family="reference", space={"rate": _RATES}),
    "merge": Method(
        label="merge, then SFT: one λ",
        family="merge, then SFT",
        merges=True,
        space={"rate": _RATES, "weight": _WEIGHTS},
    ),
    "merge_two": Method(
        label="merge, then SFT: λ of attention and of MLP",
        family="merge, then SFT",
        merges=True,
        space={"rate": _RATES, "attn": (0.3, 0.6, 0.9), "mlp": (0.4, 0.7, 1.0)},
    ),
    "merge_rv": Method(
        label="merge, then SFT: one λ",
        family="merge, then SFT",
        delta="R-V",
        merges=True,
        space={"rate": _RATES, "weight": _WEIGHTS},
    ),
    "motion": Method(
        label="planned motion, first 10 %",
        family="motion",
        moves=True,
        space={"rate": _RATES, "weight": _WEIGHTS},
    ),
    "adaptive": Method(label="DRIFT adaptive", family="injection", injects=True, space=_INJECTION),
    "adaptive_rv": Method(
        label="DRIFT adaptive", family="injection", delta="R-V", injects=True, space=_INJECTION
    ),
    "window": Method(
        label="DRIFT adaptive, first 30 %",
        family="injection",
        injects=True,
        options={"schedule": "window(0, 0.3)"},
        space=_INJECTION,
    ),
    "capped": Method(
        label="DRIFT adaptive, capped λ",
        family="injection",
        injects=True,
        options={"alpha": 2.0},
        space=_CAPPED,
    ),
    # At cos(g, Δ) = 0 adaptive is this with half of its α.
    "gradnorm": Method(
        label="DRIFT grad-norm, half of α",
        family="injection",
        injects=True,
        options={"scale": "gradnorm"},
        like="adaptive",
    ),
    "attn": Method(
        label="DRIFT adaptive, attention only",
        family="injection",
        injects=True,
        options={"modules": "attn"},
        like="adaptive",
    ),
    # A merge moves the weights by half of λ, and the injection by the other half.
    "half": Method(
        label="merge half of λ, inject to λ",
        family="mixed",
        merges=True,
        injects=True,
        options={"alpha": 2.0},
        space=_CAPPED,
    ),
}


def _variant(name: str, suffix: str, label: str, **changes: Any) -> None:
    method = METHODS[name]
    METHODS[f"{name}_{suffix}"] = replace(
        method,
        label=f"{method.label}, {label}",
        space={},
        like=method.like or name,
        **changes,
    )


def _add_variants() -> None:
    for name in ("merge", "merge_rv", "motion", "adaptive", "window", "capped", "half"):
        _variant(name, "protected", "Δ protected", protection=Protection())
    _variant(
        "adaptive", "refreshed", "Δ protected anew in each third", protection=Protection(), parts=3
    )
    for name in ("merge", "adaptive"):
        _variant(
            name,
            "deep",
            "Δ protected, without the first ten layers",
            protection=Protection(),
            first_layer=10,
        )
    for control in ("shuffled", "unrelated", "reversed"):
        _variant("adaptive", control, f"{control} Δ", control=control, family="control")
    _variant("merge", "shuffled", "shuffled Δ", control="shuffled", family="control")
    for suffix, label, protection in (
        ("by_stories", "protected by its own set", Protection(of="stories")),
        ("by_random", "protected by random directions", Protection(of="random")),
        ("by_one_span", "protected by one span of all tensors", Protection(span="one")),
        ("by_1", "protected by 1 gradient", Protection(1)),
        ("by_8", "protected by 8 gradients", Protection(8)),
        ("by_32", "protected by 32 gradients", Protection(32)),
    ):
        _variant("merge", suffix, label, protection=protection, family="control")
    for name in ("adaptive", "merge"):
        _variant(name, "ov", "expert of another lineage − multimodal", delta="O-V")
        _variant(name, "oob", "expert of another lineage − its base", delta="O-OB")
    # What reading in the set saves, other settings can use: these are tuned for themselves.
    for name in ("sft", "merge", "adaptive", "window", "motion", "half"):
        METHODS[f"{name}_reading"] = replace(
            METHODS[name], label=f"{METHODS[name].label}, a quarter of reading", reading=0.25
        )
    for name in ("merge", "adaptive"):
        _variant(f"{name}_reading", "shuffled", "shuffled Δ", control="shuffled", family="control")
    for name in ("merge", "adaptive", "half"):
        _variant(f"{name}_reading", "protected", "Δ protected", protection=Protection())
    for depth in ("late", "early"):
        _variant("merge_reading", depth, f"{depth} layers more", depth=depth)
    _variant("merge_reading", "spared", "without what seeing moved most", spared=32)
    for name in ("sft", "adaptive"):
        _variant(name, "bf16", "bfloat16 weights", dtype="bfloat16")
    for name in ("sft", "merge", "adaptive"):
        METHODS[f"{name}_lora"] = replace(
            METHODS[name],
            label=f"{METHODS[name].label}, LoRA",
            lora=True,
            space={
                **METHODS[name].space,
                "rate": (1e-4, 3e-4, 1e-3),
                **({"alpha": (0.5, 2.0, 8.0)} if name == "adaptive" else {}),
            },
        )


_add_variants()
