"""How many parameters a model has, by kind: from its headers, or from config.json alone.

Owns the choice between the two. Headers come first: they describe what is on disk, whatever wrote
it, and need neither torch nor transformers. If there is only a config.json, transformers builds the
model on the meta device, without elements. There is no table of architectures, which would be wrong
for the next one. Invariant: a tied head is counted once, as embedding.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from drift_fast.checkpoints.config_json import Configuration, Section
from drift_fast.checkpoints.opened import PathLike, open_checkpoint
from drift_fast.errors import CheckpointError, DriftError
from drift_fast.names import is_other_modality, kind_of, layer_of
from drift_fast.paths import local_path
from drift_fast.planner.training import Training
from drift_fast.preflight.fact import Fact
from drift_fast.preflight.facts import describe
from drift_fast.preflight.headers import read_headers
from drift_fast.selection import Selection

VISION = "vision tower and projector"
OTHER = "other language parameters"
# What adapters are planned on, as `lora_target: all` and PEFT's "all-linear" have it.
ADAPTED = ("attn", "mlp")
KINDS = ("attn", "mlp", "norm", "embed", "head", OTHER, VISION)

HEADERS = "headers"
CONFIGURATION = "configuration"

# One of several routed experts. A shared expert, which every token uses, does not match.
_ROUTED = re.compile(r"(^|\.)experts(\.|$)")
_NBITS = {"F64": 64, "F32": 32, "BF16": 16, "F16": 16, "F8_E4M3": 8, "F8_E5M2": 8, "I8": 8, "U8": 8}
_LAYERS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "depth")
_MOST_LAYERS = 2_000
_STATED = {"float64": "F64", "float32": "F32", "bfloat16": "BF16", "float16": "F16"}


@dataclass(frozen=True)
class Model:
    """The tensors of one model, and what its configuration says about the language backbone.

    `origin` says where shapes come from. `dtypes` are the stored ones or, for a model without
    weights, those that config.json states.
    """

    given: str
    origin: str
    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, str]
    facts: Mapping[str, Fact]
    configuration: Configuration

    @property
    def source(self) -> str:
        if self.origin == HEADERS:
            return f"headers of {self.given}"
        return f"config.json of {self.given}, built by transformers on the meta device"

    def by_kind(self) -> dict[str, int]:
        """Return elements by kind."""
        found = dict.fromkeys(KINDS, 0)
        for name, shape in self.shapes.items():
            found[self.kind(name)] += math.prod(shape)
        return found

    @staticmethod
    def kind(name: str) -> str:
        if is_other_modality(name):
            return VISION
        kind = kind_of(name)
        return OTHER if kind == "other" else kind

    def selected(self, selection: Selection) -> list[str]:
        return [name for name in self.shapes if name in selection and not is_other_modality(name)]

    def numel(self, names: list[str] | None = None) -> int:
        """Return the number of elements of all tensors or of some."""
        return sum(
            math.prod(self.shapes[name]) for name in (self.shapes if names is None else names)
        )

    def factors_numel(self, rank: int, *, active: bool = False) -> int:
        """Return the elements of LoRA's factors on every matrix of attention and MLP.

        active: count routed experts by the share of them that a token uses.
        """
        found = {
            name: rank * math.prod(shape[:-2]) * (shape[-2] + shape[-1])
            for name, shape in self.shapes.items()
            if len(shape) > 1 and self.kind(name) in ADAPTED
        }
        routed = sum(numel for name, numel in found.items() if _ROUTED.search(name))
        return sum(found.values()) - (round(routed * self._idle_share()) if active else 0)

    def _idle_share(self) -> float:
        """Return the share of the routed experts that a token does not use."""
        experts, chosen = self.size("experts"), self.size("experts per token")
        return 1 - chosen / experts if experts and chosen else 0.0

    def trained_numel(self, training: Training) -> int:
        """Return how many elements a run trains."""
        if training.lora_rank:
            return self.factors_numel(training.lora_rank)
        frozen = self.by_kind()[VISION] if training.trained == "language" else 0
        return self.numel() - frozen

    def nbytes(self, names: list[str] | None = None) -> int:
        """Return the stored bytes of all tensors or of some."""
        kept = self.shapes if names is None else names
        return sum(
            math.prod(self.shapes[name]) * _NBITS.get(self.dtypes[name], 8) // 8 for name in kept
        )

    def active_numel(self) -> int:
        """Return the language elements that each token is multiplied with.

        The embedding is a look-up and does not count, unless it is also the head. Routed experts
        count by the share of them that a token uses.
        """
        kinds = self.by_kind()
        total = sum(kinds.values()) - kinds[VISION] - (kinds["embed"] if kinds["head"] else 0)
        routed = sum(
            math.prod(shape)
            for name, shape in self.shapes.items()
            if _ROUTED.search(name) and not is_other_modality(name)
        )
        return total - round(routed * self._idle_share())

    def size(self, subject: str) -> int | None:
        """Return a fact that is a single number."""
        value = self.facts[subject].value
        return value if isinstance(value, int) and not isinstance(value, bool) else None

    def layer_numel(self) -> int:
        """Return the elements of the largest layer of the language backbone."""
        layers: dict[int, int] = {}
        for name, shape in self.shapes.items():
            layer = layer_of(name)
            if layer is not None and not is_other_modality(name):
                layers[layer] = layers.get(layer, 0) + math.prod(shape)
        return max(layers.values(), default=0)

    def outside_numel(self) -> int:
        """Return the elements outside the layers: embedding, head, last norm."""
        return sum(
            math.prod(shape) for name, shape in self.shapes.items() if layer_of(name) is None
        )


def read_model(given: PathLike) -> Model:
    """Read a checkpoint's headers, or the config.json of a directory without weights.

    Raises:
        FileNotFoundError, CheckpointError: neither exists, or it is invalid.
        DriftError: there is only a config.json, and transformers cannot build the model from it.
    """
    path = local_path(given)
    path = path.parent if path.name == "config.json" else path
    if (path / "config.json").is_file() and not any(path.glob("*.safetensors*")):
        return _from_configuration(path)
    opened = open_checkpoint(given)
    configuration = Configuration.read(opened.directory)
    headers = read_headers(opened.shapes, opened.dtypes)
    facts = describe(configuration, headers).facts
    return Model(str(given), HEADERS, opened.shapes, opened.dtypes, facts, configuration)


def _from_configuration(path: Path) -> Model:
    configuration = Configuration.read(path)
    _check_layers(path, configuration.around[-1])
    shapes = _meta_shapes(path)
    stated = configuration.anywhere(lambda part: part.text("dtype", "torch_dtype")) or "bfloat16"
    dtype = _STATED.get(stated.removeprefix("torch."), "BF16")
    dtypes = dict.fromkeys(shapes, dtype)
    facts = describe(configuration, read_headers(shapes, dtypes)).facts
    return Model(str(path), CONFIGURATION, shapes, dtypes, facts, configuration)


def _check_layers(path: Path, section: Section) -> None:
    """Refuse more layers than any model has: each would be built from an untrusted config.json."""
    for key in _LAYERS:
        stated = section.size(key, needed=True)
        found = stated if isinstance(stated, list) else [stated or 0]
        if max(found) > _MOST_LAYERS:
            raise CheckpointError(
                f"{path / 'config.json'}: {section.name + '.' if section.name else ''}{key} must "
                f"be at most {_MOST_LAYERS:,}, found {max(found):,}; correct the entry or download "
                "config.json again"
            )
    for inner in section.sections().values():
        _check_layers(path, inner)


def _meta_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the parameters of the model that transformers builds."""
    try:
        import torch
        import transformers
    except ImportError as error:
        raise DriftError(
            f"{path} has a config.json and no weights: counting its parameters needs "
            "transformers (pip install 'drift-fast[trainer]'); or give a checkpoint, whose headers "
            "are enough"
        ) from error
    try:
        stated: Any = transformers.AutoConfig.from_pretrained(path, trust_remote_code=False)
        auto: Any = transformers.AutoModelForCausalLM
        if type(stated) in transformers.AutoModelForImageTextToText._model_mapping:
            auto = transformers.AutoModelForImageTextToText
        name = next(iter(stated.architectures or ()), None)
        kind = getattr(transformers, name, None) if name else None
        with torch.device("meta"):
            model = auto.from_config(stated) if kind is None else kind._from_config(stated)
        model.tie_weights()
    # Transformers may raise anything if a configuration is wrong or too new.
    except Exception as error:
        raise DriftError(
            f"{path / 'config.json'}: transformers {transformers.__version__} cannot build this "
            f"model ({type(error).__name__}: {str(error).partition(chr(10))[0][:200]}); give a "
            "checkpoint, whose headers are enough"
        ) from error
    return {name: tuple(weight.shape) for name, weight in model.named_parameters()}
