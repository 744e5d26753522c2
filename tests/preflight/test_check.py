"""Two models are judged by their configurations and headers: what breaks Δ, what is worth knowing.

Configurations are written in the form in which they were published or saved, by transformers 4 and
5, beside files of holes whose headers have the real shapes; nothing here holds a weight.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from drift_fast import CheckpointError, DriftWarning, check
from drift_fast.alignment.options import PairOptions
from drift_fast.alignment.pairing import align_checkpoints, fetch
from drift_fast.checkpoints.config_json import Configuration
from drift_fast.preflight.check import Finding, Preflight
from drift_fast.preflight.facts import describe
from drift_fast.preflight.headers import read_headers
from drift_fast.preflight.rope import _OTHER_PARTIAL_ROTARY, _OTHER_THETA
from support.commands import run, without
from support.processes import Ended, python
from support.range_server import RangeServer
from support.synthetic import refused, write_raw, write_sparse

JSON = dict[str, Any]

# ------------------------------------------------------------------ published configurations

CONFIGS = Path(__file__).parent.parent / "data" / "configs"


def published(name: str) -> JSON:
    """Return a configuration as it was published, or as transformers saved it."""
    found: JSON = json.loads((CONFIGS / f"{name}.json").read_text())
    return found


R1_DISTILL_QWEN_7B = published("DeepSeek-R1-Distill-Qwen-7B")
QWEN25_MATH_7B = published("Qwen2.5-Math-7B")
QWEN25_VL_7B = published("Qwen2.5-VL-7B")
QWEN25_VL_7B_NESTED = published("Qwen2.5-VL-7B-nested")
R1_DISTILL_LLAMA_8B = published("DeepSeek-R1-Distill-Llama-8B")
# Its text model states only what differs from the defaults of LlamaConfig.
LLAMA3_LLAVA_NEXT_8B = published("llama3-llava-next-8b")
GEMMA3_4B = published("gemma-3-4b")
# Saved by transformers 5, with RoPE nested by type of layer.
GEMMA3_4B_TEXT = published("gemma-3-4b-text")
QWEN3_8B = published("Qwen3-8B")
QWEN3_VL_8B = published("Qwen3-VL-8B")

# A model small enough to write by the dozen, whose shapes follow its configuration.
TINY: JSON = {
    "architectures": ["LlamaForCausalLM"],
    "head_dim": 4,
    "hidden_act": "silu",
    "hidden_size": 16,
    "intermediate_size": 24,
    "max_position_embeddings": 64,
    "model_type": "llama",
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    "partial_rotary_factor": 1.0,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 64,
}


def backbone(
    config: Mapping[str, Any], prefix: str, *, biases: str = "", qk_norm: bool = False
) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a Llama-like model; `config` states every dimension."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    dimension = config.get("head_dim") or hidden // config["num_attention_heads"]
    queries = config["num_attention_heads"] * dimension
    keys = config["num_key_value_heads"] * dimension
    shapes = {f"{prefix}embed_tokens.weight": (config["vocab_size"], hidden)}
    for layer in range(config["num_hidden_layers"]):
        at = f"{prefix}layers.{layer}."
        rows = {"q": queries, "k": keys, "v": keys}
        for part, count in rows.items():
            shapes[f"{at}self_attn.{part}_proj.weight"] = (count, hidden)
            if part in biases:
                shapes[f"{at}self_attn.{part}_proj.bias"] = (count,)
        shapes[f"{at}self_attn.o_proj.weight"] = (hidden, queries)
        if qk_norm:
            shapes[f"{at}self_attn.q_norm.weight"] = (dimension,)
            shapes[f"{at}self_attn.k_norm.weight"] = (dimension,)
        shapes[f"{at}mlp.gate_proj.weight"] = (inner, hidden)
        shapes[f"{at}mlp.up_proj.weight"] = (inner, hidden)
        shapes[f"{at}mlp.down_proj.weight"] = (hidden, inner)
        shapes[f"{at}input_layernorm.weight"] = (hidden,)
        shapes[f"{at}post_attention_layernorm.weight"] = (hidden,)
    shapes[f"{prefix}norm.weight"] = (hidden,)
    if not config.get("tie_word_embeddings"):
        head = "language_model.lm_head" if prefix == "language_model.model." else "lm_head"
        shapes[f"{head}.weight"] = (config["vocab_size"], hidden)
    return shapes


def tower(prefix: str, layers: int = 2, width: int = 1280) -> dict[str, tuple[int, ...]]:
    return {
        f"{prefix}.{layer}.{name}.weight": (3 * width, width)
        for layer in range(layers)
        for name in ("attn.qkv", "mlp.fc1")
    }


def write(
    directory: Path,
    config: object,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: str = "BF16",
) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    write_sparse(directory / "model.safetensors", shapes, dtype)
    if config is not None:
        (directory / "config.json").write_text(json.dumps(config))
    return directory


def tiny(directory: Path, config: Mapping[str, Any] = TINY, **options: Any) -> Path:
    """Write a text model as its configuration describes it."""
    dtype = options.pop("dtype", "BF16")
    return write(directory, config, backbone(config, "model.", **options), dtype)


def tiny_pair(tmp_path: Path, reasoning: JSON, multimodal: JSON) -> tuple[Path, Path]:
    """Write two models of the tiny shapes, TINY changed by the entries that are given."""
    shapes = backbone(TINY, "model.")
    a = write(tmp_path / "reasoning", changed(reasoning), shapes)
    return a, write(tmp_path / "multimodal", changed(multimodal), shapes)


def changed(entries: Mapping[str, Any]) -> JSON:
    """Return TINY with entries replaced; one that is "absent" is left out."""
    return {key: value for key, value in {**TINY, **entries}.items() if value != "absent"}


def finding(report: Preflight, subject: str, between: tuple[str, str] | None = None) -> Finding:
    found = [
        row for row in report.findings if row.subject == subject and between in (None, row.between)
    ]
    assert len(found) == 1, f"{len(found)} findings on {subject}"
    return found[0]


def subjects(report: Preflight, severity: str) -> set[str]:
    return {row.subject for row in report.findings if row.severity == severity}


def assert_says(row: Finding, *words: str) -> None:
    missing = [word for word in words if word.lower() not in row.message.lower()]
    assert not missing, f"{missing} not in: {row.message}"


def transformers_5() -> Any:
    """Return transformers, or skip where it is older than the spelling under test."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("transformers", "5.0")


# ------------------------------------------------------------------ real pairs


