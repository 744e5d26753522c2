"""LoRA adapters of PEFT: which factors train in place of a weight, and what cannot be followed.

Owns what is known of PEFT's layers; knows nothing of Δ. A layer computes with
W = W₀ + Σ s·B·A over its active adapters, whatever W₀ is stored as, and with DoRA each row of that
has a trained length. Every other way of adapting a weight is refused by name.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from drift_fast.inject.shards.dtensor import is_fsdp2
from drift_fast.inject.shards.fsdp1 import is_fsdp1, unwrapped

# Why a tensor of the delta is left out of an injection into a model with adapters.
FROZEN_BIAS = "a frozen bias beside an adapted weight: LoRA trains no biases unless asked to"
FROZEN = "frozen: no adapter trains it"


@dataclass(frozen=True)
class Factors:
    """One adapter of one weight: W += s·B·A, with A of shape [rank, in] and B of [out, rank].

    For a weight of several experts, A is [experts·rank, in] and B is [out, rank·experts]; in B the
    expert is the fastest index. The magnitude [out] is that of a DoRA (lora/dora.py).
    """

    a: nn.Parameter
    b: nn.Parameter
    rank: int
    adapter: str
    scalings: Mapping[str, float]
    magnitude: nn.Parameter | None = None

    @property
    def parameters(self) -> tuple[nn.Parameter, ...]:
        """A, B and, of a DoRA, the magnitude."""
        return (self.a, self.b, *(() if self.magnitude is None else (self.magnitude,)))

    @property
    def scaling(self) -> float:
        """Return s as it is now; PEFT lets it be set between steps."""
        return float(self.scalings[self.adapter])


@dataclass(frozen=True)
class Adapted:
    """A weight of shape [out, in], or [in, out] if `transposed`, that moves through its factors.

    A weight of several experts has one more dimension in front, and factors of its own for each.
    """

    factors: tuple[Factors, ...]
    shape: tuple[int, ...]
    transposed: bool
    trained: tuple[nn.Parameter, ...]
    layer: Any = field(compare=False, repr=False)
    # Which adapters of the layer were active when it was looked at.
    active: tuple[str, ...] = ()

    def changed(self) -> str:
        """Return why the layer does not compute with these factors any longer, or nothing."""
        active = tuple(self.layer.active_adapters)
        if active != self.active:
            return (
                f"its active adapters were {list(self.active)} when the injection was attached and "
                f"are {list(active)} now; call set_adapter(…) before attaching, or remove() the "
                "injection and attach again"
            )
        return _out_of_use(self.layer)

    @functools.cached_property
    def parameters(self) -> tuple[nn.Parameter, ...]:
        """A and B of every adapter, or those and the magnitude of a DoRA; trained or not."""
        return tuple(p for one in self.factors for p in one.parameters)

    @functools.cached_property
    def experts(self) -> int:
        """How many matrices the weight is made of."""
        return math.prod(self.shape[:-2])

    @functools.cached_property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shapes of `parameters` before any sharding."""
        height, width = self.shape[-2:][:: -1 if self.transposed else 1]
        shapes: list[tuple[int, ...]] = []
        for one in self.factors:
            rank = self.experts * one.rank
            shapes += [(rank, width), (height, rank)]
            if one.magnitude is not None:
                shapes.append((height,))
        return tuple(shapes)

    def of_trained(self, parts: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Return the parts that belong to trained parameters, flat, of one for each parameter."""
        trained = {id(parameter) for parameter in self.trained}
        return [
            part.view(-1)
            for parameter, part in zip(self.parameters, parts, strict=True)
            if id(parameter) in trained
        ]

    @property
    def is_dora(self) -> bool:
        """Whether each row has a trained magnitude."""
        return any(one.magnitude is not None for one in self.factors)

    @property
    def beside(self) -> tuple[nn.Parameter, ...]:
        """What Δ̃ takes beside `parameters`: W₀ [out, in] of a DoRA, whole or sharded."""
        return (self.layer.get_base_layer().weight,) if self.is_dora else ()


@dataclass
class Adapters:
    """A model's adapters, by the names that its parameters have without them."""

    # What can be injected into, or why it cannot.
    weights: dict[str, Adapted | str] = field(default_factory=dict)
    runtime: dict[str, str] = field(default_factory=dict)
    # Parameters that no tensor of a delta belongs to.
    aside: dict[str, str] = field(default_factory=dict)
    _dropped: set[str] = field(default_factory=set)

    def bare(self, name: str) -> str:
        """Return a parameter's name as it is without adapters."""
        parts = name.split(".")
        paths = (".".join(parts[: at + 1]) for at in range(len(parts)))
        return ".".join(
            part for part, path in zip(parts, paths, strict=True) if path not in self._dropped
        )

    def frozen_bias(self, name: str) -> bool:
        """Whether a parameter, by its bare name, is the bias of an adapted weight."""
        module, _, kind = name.rpartition(".")
        return kind == "bias" and f"{module}.weight" in self.weights


def adapters_of(model: nn.Module) -> Adapters:
    """Return the adapters that PEFT has put into a model; none if it has put none."""
    found = Adapters()
    if "peft" not in sys.modules:
        # Its layers could not be there.
        return found
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import ModulesToSaveWrapper

    modules = list(model.named_modules(remove_duplicate=False))
    refusal = _model_refusal(module for _, module in modules)
    owners: dict[int, int] = {}
    for path, module in modules:
        if isinstance(module, ModulesToSaveWrapper):
            _add_copies(found, path, module)
        elif isinstance(module, BaseTunerLayer):
            _add_layer(found, path, module, refusal, owners)
    return found


def stored_shape(parameter: nn.Parameter, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of the weight that a parameter holds, packed into 4 bits or not."""
    state: Any = getattr(parameter, "quant_state", None)
    return shape if state is None else tuple(state.shape)


def _model_refusal(modules: Iterator[nn.Module]) -> str:
    """Return why no adapter of this model can be followed, or nothing."""
    for module in modules:
        kind = type(module)
        if kind.__module__.startswith("peft.tuners.xlora"):
            return "X-LoRA scales its adapters for each token, so there is no single weight"
    return ""


def _add_copies(found: Adapters, path: str, module: Any) -> None:
    """Let the copy that trains take the place of the module itself."""
    active = [name for name in module.active_adapters if name in module.modules_to_save]
    if module.disable_adapters or not active:
        active = []
        found._dropped.add(f"{path}.original_module")
    else:
        found._dropped |= {f"{path}.modules_to_save", f"{path}.modules_to_save.{active[0]}"}
        for name, _ in module.original_module.named_parameters(f"{path}.original_module"):
            found.aside[name] = "the frozen original of a module that trains as a copy"
    for adapter, copy in module.modules_to_save.items():
        if [adapter] != active[:1]:
            for name, _ in copy.named_parameters(f"{path}.modules_to_save.{adapter}"):
                found.aside[name] = f"the copy of the adapter {adapter}, which is not active"


def _add_layer(
    found: Adapters, path: str, module: Any, refusal: str, owners: dict[int, int]
) -> None:
    base, inner = path, module
    while hasattr(inner, "base_layer"):
        base, inner = f"{base}.base_layer", inner.base_layer
        found._dropped.add(base)
        if is_fsdp1(inner):
            base, inner = f"{base}._fsdp_wrapped_module", unwrapped(inner)
            found._dropped.add(base)
    if path.endswith(".token_adapter"):
        found._dropped.add(path)
    for name, _ in module.named_parameters(path, remove_duplicate=False):
        if not name.startswith(f"{path}.base_layer."):
            found.aside[name] = "a part of an adapter"
    weight = f"{base}.{getattr(module, 'parameter_name', 'weight')}"
    name = found.bare(weight)
    adapted = refusal or _follow(module, inner)
    # A module may go by several names, but a factor belongs to one module.
    if isinstance(adapted, Adapted) and any(
        owners.setdefault(id(factor), id(module)) != id(module) for factor in adapted.trained
    ):
        adapted = "it shares a factor with another layer, so both would push it"
    if name in found.weights:
        adapted = _nested(found.weights[name], adapted)
    found.weights[name] = adapted
    found.runtime[name] = weight


def _nested(outer: Adapted | str, inner: Adapted | str) -> str:
    """Return why a weight inside two layers of adapters cannot be followed."""
    refused = next((one for one in (outer, inner) if isinstance(one, str)), None)
    return refused or "it is inside two adapters, one within the other; use one LoraConfig for it"


def _follow(module: Any, base: Any) -> Adapted | str:
    """Return a layer's factors, or why Δ cannot be pulled back onto them."""
    factors = _active_factors(module)
    if isinstance(factors, str):
        return factors
    trained = tuple(p for one in factors for p in one.parameters if p.requires_grad)
    if not trained:
        return (
            "none of its adapters is active and trained; load adapters with is_trainable=True, "
            "choose with set_adapter(…), or leave it out with modules=… or layers=…"
        )
    own = getattr(module, "parameter_name", None)
    beside = (p for name, p in base.named_parameters() if name != "bias" and own in (None, name))
    if any(p.requires_grad for p in beside):
        return "the weight trains beside its adapters; freeze one of them"
    kept = tuple(one for one in factors if any(p.requires_grad for p in one.parameters))
    transposed = _is_transposed(module)
    shape = _stored_shape(module, transposed=transposed)
    return Adapted(kept, shape, transposed, trained, module, tuple(module.active_adapters))


def _active_factors(module: Any) -> list[Factors] | str:
    """Return the factors of a layer's active adapters, or why Δ cannot be pulled back to them."""
    from peft.tuners.lora import LoraLayer

    kind = type(module)
    package = kind.__module__.split(".")
    if not issubclass(kind, LoraLayer) or package[:3] != ["peft", "tuners", "lora"]:
        tuner = package[2] if package[:2] == ["peft", "tuners"] else kind.__module__
        if tuner == "trainable_tokens":
            return (
                "of this weight only the rows of trainable_token_indices train; leave it out with "
                "modules=…, or list it in modules_to_save of the LoraConfig to train all of it"
            )
        return (
            f"its adapter is {kind.__name__} of {tuner}, not a sum W₀ + s·B·A; use LoRA "
            "(peft.LoraConfig) for it, or leave it out with modules=… or layers=…"
        )
    if unused := _out_of_use(module):
        return unused
    tables = _tables(module)
    if tables is None:
        return (
            f"its adapter is a {kind.__name__}, and only adapters of linear layers and embeddings "
            "can be injected into; leave it out with modules=…"
        )
    a_of, b_of = tables
    factors = []
    for adapter in module.active_adapters:
        if adapter not in a_of:
            continue
        variant, magnitude = _variant(module, adapter), None
        if variant == "DoRA":
            if why := _why_no_dora(module):
                return (
                    f"the adapter {adapter} is a DoRA {why}; train with use_dora=False, or leave "
                    "it out with modules=…"
                )
            magnitude = module.lora_magnitude_vector[adapter].weight
        elif variant:
            return f"the adapter {adapter} is of the variant {variant}; use plain LoRA"
        rank = int(module.r[adapter])
        factors.append(
            Factors(a_of[adapter], b_of[adapter], rank, adapter, module.scaling, magnitude)
        )
    return factors


def _why_no_dora(module: Any) -> str:
    """Return of what a DoRA cannot be followed, or nothing."""
    base = module.get_base_layer()
    weight = getattr(base, "weight", None)
    # ZeRO-3 may hold frozen weights as codes.
    weight = getattr(weight, "ds_tensor", weight)
    if len(module.active_adapters) > 1:
        return "beside another active adapter"
    if _is_transposed(module):
        return "of an embedding or a transposed weight"
    if weight is None or not weight.is_floating_point() or hasattr(weight, "quant_state"):
        return "of a quantized weight, whose rows have norms that only the quantizer knows"
    if is_fsdp2(base) or any(map(is_fsdp1, (base, *module.lora_A.values()))):
        return (
            "whose weight or A is wrapped by FSDP on its own, where PEFT, which reads both from "
            "outside, cannot train it: wrap whole decoder layers (fully_shard(layer), or FSDP1's "
            "ModuleWrapPolicy of their class)"
        )
    return ""


def _out_of_use(module: Any) -> str:
    """Return why a layer does not compute with its adapters, or nothing."""
    if module.merged:
        return "its adapter is merged into the weight; call unmerge_adapter() first"
    if module.disable_adapters:
        return "its adapters are disabled; call enable_adapter_layers() first"
    return ""


def _tables(module: Any) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """Return A and B by adapter, None for layers of other factors."""
    if _is_embedding(module):
        return dict(module.lora_embedding_A), dict(module.lora_embedding_B)
    a, b = (
        {adapter: unwrapped(layer) for adapter, layer in table.items()}
        for table in (module.lora_A, module.lora_B)
    )
    plain = all(isinstance(layer, nn.Linear) for layer in (*a.values(), *b.values()))
    if not plain or type(module).__name__ == "MultiheadAttention":
        return None
    return {key: layer.weight for key, layer in a.items()}, {
        key: layer.weight for key, layer in b.items()
    }


def _stored_shape(module: Any, *, transposed: bool) -> tuple[int, ...]:
    height, width = module.out_features, module.in_features
    experts = (module.num_experts,) if _is_stacked(module) else ()
    return (*experts, width, height) if transposed else (*experts, height, width)


def _is_stacked(module: Any) -> bool:
    """Whether this is a parameter [experts, …], which PEFT adapts by `target_parameters`."""
    experts = getattr(module, "num_experts", 0)
    return experts > 0 and getattr(module, "_param_ndim", 3 if experts > 1 else 2) == 3


def _is_embedding(module: Any) -> bool:
    return len(module.lora_embedding_A) > 0


def _is_transposed(module: Any) -> bool:
    """Whether the weight is stored as [in, out]; an embedding's rows are its inputs.

    What PEFT calls the features of stacked experts it swaps where they are stored as [out, in].
    """
    if _is_stacked(module):
        return not module._did_swap_in_out_features
    return _is_embedding(module) or bool(getattr(module, "fan_in_fan_out", False))


def _variant(module: Any, adapter: str) -> str:
    """Return the name of what makes an adapter more than B·A, or nothing."""
    if module.use_dora.get(adapter):
        return "DoRA"
    variant = getattr(module, "lora_variant", {}).get(adapter)
    return "" if variant is None else type(variant).__name__
