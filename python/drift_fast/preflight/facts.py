"""What a model says of itself, in config.json and in its headers, as facts that can be compared.

Owns the spellings of transformers 4 and 5 and where each value comes from: stated, read off the
headers, a default of transformers, or not stated at all. Nothing is guessed and no weight is read.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from drift_fast.checkpoints.config_json import Configuration, Section
from drift_fast.config_files import printable
from drift_fast.names import container_of, kind_of, layer_of

STATED = ""
NOT_STATED = "not stated"
HEADERS = "from the headers"
DEFAULT = "default"
NAMES = "in the names"

# The θ that transformers 5.23 fills in where a configuration has none, if not 10,000.
_THETA = 10_000.0
_GEMMA_THETA = {"full_attention": 1_000_000.0, "sliding_attention": 10_000.0}
_OTHER_THETA: dict[str, float | dict[str, float]] = {
    "cohere": 500_000.0,
    "ernie4_5": 500_000.0,
    "ernie4_5_moe": 500_000.0,
    "ernie4_5_vl_moe_text": 500_000.0,
    "gemma3_text": _GEMMA_THETA,
    "gemma3n_text": _GEMMA_THETA,
    "gpt_oss": 150_000.0,
    "llama4_text": 500_000.0,
    "mixtral": 1_000_000.0,
    "mllama_text_model": 500_000.0,
    "olmo3": 500_000.0,
    "qwen2_5_omni_text": 1_000_000.0,
    "qwen2_5_vl": 1_000_000.0,
    "qwen2_5_vl_text": 1_000_000.0,
    "qwen2_vl": 1_000_000.0,
    "qwen2_vl_text": 1_000_000.0,
    "qwen3_omni_moe_text": 1_000_000.0,
    "qwen3_vl_moe_text": 500_000.0,
    "qwen3_vl_text": 500_000.0,
    "smollm3": 2_000_000.0,
}
# Likewise the share of each head that is rotated, if not all of it.
_OTHER_PARTIAL_ROTARY = {
    "glm": 0.5,
    "glm4": 0.5,
    "glm4_moe": 0.5,
    "glm4v_moe_text": 0.5,
    "nemotron": 0.5,
    "persimmon": 0.5,
    "phi": 0.5,
    "qwen3_5_moe_text": 0.25,
    "qwen3_5_text": 0.25,
    "qwen3_next": 0.25,
    "stablelm": 0.25,
}

# Two names of one function.
_ACTIVATIONS = {"swish": "silu", "gelu_new": "gelu_pytorch_tanh"}
_DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}

_PROJECTION = re.compile(r"(?:^|\.)((?:q|k|v|o|qkv)_proj|mlp\.down_proj)\.(weight|bias)$")
_QK_NORM = re.compile(r"(?:^|\.)(?:q|k|query|key)_(?:layer)?norm\.weight$")
_EXPERT = re.compile(r"\.experts\.(?:(\d+)\.)?")

_EPSILON = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_eps", "norm_epsilon")
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_EXPERTS_PER_TOKEN = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k")

Value = int | float | str | bool | list[int] | Mapping[str, object] | None
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Fact:
    """A value and where it comes from; None where it is stated as none or not stated."""

    value: Value = None
    origin: str = NOT_STATED

    @property
    def known(self) -> bool:
        """Whether there is a value to compare, "none" included."""
        return self.origin != NOT_STATED

    def __str__(self) -> str:
        if not self.known:
            return NOT_STATED
        return _shown(self.value) + (f" ({self.origin})" if self.origin else "")


@dataclass(frozen=True)
class Headers:
    """What the names, dtypes and shapes of one side's language backbone say.

    A dimension is None where the tensors have several, or none that tells.
    """

    layers: int
    dtypes: tuple[str, ...]
    packed: tuple[str, ...]
    biases: tuple[str, ...]
    qk_norm: bool
    experts: int
    hidden: int | None
    intermediate: int | None
    attention: int | None
    key_value: int | None
    head_dimension: int | None
    vocabulary: int | None


@dataclass(frozen=True)
class Description:
    """A model's facts by subject, and what its config.json and its tensors disagree on.

    `stated_layers` and `stated_dtype` are what config.json says, beside what the facts hold.
    """

    facts: dict[str, Fact]
    stated_layers: Value
    stated_dtype: str | None
    conflicts: list[str]


def read_headers(shapes: Shapes, dtypes: Mapping[str, str], paired: Iterable[str] = ()) -> Headers:
    """Read the backbone's facts off a checkpoint's names, dtypes and shapes.

    `paired` are names known to lie in the backbone; without any that lie in a layer, the backbone
    is the container of layers with most elements outside towers and projectors.
    """
    containers = {container_of(name) for name in paired} - {None} or _largest(shapes)
    layers: set[int | None] = set()
    stored: set[str] = set()
    biases: set[str] = set()
    experts: set[int] = set()
    found: dict[str, set[tuple[int, ...]]] = defaultdict(set)
    latent = qk_norm = False
    for name, shape in shapes.items():
        dtype = dtypes[name]
        if kind_of(name) == "embed":
            found["embed"].add(shape)
        if container_of(name) not in containers:
            continue
        layers.add(layer_of(name))
        # Indices and masks are not what weights are packed into.
        if len(shape) > 1 and dtype not in ("I64", "BOOL"):
            stored.add(dtype)
        if expert := _EXPERT.search(name):
            experts.add(int(expert[1]) + 1 if expert[1] else next(iter(shape), 0))
        latent = latent or "kv_a_proj" in name
        projection = _PROJECTION.search(name)
        if projection and projection[2] == "weight":
            # Weights packed into integers have the packing's shape.
            if dtype in _DTYPES or dtype.startswith("F8"):
                found[projection[1]].add(shape)
        elif projection and projection[1] != "mlp.down_proj":
            biases.update(projection[1].removesuffix("_proj"))
        elif _QK_NORM.search(name):
            qk_norm = True
            # Some models keep a row for each head; the last axis is the head's in any case.
            found["qk_norm"].add(shape[-1:])
    attention, key_value = _only(found["o_proj"], 1), _only(found["k_proj"], 0)
    head_dimension = _only(found["qk_norm"], 0)
    if head_dimension in (attention, key_value):
        # A norm over all heads at once says nothing about one of them.
        head_dimension = None
    if latent:
        # Latent attention: what o_proj reads are value heads, of another size than the query's.
        attention = key_value = head_dimension = None
    return Headers(
        layers=len(layers),
        dtypes=tuple(sorted(_DTYPES[dtype] for dtype in stored if dtype in _DTYPES)),
        packed=tuple(sorted(dtype for dtype in stored if dtype not in _DTYPES)),
        biases=tuple(part for part in "qkvo" if part in biases),
        qk_norm=qk_norm,
        experts=max(experts, default=0),
        hidden=_only(found["o_proj"], 0),
        intermediate=_only(found["mlp.down_proj"], 1),
        attention=attention,
        key_value=key_value,
        head_dimension=head_dimension,
        vocabulary=_only(found["embed"], 0),
    )


def _largest(shapes: Shapes) -> set[str | None]:
    numel: dict[str | None, int] = defaultdict(int)
    for name, shape in shapes.items():
        if kind_of(name) in ("attn", "mlp") and container_of(name) is not None:
            numel[container_of(name)] += math.prod(shape)
    return {max(numel, key=lambda container: numel[container])} if numel else set()


def describe(configuration: Configuration, headers: Headers) -> Description:
    """Return the facts of a configuration, completed from the headers.

    Without a config.json they are those of the headers.

    Raises:
        CheckpointError: an entry of a wrong type.
    """
    section = configuration.backbone
    stated_heads = section.size("num_attention_heads")
    stated_layers = section.size("num_hidden_layers")
    vocabularies = (part.size("vocab_size") for part in configuration.around)
    vocabulary = next((size for size in vocabularies if size is not None), None)
    hidden = _fact(section.size("hidden_size"), headers.hidden)
    dimension = _head_dimension(section.size("head_dim"), stated_heads, hidden.value, headers)
    heads = _fact(stated_heads, _divided(headers.attention, dimension.value))
    key_value = _fact(
        section.size("num_key_value_heads"), _divided(headers.key_value, dimension.value)
    )
    if not key_value.known and heads.known:
        key_value = Fact(heads.value, f"{DEFAULT}: as many as heads")
    facts = {
        "model_type": _fact(section.text("model_type")),
        "hidden size": hidden,
        "intermediate size": _fact(section.size("intermediate_size"), headers.intermediate),
        "layers": _fact(stated_layers, headers.layers or None),
        "attention heads": heads,
        "KV heads": key_value,
        "head dimension": dimension,
        **_rope(configuration),
        "norm epsilon": _fact(section.number(*_EPSILON)),
        "activation": _activation(section),
        "query-key norm": _seen("yes" if headers.qk_norm else "no", headers),
        "attention biases": _seen(", ".join(headers.biases) or "none", headers),
        "experts": _fact(section.size(*_EXPERTS), headers.experts if headers.layers else None),
        "experts per token": _fact(section.size(*_EXPERTS_PER_TOKEN)),
        "sliding window": _sliding_window(section),
        "max_position_embeddings": _fact(section.size("max_position_embeddings")),
        "dtype": _seen(", ".join((*headers.dtypes, *headers.packed)), headers),
        "quantisation": _quantisation(configuration, headers),
        "vocabulary size": _fact(vocabulary, headers.vocabulary),
        "tie_word_embeddings": _tied(configuration),
    }
    dtype = configuration.anywhere(lambda part: part.text("dtype", "torch_dtype"))
    return Description(
        facts,
        stated_layers,
        dtype.removeprefix("torch.") if dtype is not None else None,
        _conflicts(facts, headers),
    )


def _seen(value: str, headers: Headers) -> Fact:
    return Fact(value, HEADERS) if headers.layers else Fact()


def _fact(stated: Value, from_headers: int | None = None) -> Fact:
    if stated is not None:
        return Fact(stated, STATED)
    return Fact() if from_headers is None else Fact(from_headers, HEADERS)


def _head_dimension(stated: Value, heads: Value, hidden: Value, headers: Headers) -> Fact:
    """Return the stated head dimension, or what o_proj's columns, q_norm or the default say."""
    if stated is None:
        from_headers = _divided(headers.attention, heads) or headers.head_dimension
        if from_headers is None and (default := _divided(hidden, heads)) is not None:
            return Fact(default, f"{DEFAULT}: hidden size / heads")
        return _fact(None, from_headers)
    return Fact(stated, STATED)