@pytest.fixture(scope="module")
def seven(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """R1-Distill-Qwen-7B, its base, and Qwen2.5-VL-7B as transformers 4 and 5 save it."""
    directory = tmp_path_factory.mktemp("seven")
    text = backbone(R1_DISTILL_QWEN_7B, "model.", biases="qkv")
    nested = backbone(R1_DISTILL_QWEN_7B, "model.language_model.", biases="qkv")
    return {
        "r1": write(directory / "r1", R1_DISTILL_QWEN_7B, text),
        "math": write(directory / "math", QWEN25_MATH_7B, text),
        "flat": write(directory / "flat", QWEN25_VL_7B, {**tower("visual.blocks", 32), **text}),
        "nested": write(
            directory / "nested",
            QWEN25_VL_7B_NESTED,
            {**tower("model.visual.blocks", 32), **nested},
        ),
    }


@pytest.mark.parametrize("form", ["flat", "nested"])
def test_r1_distill_and_qwen_vl_fit_and_their_bases_are_noted(
    seven: dict[str, Path], form: str
) -> None:
    report = check(seven["r1"], seven[form])
    assert report.ok
    assert subjects(report, "note") == {"RoPE θ", "max_position_embeddings"}
    theta = finding(report, "RoPE θ")
    assert (theta.reasoning.value, theta.multimodal.value) == (10_000, 1_000_000)
    assert_says(theta, "different bases", "Qwen2.5-Math", "BASE", "compare both")
    assert report.pairs == 28 * 10
    assert report.coverage is not None
    assert report.coverage.fraction == 1.0
    mrope = finding(report, "mrope sections")
    assert mrope.severity == "same"
    assert mrope.multimodal.value == [16, 24, 24]
    assert_says(mrope, "expected")
    # A window that is there and switched off is no window.
    assert finding(report, "sliding window").severity == "same"


def test_the_flat_and_the_nested_form_state_the_same_facts(seven: dict[str, Path]) -> None:
    report = check(seven["flat"], seven["nested"])
    assert report.ok
    assert subjects(report, "note") == set()
    assert finding(report, "model_type").severity == "same"
    assert report.prefixes == ("", "model")


def test_the_attention_delta_of_seven_billion_parameters_is_planned_at_its_true_size(
    seven: dict[str, Path],
) -> None:
    plan = check(seven["r1"], seven["flat"], modules="attn", read_rate="500MB").plan
    assert plan is not None
    # 28 layers of q and o, 3584 × 3584, k and v, 512 × 3584, and biases on q, k and v.
    numel = 28 * (2 * 3584 * 3584 + 2 * 512 * 3584 + 3584 + 2 * 512)
    assert numel == 822_212_608
    assert plan.delta_nbytes == plan.training_memory_nbytes == 1_644_425_216
    assert plan.read_nbytes == (1_644_425_216, 1_644_425_216)
    assert plan.seconds == pytest.approx(3 * 1_644_425_216 / 500e6)
    assert plan.rate_nbytes == 500_000_000
    assert plan.compute_memory_nbytes == 20_000_000
    assert plan.download_nbytes == 0


def test_the_expert_is_compared_with_its_reference_and_the_reference_with_the_model(
    seven: dict[str, Path],
) -> None:
    report = check(seven["r1"], seven["math"], seven["flat"])
    assert report.ok
    first, second = ("expert", "reference"), ("reference", "model")
    assert finding(report, "RoPE θ", first).severity == "same"
    theta = finding(report, "RoPE θ", second)
    assert theta.severity == "note"
    assert_says(theta, "reference")
    assert finding(report, "alignment", second).severity == "same"
    assert report.pairs == 28 * 10
    assert "expert" in report.table()
    assert "reference" in report.table()


def test_a_reference_of_another_base_than_the_experts_is_noted(seven: dict[str, Path]) -> None:
    report = check(seven["r1"], seven["nested"], seven["flat"])
    assert_says(finding(report, "RoPE θ", ("expert", "reference")), "fine-tuned from")


def test_llava_whose_configuration_states_only_what_is_unusual(tmp_path: Path) -> None:
    text = backbone(R1_DISTILL_LLAMA_8B, "model.")
    vlm = backbone({**R1_DISTILL_LLAMA_8B, "vocab_size": 128320}, "language_model.model.")
    a = write(tmp_path / "text", R1_DISTILL_LLAMA_8B, text)
    b = write(
        tmp_path / "vlm",
        LLAMA3_LLAVA_NEXT_8B,
        {**tower("vision_tower.vision_model.encoder.layers"), **vlm},
    )
    report = check(a, b)
    assert report.ok
    scaling = finding(report, "RoPE scaling")
    assert scaling.severity == "note"
    assert_says(scaling, "long context")
    assert finding(report, "RoPE θ").severity == "same"
    assert str(finding(report, "layers").multimodal) == "32 (from the headers)"
    assert str(finding(report, "hidden size").multimodal) == "4,096 (from the headers)"
    # Heads cannot be told from shapes, and are not invented.
    heads = finding(report, "attention heads")
    assert heads.severity == "note"
    assert str(heads.multimodal) == "not stated"
    assert_says(heads, "the multimodal model", "not compared")
    vocabulary = finding(report, "vocabulary size")
    assert vocabulary.severity == "note"
    assert_says(vocabulary, "not selected", "does not matter")


def test_gemma3_with_rope_by_type_of_layer_in_both_spellings(tmp_path: Path) -> None:
    a = write(tmp_path / "text", GEMMA3_4B_TEXT, backbone(GEMMA3_4B_TEXT, "model.", qk_norm=True))
    b = write(
        tmp_path / "vlm",
        GEMMA3_4B,
        {
            **tower("vision_tower.vision_model.encoder.layers"),
            **backbone(GEMMA3_4B_TEXT, "language_model.model.", qk_norm=True),
        },
    )
    report = check(a, b)
    assert report.ok
    theta = finding(report, "RoPE θ")
    assert theta.severity == "same"
    assert theta.multimodal.value == {"full_attention": 1e6, "sliding_attention": 1e4}
    assert theta.multimodal.origin == "default"
    assert finding(report, "RoPE scaling").severity == "same"
    assert "linear" in str(finding(report, "RoPE scaling").multimodal)
    # Not in the configuration; q_norm has the size of a head, o_proj that of all.
    for subject, value in (("head dimension", 256), ("attention heads", 8), ("KV heads", 4)):
        row = finding(report, subject)
        assert row.severity == "same"
        assert (row.multimodal.value, row.multimodal.origin) == (value, "from the headers")


def test_qwen3_and_qwen3_vl_fit(tmp_path: Path) -> None:
    a = write(tmp_path / "text", QWEN3_8B, backbone(QWEN3_8B, "model.", qk_norm=True))
    b = write(
        tmp_path / "vlm",
        QWEN3_VL_8B,
        {
            **tower("model.visual.blocks"),
            **backbone(QWEN3_8B, "model.language_model.", qk_norm=True),
        },
    )
    report = check(a, b)
    assert report.ok
    assert subjects(report, "note") == {"RoPE θ", "max_position_embeddings"}
    assert finding(report, "query-key norm").multimodal.value == "yes"


def test_two_sizes_of_one_family_do_not_fit(seven: dict[str, Path], tmp_path: Path) -> None:
    small = {
        **R1_DISTILL_QWEN_7B,
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
    }
    a = write(tmp_path / "small", small, backbone(small, "model.", biases="qkv"))
    report = check(a, seven["flat"])
    assert not report.ok
    assert {"alignment", "hidden size", "intermediate size", "attention heads"} <= subjects(
        report, "breaks"
    )


# ------------------------------------------------------------------ each fact

# Subject, what each side's configuration has in place of TINY's, severity and words. Shapes stay.
FACTS: list[tuple[str, JSON, JSON, str, tuple[str, ...]]] = [
    ("RoPE θ", {}, {"rope_theta": 1e6}, "note", ("base", "compare both")),
    ("RoPE θ", {"rope_theta": "absent"}, {}, "same", ()),
    (
        "RoPE scaling",
        {},
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
        "note",
        ("long context",),
    ),
    ("RoPE scaling", {}, {"rope_scaling": {"type": "linear", "factor": 2}}, "note", ("base",)),
    (
        "partial rotary factor",
        {},
        {"partial_rotary_factor": 0.5},
        "breaks",
        ("q_proj", "choose two models of one backbone"),
    ),
    ("partial rotary factor", {"partial_rotary_factor": "absent"}, {}, "same", ()),
    ("norm epsilon", {}, {"rms_norm_eps": 1e-5}, "note", ("variance", "nothing needs to be done")),
    ("activation", {}, {"hidden_act": "gelu"}, "breaks", ("function", "backbone")),
    ("activation", {}, {"hidden_act": "swish"}, "same", ()),
    ("sliding window", {}, {"sliding_window": 32}, "note", ("window", "samples")),
    (
        "sliding window",
        {"sliding_window": "absent"},
        {"sliding_window": 32, "use_sliding_window": False},
        "same",
        (),
    ),
    (
        "max_position_embeddings",
        {},
        {"max_position_embeddings": 128},
        "note",
        ("context", "not a dimension of any weight"),
    ),
    ("vocabulary size", {}, {"vocab_size": 72}, "note", ("not selected",)),
    ("tie_word_embeddings", {}, {"tie_word_embeddings": True}, "note", ("not selected",)),
    ("experts", {}, {"num_experts": 8}, "breaks", ("expert", "backbone")),
    ("experts", {"num_local_experts": 8}, {"n_routed_experts": 16}, "breaks", ("expert",)),
    (
        "experts per token",
        {"num_experts_per_tok": 2},
        {"num_experts_per_tok": 4},
        "breaks",
        ("router",),
    ),
    ("model_type", {}, {"model_type": "mistral"}, "note", ("architectures",)),
    ("model_type", {}, {"model_type": "llama_vision"}, "same", ("family",)),
    (
        "quantization",
        {},
        {"quantization_config": {"quant_method": "awq", "bits": 4}},
        "breaks",
        ("the multimodal model", "awq, 4 bits", "unquantized"),
    ),
    (
        "quantization",
        {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}},
        {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}},
        "breaks",
        ("the reasoning model", "the multimodal model", "8 bits"),
    ),
    (
        "dtype in config.json",
        {},
        {"torch_dtype": "float16"},
        "note",
        ("bfloat16", "what is stored"),
    ),
]


