"""The demo's world, its shipped checkpoints, and one short run of the whole."""

from __future__ import annotations

import json
import logging
import struct
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

import drift_fast
from drift_fast import demo
from drift_fast.demo import experiment, figures
from drift_fast.demo import world as w
from drift_fast.demo.digits import load_digits
from drift_fast.demo.jobs import quiet

MEBIBYTE = 2**20
NAMES = ("base", "expert", "multimodal")


@pytest.fixture(scope="module")
def world() -> w.World:
    return w.World()


@pytest.fixture(scope="module")
def multimodal() -> torch.nn.Module:
    return transformers.LlavaForConditionalGeneration.from_pretrained(
        demo.CHECKPOINTS / "multimodal", dtype=torch.float32
    ).eval()


def fold_spelled_out(tables: np.ndarray, text: str) -> list[int]:
    """Evaluate '3 f 7 g 1' by walking over its symbols, operations as letters from 'a'."""
    symbols = text.split()
    value, values = int(symbols.pop(0)), []
    while symbols:
        letter, digit = symbols.pop(0), int(symbols.pop(0))
        value = int(tables["abcdefgh".index(letter)][value][digit])
        values.append(value)
    return values


def spelled(token: int) -> str:
    if w.DIGIT <= token < w.DIGIT + 10:
        return str(token - w.DIGIT)
    if w.OPERATION <= token < w.OPERATION + w.OPERATIONS:
        return "abcdefgh"[token - w.OPERATION]
    return {w.BOS: "<bos>", w.EOS: "<eos>", w.EQUALS: "=", w.FOLD: "?", w.WRITE_OUT: ":"}[token]


# The world.


def test_same_seed_gives_the_same_world_and_problems() -> None:
    one, two, other = w.World(3), w.World(3), w.World(4)
    np.testing.assert_array_equal(one.tables, two.tables)
    np.testing.assert_array_equal(one.known, two.known)
    assert (one.tables != other.tables).any()
    problems = [world.image_fold(np.random.default_rng(1), 4, "test") for world in (one, two)]
    assert problems[0].prompt == problems[1].prompt
    assert problems[0].target == problems[1].target
    np.testing.assert_array_equal(problems[0].image, problems[1].image)


def test_every_operation_is_a_latin_square_of_which_half_is_known(world: w.World) -> None:
    for table, known in zip(world.tables, world.known, strict=True):
        for lines in (table, table.T):
            assert all(sorted(line) == list(range(10)) for line in lines)
        assert (known.sum(axis=1) == 5).all()
    assert len({table.tobytes() for table in world.tables}) == w.OPERATIONS


@pytest.mark.parametrize("length", [2, 3, 8])
def test_text_answers_agree_with_a_fold_over_the_spelled_prompt(
    world: w.World, length: int
) -> None:
    generator = np.random.default_rng(length)
    for _ in range(50):
        problem = world.text_fold(generator, length)
        question = " ".join(map(spelled, problem.prompt[1:-1]))
        values = fold_spelled_out(world.tables, question)
        said = [spelled(token) for token in problem.target]
        assert problem.answer == values[-1]
        assert said[-1] == "<eos>"
        assert [int(said[i + 1]) for i, s in enumerate(said) if s == "="] == values


def test_an_image_shows_the_digits_that_the_target_speaks_of(world: w.World) -> None:
    images, labels = load_digits()
    of_tile = {
        (image / 16.0).astype(np.float32).tobytes(): int(label)
        for image, label in zip(images, labels, strict=True)
    }
    generator = np.random.default_rng(5)
    for _ in range(50):
        problem = world.image_fold(generator, 3, "train")
        cells = [t - w.CELL for t in problem.prompt if w.CELL <= t < w.CELL + w.CELLS]
        shown = []
        for cell in cells:
            row, column = divmod(cell, 3)
            tile = problem.image[8 * row : 8 * row + 8, 8 * column : 8 * column + 8]
            shown.append(of_tile[tile.tobytes()])
        assert tuple(shown) == problem.digits
        operations = [spelled(t) for t in problem.prompt if w.OPERATION <= t < w.EQUALS]
        pairs = zip(operations, shown[1:], strict=True)
        text = " ".join([str(shown[0]), *(f"{o} {d}" for o, d in pairs)])
        assert problem.answer == fold_spelled_out(world.tables, text)[-1]


def test_no_image_is_in_two_splits(world: w.World) -> None:
    splits = [set(world.image_indices(name)) for name in ("train", "validation", "test")]
    assert sum(map(len, splits)) == len(set.union(*splits)) == 1797
    assert len(splits[2]) == 300


def test_known_facts_stay_within_the_known_half(world: w.World) -> None:
    generator = np.random.default_rng(6)
    for _ in range(200):
        problem = world.text_known_fact(generator)
        assert world.known[problem.operations[0], problem.digits[0], problem.digits[1]]


