"""The study of a pre-trained model, without one: its problems, jobs and published lines."""

from __future__ import annotations

import gzip
import importlib
import importlib.util
import json
import re
import statistics
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

if importlib.util.find_spec("transformers") is None:
    pytest.skip("the study needs transformers", allow_module_level=True)

EXAMPLES = Path(__file__).parents[2] / "examples"
STUDY = EXAMPLES / "pretrained"


@pytest.fixture(scope="module")
def study() -> Iterator[Any]:
    """The example's modules, which it imports by bare names, and none of them left behind."""
    before, path = set(sys.modules), list(sys.path)
    sys.path.insert(0, str(STUDY))
    try:
        yield importlib.import_module("run")
    finally:
        sys.path[:] = path
        ours = (str(STUDY), str(EXAMPLES / "miniature"))
        for name in set(sys.modules) - before:
            if str(getattr(sys.modules[name], "__file__", "")).startswith(ours):
                del sys.modules[name]


@pytest.mark.parametrize("image", [False, True])
def test_each_line_of_a_chain_is_right_and_the_last_is_the_result(study: Any, image: bool) -> None:
    problems = study.training.problems
    rng = np.random.default_rng(0)
    for steps in (1, 3, 6) * 20:
        story = problems.story(rng, steps, image=image)
        sums = re.findall(r"(\d+)([+-])(\d+)=(\d+)", story.answer)
        assert len(sums) == steps
        for left, sign, right, result in sums:
            assert int(result) == int(left) + (1 if sign == "+" else -1) * int(right)
        assert sums[-1][3] == str(story.result) == story.answer.split()[-1]
        assert problems.result_of(story.answer) == story.result
        assert (story.numbers is not None) == image


def test_no_digit_of_training_is_shown_in_a_test(study: Any) -> None:
    digits = study.training.problems._digits
    for train, test in zip(digits("train"), digits("test"), strict=True):
        assert len(train)
        assert len(test)
        assert not {d.tobytes() for d in train} & {d.tobytes() for d in test}


def test_an_image_has_one_token_for_each_digit(study: Any) -> None:
    problems, batches = study.training.problems, study.training.batches
    shown = problems.image([12] * 8, np.random.default_rng(0), "train")
    assert shown.shape == (3, problems.SIDE, problems.SIDE)
    assert 2 * len(problems.LETTERS) == batches.IMAGE_TOKENS


def test_trials_take_each_value_about_equally_often_and_merges_have_more(study: Any) -> None:
    methods = study.METHODS
    for method in methods.values():
        if not method.space:
            continue
        trials = method.trials(8)
        assert trials == method.trials(8)
        assert len({tuple(trial.values()) for trial in trials}) == len(trials)
        for name, values in method.space.items():
            often = Counter(trial[name] for trial in trials)
            assert set(often) == set(values)
            assert max(often.values()) - min(often.values()) <= 1
    assert len(methods["adaptive"].trials(8)) == 8
    assert len(methods["merge"].trials(8)) > len(methods["adaptive"].trials(8))


def test_a_test_waits_for_the_trials_of_the_method_it_is_like(study: Any, tmp_path: Path) -> None:
    choosing = study.choosing
    form = replace(choosing.Form(), methods=("adaptive", "gradnorm"), trials=2)
    jobs = choosing.jobs(form)
    for job in jobs:
        if job.stage == "checkpoint":
            place = choosing.lessons.directory(tmp_path, job.pair, job.method)
            place.mkdir(parents=True)
            (place / "config.json").touch()
    test = next(job for job in jobs if job.stage == "test" and job.method == "gradnorm")
    lines: list[dict[str, Any]] = []
    assert not choosing.ready(test, tmp_path, form, lines)
    for job in jobs:
        if job.stage in ("tune", "again"):
            assert choosing.ready(job, tmp_path, form, lines)
            settings = choosing.settings(job, form, lines, {})
            answers = (
                0.5
                if settings["alpha"]
                == min(trial["alpha"] for trial in study.METHODS["adaptive"].trials(2))
                else 0.1
            )
            lines.append(
                {
                    "method": job.method,
                    "stage": job.stage,
                    "settings": settings,
                    "answers": answers,
                    "reading": 0.9,
                }
            )
    assert choosing.ready(test, tmp_path, form, lines)
    best = choosing.settings(test, form, lines, {})
    assert best == min(study.METHODS["adaptive"].trials(2), key=lambda trial: trial["alpha"])


_LABELS = {
    "sft": "SFT",
    "merge": "merge, then SFT",
    "adaptive": "DRIFT, adaptive",
    "half": "half merged, half injected",
    "merge_reading": "merge, then SFT",
    "adaptive_reading": "DRIFT, adaptive",
    "half_reading": "half merged, half injected",
    "sft_reading": "SFT",
    "merge_reading_late": "the same, later layers more",
    "merge_reading_early": "the same, earlier layers more",
    "merge_reading_spared": "the same, Δ without what seeing moved most",
    "adaptive_reading_shuffled": "DRIFT, shuffled Δ",
    "merge_reading_shuffled": "merge, then SFT, shuffled Δ",
}


