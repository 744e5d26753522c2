"""Modules, patterns and layers choose the tensors they say, and never the vision side."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from drift_fast import DriftError, compute_delta, inspect
from support.processes import python
from support.synthetic import Pair, everything_under, refused, write_pair

LM = "model.language_model."
ATTENTION = {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"}
MLP = {"mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"}
LAYER_NORMS = {"input_layernorm", "post_attention_layernorm"}


def label(value: object) -> str:
    """Return a name for a case that does not depend on addresses or the order of a set."""
    plain = isinstance(value, str | int | tuple | list | range | None)
    return repr(value) if plain else type(value).__name__


@pytest.fixture(scope="module")
def deep_pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """Twelve layers with biases, so that layer 1 and layers 10 and 11 can be told apart."""
    return write_pair(tmp_path_factory.mktemp("deep"), layers=12, hidden=4, inner=4, bias=True)


def in_layers(kinds: set[str], layers: Any = range(12)) -> set[str]:
    weights = {f"{LM}layers.{layer}.{kind}.weight" for layer in layers for kind in kinds}
    biased = {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"} & kinds
    return weights | {f"{LM}layers.{layer}.{kind}.bias" for layer in layers for kind in biased}


EMBED, HEAD, FINAL_NORM = {f"{LM}embed_tokens.weight"}, {"lm_head.weight"}, {f"{LM}norm.weight"}
EVERYTHING = in_layers(ATTENTION | MLP | LAYER_NORMS) | EMBED | HEAD | FINAL_NORM


def selected(pair: Pair, **options: Any) -> set[str]:
    """Return the selected names; inspect and the lazy delta must agree on them."""
    options["rows"] = "index"
    names = {row.name for row in inspect(pair.reasoning, pair.multimodal, **options).stats}
    assert names == set(compute_delta(pair.reasoning, pair.multimodal, **options))
    return names


@pytest.mark.parametrize(
    ("modules", "expected"),
    [
        (("attn",), in_layers(ATTENTION)),
        (("mlp",), in_layers(MLP)),
        (("norm",), in_layers(LAYER_NORMS) | FINAL_NORM),
        (("embed",), EMBED),
        (("head",), HEAD),
        (("all",), EVERYTHING),
        (("attn", "mlp"), in_layers(ATTENTION | MLP)),
        (("mlp", "attn", "attn"), in_layers(ATTENTION | MLP)),
        (("attn", "mlp", "norm", "embed", "head"), EVERYTHING),
        (("attn", "all"), EVERYTHING),
        (("embed", "re:down_proj"), EMBED | in_layers({"mlp.down_proj"})),
    ],
    ids=label,
)
def test_a_preset_selects_its_modules_with_their_biases(
    deep_pair: Pair, modules: tuple[str, ...], expected: set[str]
) -> None:
    assert selected(deep_pair, modules=modules) == expected


def test_attention_and_mlp_are_what_is_selected_unless_asked(deep_pair: Pair) -> None:
    assert selected(deep_pair) == in_layers(ATTENTION | MLP)


def test_the_rows_carry_the_preset_and_the_layer_of_their_tensor(deep_pair: Pair) -> None:
    rows = {
        row.name: row
        for row in inspect(
            deep_pair.reasoning, deep_pair.multimodal, modules="all", rows="index"
        ).stats
    }
    for name, row in rows.items():
        found = re.search(r"layers\.(\d+)\.", name)
        assert row.layer == (int(found[1]) if found else None)
    for expected, names in (
        ("attn", in_layers(ATTENTION)),
        ("mlp", in_layers(MLP)),
        ("norm", in_layers(LAYER_NORMS) | FINAL_NORM),
        ("embed", EMBED),
        ("head", HEAD),
    ):
        assert {name for name, row in rows.items() if row.kind == expected} == names


@pytest.mark.parametrize(
    "modules", ["attn", ["attn"], ("attn",), "re:self_attn", iter(["attn"])], ids=label
)
def test_modules_may_be_one_name_or_any_iterable(deep_pair: Pair, modules: Any) -> None:
    names = set(
        compute_delta(deep_pair.reasoning, deep_pair.multimodal, modules=modules, rows="index")
    )
    assert names == in_layers(ATTENTION)


@pytest.mark.parametrize("modules", [("all",), ("attn",), ("re:.*",), ("re:q_proj",)], ids=label)
def test_the_vision_tower_and_the_projector_are_never_selected(
    pair: Pair, modules: tuple[str, ...]
) -> None:
    names = selected(pair, modules=modules)
    assert names
    assert not [name for name in names if "vision" in name or "projector" in name]


def test_a_pattern_that_only_the_vision_tower_meets_selects_nothing_and_says_so(
    pair: Pair, out: Path
) -> None:
    with refused(DriftError, "re:vision_tower"):
        compute_delta(pair.reasoning, pair.multimodal, out, modules="re:vision_tower")
    assert everything_under(out.parent) == set()


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        (r"re:q_proj", in_layers({"self_attn.q_proj"})),
        (
            r"re:(q|k)_proj\.weight$",
            {n for n in in_layers({"self_attn.q_proj", "self_attn.k_proj"}) if "weight" in n},
        ),
        (r"re:layers\.1\.", in_layers(ATTENTION | MLP | LAYER_NORMS, [1])),
        (r"re:layers\.1[01]\.mlp", in_layers(MLP, [10, 11])),
        (r"re:norm", in_layers(LAYER_NORMS) | FINAL_NORM),
        (r"re:lm_head", HEAD),
    ],
)
def test_a_pattern_selects_the_names_it_is_found_in(
    deep_pair: Pair, pattern: str, expected: set[str]
) -> None:
    assert selected(deep_pair, modules=pattern) == expected


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        (range(2), [0, 1]),
        (range(0, 12, 5), [0, 5, 10]),
        ([1], [1]),
        ({3, 11}, [3, 11]),
        (iter([2, 2, 4]), [2, 4]),
        ("4-11", list(range(4, 12))),
        ("1", [1]),
        ("0-0", [0]),
        ("0-1,10", [0, 1, 10]),
    ],
    ids=label,
)
def test_layers_are_an_iterable_or_text_whose_ranges_include_their_end(
    deep_pair: Pair, layers: Any, expected: list[int]
) -> None:
    names = set(compute_delta(deep_pair.reasoning, deep_pair.multimodal, layers=layers))
    assert names == in_layers(ATTENTION | MLP, expected)


def test_a_tensor_of_no_layer_is_left_out_once_layers_are_named(deep_pair: Pair) -> None:
    names = selected(deep_pair, modules="all", layers=[11])
    assert names == in_layers(ATTENTION | MLP | LAYER_NORMS, [11])


@pytest.mark.parametrize(
    "layers",
    ["", "x", "3-1", "-1", "1-", "1-2-3", "1.5", [-1], [1.5],
     ["1"], [], range(0), range(-2, 0), "0-1,", "0–2"],
    ids=label,
)  # fmt: skip
def test_a_bad_range_of_layers_is_a_value_error(pair: Pair, out: Path, layers: Any) -> None:
    with pytest.raises((ValueError, TypeError)) as caught:
        compute_delta(pair.reasoning, pair.multimodal, out, layers=layers)
    assert "layer" in str(caught.value)
    assert everything_under(out.parent) == set()


@pytest.mark.parametrize("layers", [[2], "1-2", range(3), "99"], ids=label)
def test_a_layer_the_model_does_not_have_is_refused_with_the_number_it_has(
    pair: Pair, out: Path, layers: Any
) -> None:
    with refused((ValueError, DriftError), "layer", "2"):
        compute_delta(pair.reasoning, pair.multimodal, out, layers=layers)
    assert everything_under(out.parent) == set()


@pytest.mark.parametrize(
    "modules",
    [(), "", ("attention",), ("attn", "mpl"), ("re:(",), "attn,mlp,", ("ATTN",)],
    ids=label,
)
def test_an_unknown_preset_or_a_broken_pattern_is_a_value_error_naming_it(
    pair: Pair, out: Path, modules: Any
) -> None:
    with pytest.raises(ValueError, match=r"module|pattern") as caught:
        compute_delta(pair.reasoning, pair.multimodal, out, modules=modules)
    for name in ("attention", "mpl", "ATTN"):
        if name in modules:
            assert repr(name)[1:-1] in str(caught.value)
            for preset in ("attn", "mlp", "norm", "embed", "head", "all", "re:"):
                assert preset in str(caught.value)
    assert everything_under(out.parent) == set()


@pytest.mark.parametrize("modules", [3, None], ids=label)
def test_modules_of_another_type_are_refused(pair: Pair, modules: Any) -> None:
    with pytest.raises((TypeError, ValueError)):
        compute_delta(pair.reasoning, pair.multimodal, modules=modules)


def test_a_head_that_neither_checkpoint_has_is_an_error_and_no_empty_delta(tmp_path: Path) -> None:
    tied = write_pair(tmp_path, head=None)
    with refused(DriftError, "head"):
        compute_delta(tied.reasoning, tied.multimodal, modules="head")
    assert "lm_head.weight" not in selected(tied, modules="all")


@given(
    st.one_of(
        st.text(max_size=12),
        st.text(alphabet="attnmlp,re:.*+?()[]{}|\\^$0-9", max_size=16),
        st.text(alphabet=".*+?()[]{}|\\^$ab", max_size=12).map("re:".__add__),
    )
)
@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_text_for_modules_selects_something_or_is_refused(pair: Pair, modules: str) -> None:
    with contextlib.suppress(ValueError, DriftError):
        report = inspect(pair.reasoning, pair.multimodal, modules=modules, rows="index")
        names = [row.name for row in report.stats]
        assert names
        assert not [name for name in names if "vision" in name or "projector" in name]


@given(
    st.lists(st.from_regex(r"[0-9]{0,3}[-, ]{0,2}", fullmatch=True), max_size=4).map("".join)
    | st.text(max_size=5)
)
@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_text_for_layers_selects_those_layers_or_is_refused(pair: Pair, layers: str) -> None:
    with contextlib.suppress(ValueError, DriftError):
        rows = list(inspect(pair.reasoning, pair.multimodal, layers=layers).stats)
        assert rows
        assert {row.layer for row in rows} <= {0, 1}


def test_an_enormous_range_of_layers_takes_no_time_and_no_memory(pair: Pair) -> None:
    script = (
        "import resource, sys, drift_fast\n"
        "resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))\n"
        "try:\n"
        "    drift_fast.inspect(*sys.argv[1:], layers='0-99999999999', threads=1)\n"
        "except (ValueError, drift_fast.DriftError) as error:\n"
        "    print('refused:', error)\n"
    )
    result = python(script, pair.reasoning, pair.multimodal, limit=20)
    assert "layer" in result.stdout


def test_a_pattern_that_takes_exponential_time_elsewhere_does_not_hang(pair: Pair) -> None:
    # Names are short, so even a backtracking engine ends; what counts is that it does.
    with refused(DriftError, "re:"):
        inspect(pair.reasoning, pair.multimodal, modules="re:^(m+)+(o+)+(d+)+x$")