@pytest.mark.parametrize(
    ("subject", "reasoning", "multimodal", "severity", "words"),
    FACTS,
    ids=[f"{row[0]}-{row[3]}-{number}" for number, row in enumerate(FACTS)],
)
def test_a_pair_that_differs_in_one_fact_has_one_finding(
    tmp_path: Path,
    subject: str,
    reasoning: JSON,
    multimodal: JSON,
    severity: str,
    words: tuple[str, ...],
) -> None:
    report = check(*tiny_pair(tmp_path, reasoning, multimodal))
    row = finding(report, subject)
    assert row.severity == severity
    assert_says(row, *words)
    others = subjects(report, "breaks") | subjects(report, "note")
    assert others == ({subject} if severity != "same" else set())
    assert report.ok == (severity != "breaks")


def test_a_model_beside_itself_has_nothing_to_say(tmp_path: Path) -> None:
    a, b = tiny_pair(tmp_path, {}, {})
    report = check(a, b)
    assert subjects(report, "same") == {row.subject for row in report.findings}
    assert report.ok


@pytest.mark.parametrize(
    ("subject", "entries", "words"),
    [
        ("hidden size", {"hidden_size": 20}, ("shape", "backbone")),
        ("intermediate size", {"intermediate_size": 32}, ("MLP", "backbone")),
        ("layers", {"num_hidden_layers": 4}, ("layer", "backbone")),
        ("KV heads", {"num_key_value_heads": 4}, ("k_proj", "backbone")),
        ("head dimension", {"head_dim": 8}, ("heads", "backbone")),
    ],
)
def test_another_dimension_breaks_and_so_does_the_alignment(
    tmp_path: Path, subject: str, entries: JSON, words: tuple[str, ...]
) -> None:
    report = check(tiny(tmp_path / "a"), tiny(tmp_path / "b", changed(entries)))
    assert subjects(report, "breaks") == {"alignment", subject}
    assert_says(finding(report, subject), *words)
    assert finding(report, "alignment").message != ""