@pytest.mark.parametrize(
    ("run", "heading", "better"),
    [
        ("full", "The first run", ("adaptive", "merge")),
        ("second", "The second run", ("adaptive_reading", "merge_reading")),
        ("third", "The third run", ("adaptive_reading", "sft_reading")),
    ],
)
def test_what_is_published_says_what_the_page_says(
    study: Any, run: str, heading: str, better: tuple[str, str]
) -> None:
    lines, page = published(run, heading)
    tests = [line for line in lines if line["stage"] == "test"]
    assert f"{len(lines)} lines" in page
    assert f"{len(tests)} tests" in page
    for name, label in _LABELS.items():
        mine = [line for line in tests if line["method"] == name]
        if mine:
            cells = [
                _cell(study, [line[measure] for line in mine]) for measure in ("answers", "reading")
            ]
            assert f"{label} | {cells[0]} | {cells[1]} |" in page, name
    above = study.report.paired(tests, *better, "answers")
    assert statistics.mean(above) > study.report.interval(above)
    pairs = len({line["pair"] for line in tests})
    assert len(above) == (10 if pairs == 2 else 12)
    if pairs > 2:
        # Runs of a pair are not independent.
        above = [statistics.mean(above[at : at + 2]) for at in range(0, len(above), 2)]
        assert statistics.mean(above) > study.report.interval(above)
    assert f"+{_cell(study, above)}" in page


@pytest.mark.parametrize(("run", "heading"), [("full", "The first"), ("second", "The second")])
def test_what_is_published_of_forecasts_says_what_the_page_says(run: str, heading: str) -> None:
    lines, page = published(run, heading)
    ratios = sorted(
        line["progress"]["along"] / line["foreseen"] for line in lines if line.get("foreseen")
    )
    least, middle, most = (
        f"{ratios[at]:.2f}".removeprefix("0") for at in (0, len(ratios) // 2, -1)
    )
    assert f"of {len(ratios)} injections" in page
    assert f"median {middle}" in page
    assert f"between {least} and {most}" in page or f"from {least} to {most}" in page
    assert f"{sum(0.85 <= ratio <= 1.15 for ratio in ratios)} of them within 15 %" in page


def published(run: str, heading: str) -> tuple[list[dict[str, Any]], str]:
    """Return the lines of a run, and the page's section on it as one line of text."""
    with gzip.open(STUDY / run / "results.jsonl.gz", "rt", encoding="utf-8") as file:
        lines = [json.loads(text) for text in file]
    text = (STUDY / "README.md").read_text(encoding="utf-8")
    page = text.split(f"### {heading}")[1].split("\n### ")[0]
    return lines, " ".join(page.split()).replace("**", "")


def _cell(study: Any, values: list[float]) -> str:
    half = study.report.interval(values)
    return f"{statistics.mean(values):.3f} ± {half:.3f}".replace("0.", ".")


def test_tests_of_new_pairs_take_settings_from_an_earlier_run_and_train_no_other_pair(
    study: Any, tmp_path: Path
) -> None:
    results = study.Results(tmp_path / "results.jsonl")
    study._take_trials(STUDY / "second" / "results.jsonl.gz", results)
    assert {line["stage"] for line in results.lines()} == {"tune", "again"}
    form = replace(study.FULL, methods=("adaptive_reading",), pairs=(4, 5), seeds=(0,))
    undone = [job for job in study.choosing.jobs(form) if not results.done(job.key)]
    left = study.choosing.left(undone)
    assert {job.pair for job in left} == {4, 5}
    assert {(job.stage, job.method) for job in left} == {
        ("checkpoint", "multimodal"),
        ("checkpoint", "expert"),
        ("test", "adaptive_reading"),
    }
    settings = study.choosing.settings(left[-1], form, results.lines(), {})
    assert settings == {"alpha": 0.5, "rate": 8e-5}


def test_weights_by_depth_rise_or_fall_around_one(study: Any) -> None:
    names = [f"model.layers.{layer}.mlp.up_proj.weight" for layer in range(4)]
    delta = study.training.Tensors((name, torch.ones(2, 2)) for name in names)
    late, early = (
        [float(d[0, 0]) for d in study.training._by_depth(delta, depth).values()]
        for depth in ("late", "early")
    )
    assert late == [0.25, 0.75, 1.25, 1.75] == early[::-1]


def test_the_largest_directions_of_another_matrix_are_taken_out_on_both_sides(study: Any) -> None:
    torch.manual_seed(0)
    name, other = "model.layers.0.mlp.up_proj.weight", "language_model."
    largest = torch.outer(torch.randn(24), torch.randn(16)) * 100
    delta = study.training.Tensors({name: torch.randn(24, 16) + largest})
    matrices = study.training.Tensors({f"{other}{name}": torch.randn(24, 16) + largest})
    (found,) = study.training._without_largest(delta, matrices, 1).values()
    left, _, right = torch.linalg.svd(matrices[f"{other}{name}"])
    assert (left[:, 0] @ found).norm() < 1e-3
    assert (found @ right[0]).norm() < 1e-3
    assert found.norm() > 0.5 * 15


def test_without_one_span_a_delta_is_orthogonal_to_gradients_of_all_tensors_together(
    study: Any,
) -> None:
    class Squares(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = (torch.nn.Linear(4, 4, bias=False) for _ in range(2))

        def forward(self, x: torch.Tensor) -> SimpleNamespace:
            return SimpleNamespace(loss=self.two(self.one(x).tanh()).square().mean())

    torch.manual_seed(0)
    model = Squares()
    names = [name for name, _ in model.named_parameters()]
    delta = study.training.Tensors((name, torch.randn(4, 4)) for name in names)
    kept = [{"x": torch.randn(3, 4)} for _ in range(4)]
    found = study.training._without_one_span(model, delta, kept, 2)
    taken = torch.cat([(delta[name] - found[name]).flatten() for name in names])
    for first in range(2):
        loss = sum(model(**batch).loss for batch in kept[first::2])
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        products = [(found[n] * g).sum() for n, g in zip(names, gradients, strict=True)]
        assert abs(sum(products)) < 1e-5
        assert all(abs(product) > 1e-4 for product in products)
    assert taken.norm() > 0.1