def _conflicts(facts: dict[str, Fact], headers: Headers) -> list[str]:
    """Return, as phrases, the stated dimensions that the tensors do not have."""
    value = {subject: fact.value for subject, fact in facts.items()}
    heads, dimension = value["attention heads"], value["head dimension"]
    expected = [
        ("hidden size", value["hidden size"], "rows of o_proj", headers.hidden),
        ("intermediate size", value["intermediate size"], "columns of down_proj",
         headers.intermediate),
        ("heads × head dimension", _product(heads, dimension), "columns of o_proj",
         headers.attention),
        ("KV heads × head dimension", _product(value["KV heads"], dimension), "rows of k_proj",
         headers.key_value),
    ]  # fmt: skip
    return [
        f"{what} {stated:,} against {there:,} {where}"
        for what, stated, where, there in expected
        if isinstance(stated, int) and there is not None and stated != there
    ]


def _rope(configuration: Configuration) -> dict[str, Fact]:
    """Return θ, scaling, partial rotation and multimodal sections, of each type of layer."""
    section = configuration.backbone
    if not configuration.found:
        return dict.fromkeys(
            ("RoPE θ", "RoPE scaling", "partial rotary factor", "mrope sections"), Fact()
        )
    kind = section.text("model_type") or ""
    default = _OTHER_THETA.get(kind, _THETA)
    flat, local = section.number("rope_theta"), section.number("rope_local_base_freq")
    flat_partial = section.number("partial_rotary_factor")
    stated = section.section("rope_parameters") or section.section("rope_scaling")
    types: dict[str, Section | None] = dict(stated.sections()) if stated else {}
    nested = bool(types)
    if not nested:
        types = {"": stated}
        if local is not None or isinstance(default, dict):
            # Before transformers 5 these were of the layers with full attention.
            types = {"full_attention": stated, "sliding_attention": None}
    theta: dict[str, object] = {}
    scaling: dict[str, object] = {}
    partial: dict[str, object] = {}
    multimodal: list[object] = []
    origins = {"θ": STATED, "partial": STATED}
    for name, entry in types.items():
        base = entry.number("rope_theta") if entry else None
        if base is None:
            base = local if name == "sliding_attention" and not nested else flat
        if base is None:
            base = default.get(name, _THETA) if isinstance(default, dict) else default
            origins["θ"] = DEFAULT
        factor = entry.number("partial_rotary_factor") if entry else None
        if factor is None:
            factor = flat_partial
        if factor is None:
            factor = _OTHER_PARTIAL_ROTARY.get(kind, 1.0)
            origins["partial"] = DEFAULT
        theta[name], partial[name], scaling[name] = base, factor, _scaling(section, entry)
        multimodal += [entry.plain().get("mrope_section")] if entry else []
    sections = next((item for item in multimodal if isinstance(item, list)), None)
    return {
        "RoPE θ": Fact(_collapsed(theta), origins["θ"]),
        "RoPE scaling": Fact(_collapsed(scaling), STATED if stated else DEFAULT),
        "partial rotary factor": Fact(_collapsed(partial), origins["partial"]),
        "mrope sections": _fact(sections),
    }