def test_heads_of_another_size_break_although_every_shape_agrees(tmp_path: Path) -> None:
    shapes = backbone(TINY, "model.")
    a = write(tmp_path / "a", TINY, shapes)
    # 4 × 4 and 2 × 8 rows of queries, 2 × 4 and 1 × 8 of keys.
    other = changed({"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8})
    assert backbone(other, "model.") == shapes
    report = check(a, write(tmp_path / "b", other, shapes))
    assert finding(report, "alignment").severity == "same"
    assert subjects(report, "breaks") == {"attention heads", "KV heads", "head dimension"}
    assert_says(finding(report, "attention heads"), "even if the shapes agree")


def test_biases_that_only_one_side_has_break_where_attention_is_selected(tmp_path: Path) -> None:
    a, b = tiny(tmp_path / "a", biases="qkv"), tiny(tmp_path / "b")
    report = check(a, b)
    row = finding(report, "attention biases")
    assert row.severity == "breaks"
    assert (row.reasoning.value, row.multimodal.value) == ("q, k, v", "none")
    assert finding(report, "alignment").severity == "breaks"
    # What does pair is still planned.
    assert report.pairs == 3 * 7
    assert finding(check(a, b, modules="mlp"), "attention biases").severity == "note"


def test_the_remedy_for_biases_is_one(tmp_path: Path) -> None:
    a, b = tiny(tmp_path / "a", biases="qkv"), tiny(tmp_path / "b")
    remedy = "re:_proj[.]weight$"
    row = finding(check(a, b), "attention biases")
    assert_says(row, remedy)
    assert finding(check(a, b, modules=remedy), "alignment").severity == "same"


def test_a_norm_of_queries_and_keys_on_one_side_breaks(tmp_path: Path) -> None:
    report = check(tiny(tmp_path / "a"), tiny(tmp_path / "b", qk_norm=True))
    row = finding(report, "query-key norm")
    assert row.severity == "breaks"
    assert_says(row, "q_proj")


def test_another_precision_is_noted_and_both_sides_are_planned_at_their_own(
    tmp_path: Path,
) -> None:
    a = tiny(tmp_path / "a", changed({"torch_dtype": "float32"}), dtype="F32")
    b = tiny(tmp_path / "b")
    report = check(a, b, dtype="float32")
    assert subjects(report, "note") == {"dtype"}
    assert_says(finding(report, "dtype"), "exact", "rounding")
    plan = report.plan
    assert plan is not None
    numel = 3 * (2 * 16 * 16 + 2 * 8 * 16 + 3 * 24 * 16)
    assert plan.read_nbytes == (4 * numel, 2 * numel)
    assert plan.delta_nbytes == 4 * numel
    assert sum(plan.read_nbytes) == align_checkpoints(a, b, PairOptions()).nbytes


@pytest.mark.parametrize("modules", ["embed", "head", "all"])
def test_another_vocabulary_breaks_where_embeddings_are_selected_and_cannot_be_matched(
    tmp_path: Path, modules: str
) -> None:
    a = tiny(tmp_path / "a")
    b = tiny(tmp_path / "b", changed({"vocab_size": 72}))
    report = check(a, b, modules=modules)
    row = finding(report, "vocabulary size")
    assert row.severity == "breaks"
    assert_says(row, "tokenizers")
    assert finding(report, "alignment").severity == "breaks"
    assert_says(finding(report, "alignment"), "no tokenizer in")


def test_another_vocabulary_is_a_note_where_rows_are_matched(tmp_path: Path) -> None:
    a = tiny(tmp_path / "a")
    b = tiny(tmp_path / "b", changed({"vocab_size": 72}))
    report = check(a, b, modules="embed", rows="index")
    assert report.ok
    row = finding(report, "vocabulary size")
    assert row.severity == "note"
    assert_says(row, "coverage")


def test_a_delta_of_embeddings_is_not_attached_to_more_or_fewer_rows(tmp_path: Path) -> None:
    text = tiny(tmp_path / "text")
    model = tiny(tmp_path / "model", changed({"vocab_size": 72}))
    report = check(text, text, model, modules="embed", rows="index")
    row = finding(report, "vocabulary size", ("reference", "model"))
    assert row.severity == "breaks"
    assert_says(row, "has the rows of the reference")
    assert check(text, text, model).ok
    # Without tokenizers the first step fails, but what has one shape is attached without them.
    report = check(text, tiny(tmp_path / "other"), text, modules="embed")
    assert {row.between for row in report.findings if row.severity == "breaks"} == {
        ("expert", "reference")
    }
    assert check(text, text, text, modules="embed", rows="index").ok


def test_as_many_tokens_are_not_taken_for_the_same_tokens(tmp_path: Path) -> None:
    a, b = tiny_pair(tmp_path, {}, {})
    row = finding(check(a, b, modules="embed", rows="index"), "vocabulary size")
    assert row.severity == "note"
    assert_says(row, "same tokens")
    assert finding(check(a, b), "vocabulary size").severity == "same"


@pytest.mark.parametrize("rows", [None, "index"])
def test_the_same_tokenizers_are_the_same_vocabulary(tmp_path: Path, rows: Any) -> None:
    a, b = tiny_pair(tmp_path, {}, {})
    vocabulary = {f"t{row}": row for row in range(60)}
    write_tokenizers(a, b, vocabulary, vocabulary)
    row = finding(check(a, b, modules="embed", rows=rows), "vocabulary size")
    assert (row.severity, row.message) == ("same", "")
    exchanged = vocabulary | {"t3": 4, "t4": 3}
    exchanged["new"] = exchanged.pop("t9")
    write_tokenizers(a, b, vocabulary, exchanged)
    row = finding(check(a, b, modules="embed", rows=rows), "vocabulary size")
    assert row.severity == "note"
    assert_says(row, "4 tokens have another row", "rows='index'")
    row = finding(check(a, a, b, modules="embed"), "vocabulary size", ("reference", "model"))
    assert_says(row, "4 tokens have another row", "leave embed and head out")


def write_tokenizers(a: Path, b: Path, first: JSON, second: JSON) -> None:
    for directory, vocabulary in ((a, first), (b, second)):
        model = {"model": {"type": "BPE", "vocab": vocabulary, "merges": []}}
        (directory / "tokenizer.json").write_text(json.dumps(model))


def test_tied_embeddings_matter_where_they_are_selected(tmp_path: Path) -> None:
    a, b = tiny(tmp_path / "a", changed({"tie_word_embeddings": True})), tiny(tmp_path / "b")
    row = finding(check(a, b, modules="embed", rows="index"), "tie_word_embeddings")
    assert row.severity == "note"
    assert_says(row, "embedding and head")


@pytest.mark.parametrize("level", ["top", "text_config"])
def test_tying_is_read_at_either_level(tmp_path: Path, level: str) -> None:
    text = changed({"tie_word_embeddings": "absent"})
    nested = {"model_type": "llava", "text_config": text}
    (nested if level == "top" else text)["tie_word_embeddings"] = True
    a, b = tiny(tmp_path / "a"), write(tmp_path / "b", nested, backbone(TINY, "model."))
    assert finding(check(a, b), "tie_word_embeddings").multimodal.value is True


@pytest.mark.parametrize(
    ("path", "shorter"),
    [
        ("Qwen2.5-VL-7B-Instruct-AWQ", "Qwen2.5-VL-7B-Instruct"),
        ("Qwen2.5-7B-GPTQ-Int4", "Qwen2.5-7B"),
        ("Llama-3.1-8B-bnb-4bit", "Llama-3.1-8B"),
        ("Qwen3-8B-FP8", "Qwen3-8B"),
    ],
)
def test_the_unquantized_checkpoint_is_named_where_the_name_tells(
    tmp_path: Path, path: str, shorter: str
) -> None:
    a = tiny(tmp_path / path, changed({"quantization_config": {"quant_method": "awq"}}))
    row = finding(check(a, tiny(tmp_path / "b")), "quantization")
    assert_says(row, f"by its name {shorter}")
    assert path not in row.message


def test_packed_weights_are_seen_in_the_headers_too(tmp_path: Path) -> None:
    shapes = backbone(TINY, "model.")
    a = write(tmp_path / "a", TINY, shapes, dtype="U8")
    report = check(a, tiny(tmp_path / "b"))
    row = finding(report, "quantization")
    assert row.severity == "breaks"
    assert_says(row, "stored as U8")


def test_a_packed_shape_is_not_taken_for_a_contradiction(tmp_path: Path) -> None:
    config = changed({"quantization_config": {"quant_method": "bitsandbytes"}})
    packed = {
        name: (shape[0] * shape[1] // 2, 1) if "_proj" in name else shape
        for name, shape in backbone(TINY, "model.").items()
    }
    a = write(tmp_path / "a", config, packed, dtype="U8")
    report = check(a, tiny(tmp_path / "b"))
    assert subjects(report, "breaks") == {"alignment", "quantization"}
    assert str(finding(report, "dtype").reasoning) == "U8 (from the headers)"


def test_a_quantized_model_cannot_be_trained_and_is_reported_once(tmp_path: Path) -> None:
    quantized = changed({"quantization_config": {"quant_method": "fp8"}})
    plain = tiny(tmp_path / "plain")
    report = check(plain, plain, tiny(tmp_path / "model", quantized))
    assert [row.between for row in report.findings if row.severity == "breaks"] == [
        ("reference", "model")
    ]
    report = check(plain, tiny(tmp_path / "reference", quantized), plain)
    assert [row.between for row in report.findings if row.severity == "breaks"] == [
        ("expert", "reference")
    ]


# ------------------------------------------------------------------ what is not stated


def test_without_a_config_the_headers_are_compared_and_the_rest_is_not_stated(
    tmp_path: Path,
) -> None:
    a, b = tiny(tmp_path / "a"), write(tmp_path / "b", None, backbone(TINY, "model."))
    report = check(a, b)
    assert report.ok
    row = finding(report, "config.json")
    assert row.severity == "note"
    assert_says(row, str(tmp_path / "b" / "config.json"))
    for subject in ("RoPE θ", "RoPE scaling", "norm epsilon", "activation", "attention heads"):
        assert str(finding(report, subject).multimodal) == "not stated"
        assert finding(report, subject).severity == "note"
    for subject, value in (("hidden size", 16), ("layers", 3), ("vocabulary size", 64)):
        row = finding(report, subject)
        assert row.severity == "same"
        assert (row.multimodal.value, row.multimodal.origin) == (value, "from the headers")


@pytest.mark.parametrize(
    ("entries", "subject", "shown"),
    [
        ({"rope_theta": "absent"}, "RoPE θ", "10,000 (default)"),
        ({"rope_theta": "absent", "model_type": "mixtral"}, "RoPE θ", "1,000,000 (default)"),
        ({"partial_rotary_factor": "absent"}, "partial rotary factor", "1 (default)"),
        (
            {"partial_rotary_factor": "absent", "model_type": "glm4"},
            "partial rotary factor",
            "0.5 (default)",
        ),
        ({"head_dim": "absent"}, "head dimension", "4 (from the headers)"),
        ({"head_dim": None}, "head dimension", "4 (from the headers)"),
        ({"num_key_value_heads": "absent"}, "KV heads", "2 (from the headers)"),
        ({"num_hidden_layers": "absent"}, "layers", "3 (from the headers)"),
        ({"num_attention_heads": "absent"}, "attention heads", "4 (from the headers)"),
        ({"rms_norm_eps": "absent"}, "norm epsilon", "not stated"),
        ({"rms_norm_eps": "absent", "layer_norm_epsilon": 1e-5}, "norm epsilon", "1e-05"),
        ({"hidden_act": "absent"}, "activation", "not stated"),
        ({"hidden_activation": "gelu"}, "activation", "gelu"),
        ({"sliding_window": "absent"}, "sliding window", "not stated"),
        ({"sliding_window": 32}, "sliding window", "32"),
        ({"intermediate_size": [24, 24, 24]}, "intermediate size", "24"),
        ({"hidden_size": "absent"}, "hidden size", "16 (from the headers)"),
    ],
)
def test_what_is_absent_is_derived_a_named_default_or_not_stated(
    tmp_path: Path, entries: JSON, subject: str, shown: str
) -> None:
    report = check(*tiny_pair(tmp_path, entries, {}))
    assert str(finding(report, subject).reasoning) == shown


def test_documented_defaults_are_taken_where_the_headers_do_not_tell(tmp_path: Path) -> None:
    text = changed({"head_dim": "absent", "num_key_value_heads": "absent"})
    (tmp_path / "config.json").write_text(json.dumps(text))
    facts = describe(Configuration.read(tmp_path), read_headers({}, {})).facts
    assert str(facts["head dimension"]) == "4 (default: hidden size / heads)"
    assert str(facts["KV heads"]) == "4 (default: as many as heads)"


@pytest.mark.parametrize(
    "wrap",
    [
        lambda text: {"text_config": text},
        lambda text: {"language_config": text},
        lambda text: {"llm_config": text},
        lambda text: {"thinker_config": {"text_config": text}, "talker_config": {"hidden_size": 1}},
        lambda text: {"text_config": None, **text},
    ],
    ids=["text_config", "language_config", "llm_config", "thinker_config", "flat"],
)
def test_the_backbone_is_found_wherever_it_is_described(tmp_path: Path, wrap: Any) -> None:
    shapes = backbone(TINY, "model.")
    a = write(tmp_path / "a", TINY, shapes)
    b = write(tmp_path / "b", {"vision_config": {"hidden_size": 99}, **wrap(TINY)}, shapes)
    assert subjects(check(a, b), "same") == {row.subject for row in check(a, b).findings}


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ({"rope_theta": 5e5}, {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}),
        (
            {"rope_scaling": {"type": "yarn", "factor": 4}, "max_position_embeddings": 64},
            {
                "rope_parameters": {
                    "rope_type": "yarn",
                    "type": "yarn",
                    "factor": 4.0,
                    "rope_theta": 10000.0,
                    "original_max_position_embeddings": 64,
                    "attention_factor": None,
                }
            },
        ),
        (
            {"partial_rotary_factor": 0.5},
            {"rope_parameters": {"partial_rotary_factor": 0.5, "rope_theta": 10000.0}},
        ),
        ({"torch_dtype": "torch.bfloat16"}, {"torch_dtype": "absent", "dtype": "bfloat16"}),
        (
            {"rope_local_base_freq": 1e4, "rope_theta": 1e6},
            {
                "rope_parameters": {
                    "sliding_attention": {"rope_theta": 1e4},
                    "full_attention": {"rope_theta": 1e6, "rope_type": "default"},
                }
            },
        ),
    ],
    ids=["theta", "yarn", "partial", "dtype", "by-layer-type"],
)
def test_the_spellings_of_transformers_4_and_5_mean_the_same(
    tmp_path: Path, old: JSON, new: JSON
) -> None:
    if "rope_parameters" in new:
        new = {"rope_theta": "absent", "rope_scaling": "absent",
               "partial_rotary_factor": "absent", **new}  # fmt: skip
    report = check(*tiny_pair(tmp_path, old, new))
    assert subjects(report, "same") == {row.subject for row in report.findings}


def test_the_defaults_are_those_of_transformers() -> None:
    transformers_5()
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    checked = 0
    for kind, expected in _OTHER_THETA.items():
        # The section of the text model is what has a θ; its name is in none of the mappings.
        for name in (kind, kind.removesuffix("_text"), kind.removesuffix("_text_model")):
            if name in CONFIG_MAPPING:
                config = CONFIG_MAPPING[name]()
                config = config.get_text_config(decoder=True)
                parameters = getattr(config, "rope_parameters", None)
                if not parameters:
                    break
                by_type = {
                    layers: values["rope_theta"]
                    for layers, values in parameters.items()
                    if isinstance(values, dict)
                } or {"": parameters["rope_theta"]}
                if isinstance(expected, float):
                    assert set(by_type.values()) == {expected}, kind
                else:
                    assert by_type == expected, kind
                checked += 1
                break
    assert checked >= 10
    for kind in ("llama", "qwen2", "qwen3", "mistral", "gemma2"):
        assert CONFIG_MAPPING[kind]().rope_parameters["rope_theta"] == 10_000.0
    for kind, share in _OTHER_PARTIAL_ROTARY.items():
        if kind in CONFIG_MAPPING:
            assert CONFIG_MAPPING[kind]().rope_parameters["partial_rotary_factor"] == share, kind


# ------------------------------------------------------------------ configuration against headers


def test_fewer_layers_on_disk_than_stated_break_and_more_are_noted(tmp_path: Path) -> None:
    shapes = backbone(TINY, "model.")
    a = write(tmp_path / "a", changed({"num_hidden_layers": 4}), shapes)
    b = write(tmp_path / "b", changed({"num_hidden_layers": 2}), shapes)
    c = write(tmp_path / "c", TINY, shapes)
    row = finding(check(a, c), "layers on disk")
    assert row.severity == "breaks"
    assert_says(row, "4 layers", "of 3", "incomplete")
    row = finding(check(b, c), "layers on disk")
    assert row.severity == "note"
    assert_says(row, "not loaded", "layers=")


def test_a_config_of_other_key_value_heads_is_told_from_the_tensors(tmp_path: Path) -> None:
    row = finding(check(*tiny_pair(tmp_path, {}, {"num_key_value_heads": 4})), "config.json")
    assert_says(row, "KV heads × head dimension 16 against 8")


def test_a_norm_over_all_heads_says_nothing_of_one(tmp_path: Path) -> None:
    shapes = backbone(TINY, "model.")
    for layer in range(3):
        shapes[f"model.layers.{layer}.self_attn.q_norm.weight"] = (16,)
        shapes[f"model.layers.{layer}.self_attn.k_norm.weight"] = (8,)
    for norm in (shapes, {name: size for name, size in shapes.items() if "k_norm" not in name}):
        report = check(write(tmp_path / "a", None, norm), tiny(tmp_path / "b"))
        assert str(finding(report, "head dimension").reasoning) == "not stated"
        assert str(finding(report, "query-key norm").reasoning) == "yes (from the headers)"


def test_latent_attention_is_not_measured_by_its_value_heads(tmp_path: Path) -> None:
    # The query's heads are 4 + 2 wide, the value's 8; head_dim is the rotated part's.
    config = changed({"head_dim": 2, "kv_lora_rank": 6, "num_key_value_heads": 4})
    shapes = {
        name: (16, 32) if "o_proj" in name else (24, 16) if "q_proj" in name else shape
        for name, shape in backbone(TINY, "model.").items()
        if "k_proj" not in name and "v_proj" not in name
    }
    for layer in range(3):
        at = f"model.layers.{layer}.self_attn."
        shapes[f"{at}kv_a_proj_with_mqa.weight"] = (8, 16)
        shapes[f"{at}kv_b_proj.weight"] = (48, 6)
    a, b = write(tmp_path / "a", config, shapes), write(tmp_path / "b", config, shapes)
    report = check(a, b)
    assert subjects(report, "same") == {row.subject for row in report.findings}
    unstated = write(tmp_path / "c", changed({"head_dim": "absent"}), shapes)
    assert "headers" not in str(finding(check(unstated, b), "head dimension").reasoning)


@pytest.mark.parametrize("fused", [False, True])
def test_experts_are_counted_in_the_headers(tmp_path: Path, fused: bool) -> None:
    shapes = {name: s for name, s in backbone(TINY, "model.").items() if ".mlp." not in name}
    for layer in range(3):
        at = f"model.layers.{layer}.mlp."
        shapes[f"{at}gate.weight"] = (5, 16)
        shapes[f"{at}shared_expert.down_proj.weight"] = (16, 40)
        if fused:
            shapes[f"{at}experts.gate_up_proj"] = (5, 16, 48)
            shapes[f"{at}experts.down_proj"] = (5, 24, 16)
        for expert in range(0 if fused else 5):
            shapes[f"{at}experts.{expert}.down_proj.weight"] = (16, 24)
    a, b = write(tmp_path / "a", TINY, shapes), write(tmp_path / "b", None, shapes)
    report = check(a, b, modules="attn")
    assert report.ok
    assert str(finding(report, "experts").multimodal) == "5 (from the headers)"
    # The shared expert's size is not that of a dense MLP.
    assert str(finding(report, "intermediate size").multimodal) == "not stated"


def test_a_config_of_another_model_is_told_from_the_tensors(tmp_path: Path) -> None:
    entries = {"hidden_size": 32, "num_attention_heads": 8, "intermediate_size": 48}
    report = check(*tiny_pair(tmp_path, {}, entries))
    row = finding(report, "config.json")
    assert row.severity == "breaks"
    assert_says(row, "hidden size 32 against 16", "heads × head dimension 32 against 16", "48")


def test_a_vision_tower_larger_than_the_language_model_is_not_taken_for_it(
    tmp_path: Path,
) -> None:
    shapes = backbone(TINY, "model.")
    big = {
        name.replace("model.", "vision_tower.vision_model.", 1): tuple(4 * size for size in shape)
        for name, shape in backbone(changed({"num_hidden_layers": 9}), "model.").items()
        if "layers" in name
    }
    a = write(tmp_path / "a", None, {**big, **shapes})
    other = backbone(changed({"num_hidden_layers": 5, "hidden_size": 8}), "model.")
    report = check(a, write(tmp_path / "b", None, other))
    assert not report.ok
    assert finding(report, "layers").reasoning.value == 3


# ------------------------------------------------------------------ refusals


def test_what_cannot_be_aligned_is_a_finding_with_the_reason(tmp_path: Path) -> None:
    a = tiny(tmp_path / "a")
    b = write(tmp_path / "b", TINY, {"transformer.h.0.attn.c_attn.weight": (4, 4)})
    report = check(a, b)
    row = finding(report, "alignment")
    assert row.severity == "breaks"
    assert str(tmp_path / "a") in row.message
    assert (report.pairs, report.plan, report.coverage, report.prefixes) == (0, None, None, None)
    assert "no Δ to plan for" in report.table()
    json.dumps(report.to_dict(), allow_nan=False)


def test_a_mapping_reaches_the_match(tmp_path: Path) -> None:
    a = tiny(tmp_path / "a")
    b = write(tmp_path / "b", TINY, backbone(TINY, "model.language_model."))
    assert check(a, b, mapping=[("model.", "model.language_model.")]).ok
    row = finding(check(a, b, mapping=[("model.", "elsewhere.")]), "alignment")
    assert row.severity == "breaks"
    assert_says(row, "the mapping")


@pytest.mark.parametrize(
    "arguments",
    [
        {"modules": "atn"},
        {"layers": "3-1"},
        {"layers": "7"},
        {"dtype": "float8"},
        {"read_rate": "fast"},
        {"read_rate": 0},
        {"read_rate": "1 furlong"},
    ],
    ids=str,
)
def test_an_argument_without_meaning_is_a_value_error_that_names_it(
    tmp_path: Path, arguments: JSON
) -> None:
    a, b = tiny_pair(tmp_path, {}, {})
    with refused(ValueError, *arguments.values()):
        check(a, b, **arguments)


@pytest.mark.parametrize("rate", ["1GB", "1 GB/s", "1000MB", 10**9])
def test_a_rate_may_be_a_number_or_text(tmp_path: Path, rate: Any) -> None:
    plan = check(*tiny_pair(tmp_path, {}, {}), read_rate=rate).plan
    assert plan is not None
    assert plan.rate_nbytes == 10**9


def test_a_missing_or_broken_checkpoint_raises(tmp_path: Path) -> None:
    a = tiny(tmp_path / "a")
    with refused(FileNotFoundError, "absent"):
        check(a, tmp_path / "absent")
    write_raw(tmp_path / "broken" / "model.safetensors", "{")
    with refused(CheckpointError, "broken"):
        check(a, tmp_path / "broken")


# ------------------------------------------------------------------ a config from a stranger


@pytest.mark.parametrize(
    ("entries", "subject", "words"),
    [
        ({"hidden_size": "16"}, "hidden size", ("an integer", "a string", "as 16")),
        ({"hidden_size": "16.0"}, "hidden size", ("a string", "as 16")),
        ({"max_position_embeddings": 64.0}, "max_position_embeddings", ("an integer", "as 64")),
        ({"rope_theta": "10000"}, "RoPE θ", ("a number", "as 10000")),
        ({"rms_norm_eps": "1e-06"}, "norm epsilon", ("a number", "a string", "as 1e-06")),
        ({"num_key_value_heads": 2.0}, "KV heads", ("an integer", "as 2")),
        ({"sliding_window": 7, "use_sliding_window": 0}, "sliding window", ("as False",)),
        ({"sliding_window": 7, "use_sliding_window": "false"}, "sliding window", ("as False",)),
        ({"tie_word_embeddings": 0}, "tie_word_embeddings", ("true or false", "as False")),
        ({"tie_word_embeddings": "False"}, "tie_word_embeddings", ("a string", "as False")),
        ({"sliding_window": None, "quantization_config": {}}, "quantization", ()),
        ({"quantization_config": None}, "quantization", ()),
    ],
    ids=lambda value: str(value)[:40],
)
def test_an_entry_of_another_type_whose_meaning_is_plain_is_read(
    tmp_path: Path, entries: JSON, subject: str, words: tuple[str, ...]
) -> None:
    pair = tiny_pair(tmp_path, {}, entries)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        report = check(*pair)
    assert finding(report, subject).severity == "same", finding(report, subject)
    said = [str(one.message) for one in caught]
    assert bool(said) == bool(words)
    assert all(any(word in text for text in said) for word in words), said


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ({"hidden_size": True}, ("hidden_size", "an integer")),
        ({"hidden_size": 16.5}, ("hidden_size", "an integer")),
        ({"hidden_size": -16}, ("hidden_size", "an integer >= 0", "-16")),
        ({"hidden_size": 10**400}, ("hidden_size", "an integer <= 9007199254740992")),
        ({"sliding_window": -1}, ("sliding_window", "an integer >= 0", "-1")),
        ({"vocab_size": -1}, ("vocab_size", "an integer >= 0", "-1")),
        ({"num_attention_heads": {}}, ("num_attention_heads", "an object")),
        ({"num_key_value_heads": [2, "2"]}, ("num_key_value_heads", "an integer")),
        ({"rope_theta": float("nan")}, ("rope_theta", "a number", "found nan")),
        ({"rope_theta": float("inf")}, ("rope_theta", "a number", "found inf")),
        ({"rope_theta": "1e999"}, ("rope_theta", "a number", "a string")),
        ({"rope_theta": "NaN"}, ("rope_theta", "a number", "a string")),
        ({"rope_theta": 10**400}, ("rope_theta", "an integer <= 9007199254740992")),
        ({"rope_scaling": [1]}, ("rope_scaling", "an object", "a list")),
        ({"rope_scaling": {"type": 3}}, ("rope_scaling.type", "a string")),
        ({"rope_scaling": {"factor": float("inf")}}, ("rope_scaling.factor", "found inf")),
        (
            {"rope_scaling": {"short_factor": ["1"]}},
            ("short_factor", "a number", "a string"),
        ),
        (
            {"rope_parameters": {"full_attention": {"rope_theta": []}}},
            ("rope_parameters.full_attention.rope_theta", "a number"),
        ),
        ({"hidden_act": 1}, ("hidden_act", "a string")),
        ({"torch_dtype": {}}, ("torch_dtype", "a string")),
        ({"quantization_config": "awq"}, ("quantization_config", "an object")),
        ({"text_config": "text"}, ("text_config", "an object", "a string")),
        ({"text_config": {"vocab_size": "x"}}, ("text_config.vocab_size", "an integer")),
        (
            {"thinker_config": {"text_config": []}},
            ("thinker_config.text_config", "an object", "a list"),
        ),
    ],
    ids=lambda value: str(value)[:40],
)
def test_an_entry_without_meaning_is_taken_as_not_stated_with_a_warning(
    tmp_path: Path, entries: JSON, words: tuple[str, ...]
) -> None:
    a, b = tiny_pair(tmp_path, {}, entries)
    with pytest.warns(DriftWarning, match="not stated") as caught:
        check(a, b)
    said = "\n".join(str(one.message) for one in caught)
    assert all(str(word) in said for word in (b / "config.json", *words)), said


