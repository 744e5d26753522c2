"""What is compared: methods, what each may tune, and the regimes in which they are compared.

Owns names, labels and search spaces; trains nothing. Invariant: every tuned method of a regime has
the same number of trials, or twice as many where that favours the rivals of injection, drawn from
its space by a seed of its names alone; a control takes the settings of the method it controls, so
that only its Δ differs.
"""

from __future__ import annotations

import itertools
import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Final, Literal

import numpy as np

from drift_fast.demo.experiment import Prior

Way = Literal["as is", "merge", "train"]
Control = Literal["shuffled", "unrelated", "reversed"]
Family = Literal["reference", "merge", "merge, then SFT", "injection", "motion", "control"]


@dataclass(frozen=True, kw_only=True)
class Interval:
    """Numbers between two bounds, evenly or by their logarithms."""

    low: float
    high: float
    log: bool = False

    def at(self, share: float) -> float:
        """Return the number at a share of the way, to three significant digits."""
        if self.log:
            value = math.exp(math.log(self.low) + share * math.log(self.high / self.low))
        else:
            value = self.low + share * (self.high - self.low)
        return float(f"{value:.3g}")


Space = Mapping[str, Interval | tuple[Any, ...]]


@dataclass(frozen=True, kw_only=True)
class Method:
    """One way to make a multimodal model reason.

    `prior` names what is subtracted from the expert. `merge` is a method of `drift_fast.merge`,
    applied before training if there is any. `options` are those of `drift_fast.attach`. `like` is
    the method whose trials settle the settings, and `chosen_by` what of them is best.
    """

    label: str
    family: Family
    way: Way = "train"
    prior: Prior | None = None
    merge: str | None = None
    injects: bool = False
    moves: bool = False
    options: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    space: Space = field(default_factory=lambda: MappingProxyType({}))
    control: Control | None = None
    like: str | None = None
    chosen_by: Literal["answers", "answers and digits"] = "answers"


# The learning rate's range is the same for every method but SFT, whose best rate was the lowest in
# the demo's trials, and whose range therefore reaches further down.
_LR: Final = Interval(low=1e-4, high=2e-3, log=True)
_LR_SFT: Final = Interval(low=2e-5, high=2e-3, log=True)
_ATTN: Final = Interval(low=0.2, high=1.2)
_MLP: Final = Interval(low=0.3, high=1.6)
_ALPHA: Final = Interval(low=0.1, high=2.0, log=True)
_MODULES: Final = ("attn,mlp", "all")
# By logarithm: without fine-tuning, a tenth of Δ may already be too much.
_WEIGHT: Final = Interval(low=0.02, high=1.2, log=True)

METHODS: Final[dict[str, Method]] = {
    "as_is": Method(label="multimodal model as is", family="reference", way="as is"),
    "sft": Method(label="SFT", family="reference", space={"lr": _LR_SFT}),
}


def _add_merges() -> None:
    dropped: Space = {"weight": _WEIGHT, "density": Interval(low=0.2, high=0.9)}
    # These average what agrees in sign, so that 1 is not the multimodal model's natural weight.
    elected: Space = {**dropped, "multimodal_weight": Interval(low=0.6, high=2.0)}
    for name, label, space in (
        ("linear", "linear (BR2V)", {"weight": _WEIGHT}),
        ("task_arithmetic", "task arithmetic", {"weight": _WEIGHT}),
        ("ties", "TIES", elected),
        ("dare_linear", "DARE-linear", dropped),
        ("dare_ties", "DARE-TIES", elected),
        ("slerp", "SLERP", {"weight": Interval(low=0.02, high=0.95, log=True)}),
    ):
        METHODS[name] = Method(
            label=f"merge: {label}",
            family="merge",
            way="merge",
            prior="multimodal" if name in ("linear", "slerp") else "base",
            merge=name,
            space={**space, "modules": _MODULES},
        )
    METHODS["layer_swap"] = Method(
        label="merge: layer swap",
        family="merge",
        way="merge",
        prior="multimodal",
        merge="layer_swap",
        space={"keep_layers": (1, 2, 3), "modules": _MODULES},
    )
    two: Space = {"lr": _LR, "attn": _ATTN, "mlp": _MLP}
    METHODS["merge_sft"] = Method(
        label="merge, then SFT: one λ",
        family="merge, then SFT",
        prior="base",
        merge="task_arithmetic",
        space={"lr": _LR, "weight": Interval(low=0.2, high=1.6)},
    )
    METHODS["merge_sft_two"] = Method(
        label="merge, then SFT: λ of attention and of MLP",
        family="merge, then SFT",
        prior="base",
        merge="task_arithmetic",
        space=two,
    )
    METHODS["merge_sft_mm"] = Method(
        label="merge, then SFT: λ of attention and of MLP",
        family="merge, then SFT",
        prior="multimodal",
        merge="linear",
        space=two,
    )