def test_a_batch_labels_targets_only_and_refuses_a_mixture(world: w.World) -> None:
    generator = np.random.default_rng(7)
    problems = [world.text_fold(generator, 2), world.text_fold(generator, 4)]
    batch = w.collate(problems)
    for i, problem in enumerate(problems):
        labeled = batch.labels[i] != w.IGNORED_LABEL
        assert tuple(batch.labels[i][labeled]) == problem.target
        assert tuple(batch.input_ids[i][labeled]) == problem.target
    with pytest.raises(ValueError, match="not both"):
        w.collate([problems[0], world.image_fold(generator, 2, "train")])


# The shipped checkpoints.


@pytest.mark.parametrize("name", NAMES)
def test_checkpoints_are_sharded_bf16_safetensors(name: str) -> None:
    directory = demo.CHECKPOINTS / name
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    shards = sorted(set(index["weight_map"].values()))
    assert len(shards) >= 2
    for shard in shards:
        content = (directory / shard).read_bytes()
        (length,) = struct.unpack("<Q", content[:8])
        header = json.loads(content[8 : 8 + length])
        header.pop("__metadata__", None)
        assert {entry["dtype"] for entry in header.values()} == {"BF16"}
        assert {n for n, s in index["weight_map"].items() if s == shard} == set(header)
    assert {path.suffix for path in directory.iterdir()} == {".json", ".safetensors"}


def test_checkpoints_are_small() -> None:
    files = [path for path in demo.CHECKPOINTS.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 6 * MEBIBYTE


def test_the_expert_solves_long_chains_and_the_base_does_not(world: w.World) -> None:
    generator = np.random.default_rng(8)
    problems = [world.text_fold(generator, 6) for _ in range(100)]
    right = {}
    for name in ("base", "expert"):
        model = transformers.Qwen2ForCausalLM.from_pretrained(
            demo.CHECKPOINTS / name, dtype=torch.float32
        ).eval()
        replies = experiment.decode(model, problems)
        right[name] = sum(map(experiment.is_answer_right, problems, replies))
    assert right["expert"] >= 95
    assert right["base"] <= 30


def test_the_multimodal_model_sees_but_cannot_chain(
    world: w.World, multimodal: torch.nn.Module
) -> None:
    protocol = experiment.Protocol(answers_per_length=60, readings_per_length=60)
    answers, digits = experiment.evaluate(multimodal, world, 99, protocol)
    assert digits >= 0.85
    assert 0.1 <= answers <= 0.4


def test_the_replies_depend_on_the_image(world: w.World, multimodal: torch.nn.Module) -> None:
    generator = np.random.default_rng(9)
    problems = [world.image_read(generator, 3, "test") for _ in range(40)]
    blank = [replace(p, image=np.zeros_like(p.image)) for p in problems]
    read = [
        sum(r[:3] == list(p.target[:3]) for p, r in zip(problems, replies, strict=True))
        for replies in (
            experiment.decode(multimodal, problems),
            experiment.decode(multimodal, blank),
        )
    ]
    assert read[0] >= 25
    assert read[1] <= 4


def test_cached_decoding_equals_recomputing_the_whole_text(
    world: w.World, multimodal: torch.nn.Module
) -> None:
    generator = np.random.default_rng(10)
    problems = [world.image_fold(generator, 3, "test") for _ in range(8)]
    batch = w.collate(problems)
    ids = torch.from_numpy(batch.input_ids[:, : len(problems[0].prompt)])
    pixels = torch.from_numpy(batch.pixel_values)
    with torch.no_grad():
        for _ in range(len(problems[0].target)):
            logits = multimodal(input_ids=ids, pixel_values=pixels, use_cache=False).logits
            ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
    expected = ids[:, len(problems[0].prompt) :].tolist()
    assert experiment.decode(multimodal, problems) == expected


# The experiment.


@pytest.fixture(scope="module")
def deltas() -> dict[experiment.Prior, drift_fast.Delta]:
    expert, multimodal, base = (demo.CHECKPOINTS / n for n in ("expert", "multimodal", "base"))
    return {
        "multimodal": drift_fast.compute_delta(expert, multimodal),
        "base": drift_fast.compute_delta(expert, base),
    }


SHORT = experiment.Protocol(
    samples=24, steps=6, batch=4, answers_per_length=8, readings_per_length=8, log_every=2
)


def run_short(method: str, deltas: dict[experiment.Prior, drift_fast.Delta]) -> experiment.Outcome:
    return experiment.train_and_evaluate(
        method, 0, checkpoint=demo.CHECKPOINTS / "multimodal", deltas=deltas, protocol=SHORT
    )


def test_methods_differ_in_what_they_should(
    deltas: dict[experiment.Prior, drift_fast.Delta],
) -> None:
    last = {
        name: run_short(name, deltas).curve[-1]
        for name in ("sft", "drift", "drift_prior2", "merge_sft")
    }
    settings = experiment.METHODS["merge_sft"]
    low, high = sorted((settings.merge_attention, settings.merge_mlp))
    assert low - 0.1 < last["merge_sft"]["progress_base"] < high + 0.1
    assert abs(last["sft"]["progress_multimodal"]) < last["drift"]["progress_multimodal"]
    assert abs(last["sft"]["progress_base"]) < last["drift_prior2"]["progress_base"]
    assert last["drift_prior2"]["progress_base"] < last["merge_sft"]["progress_base"]


def test_progress_agrees_with_the_librarys(
    deltas: dict[experiment.Prior, drift_fast.Delta], multimodal: torch.nn.Module
) -> None:
    model = transformers.LlavaForConditionalGeneration.from_pretrained(
        demo.CHECKPOINTS / "multimodal", dtype=torch.float32
    )
    with drift_fast.Injection(model, deltas["base"]) as injection:
        progress = experiment.Progress(model, deltas["base"])
        assert progress() == 0.0
        generator = torch.Generator().manual_seed(0)
        parameters = dict(model.named_parameters())
        with torch.no_grad():
            for name, source in drift_fast.match_parameters(model, deltas["base"]).items():
                delta = deltas["base"][source].float()
                noise = torch.randn(delta.shape, generator=generator)
                parameters[name].add_(0.3 * delta + 0.001 * noise)
        assert progress() == pytest.approx(0.3, abs=0.01)
        assert progress() == pytest.approx(injection.metrics()["progress"], abs=1e-5)


def test_fine_tuning_sets_differ_by_seed_and_hold_their_share_of_reading(world: w.World) -> None:
    one, again, two = (
        experiment.fine_tuning_set(world, seed, experiment.Protocol()) for seed in (0, 0, 1)
    )
    assert [p.prompt for p in one] == [p.prompt for p in again]
    assert [p.prompt for p in one] != [p.prompt for p in two]
    assert len(one) == 256
    assert sum(p.prompt[-1] == w.WRITE_OUT for p in one) == 77


def test_held_out_problems_cannot_come_from_training_images() -> None:
    with pytest.raises(ValueError, match="held-out"):
        experiment.Protocol(split="train")


def test_an_unfinished_reply_is_wrong(world: w.World) -> None:
    problem = world.text_fold(np.random.default_rng(0), 3)
    assert experiment.is_answer_right(problem, list(problem.target))
    assert not experiment.is_answer_right(problem, list(problem.target[:-1]))
    assert not experiment.is_answer_right(problem, [w.EOS])


def test_paired_differences_are_taken_seed_by_seed() -> None:
    outcomes = [
        experiment.Outcome(method=method, seed=seed, answers_right=right, digits_read=0.5)
        for method, rights in (("sft", (0.2, 0.6)), ("drift", (0.3, 0.5)))
        for seed, right in enumerate(rights)
    ]
    row = demo.compare(outcomes, "sft")["drift"]["answers_right"]
    assert row["differences"] == pytest.approx([0.1, -0.1])
    assert row["mean"] == pytest.approx(0.0)
    assert row["better_in"] == 1


def test_curves_logged_at_different_steps_are_refused(tmp_path: Path) -> None:
    point = {"loss": 1.0, "progress_multimodal": 0.0, "progress_base": 0.0}
    with pytest.raises(ValueError, match="different steps"):
        figures.plot_curves(
            {"SFT": [[{"step": 1, **point}], [{"step": 2, **point}]]}, tmp_path / "curves.png"
        )


def test_a_missing_package_is_named_with_its_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib.util

    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "accelerate" else found(name)
    )
    with pytest.raises(ImportError, match=r"accelerate.*pip install 'drift-fast\[demo\]'"):
        demo.run(tmp_path / "out")