@pytest.mark.parametrize("value", [3, "perhaps", {}, [True]])
def test_an_entry_that_a_delta_needs_is_refused_naming_file_and_key(
    tmp_path: Path, value: object
) -> None:
    a, b = tiny_pair(tmp_path, {}, {"tie_word_embeddings": value})
    with refused(CheckpointError, b / "config.json", "tie_word_embeddings", "true or false"):
        check(a, b)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"", ("the file is empty",)),
        (b"{", ("not valid JSON",)),
        (b'{"hidden_size": 16, "hidden_size": 16}', ("'hidden_size' occurs twice",)),
        (b'{"text_config": {"a": 1, "a": 2}}', ("'a' occurs twice",)),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", ("git lfs pull",)),
        (b"\xff\xfe\x00", ("not valid JSON",)),
        (b'{"hidden_size": ' + b"9" * 5000 + b"}", ("not valid JSON",)),
        (b"[]", ("an object", "a list")),
        (b"null", ("an object", "null")),
        (b"3", ("an object", "an integer")),
        (b"[" * 1_000_000, ("nested too deeply",)),
        (b'{"a":' * 1_000_000, ("nested too deeply",)),
        (b'{"a": "' + b"x" * 10_000_000 + b'"}', ("10,000,000 bytes",)),
    ],
    ids=lambda value: str(value)[:24],
)
def test_what_is_no_configuration_is_refused(
    tmp_path: Path, text: bytes, words: tuple[str, ...]
) -> None:
    a, b = tiny_pair(tmp_path, {}, {})
    (b / "config.json").write_bytes(text)
    with refused(CheckpointError, b / "config.json", *words):
        check(a, b)