def _add_injections() -> None:
    adaptive: Space = {"lr": _LR, "alpha": _ALPHA}
    wide: Space = {"lr": _LR, "alpha": Interval(low=0.3, high=4.0, log=True)}
    capped: Space = {**wide, "attn": _ATTN, "mlp": _MLP}
    for suffix, prior in (("", "multimodal"), ("_base", "base")):
        for name, label, space, options in (
            ("", "DRIFT adaptive", adaptive, {}),
            ("_gradnorm", "DRIFT grad-norm", adaptive, {"scale": "gradnorm"}),
            (
                "_absolute",
                "DRIFT absolute",
                {"lr": _LR, "alpha": Interval(low=3e-3, high=3.0, log=True)},
                {"scale": "absolute"},
            ),
            ("_attn", "DRIFT adaptive, attention only", adaptive, {"modules": "attn"}),
            ("_mlp", "DRIFT adaptive, MLP only", adaptive, {"modules": "mlp"}),
            ("_window", "DRIFT adaptive, first 30 %", wide, {"schedule": "window(0, 0.3)"}),
            ("_cap", "DRIFT adaptive, capped λ", capped, {}),
        ):
            METHODS[f"drift{suffix}{name}"] = Method(
                label=label,
                family="injection",
                prior=prior,
                injects=True,
                options=MappingProxyType(options),
                space=space,
            )
        METHODS[f"motion{suffix}"] = Method(
            label="planned motion, first 10 %",
            family="motion",
            prior=prior,
            moves=True,
            space={"lr": _LR, "attn": _ATTN, "mlp": _MLP},
        )


def _add_dependents() -> None:
    """Add what takes another method's settings: controls, and the other choice among trials."""
    controls: tuple[Control, ...] = ("shuffled", "unrelated", "reversed")
    for name in ("drift", "drift_base", "motion_base"):
        for control in controls:
            _like(name, control, control=control, family="control")
    # A merge needs checkpoints, which a shuffled or a reversed Δ does not have.
    _like("merge_sft_two", "unrelated", control="unrelated", family="control")
    for name in ("sft", "drift", "drift_base", "drift_base_cap", "merge_sft_two", "motion_base"):
        _like(name, "balanced", chosen_by="answers and digits")
    # Whether a motion differs from the merge that it resembles by what it does, or by its tuning.
    for name in ("merge_sft_two", "merge_sft_mm"):
        METHODS[f"{name}_as_motion"] = replace(
            METHODS[name],
            label="merge, then SFT: settings of planned motion",
            like="motion_base",
        )


def _like(name: str, suffix: str, **changes: Any) -> None:
    told = f"{changes['control']} Δ" if "control" in changes else "tuned for answers and digits"
    values = {key: getattr(METHODS[name], key) for key in Method.__dataclass_fields__}
    values |= {"label": f"{METHODS[name].label}, {told}", "like": name, **changes}
    METHODS[f"{name}_{suffix}"] = Method(**values)


_add_merges()
_add_injections()
_add_dependents()


@dataclass(frozen=True, kw_only=True)
class Regime:
    """Circumstances in which methods are compared.

    `expert` and `base` are the checkpoints that Δ is made of; `ranges` replaces those of the search
    spaces by name, `samples` and `steps` what the protocol says. Methods that have any of `again`
    in their space are tried as often again, over these ranges. `worlds` is how many of the test
    worlds it is tested on at most. The methods are in the order of the tables.
    """

    label: str
    methods: tuple[str, ...]
    expert: str = "expert"
    base: str = "base"
    lora: bool = False
    vision: bool = False
    samples: int | None = None
    steps: int | None = None
    ranges: Mapping[str, Interval] = field(default_factory=lambda: MappingProxyType({}))
    again: Mapping[str, Interval] = field(default_factory=lambda: MappingProxyType({}))
    worlds: int = 6