def _scaling(section: Section, entry: Section | None) -> dict[str, object]:
    """Return one scaling as transformers 5 states it, without what is a fact of its own."""
    if entry is None:
        return {"rope_type": "default"}
    kind = entry.text("rope_type", "type") or "default"
    scaling: dict[str, object] = {"rope_type": "default" if kind == "mrope" else kind}
    scaling |= entry.plain(
        "rope_type", "type", "rope_theta", "partial_rotary_factor", "mrope_section",
        "mrope_interleaved",
    )  # fmt: skip
    if scaling["rope_type"] in ("llama3", "yarn", "longrope"):
        # transformers 5 writes it here; before, it was implied.
        longest = section.size("original_max_position_embeddings", "max_position_embeddings")
        if longest is not None:
            scaling.setdefault("original_max_position_embeddings", longest)
    return scaling


def _activation(section: Section) -> Fact:
    stated = section.text("hidden_activation", "hidden_act")
    return _fact(stated and _ACTIVATIONS.get(stated, stated))


def _sliding_window(section: Section) -> Fact:
    window = section.size("sliding_window")
    if section.truth("use_sliding_window") is False or (
        window is None and section.names_null("sliding_window")
    ):
        return Fact(None, STATED)
    return _fact(window)


def _quantisation(configuration: Configuration, headers: Headers) -> Fact:
    stated = configuration.anywhere(
        lambda part: part.section("quantization_config") or part.section("compression_config")
    )
    if stated is not None:
        method, nbits = stated.text("quant_method") or "method not stated", stated.size("bits")
        for loaded in (4, 8):
            if stated.truth(f"load_in_{loaded}bit"):
                nbits = loaded
        return Fact(method if nbits is None else f"{method}, {_shown(nbits)} bits", STATED)
    if headers.packed:
        return Fact("stored as " + ", ".join(headers.packed), HEADERS)
    return Fact(None, STATED if configuration.found else HEADERS)


