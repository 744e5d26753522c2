"""Every reason to refuse a pair is found by one function, with a reason that code can ask for."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from drift_fast import AlignmentError, CoverageError, align, check, compute_delta
from drift_fast.alignment import refusals
from drift_fast.alignment.model_pair import ModelPair
from drift_fast.alignment.options import PairOptions
from drift_fast.alignment.pairing import align_checkpoints, survey_checkpoints
from drift_fast.alignment.refusals import Refusal, is_usable, why_not
from drift_fast.errors import AmbiguousAlignmentError
from support.synthetic import Stored, language_model, moved, refused, write_checkpoint

Tensors = dict[str, Stored]
LOST = "layers.0.self_attn.q_proj"


@pytest.fixture
def text() -> Tensors:
    return language_model(np.random.default_rng(1))


def written(directory: Path, reasoning: Tensors, multimodal: Tensors) -> tuple[Path, Path]:
    return (
        write_checkpoint(directory / "a", reasoning),
        write_checkpoint(directory / "b", multimodal),
    )


def reasons(a: Path, b: Path, options: PairOptions | None = None) -> list[str]:
    return [one.reason for one in why_not(survey_checkpoints(a, b, options or PairOptions()))]


def test_a_pair_that_fits_has_no_reason(tmp_path: Path, text: Tensors) -> None:
    a, b = written(tmp_path, text, moved(np.random.default_rng(2), text))
    assert reasons(a, b) == []
    assert align_checkpoints(a, b, PairOptions()).coverage.fraction == 1.0


def test_each_reason_has_a_name(tmp_path: Path, text: Tensors) -> None:
    vlm = moved(np.random.default_rng(2), text)
    nothing = {"other.weight": next(iter(text.values()))}
    assert reasons(*written(tmp_path / "nothing", text, nothing)) == ["not matched"]
    lost = {name: one for name, one in vlm.items() if LOST not in name}
    a, b = written(tmp_path / "lost", text, lost)
    assert reasons(a, b) == ["unmatched tensors"]
    assert reasons(a, b, PairOptions(min_coverage=1.0)) == ["unmatched tensors", "low coverage"]
    assert reasons(a, b, PairOptions(modules="re:nowhere")) == ["nothing selected"]


def test_what_strict_false_takes_leaves_pairs_and_the_rest_does_not(
    tmp_path: Path, text: Tensors
) -> None:
    lost = {name: one for name, one in text.items() if LOST not in name}
    pair = survey_checkpoints(*written(tmp_path / "lost", text, lost), PairOptions())
    assert is_usable(why_not(pair))
    assert why_not(pair, strict=False) == []
    nothing = {"other.weight": next(iter(text.values()))}
    failed = survey_checkpoints(*written(tmp_path / "nothing", text, nothing), PairOptions())
    assert not is_usable(why_not(failed))
    assert failed.pairs == []


def test_a_new_rule_is_one_function_and_every_verb_has_it(
    tmp_path: Path, text: Tensors, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unlucky(pair: ModelPair) -> Refusal | None:
        return Refusal("low coverage", CoverageError("an unlucky pair"))

    a, b = written(tmp_path, text, moved(np.random.default_rng(2), text))
    monkeypatch.setattr(refusals, "RULES", (*refusals.RULES, unlucky))
    with refused(CoverageError, "an unlucky pair"):
        compute_delta(a, b)
    assert align(a, b).problem == "an unlucky pair"
    finding = next(one for one in check(a, b).findings if one.subject == "alignment")
    assert (finding.severity, finding.message) == ("breaks", "an unlucky pair")


def test_two_alignments_that_fit_are_an_error_of_their_own(tmp_path: Path, text: Tensors) -> None:
    parts = ("talker", "thinker")
    twice = {f"{part}.{name}": one for part in parts for name, one in text.items()}
    sources = written(tmp_path, text, twice)
    with pytest.raises(AmbiguousAlignmentError, match=r"talker.*thinker") as caught:
        align_checkpoints(*sources, PairOptions())
    # Each of the mappings that it names does.
    mappings = re.findall(r"\S+:\S+", str(caught.value).partition("the mapping ")[2])
    assert len(mappings) == 2
    for mapping, part in zip(mappings, parts, strict=True):
        (found,) = {name.split(".")[0] for name in compute_delta(*sources, mapping=mapping)}
        assert found == part
    assert issubclass(AmbiguousAlignmentError, AlignmentError)