_TELLING: Final = (
    "as_is",
    "sft",
    "linear",
    "task_arithmetic",
    "merge_sft_two",
    "merge_sft_mm",
    "drift",
    "drift_base",
    "drift_base_window",
    "drift_base_cap",
    "motion_base",
    "drift_base_shuffled",
    "drift_base_unrelated",
    "drift_base_reversed",
    "motion_base_unrelated",
)
_SMALL: Final = Interval(low=0.01, high=1.2, log=True)

REGIMES: Final[dict[str, Regime]] = {
    "main": Regime(
        label="an expert and a multimodal model from one base, all of the backbone trained",
        methods=tuple(METHODS),
    ),
    "strong": Regime(
        label="a large Δ: the expert was trained longer and at a larger rate",
        methods=(*_TELLING, "merge_sft_two_as_motion", "merge_sft_mm_as_motion"),
        expert="strong",
        ranges={"weight": _SMALL, "attn": _SMALL, "mlp": _SMALL},
        # Of eight trials by logarithm only one had both λ above a half, and it had a small rate:
        # what states λ would have lost to what does not for want of trials.
        again={"attn": _ATTN, "mlp": _MLP},
    ),
    "large": Regime(
        label="a large Δ and a small learning rate, which can move weights by little of it",
        methods=_TELLING,
        expert="strong",
        ranges={
            "lr": Interval(low=1e-5, high=1e-4, log=True),
            "weight": _SMALL,
            "attn": _SMALL,
            "mlp": _SMALL,
        },
    ),
    "lora": Regime(
        label="LoRA of rank 16 on attention and MLP",
        # A planned motion moves weights that train, and beside an adapter they are frozen.
        methods=tuple(name for name in _TELLING if not name.startswith("motion")),
        lora=True,
        ranges={"lr": Interval(low=5e-4, high=1e-2, log=True)},
    ),
    "vision": Regime(label="the vision tower trained too", methods=_TELLING, vision=True),
    "sibling": Regime(
        label="an expert continued from another base, which was continued from the common one",
        methods=_TELLING,
        expert="sibling",
        base="sibling_base",
        # Two checkpoints more in every world.
        worlds=4,
    ),
    "foreign": Regime(
        label="an expert and its base from other initial weights",
        methods=_TELLING,
        expert="foreign",
        base="foreign_base",
        worlds=4,
    ),
    "more": Regime(
        label="four times the samples and twice the steps",
        methods=(
            "as_is",
            "sft",
            "merge_sft_two",
            "drift",
            "drift_base",
            "drift_base_cap",
            "motion_base",
            "drift_base_shuffled",
        ),
        samples=1024,
        steps=400,
    ),
}


def space_of(regime: str, method: str) -> Space:
    """Return what a method may tune in a regime."""
    return _narrowed(method, REGIMES[regime].ranges)


def _narrowed(method: str, ranges: Mapping[str, Interval]) -> Space:
    return {name: ranges.get(name, values) for name, values in METHODS[method].space.items()}


def tuned(regime: str) -> list[str]:
    """Return the methods of a regime that have trials of their own."""
    return [
        name
        for name in REGIMES[regime].methods
        if METHODS[name].like is None and METHODS[name].space
    ]


def trials(regime: str, method: str, count: int) -> list[dict[str, Any]]:
    """Return the settings to try: all there are, or `count` drawn by a Latin hypercube.

    Twice as many where the regime says so (`Regime.again`).
    """
    found = _drawn(space_of(regime, method), count, 0)
    again = REGIMES[regime].again
    if again.keys() & METHODS[method].space.keys():
        found += _drawn(_narrowed(method, again), count, 1)
    return found


def _drawn(space: Space, count: int, draw: int) -> list[dict[str, Any]]:
    """Return one draw of `count` settings, or all if the space has no interval.

    Every setting's range is cut into `count` equal shares, one trial in each, so that no method's
    luck is a clump of trials. The draw depends on the space alone: methods with equal spaces
    are tried at equal settings.
    """
    if all(isinstance(values, tuple) for values in space.values()):
        combinations = itertools.product(*space.values())
        return [dict(zip(space, values, strict=True)) for values in combinations][:count]
    columns = {}
    for name, values in space.items():
        seed = [zlib.crc32(name.encode()), len(space), count]
        generator = np.random.default_rng([*seed, draw] if draw else seed)
        shares = (generator.permutation(count) + 0.5) / count
        if isinstance(values, tuple):
            columns[name] = [values[int(share * len(values))] for share in shares]
        else:
            columns[name] = [values.at(share) for share in shares]
    return [{name: column[i] for name, column in columns.items()} for i in range(count)]