@pytest.mark.parametrize(
    "dress",
    [
        lambda text: b"\xef\xbb\xbf" + text,
        lambda text: text + b"\n\n",
        lambda text: text.replace(b"{", b'{"initializer_range": NaN, "x": -Infinity, ', 1),
        lambda text: text.replace(b"{", b'{"_anything": {"at": [null, "all"]}, ', 1),
    ],
    ids=["byte-order-mark", "newlines", "not-finite", "further-keys"],
)
def test_what_python_reads_as_json_is_a_configuration(tmp_path: Path, dress: Any) -> None:
    a, b = tiny_pair(tmp_path, {}, {})
    path = b / "config.json"
    path.write_bytes(dress(path.read_bytes()))
    report = check(a, b)
    assert subjects(report, "same") == {row.subject for row in report.findings}


def test_a_pipe_in_place_of_the_config_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    a, b = tiny_pair(tmp_path, {}, {})
    (b / "config.json").unlink()
    os.mkfifo(b / "config.json")
    with refused(CheckpointError, "regular file"):
        check(a, b)


def test_what_a_stranger_wrote_cannot_steer_the_terminal(tmp_path: Path) -> None:
    entries = {
        "model_type": "\x1b[31mred\x07\nrow",
        "hidden_act": "x" * 5000,
        "rope_scaling": {"rope_type": "\x1b]0;title\x07", "\x1b[2J": 1},
        "quantization_config": {"quant_method": "\x1b[1A\r"},
        "torch_dtype": "\x9b31m",
    }
    table = check(*tiny_pair(tmp_path, {}, entries)).table()
    assert all(character.isprintable() or character == "\n" for character in table)
    assert max(map(len, table.split("\n"))) < 2_100


