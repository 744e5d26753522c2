"""Who comes from whom is found from samples of three models, and with it which Δ to take.

Every model here is a random one moved at random, so its lineage is known; distances are compared
with those that numpy computes of all elements in float64.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from drift_fast import check
from drift_fast.preflight.lineage import Lineage
from support.commands import run
from support.range_server import RangeServer
from support.synthetic import (
    Floats,
    Stored,
    language_model,
    projector,
    stored,
    vision_tower,
    write_checkpoint,
)

SHAPE = {"layers": 2, "hidden": 32, "inner": 48}
NESTED = "model.language_model."


@dataclass(frozen=True)
class World:
    """Makes models from one generator, and writes them."""

    rng: np.random.Generator
    directory: Path

    def new(self, **shape: int) -> dict[str, Stored]:
        return language_model(self.rng, **{**SHAPE, **shape}, dtype="F64")

    def trained(self, model: Mapping[str, Stored], share: float) -> dict[str, Stored]:
        """Move every tensor at random, by a share of its norm."""
        return {
            name: stored(
                tensor.values.reshape(tensor.shape) + self.rng.normal(0, share, tensor.shape),
                "F64",
            )
            for name, tensor in model.items()
        }

    def write(self, name: str, model: Mapping[str, Stored], dtype: str = "F32") -> Path:
        held = {key: stored(t.values, dtype, t.shape) for key, t in model.items()}
        return write_checkpoint(self.directory / name, held)

    def multimodal(self, name: str, model: Mapping[str, Stored], dtype: str = "F32") -> Path:
        """Write a multimodal model with this backbone."""
        nested = {NESTED + key.removeprefix("model."): t for key, t in model.items()}
        shape = {"hidden": SHAPE["hidden"]}
        towers = {**vision_tower(self.rng, **shape), **projector(self.rng, **shape)}
        return self.write(name, {**towers, **nested}, dtype)


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(np.random.default_rng(7), tmp_path)


Models = tuple[dict[str, Stored], dict[str, Stored], dict[str, Stored]]


def both_from_base(world: World) -> Models:
    base = world.new()
    return world.trained(base, 0.012), world.trained(base, 0.0075), base


def both_from_base_far(world: World) -> Models:
    base = world.new()
    return world.trained(base, 0.6), world.trained(base, 0.5), base


def multimodal_trained_long(world: World) -> Models:
    base = world.new()
    return world.trained(base, 0.02), world.trained(base, 0.3), base


def reasoning_from_another_of_the_base(world: World) -> Models:
    base = world.new()
    return world.trained(world.trained(base, 0.3), 0.02), world.trained(base, 0.01), base


def frozen_backbone(world: World) -> Models:
    base = world.new()
    return world.trained(base, 0.02), base, base


def base_is_reasoning(world: World) -> Models:
    base = world.new()
    return base, world.trained(base, 0.02), base


def reasoning_inside_multimodal(world: World) -> Models:
    base = world.new()
    reasoning = world.trained(base, 0.02)
    return reasoning, reasoning, base


def multimodal_from_reasoning(world: World) -> Models:
    base = world.new()
    reasoning = world.trained(base, 0.02)
    return reasoning, world.trained(reasoning, 0.02), base


def base_from_multimodal(world: World) -> Models:
    multimodal = world.new()
    return world.trained(multimodal, 0.03), multimodal, world.trained(multimodal, 0.03)


def base_exchanged_with_reasoning(world: World) -> Models:
    base = world.new()
    return base, world.trained(base, 0.02), world.trained(base, 0.03)


def base_is_a_sibling(world: World) -> Models:
    ancestor = world.new()
    learned = (world.trained(ancestor, share) for share in (0.03, 0.02, 0.015))
    reasoning, multimodal, base = learned
    return reasoning, multimodal, base


def base_is_a_far_sibling(world: World) -> Models:
    ancestor = world.new()
    learned = (world.trained(ancestor, share) for share in (0.03, 0.015, 0.03))
    reasoning, multimodal, base = learned
    return reasoning, multimodal, base


def unrelated_base(world: World) -> Models:
    ancestor = world.new()
    return world.trained(ancestor, 0.03), world.trained(ancestor, 0.02), world.new()


def unrelated_multimodal(world: World) -> Models:
    base = world.new()
    return world.trained(base, 0.03), world.new(), base


def all_unrelated(world: World) -> Models:
    return world.new(), world.new(), world.new()


CASES: list[tuple[Callable[[World], Models], str, str | None, str]] = [
    (both_from_base, "common base", "base", "undo"),
    (both_from_base_far, "common base", "base", "undo"),
    (multimodal_trained_long, "common base", "base", "give that one as --base"),
    (reasoning_from_another_of_the_base, "common base", "base", "as it should"),
    (frozen_backbone, "base is multimodal", "multimodal", "the same"),
    (base_is_reasoning, "base is reasoning", None, "is zero"),
    (reasoning_inside_multimodal, "nothing to move", None, "nothing to move"),
    (multimodal_from_reasoning, "reasoning between", None, "exchanged"),
    (base_from_multimodal, "multimodal between", "multimodal", "undoes nothing"),
    (base_exchanged_with_reasoning, "reasoning between", None, "give the base first"),
    (base_is_a_sibling, "elsewhere", "base", "training of its own"),
    (base_is_a_far_sibling, "elsewhere", "multimodal", "training of its own"),
    (unrelated_base, "unrelated base", "multimodal", "not part of it"),
    (unrelated_multimodal, "unrelated models", None, "no common origin"),
    (all_unrelated, "unrelated models", None, "no common origin"),
]


@pytest.mark.parametrize(
    ("models", "verdict", "subtract", "words"), CASES, ids=[case[0].__name__ for case in CASES]
)
@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_the_lineage_of_three_models_is_found(
    world: World,
    models: Callable[[World], Models],
    verdict: str,
    subtract: str | None,
    words: str,
    dtype: str,
) -> None:
    reasoning, multimodal, base = models(world)
    report = check(
        world.write("reasoning", reasoning, dtype),
        world.multimodal("multimodal", multimodal, dtype),
        base=world.write("base", base, dtype),
    )
    found = lineage_of(report)
    assert (found.verdict, found.subtract) == (verdict, subtract), found
    assert words in found.reason
    assert report.ok == (verdict != "unrelated models")
    (row,) = (row for row in report.findings if row.subject == "lineage")
    assert row.message == found.reason
    assert row.between == ("reasoning − base", "multimodal − base")
    assert found.reason in report.table().replace("\n  ", "\n")
    assert json.loads(json.dumps(report.to_dict()))["lineage"]["verdict"] == verdict


def lineage_of(report: object) -> Lineage:
    found = getattr(report, "lineage", None)
    assert isinstance(found, Lineage)
    return found


def test_distances_are_those_of_float64(world: World) -> None:
    reasoning, multimodal, base = base_is_a_sibling(world)
    report = check(
        world.write("reasoning", reasoning, "F64"),
        world.multimodal("multimodal", multimodal, "F64"),
        base=world.write("base", base, "F64"),
        modules="mlp,attn",
    )
    found = lineage_of(report).distances
    assert found is not None

    def mean(of: Callable[[Floats, Floats, Floats], float]) -> float:
        """Return the mean over the matrices, which are small enough to be read whole."""
        names = [name for name in base if "_proj.weight" in name]
        assert len(names) == found.tensors == 14
        values = [of(reasoning[x].values, multimodal[x].values, base[x].values) for x in names]
        return float(np.mean(values))

    def cosine(a: Floats, b: Floats) -> float:
        return float(a @ b / math.sqrt((a @ a) * (b @ b)))

    close = pytest.approx
    assert found.reasoning_base == close(mean(lambda r, v, b: (r - b) @ (r - b) / (b @ b)))
    assert found.multimodal_base == close(mean(lambda r, v, b: (v - b) @ (v - b) / (b @ b)))
    assert found.reasoning_multimodal == close(mean(lambda r, v, b: (r - v) @ (r - v) / (b @ b)))
    assert found.product == close(mean(lambda r, v, b: (r - b) @ (v - b) / (b @ b)))
    assert found.similarity_reasoning_base == close(mean(lambda r, v, b: cosine(r, b)))
    assert found.similarity_multimodal_base == close(mean(lambda r, v, b: cosine(v, b)))
    assert found.similarity_reasoning_multimodal == close(mean(lambda r, v, b: cosine(r, v)))
    # Each has about as much of its own as it was trained by, which is the share of ‖W‖.
    assert [math.sqrt(x) for x in found.branches] == close([0.03, 0.02, 0.015], rel=0.1)


def test_a_cast_is_the_same_model_and_a_small_training_is_not(world: World) -> None:
    base = world.new()
    reasoning, multimodal = world.trained(base, 0.02), world.trained(base, 0.01)
    paths = world.write("reasoning", reasoning), world.multimodal("multimodal", multimodal)
    cast = lineage_of(check(*paths, base=world.write("cast", reasoning, "BF16")))
    assert cast.verdict == "base is reasoning"
    near = world.trained(reasoning, 0.004)
    trained = lineage_of(check(world.write("near", near), paths[1], base=paths[0]))
    assert trained.verdict == "common base"


def test_rounding_is_not_taken_for_training_of_its_own(world: World) -> None:
    # ‖R−B‖ is .2 % of ‖W‖, and rounding to bfloat16 another .15 %.
    base = world.new()
    reasoning, multimodal = world.trained(base, 0.002), world.trained(base, 0.002)
    paths = world.write("reasoning", reasoning), world.multimodal("multimodal", multimodal)
    found = lineage_of(check(*paths, base=world.write("base", base, "BF16")))
    assert found.verdict == "common base"
    assert found.distances is not None
    # It looks like it.
    assert found.distances.branches[2] > 0.3 * found.distances.branches[0]


def test_another_theta_of_the_base_shows_a_base_of_the_expert_alone(world: World) -> None:
    reasoning, multimodal, base = multimodal_trained_long(world)
    paths = (
        world.write("reasoning", reasoning),
        world.multimodal("multimodal", multimodal),
        world.write("base", base),
    )
    for path, theta in zip(paths, (1e4, 1e6, 1e4), strict=True):
        (path / "config.json").write_text(json.dumps({"model_type": "qwen2", "rope_theta": theta}))
    found = lineage_of(check(*paths[:2], base=paths[2]))
    assert (found.verdict, found.subtract) == ("other base", "multimodal")
    assert "compare them in short runs" in found.reason


def test_a_vocabulary_of_another_size_does_not_matter(world: World) -> None:
    reasoning, multimodal, base = both_from_base(world)
    more = world.rng.normal(0, 1, (20, SHAPE["hidden"]))
    multimodal |= {
        name: stored(more, "F64")
        for name in multimodal
        if name in ("model.embed_tokens.weight", "lm_head.weight")
    }
    found = lineage_of(
        check(
            world.write("reasoning", reasoning),
            world.multimodal("multimodal", multimodal),
            base=world.write("base", base),
        )
    )
    assert (found.verdict, found.subtract) == ("common base", "base")


@pytest.mark.parametrize("shape", [{"hidden": 40}, {"layers": 3}])
def test_a_base_of_another_size_is_not_compared(world: World, shape: dict[str, int]) -> None:
    reasoning, multimodal, _ = both_from_base(world)
    report = check(
        world.write("reasoning", reasoning),
        world.multimodal("multimodal", multimodal),
        base=world.write("base", world.new(**shape)),
    )
    found = lineage_of(report)
    assert (found.verdict, found.subtract) == ("not compared", "multimodal")
    assert "the base does not match the multimodal model" in found.reason
    assert report.ok
    assert "not compared" in report.table()


def test_two_models_that_do_not_match_are_not_compared(world: World) -> None:
    _, multimodal, base = both_from_base(world)
    paths = world.write("reasoning", world.new(hidden=40)), world.multimodal("vlm", multimodal)
    report = check(*paths, base=world.write("base", base))
    assert (lineage_of(report).verdict, lineage_of(report).subtract) == ("not compared", None)
    assert not report.ok


def test_base_and_multimodal_model_that_are_exchanged_are_named_as_such(world: World) -> None:
    reasoning, multimodal, base = both_from_base(world)
    text, vlm = world.write("base", base), world.multimodal("multimodal", multimodal)
    found = lineage_of(check(world.write("reasoning", reasoning), text, base=vlm))
    assert (found.verdict, found.subtract) == ("exchanged", None)


def test_a_fused_weight_is_left_out_and_the_others_are_compared(world: World) -> None:
    reasoning, multimodal, base = both_from_base(world)
    fused = dict(multimodal)
    for layer in range(SHAPE["layers"]):
        at = f"model.layers.{layer}.self_attn."
        parts = [fused.pop(f"{at}{part}_proj.weight") for part in "qkv"]
        rows = np.concatenate([part.values.reshape(part.shape) for part in parts])
        fused[f"{at}qkv_proj.weight"] = stored(rows, "F64")
    found = lineage_of(
        check(
            world.write("reasoning", reasoning),
            world.multimodal("multimodal", fused),
            base=world.write("base", base),
        )
    )
    assert (found.verdict, found.subtract) == ("common base", "base")
    assert found.distances is not None
    assert found.distances.tensors == 2 * 4


def test_values_that_are_not_finite_are_left_out(world: World) -> None:
    reasoning, multimodal, base = both_from_base(world)
    name = "model.layers.0.mlp.up_proj.weight"
    broken = reasoning[name].values.copy()
    broken[5] = math.nan
    reasoning[name] = stored(broken, "F64", reasoning[name].shape)
    found = lineage_of(
        check(
            world.write("reasoning", reasoning),
            world.multimodal("multimodal", multimodal),
            base=world.write("base", base),
        )
    )
    assert found.verdict == "common base"
    assert found.distances is not None
    assert found.distances.tensors == 13


def test_of_models_on_a_server_few_bytes_are_read(world: World) -> None:
    large = {"hidden": 512, "inner": 1024, "layers": 1}
    base = world.new(**large)
    paths = [
        world.write("reasoning", world.trained(base, 0.03), "BF16"),
        world.multimodal("multimodal", world.trained(base, 0.02), "BF16"),
        world.write("base", base, "BF16"),
    ]
    with RangeServer(world.directory) as server:
        urls = [f"{server.url}/{path.name}" for path in paths]
        found = lineage_of(check(*urls[:2], base=urls[2]))
        received = server.nbytes
    assert (found.verdict, found.subtract) == ("common base", "base")
    assert found.distances is not None
    assert found.distances.elements <= 24 * 4096
    whole = sum((path / "model.safetensors").stat().st_size for path in paths)
    # Spans that are near each other are read in one request.
    assert received < whole / 2
    here = lineage_of(check(*paths[:2], base=paths[2]))
    assert here.verdict == found.verdict


def test_a_third_model_and_a_base_are_refused_together(world: World) -> None:
    reasoning, multimodal, base = both_from_base(world)
    paths = world.write("reasoning", reasoning), world.multimodal("multimodal", multimodal)
    text = world.write("base", base)
    with pytest.raises(ValueError, match="MODEL or base, not both"):
        check(paths[0], text, paths[1], base=text)


def test_without_a_base_nothing_is_said_of_lineage(world: World) -> None:
    reasoning, multimodal, _ = both_from_base(world)
    report = check(world.write("reasoning", reasoning), world.multimodal("multimodal", multimodal))
    assert report.lineage is None
    assert report.to_dict()["lineage"] is None
    assert "lineage" not in str(report)


def test_the_command_says_which_delta_to_take(world: World) -> None:
    reasoning, multimodal, base = both_from_base(world)
    arguments = (
        "check",
        world.write("reasoning", reasoning),
        world.multimodal("multimodal", multimodal),
        "--base",
        world.write("base", base),
    )
    ended = run(*arguments)
    assert ended.returncode == 0
    assert "note: lineage: take reasoning − base" in ended.stdout
    found = json.loads(run(*arguments, "--json").stdout)
    assert found["lineage"]["subtract"] == "base"