def test_a_short_demo_runs_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = demo.run(tmp_path, seeds=1, workers=1, protocol=SHORT)
    assert json.loads((tmp_path / "results.json").read_text()) == json.loads(json.dumps(result))
    assert [r["method"] for r in result["runs"]] == list(experiment.METHODS)
    assert set(result["paired"]) == {"sft", "merge_sft"}
    for run in result["runs"]:
        assert 0 <= run["answers_right"] <= 1
        assert 0 <= run["digits_read"] <= 1
        steps = [point["step"] for point in run["curve"]]
        assert steps == ([] if run["method"] == "as_is" else [2, 4, 6])
    for name in ("delta.png", "curves.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert len(drift_fast.Delta.open(tmp_path / "delta")) == 40
    printed = capsys.readouterr().out
    for expected in ("self_attn.q_proj", "layer 3", "Paired difference", "merge"):
        assert expected in printed


@pytest.mark.slow
def test_results_do_not_depend_on_the_number_of_processes(tmp_path: Path) -> None:
    one, two = (
        demo.run(tmp_path / str(workers), seeds=1, workers=workers, protocol=SHORT)
        for workers in (1, 2)
    )
    assert one["runs"] == two["runs"]


def test_other_libraries_are_not_heard_and_drift_fast_is(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with warnings.catch_warnings(record=True) as caught, quiet():
        warnings.warn("of another library", UserWarning, stacklevel=1)
        logging.getLogger("bitsandbytes.backends").warning("Failed to load a kernel")
        warnings.warn("λ is low", drift_fast.DriftWarning, stacklevel=1)
    assert caplog.records == []
    logging.getLogger("bitsandbytes.backends").warning("heard again")
    assert [record.message for record in caplog.records] == ["heard again"]
    assert [str(one.message) for one in caught] == ["λ is low"]
