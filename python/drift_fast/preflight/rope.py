"""RoPE as a configuration states it, in the spellings of transformers 4 and 5."""

from __future__ import annotations

from drift_fast.checkpoints.config_json import Configuration, Section
from drift_fast.preflight.fact import DEFAULT, STATED, Fact, Value, fact

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


def describe_rope(configuration: Configuration) -> dict[str, Fact]:
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
        "mrope sections": fact(sections),
    }


def _scaling(section: Section, entry: Section | None) -> dict[str, object]:
    """Return one scaling as transformers 5 states it, without what other facts hold."""
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


def _collapsed(by_type: dict[str, object]) -> Value:
    """Return the one value that all types of layers share, or a value for each type."""
    values = list(by_type.values())
    one = values[0]
    if all(value == one for value in values) and isinstance(one, int | float | dict):
        return one
    return by_type
