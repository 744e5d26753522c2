"""What a model says of itself, in config.json and in its headers, as facts that can be compared.

Owns the spellings of transformers 4 and 5 and where each value comes from: stated, read off the
headers, a default of transformers, or not stated at all. No weight is read.
"""

from __future__ import annotations

from dataclasses import dataclass

from drift_fast.checkpoints.config_json import Configuration, Section
from drift_fast.preflight.fact import DEFAULT, HEADERS, STATED, Fact, Value, fact, shown
from drift_fast.preflight.headers import Headers
from drift_fast.preflight.rope import describe_rope

# Two names of one function.
_ACTIVATIONS = {"swish": "silu", "gelu_new": "gelu_pytorch_tanh"}

_EPSILON = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_eps", "norm_epsilon")
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_EXPERTS_PER_TOKEN = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k")


@dataclass(frozen=True)
class Description:
    """A model's facts by subject, and what its config.json and its tensors disagree on.

    `stated_layers` and `stated_dtype` are what config.json says, beside what the facts hold.
    """

    facts: dict[str, Fact]
    stated_layers: Value
    stated_dtype: str | None
    conflicts: list[str]


def describe(configuration: Configuration, headers: Headers) -> Description:
    """Return the facts of a configuration, completed from the headers.

    Without a config.json they are those of the headers.

    Raises:
        CheckpointError: an entry of a wrong type that a delta needs.
    """
    section = configuration.backbone
    stated_heads = section.size("num_attention_heads")
    stated_layers = section.size("num_hidden_layers")
    vocabularies = (part.size("vocab_size") for part in configuration.around)
    vocabulary = next((size for size in vocabularies if size is not None), None)
    hidden = fact(section.size("hidden_size"), headers.hidden)
    dimension = _head_dimension(section.size("head_dim"), stated_heads, hidden.value, headers)
    heads = fact(stated_heads, _divided(headers.attention, dimension.value))
    key_value = fact(
        section.size("num_key_value_heads"), _divided(headers.key_value, dimension.value)
    )
    if not key_value.known and heads.known:
        key_value = Fact(heads.value, f"{DEFAULT}: as many as heads")
    facts = {
        "model_type": fact(section.text("model_type")),
        "hidden size": hidden,
        "intermediate size": fact(section.size("intermediate_size"), headers.intermediate),
        "layers": fact(stated_layers, headers.layers or None),
        "attention heads": heads,
        "KV heads": key_value,
        "head dimension": dimension,
        **describe_rope(configuration),
        "norm epsilon": fact(section.number(*_EPSILON)),
        "activation": _activation(section),
        "query-key norm": _seen("yes" if headers.qk_norm else "no", headers),
        "attention biases": _seen(", ".join(headers.biases) or "none", headers),
        "experts": fact(section.size(*_EXPERTS), headers.experts if headers.layers else None),
        "experts per token": fact(section.size(*_EXPERTS_PER_TOKEN)),
        "sliding window": _sliding_window(section),
        "max_position_embeddings": fact(section.size("max_position_embeddings")),
        "dtype": _seen(", ".join((*headers.dtypes, *headers.packed)), headers),
        "quantization": _quantization(configuration, headers),
        "vocabulary size": fact(vocabulary, headers.vocabulary),
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


def _head_dimension(stated: Value, heads: Value, hidden: Value, headers: Headers) -> Fact:
    """Return the stated head dimension, or what o_proj's columns, q_norm or the default say."""
    if stated is None:
        from_headers = _divided(headers.attention, heads) or headers.head_dimension
        if from_headers is None and (default := _divided(hidden, heads)) is not None:
            return Fact(default, f"{DEFAULT}: hidden size / heads")
        return fact(None, from_headers)
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
    found = [
        f"{what} {stated:,} against {there:,} {where}"
        for what, stated, where, there in expected
        if isinstance(stated, int) and there is not None and stated != there
    ]
    # Another number of layers than none may be right, and is judged as "layers on disk".
    if value["layers"] == 0 and headers.layers:
        found.append(f"layers 0 against {headers.layers:,} stored")
    return found


def _activation(section: Section) -> Fact:
    stated = section.text("hidden_activation", "hidden_act")
    return fact(stated and _ACTIVATIONS.get(stated, stated))


def _sliding_window(section: Section) -> Fact:
    window = section.size("sliding_window")
    if section.truth("use_sliding_window") is False or (
        window is None and section.names_null("sliding_window")
    ):
        return Fact(None, STATED)
    return fact(window)


def _quantization(configuration: Configuration, headers: Headers) -> Fact:
    stated = configuration.anywhere(
        lambda part: part.section("quantization_config") or part.section("compression_config")
    )
    if stated:
        method, nbits = stated.text("quant_method") or "method not stated", stated.size("bits")
        for loaded in (4, 8):
            if stated.truth(f"load_in_{loaded}bit"):
                nbits = loaded
        return Fact(method if nbits is None else f"{method}, {shown(nbits)} bits", STATED)
    if headers.packed:
        return Fact("stored as " + ", ".join(headers.packed), HEADERS)
    return Fact(None, STATED if configuration.found else HEADERS)


def _tied(configuration: Configuration) -> Fact:
    if configuration.is_tied:
        return Fact(True, STATED if configuration.states_ties else DEFAULT)
    return fact(configuration.anywhere(lambda part: part.truth("tie_word_embeddings")))


def _divided(whole: Value, part: Value) -> int | None:
    if isinstance(whole, int) and isinstance(part, int) and part and whole and whole % part == 0:
        return whole // part
    return None


def _product(first: Value, second: Value) -> int | None:
    return first * second if isinstance(first, int) and isinstance(second, int) else None