KEYS = [
    "text_config", "language_config", "thinker_config", "rope_scaling", "rope_parameters",
    "full_attention", "rope_type", "type", "rope_theta", "factor", "mrope_section",
    "quantization_config", "quant_method", "bits", "load_in_4bit", "hidden_size", "head_dim",
    "num_attention_heads", "num_key_value_heads", "num_hidden_layers", "model_type", "dtype",
    "hidden_act", "rms_norm_eps", "sliding_window", "use_sliding_window", "vocab_size",
    "tie_word_embeddings", "num_experts", "partial_rotary_factor", "architectures",
]  # fmt: skip
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(0, 32)
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["default", "yarn", "llama3", "mrope", "gemma3_text", "llama"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=8), inner, max_size=6)
    ),
    max_leaves=12,
)


def test_a_configuration_of_no_layers_leaves_out_none_and_is_refused(tmp_path: Path) -> None:
    shapes = backbone(TINY, "model.")
    a, b = (write(tmp_path / name, TINY, shapes) for name in "ab")
    write(b, {**TINY, "num_hidden_layers": 0}, shapes)

    report = check(a, b)

    (finding,) = (one for one in report.findings if one.subject == "config.json")
    assert finding.severity == "breaks"
    assert "layers 0 against 3 stored" in finding.message
    assert "alignment" not in subjects(report, "breaks")


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@example(first=None, second={"text_config": {"num_hidden_layers": 0}})
@given(first=VALUES, second=st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=8))
def test_no_configuration_makes_a_check_fail_in_another_way_than_naming_it(
    tmp_path: Path, first: Any, second: Any
) -> None:
    shapes = backbone(TINY, "model.")
    a, b = write(tmp_path / "a", first, shapes), write(tmp_path / "b", second, shapes)
    refusals: set[bool] = set()
    for pair in ((a, b), (b, b)):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DriftWarning)
                report = check(*pair)
        except CheckpointError as error:
            refusals.add("config.json" in str(error))
            continue
        report.table()
        json.dumps(report.to_dict(), allow_nan=False)
        if pair == (b, b):
            against_itself = {"models", "config.json", "layers on disk", "quantization"}
            assert subjects(report, "breaks") <= against_itself
    assert refusals <= {True}


# ------------------------------------------------------------------ real classes


def saved(directory: Path, model: Any) -> Path:
    model.save_pretrained(directory)
    return directory


def real_pairs() -> dict[str, Any]:
    transformers = transformers_5()
    text = {key: value for key, value in TINY.items() if key not in (
        "architectures", "model_type", "rope_scaling", "rope_theta", "partial_rotary_factor",
        "head_dim", "sliding_window", "torch_dtype",
    )}  # fmt: skip
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3,
              "num_attention_heads": 4, "image_size": 28, "patch_size": 14}  # fmt: skip
    rope = {"rope_type": "default", "mrope_section": [1, 1, 0], "rope_theta": 1e6}
    qwen_vision = {"depth": 3, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2,
                   "out_hidden_size": 16, "patch_size": 14}  # fmt: skip
    tokens = {"image_token_id": 60, "video_token_id": 61, "vision_start_token_id": 62,
              "vision_end_token_id": 59}  # fmt: skip
    t = transformers
    return {
        "qwen2.5-vl": (
            lambda: t.Qwen2ForCausalLM(t.Qwen2Config(**text)),
            lambda: t.Qwen2_5_VLForConditionalGeneration(
                t.Qwen2_5_VLConfig(
                    text_config={**text, "rope_parameters": rope},
                    vision_config=qwen_vision,
                    **tokens,
                    tie_word_embeddings=False,
                )
            ),
            {"RoPE θ"},
        ),
        "llava": (
            lambda: t.LlamaForCausalLM(t.LlamaConfig(**text)),
            lambda: t.LlavaForConditionalGeneration(
                t.LlavaConfig(
                    text_config=t.LlamaConfig(**text),
                    vision_config=t.CLIPVisionConfig(**vision, projection_dim=8),
                    image_token_index=63,
                    tie_word_embeddings=False,
                )
            ),
            set(),
        ),
        "gemma3": (
            lambda: t.Gemma3ForCausalLM(
                t.Gemma3TextConfig(**{**text, "head_dim": 4, "tie_word_embeddings": True})
            ),
            lambda: t.Gemma3ForConditionalGeneration(
                t.Gemma3Config(
                    text_config={**text, "head_dim": 4, "tie_word_embeddings": True},
                    vision_config=vision,
                    mm_tokens_per_image=4,
                    image_token_index=63,
                    boi_token_index=61,
                    eoi_token_index=62,
                )
            ),
            set(),
        ),
    }