def _tied(configuration: Configuration) -> Fact:
    stated = configuration.anywhere(lambda part: part.truth("tie_word_embeddings"))
    return _fact(True if configuration.is_tied else stated)


def _only(shapes: set[tuple[int, ...]], axis: int) -> int | None:
    """Return the one size that all shapes have along `axis`."""
    sizes = {shape[axis] if axis < len(shape) else None for shape in shapes}
    return sizes.pop() if len(sizes) == 1 else None


def _divided(whole: Value, part: Value) -> int | None:
    if isinstance(whole, int) and isinstance(part, int) and part and whole and whole % part == 0:
        return whole // part
    return None


def _product(first: Value, second: Value) -> int | None:
    return first * second if isinstance(first, int) and isinstance(second, int) else None


def _collapsed(by_type: dict[str, object]) -> Value:
    """Return the one value that all types of layers share, or a value for each type."""
    values = list(by_type.values())
    one = values[0]
    if all(value == one for value in values) and isinstance(one, int | float | dict):
        return one
    return by_type


def _shown(value: object) -> str:
    """Return a value as the table shows it."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return f"{int(value):,}" if value == int(value) else repr(value)
    if isinstance(value, list):
        return printable("[" + ", ".join(map(_shown, value[:8])) + "]", 48)
    if isinstance(value, dict):
        if "rope_type" in value:
            rest = [f"{key} {_shown(item)}" for key, item in value.items() if key != "rope_type"]
            return printable(", ".join([str(value["rope_type"]), *rest]), 120)
        return printable("; ".join(f"{key} {_shown(item)}" for key, item in value.items()), 120)
    return printable(str(value), 48)