@pytest.mark.parametrize("family", ["qwen2.5-vl", "llava", "gemma3"])
def test_models_that_transformers_saves_are_compared_in_full(tmp_path: Path, family: str) -> None:
    make_text, make_multimodal, notes = real_pairs()[family]
    a, b = saved(tmp_path / "text", make_text()), saved(tmp_path / "vlm", make_multimodal())
    report = check(a, b)
    assert report.ok
    assert subjects(report, "note") == notes
    for row in report.findings:
        if row.subject not in ("experts per token", "mrope sections", "sliding window"):
            assert row.reasoning.known, row.subject
            assert row.multimodal.known, row.subject


# ------------------------------------------------------------------ what is read


def test_nothing_heavy_is_imported(seven: dict[str, Path]) -> None:
    program = (
        "import sys; from drift_fast import check\n"
        "assert check(*sys.argv[1:]).ok\n"
        "print(*sorted({name.split('.')[0] for name in sys.modules}))"
    )
    result = python(program, seven["r1"], seven["math"], seven["nested"])
    heavy = {"torch", "numpy", "transformers", "huggingface_hub", "requests", "safetensors"}
    assert not heavy & set(result.stdout.split())
    assert "drift_fast" in result.stdout.split()


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="needs Linux's account of reads")
def test_of_thirty_gigabytes_only_headers_are_read(seven: dict[str, Path]) -> None:
    def read_nbytes() -> int:
        lines = Path("/proc/self/io").read_text().splitlines()
        return int(dict(line.split(": ") for line in lines)["rchar"])

    before = read_nbytes()
    check(seven["r1"], seven["nested"])
    assert read_nbytes() - before < 2_000_000


def test_of_a_checkpoint_on_a_server_the_plan_says_what_would_be_downloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DRIFT_FAST_CACHE", str(tmp_path / "cache"))
    # Large enough that most of it is not in the first request, which is for the header.
    large = changed({"hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 128})
    a = tiny(tmp_path / "a", large)
    tiny(tmp_path / "served" / "b", {**large, "rope_theta": 1e6})
    with RangeServer(tmp_path / "served") as server:
        url = f"{server.url}/b"
        report = check(a, url, modules="attn")
        received = server.nbytes
        fetched = fetch(align_checkpoints(a, url, PairOptions(modules="attn")))
        again = check(a, url, modules="attn")
    assert received < 1_000_000
    assert report.plan is not None
    assert again.plan is not None
    (transfer,) = fetched.multimodal.source.transfers
    assert report.plan.read_nbytes[1] == transfer.wanted_nbytes
    assert report.plan.download_nbytes == transfer.wanted_nbytes - transfer.cached_nbytes > 0
    assert again.plan.download_nbytes == 0
    assert finding(report, "RoPE θ").multimodal.value == 1e6
    assert "MB\ntime" in report.table()


# ------------------------------------------------------------------ as text, as JSON, as a command


def test_the_table_shows_values_side_by_side_and_explains_each_difference(
    seven: dict[str, Path],
) -> None:
    table = check(seven["r1"], seven["flat"], modules="attn").table()
    lines = table.splitlines()
    assert lines[0].startswith("verdict: the models fit each other")
    assert ["reasoning", "multimodal"] in [line.split() for line in lines]
    assert any(line.split() == ["note", "RoPE", "θ", "10,000", "1,000,000"] for line in lines)
    assert any(line.startswith("note: RoPE θ: ") for line in lines)
    assert not any(line.startswith("breaks") for line in lines)
    assert not any("experts per token" in line for line in lines), "what neither has is shown"
    assert "1.64 GB" in table
    assert "1 GB per second, a rate assumed" in table
    assert "100.0% of the selected parameters" in table


def test_the_json_holds_values_origins_and_the_plan(seven: dict[str, Path]) -> None:
    result = json.loads(json.dumps(check(seven["r1"], seven["flat"]).to_dict(), allow_nan=False))
    theta = next(row for row in result["findings"] if row["subject"] == "RoPE θ")
    assert theta["reasoning"] == {"value": 10000, "origin": ""}
    assert theta["severity"] == "note"
    head = next(row for row in result["findings"] if row["subject"] == "head dimension")
    assert head["reasoning"] == {"value": 128, "origin": "from the headers"}
    assert result["ok"] is True
    assert result["plan"]["delta_nbytes"] == 2 * 28 * (
        2 * 3584 * 3584 + 2 * 512 * 3584 + 3584 + 2 * 512 + 3 * 3584 * 18944
    )
    assert result["coverage"]["fraction"] == 1.0
    assert result["pairs"] == 280


def drift_fast(*arguments: object) -> Ended:
    return run(*arguments, program=without("torch"))


def test_the_command_prints_the_table_and_succeeds_with_notes(seven: dict[str, Path]) -> None:
    result = drift_fast("check", seven["r1"], seven["flat"], "--modules", "attn")
    assert result.returncode == 0, result.stderr
    expected = check(seven["r1"], seven["flat"], modules="attn").table()
    both = f"{seven['r1']} {seven['flat']} --modules attn"
    printed, base, delta = result.stdout.strip().rsplit("\n", 2)
    assert printed == expected
    assert base.startswith(f"next: drift-fast check {both} --base TEXT_BASE, if you know")
    assert delta == f"next: drift-fast delta {both} --out delta"
    assert result.stderr == ""


def test_the_command_takes_a_third_model_and_the_options(seven: dict[str, Path]) -> None:
    result = drift_fast(
        "check", seven["r1"], seven["math"], seven["flat"], "--json", "--layers", "0-3",
        "--dtype", "float32", "--read-rate", "500MB", "--modules", "mlp",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    document = json.loads(result.stdout)
    report = check(
        seven["r1"], seven["math"], seven["flat"],
        layers="0-3", dtype="float32", read_rate="500MB", modules="mlp",
    )  # fmt: skip
    assert document == json.loads(json.dumps(report.to_dict()))


def test_the_command_fails_with_status_one_where_something_breaks(tmp_path: Path) -> None:
    a, b = tiny_pair(tmp_path, {}, {"hidden_act": "gelu"})
    for options in ([], ["--json"]):
        result = drift_fast("check", a, b, *options)
        assert result.returncode == 1
        assert "activation" in result.stdout
        assert "Traceback" not in result.stderr
    assert json.loads(result.stdout)["ok"] is False


def test_a_broken_config_is_status_one_with_one_message(tmp_path: Path) -> None:
    a, b = tiny_pair(tmp_path, {}, {"tie_word_embeddings": "16"})
    result = drift_fast("check", a, b)
    assert result.returncode == 1
    assert result.stdout == ""
    assert "tie_word_embeddings must be true or false" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["{b}", "--modules", "atn"],
        ["{b}", "--layers", "9"],
        ["{b}", "--dtype", "float8"],
        ["{b}", "--read-rate", "fast"],
        ["{b}", "{b}", "{b}"],
    ],
    ids=" ".join,
)
def test_wrong_usage_of_the_command_is_status_two(tmp_path: Path, options: list[str]) -> None:
    a, b = tiny_pair(tmp_path, {}, {})
    result = drift_fast("check", a, *(option.format(b=b) for option in options))
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr != ""
    assert "Traceback" not in result.stderr
