"""The miniature end to end at a tiny size: pairs are equal, tables follow from the lines."""

from __future__ import annotations

import gzip
import importlib.util
import json
import math
import shutil
import statistics
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

if any(importlib.util.find_spec(name) is None for name in ("peft", "accelerate")):
    pytest.skip("the miniature needs peft and accelerate", allow_module_level=True)

HERE = Path(__file__).parents[2] / "examples" / "miniature"
OWN = (
    "choosing",
    "figures",
    "methods",
    "pool",
    "processes",
    "profiles",
    "run",
    "tables",
    "training",
    "worlds",
)


@pytest.fixture(scope="module")
def miniature() -> Iterator[Any]:
    """The example's modules, which it imports by bare names, and none of them left behind."""
    sys.path.insert(0, str(HERE))
    try:
        yield importlib.import_module("run")
    finally:
        sys.path.remove(str(HERE))
        for name in OWN:
            sys.modules.pop(name, None)


def tiny(miniature: Any) -> Any:
    protocol = miniature.training.experiment.Protocol(
        samples=24, steps=4, batch=4, answers_per_length=4, readings_per_length=4
    )
    return replace(
        miniature.FAST,
        sets=2,
        trials=2,
        methods=(
            "as_is",
            "sft",
            "task_arithmetic",
            "merge_sft_two",
            "drift_base",
            "drift_base_reversed",
            "motion_base",
            "drift_base_balanced",
        ),
        strengths=(0.5,),
        doses=(1.0,),
        protocol=protocol,
    )


@pytest.fixture(scope="module")
def finished(miniature: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    one = miniature.Miniature(
        tiny(miniature),
        tmp_path_factory.mktemp("miniature"),
        processes=1,
        device="cpu",
        clock=miniature.Clock(None),
    )
    for stage in ("checkpoints", "tune", "test", "dose", "report"):
        assert one.stage(stage) == 0
    assert not one.results.failed()
    return one


def of(lines: list[dict[str, Any]], **fields: Any) -> list[dict[str, Any]]:
    return [line for line in lines if all(line[k] == v for k, v in fields.items())]


@pytest.mark.slow
def test_every_method_of_the_profile_is_run_on_every_world_and_set(finished: Any) -> None:
    tested = of(finished.results.lines(), stage="test")
    pairs = {(line["method"], line["world"], line["set"]) for line in tested}
    assert pairs == {(m, 0, s) for m in finished.profile.methods for s in (0, 1)}
    assert len(tested) == len(pairs)


@pytest.mark.slow
def test_methods_of_one_set_train_on_equal_batches_and_other_sets_on_others(finished: Any) -> None:
    trained = [line for line in of(finished.results.lines(), stage="test") if "batches" in line]
    digests = {s: {line["batches"] for line in of(trained, set=s)} for s in (0, 1)}
    assert len(trained) == 12
    assert [len(found) for found in digests.values()] == [1, 1]
    assert digests[0] != digests[1]


@pytest.mark.slow
def test_what_is_chosen_is_the_best_trial_and_never_from_a_test(finished: Any) -> None:
    lines = finished.results.lines()
    tried = of(lines, stage="tune", method="sft")
    best = max(tried, key=lambda line: line["answers"])
    assert finished.settings("main")["sft"] == best["settings"]
    assert {line["split"] for line in of(lines, stage="tune")} == {"validation"}
    assert not {line["set"] for line in of(lines, stage="tune")} & {0, 1}
    balanced = finished.settings("main")["drift_base_balanced"]
    score = {
        json.dumps(line["settings"]): line["answers"] + line["digits"]
        for line in of(lines, stage="tune", method="drift_base")
    }
    assert score[json.dumps(balanced)] == max(score.values())


@pytest.mark.slow
def test_tables_follow_from_the_lines(finished: Any) -> None:
    written = (finished.out / "results.md").read_text(encoding="utf-8")
    rows = of(finished.results.lines(), stage="test", method="drift_base")
    answers = [row["answers"] for row in rows]
    cell = f"{statistics.fmean(answers):.3f} ± {statistics.stdev(answers):.3f}"
    assert f"| DRIFT adaptive | exp−base | {cell} |" in written
    sft = {row["set"]: row for row in of(finished.results.lines(), stage="test", method="sft")}
    gains = [row["digits"] - sft[row["set"]]["digits"] for row in rows]
    (row,) = [r for r in written.split("### ")[1].splitlines() if "| DRIFT adaptive | exp−b" in r]
    assert f"{statistics.fmean(gains):+.3f} ± " in row
    assert f"{sum(gain > 0 for gain in gains)}/2" in row
    for name in ("pareto.png", "progress.png"):
        assert (finished.out / name).read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_progress_ends_where_each_method_should(finished: Any) -> None:
    lines = of(finished.results.lines(), stage="test", set=0)
    progress = {line["method"]: line["progress"]["base"] for line in lines}
    assert progress["as_is"]["all"] == 0.0
    settings = finished.settings("main")
    for name in ("merge_sft_two", "motion_base"):
        for kind in ("attn", "mlp"):
            assert progress[name][kind] == pytest.approx(settings[name][kind], abs=0.05)
    assert progress["drift_base"]["all"] > 0 > progress["drift_base_reversed"]["all"]
    assert progress["task_arithmetic"]["all"] == pytest.approx(
        settings["task_arithmetic"]["weight"], abs=0.01
    )


@pytest.mark.slow
def test_a_second_call_runs_nothing_and_a_failed_run_is_run_again(
    finished: Any, miniature: Any
) -> None:
    before = finished.results.path.read_bytes()
    assert finished.stage("test") == 0
    assert finished.results.path.read_bytes() == before
    key = of(finished.results.lines(), stage="test", method="as_is", set=0)[0]["key"]
    copy = finished.out / "copy.jsonl"
    copy.write_bytes(before + b'{"key": "unfini')
    results = type(finished.results)(copy)
    assert results.done(key)
    results.add({"key": key, "method": "as_is", "error": "no room"})
    results = type(results)(copy)
    assert not results.done(key)
    assert [line["error"] for line in results.failed()] == ["no room"]
    assert len(results.lines()) == len(finished.results.lines()) - 1


@pytest.mark.slow
def test_results_can_be_packed_and_taken_up_elsewhere(
    finished: Any, miniature: Any, tmp_path: Path
) -> None:
    miniature.pack(finished.out, tmp_path / "results.tar.gz")
    miniature.unpack(tmp_path / "results.tar.gz", tmp_path / "other")
    for name in ("results.jsonl", "settings.json", "results.md"):
        assert (tmp_path / "other" / name).read_bytes() == (finished.out / name).read_bytes()


def test_nothing_starts_that_the_clock_does_not_allow(miniature: Any) -> None:
    ran: list[int] = []
    left = miniature.execute(
        [1, 2],
        ran.append,
        processes=1,
        clock=miniature.Clock(0.0),
        done=lambda job, result, seconds: None,
    )
    assert (left, ran) == (2, [])


# The arithmetic of pairs.


def pairs(worlds: list[list[float]]) -> list[dict[str, Any]]:
    return [
        {"world": w, "set": s, "answers": value}
        for w, sets in enumerate(worlds)
        for s, value in enumerate(sets)
    ]


def test_an_interval_is_over_the_means_of_worlds(miniature: Any) -> None:
    found = miniature.tables.difference(
        pairs([[0.5, 0.7], [0.3, 0.3]]), pairs([[0.4, 0.4], [0.3, 0.4]]), "answers"
    )
    # World means +0.2 and −0.05: mean 0.075, deviation 0.1768, t of one degree of freedom.
    assert found.mean == pytest.approx(0.075)
    assert found.interval == pytest.approx(12.706 * statistics.stdev([0.2, -0.05]) / math.sqrt(2))
    assert (found.wins, found.ties, found.pairs) == (2, 1, 4)
    assert found.told == "not told apart"


def test_pairs_that_the_baseline_lacks_are_left_out(miniature: Any) -> None:
    found = miniature.tables.difference(
        pairs([[0.5, 0.9], [0.6]]), pairs([[0.4], [0.4]]), "answers"
    )
    assert found.pairs == 2
    assert found.mean == pytest.approx(0.15)


# The methods.


def test_every_method_has_equal_trials_within_its_space(miniature: Any) -> None:
    from methods import METHODS, Interval, space_of, trials, tuned

    for regime in ("main", "large"):
        for name in tuned(regime):
            tried = trials(regime, name, 12)
            assert len({json.dumps(t) for t in tried}) == len(tried)
            assert len(tried) == (6 if name == "layer_swap" else 12)
            for settings in tried:
                for key, values in space_of(regime, name).items():
                    if isinstance(values, Interval):
                        assert values.low <= settings[key] <= values.high
                    else:
                        assert settings[key] in values
    assert trials("main", "merge_sft_two", 12) == trials("main", "motion_base", 12)
    # What states λ is tried twice as often where Δ is large, half of it over the main ranges.
    assert trials("strong", "drift", 8) == trials("main", "drift", 8)
    first, again = trials("strong", "merge_sft_mm", 8)[:8], trials("strong", "merge_sft_mm", 8)[8:]
    assert len(again) == 8
    assert min(min(t["attn"], t["mlp"]) for t in first) < 0.05
    for key, values in space_of("main", "merge_sft_mm").items():
        assert isinstance(values, Interval)
        assert all(values.low <= settings[key] <= values.high for settings in again)
    for method in METHODS.values():
        if method.like is not None:
            assert METHODS[method.like].space == method.space


# What is refused, and what is run again. Nothing here trains.


def made_up(miniature: Any, out: Path, **changes: Any) -> Any:
    profile = replace(tiny(miniature), methods=("as_is", "sft"), sets=1, **changes)
    return miniature.Miniature(profile, out, processes=1, device="cpu", clock=miniature.Clock(None))


def stand_in(job: Any, **_: Any) -> dict[str, Any]:
    """A line as a run has, without the run."""
    line = {"key": job.key, **vars(job), "settings": json.loads(job.settings)}
    return line | {"answers": 0.5, "digits": 0.5, "device": "cpu", "seconds": {"train": 7.0}}


def test_a_failed_trial_leaves_the_tuning_unfinished_until_it_is_run_again(
    miniature: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = made_up(miniature, tmp_path)
    bad = one.tuning_jobs("main")[1].key

    def failing(job: Any, **_: Any) -> dict[str, Any]:
        if job.key == bad:
            raise ValueError("no room")
        return stand_in(job)

    monkeypatch.setattr(miniature, "_run", failing)
    assert one.stage("tune") == 1
    assert not (tmp_path / "settings.json").exists()
    monkeypatch.setattr(miniature, "_run", stand_in)
    assert one.stage("tune") == 0
    assert json.loads((tmp_path / "settings.json").read_text())["main"]["sft"]["trials"] == 2


def test_a_command_of_which_a_run_failed_does_not_exit_with_zero(
    miniature: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(job: Any, **_: Any) -> dict[str, Any]:
        raise ValueError("no room")

    monkeypatch.setattr(miniature, "FAST", made_up(miniature, tmp_path).profile)
    monkeypatch.setattr(miniature, "_run", failing)
    command = ["--out", str(tmp_path), "--processes", "1", "--stage", "test"]
    assert miniature.main(command) == 3
    monkeypatch.setattr(miniature, "_run", stand_in)
    assert miniature.main(command) == 0


def test_settings_are_chosen_only_where_every_trial_has_every_validation_world(
    miniature: Any,
) -> None:
    tried = [
        {"method": "sft", "world": w, "settings": {"lr": lr}, "answers": lr, "digits": 1.0}
        for w in (11, 12)
        for lr in (0.1, 0.2)
    ]
    assert miniature.choose(tried, ["sft"], (11, 12))["sft"]["settings"] == {"lr": 0.2}
    with pytest.raises(
        ValueError, match=r"expected one run on each .* \[11, 12\], found .* \[11\]"
    ):
        miniature.choose(tried[:3], ["sft"], (11, 12))
    with pytest.raises(ValueError, match="no trial of 'sft'"):
        miniature.choose([], ["sft"], (11, 12))


def test_of_equal_trials_the_first_is_chosen_in_whatever_order_they_ended(
    miniature: Any, tmp_path: Path
) -> None:
    one = made_up(miniature, tmp_path)
    for job in reversed(one.tuning_jobs("main")):
        one._add(job, stand_in(job), 1.0)
    one._choose("main")
    first = json.loads(one.tuning_jobs("main")[0].settings)
    assert one.settings("main")["sft"] == first


def test_how_long_runs_take_is_known_from_earlier_lines(
    miniature: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(miniature, "_run", stand_in)
    one = made_up(miniature, tmp_path)
    earlier = replace(one.tuning_jobs("main")[0], set=99)
    one._add(earlier, stand_in(earlier) | {"seconds": {"train": 30.0, "evaluate": 10.0}}, 40.0)
    # Forty seconds a run, and thirty in all; of the first run ever, less is expected.
    one.clock = miniature.Clock(0.5)
    assert one.stage("tune") == 2


def test_a_checkpoint_is_measured_before_it_has_its_name(
    miniature: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worlds = miniature.worlds

    def killed(*_: Any) -> dict[str, float]:
        assert not worlds.exists(tmp_path, 7, "base")
        raise KeyboardInterrupt

    monkeypatch.setattr(worlds, "measure", killed)
    with pytest.raises(KeyboardInterrupt):
        worlds.train(tmp_path, 7, "base", shrink=10_000)
    assert not worlds.exists(tmp_path, 7, "base")
    monkeypatch.setattr(worlds, "measure", lambda *_: {"steps": 0.5})
    worlds.train(tmp_path, 7, "base", shrink=10_000)
    one = made_up(miniature, tmp_path, test_worlds=(7,), validation_worlds=(7,))
    one.clock = miniature.Clock(0.0)
    one.train({(7, "base")})
    (line,) = one.results.lines()
    assert line["key"] == "checkpoint/7/base"
    assert line["measured"] == {"steps": 0.5}


def test_an_unrelated_delta_has_the_norms_of_the_one_it_stands_for(
    miniature: Any, tmp_path: Path
) -> None:
    import shutil

    import torch
    from safetensors.torch import load_file, save_file

    made_up(miniature, tmp_path)
    training, worlds = miniature.training, miniature.worlds
    expert = worlds.directory(tmp_path, 0, "expert")
    generator = torch.Generator().manual_seed(0)
    for name, size in (("unrelated", 0.01), ("strong", 0.1)):
        shutil.copytree(expert, worlds.directory(tmp_path, 0, name))
        for path in sorted(worlds.directory(tmp_path, 0, name).glob("*.safetensors")):
            state = {
                key: (t.float() + size * torch.randn(t.shape, generator=generator)).to(t.dtype)
                for key, t in load_file(path).items()
            }
            save_file(state, path, metadata={"format": "pt"})
    job = training.Job(stage="test", regime="strong", world=0, set=0, method="drift_base_unrelated")
    control = training._delta(job, tmp_path)
    true = training._delta(replace(job, method="drift_base"), tmp_path)
    assert set(control) == set(true)
    for name in true:
        given, wanted = control[name].double(), true[name].double()
        assert float(given.norm()) == pytest.approx(float(wanted.norm()), rel=1e-3)
        assert float(given.flatten() @ wanted.flatten()) < 0.9 * float(wanted.norm() ** 2)
    merged = training._merged(
        replace(job, method="merge_sft_two_unrelated"),
        tmp_path,
        training.METHODS["merge_sft_two_unrelated"],
        training.REGIMES["strong"],
        {"attn": 1.0, "mlp": 1.0},
        tmp_path / "merged",
    )
    before, after = (
        {k: v for path in at.glob("*.safetensors") for k, v in load_file(path).items()}
        for at in (worlds.directory(tmp_path, 0, "multimodal"), merged)
    )
    moved = sum(float((after[n].double() - before[n].double()).norm() ** 2) for n in before)
    wanted = sum(float(true[name].double().norm() ** 2) for name in true)
    assert moved == pytest.approx(wanted, rel=1e-2)


def test_a_line_of_other_checkpoints_or_another_protocol_is_run_again(
    miniature: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(miniature, "_run", stand_in)
    one = made_up(miniature, tmp_path)
    assert one.stage("tune") == 0
    ran: list[str] = []
    monkeypatch.setattr(miniature, "_run", lambda job, **_: ran.append(job.key) or stand_in(job))
    assert made_up(miniature, tmp_path).stage("tune") == 0
    assert ran == []
    other = made_up(miniature, tmp_path, protocol=replace(one.profile.protocol, batch=2))
    assert other.stage("tune") == 0
    assert len(ran) == 2
    path = sorted(miniature.worlds.directory(tmp_path, 0, "expert").glob("*.safetensors"))[0]
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    assert other.stage("tune") == 0
    assert len(ran) == 4


def test_results_are_added_to_where_only_the_checkpoints_of_what_is_left_are(
    miniature: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worlds = miniature.worlds
    monkeypatch.setattr(miniature, "_run", stand_in)
    trained: list[tuple[int, str]] = []

    def train(root: Path, number: int, name: str, **_: Any) -> dict[str, Any]:
        trained.append((number, name))
        path = worlds.directory(root, number, name)
        path.mkdir(parents=True)
        (path / "config.json").write_text("{}")
        (path / "model.safetensors").write_bytes(f"{number} {name}".encode())
        return {"knows": {}, "steps": 1, "attempts": 1, "seconds": 1.0, "device": "cpu"}

    monkeypatch.setattr(worlds, "train", train)
    there, here = tmp_path / "there", tmp_path / "here"
    changes = {"test_worlds": (7,), "validation_worlds": (8,)}
    one = made_up(miniature, there, **changes)
    assert (one.stage("checkpoints"), one.stage("tune")) == (0, 0)
    miniature.pack(there, tmp_path / "packed.tar.gz")
    miniature.unpack(tmp_path / "packed.tar.gz", here)
    shutil.copytree(there / "checkpoints" / "7", here / "checkpoints" / "7")
    trained.clear()
    other = made_up(miniature, here, **changes)
    # The trials are done, on checkpoints whose digests their own lines name: nothing is missing.
    assert other.stage("checkpoints") == 0
    assert trained == []
    assert (other.stage("tune"), other.stage("test")) == (0, 0)
    # Another one in their place, however, is noticed.
    train(here, 8, "multimodal")
    path = worlds.directory(here, 8, "multimodal") / "model.safetensors"
    path.write_bytes(b"other")
    with pytest.raises(SystemExit, match="missing: 8/base, 8/expert"):
        other.stage("tune")


def test_a_parent_is_not_trained_anew_under_what_was_trained_from_another(
    miniature: Any, tmp_path: Path
) -> None:
    worlds = miniature.worlds
    one = made_up(miniature, tmp_path, test_worlds=(7,), validation_worlds=(7,))
    path = worlds.directory(tmp_path, 7, "expert")
    path.mkdir(parents=True)
    (path / "config.json").write_text("{}")
    assert worlds.missing(tmp_path, {(7, "expert")}) == []
    assert worlds.missing(tmp_path, {(7, "strong")}) == [(7, "strong")]
    with pytest.raises(SystemExit, match="7/expert, trained from one that is not there"):
        one.train({(7, "base"), (7, "expert")})


def test_a_directory_of_another_profile_is_refused_and_earlier_lines_are_only_reported(
    miniature: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(miniature, "_run", stand_in)
    one = made_up(miniature, tmp_path)
    assert one.stage("tune") == 0
    for changes in ({"trials": 3}, {"flag": "--full"}):
        with pytest.raises(SystemExit, match="give another --out"):
            made_up(miniature, tmp_path, **changes)
    lines = [json.loads(text) for text in one.results.path.read_text().splitlines()]
    kept = [{k: v for k, v in line.items() if k != "profile"} for line in lines]
    one.results.path.write_text("".join(json.dumps(line) + "\n" for line in kept))
    earlier = made_up(miniature, tmp_path)
    with pytest.raises(SystemExit, match="earlier version"):
        earlier.stage("tune")
    written = miniature.tables.write(earlier.results.lines(), [], tmp_path / "results.md")
    assert "2 lines are of an earlier version" in written.read_text(encoding="utf-8")
    with pytest.raises(SystemExit, match="give another --out"):
        made_up(miniature, tmp_path, flag="--full")


def test_lines_that_are_no_pair_are_not_subtracted(miniature: Any) -> None:
    line = pairs([[0.5]])[0] | {"key": "a", "batches": "1", "protocol": "2", "profile": "3"}
    line["checkpoints"] = {"base": "4"}
    alike = line | {"checkpoints": {"base": "4", "unrelated": "5"}}
    assert miniature.tables.difference([alike], [line], "answers").pairs == 1
    for changes in (
        {"batches": "x"},
        {"protocol": "x"},
        {"profile": "x"},
        {"checkpoints": {"base": "x"}},
    ):
        with pytest.raises(ValueError, match="are no pair"):
            miniature.tables.difference([line | changes], [line], "answers")


def test_gpus_are_those_the_user_left_visible_and_are_taken_in_turn(
    miniature: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    processes = importlib.import_module("processes")
    assert processes.cards({}, 2) == ["0", "1"]
    assert processes.cards({"CUDA_VISIBLE_DEVICES": "3, GPU-5d,-1,0"}, 2) == ["3", "GPU-5d"]
    for stated in ("", "-1"):
        with pytest.raises(SystemExit, match="expected a GPU"):
            processes.cards({"CUDA_VISIBLE_DEVICES": stated}, 0)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-5d")
    monkeypatch.setattr(processes.gc, "freeze", lambda: None)
    begin = processes.beginning("cuda")
    seen = []
    for _ in range(3):
        begin()
        seen.append(processes.os.environ["CUDA_VISIBLE_DEVICES"])
    assert seen == ["3", "GPU-5d", "3"]


def test_the_shipped_settings_of_a_control_are_those_of_what_it_controls(
    miniature: Any, tmp_path: Path
) -> None:
    shipped = json.loads((HERE / "settings.json").read_text(encoding="utf-8"))["main"]
    assert shipped["drift_base_shuffled"] == {"like": "drift_base"}
    one = miniature.Miniature(
        miniature.FAST, tmp_path, processes=1, device="cpu", clock=miniature.Clock(None)
    )
    settings = one.settings("main")
    assert settings["drift_base_shuffled"] == settings["drift_base"]
    # And none of them was found on the world that the fast form tests on.
    assert shipped["sft"]["worlds"]
    assert one.tuned_on() == []


@pytest.mark.parametrize("form", ["full", "fast"])
def test_the_published_tables_follow_from_the_published_lines(
    form: str, miniature: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    published = HERE / form
    packed = published / "results.jsonl.gz"
    lines = gzip.decompress(packed.read_bytes()) if packed.exists() else None
    (tmp_path / "results.jsonl").write_bytes(lines or (published / "results.jsonl").read_bytes())
    monkeypatch.setattr(miniature.figures, "write", lambda *_: [])
    profile = miniature.FULL if form == "full" else miniature.FAST
    one = miniature.Miniature(
        profile, tmp_path, processes=1, device="cpu", clock=miniature.Clock(None)
    )
    # None failed, each is what the profile asks for, and nothing is missing.
    assert not one.results.failed()
    keys = {line["key"] for line in one.results.lines() if line["stage"] != "checkpoints"}
    regimes = ("main", *profile.regimes)
    if "tune" in profile.stages:
        # What is shipped is what was best of the published trials.
        for regime in regimes:
            one._choose(regime)
        chosen = json.loads((tmp_path / "settings.json").read_text(encoding="utf-8"))
        assert chosen == json.loads((HERE / "settings.json").read_text(encoding="utf-8"))
    asked = [job for regime in regimes for job in one.test_jobs(regime)] + one.dose_jobs()
    if "tune" in profile.stages:
        asked += [job for regime in regimes for job in one.tuning_jobs(regime)]
    assert keys == {job.key for job in asked}
    one.report()
    written = [(folder / "results.md").read_text("utf-8") for folder in (tmp_path, published)]
    assert written[0] == written[1]


def test_the_documentation_quotes_the_published_table() -> None:
    """Every pair of answers and digits in the page on whether to use it, against results.md."""
    text = (HERE / "full" / "results.md").read_text(encoding="utf-8")
    main = text.partition("## An expert and a multimodal model from one base")[2]
    found = {}
    for row in main.partition("###")[0].splitlines():
        cells = [cell.strip() for cell in row.strip("| ").split("|")]
        if len(cells) == 8 and cells[2][:1] == "0":
            means = [cell.partition(" ")[0].removeprefix("0") for cell in cells[2:4]]
            found[cells[0], cells[1]] = " / ".join(means)
    two = "merge, then SFT: λ of attention and of MLP"
    quoted = {
        "DRIFT, `adaptive`": ["DRIFT adaptive"] * 2,
        "DRIFT, `adaptive`, first 30 % of steps": ["DRIFT adaptive, first 30 %"] * 2,
        "planned motion (`attach_motion`)": ["planned motion, first 10 %"] * 2,
        "merge, then SFT": [two] * 2,
        "the best merge without fine-tuning": ["merge: linear (BR2V)", "merge: task arithmetic"],
        "DRIFT with the Δ of an expert for something else": ["DRIFT adaptive, unrelated Δ"] * 2,
    }
    page = (HERE.parents[1] / "docs" / "should_i_use_it.md").read_text(encoding="utf-8")
    assert f"| SFT, without Δ | {found['SFT', '']} | |" in page
    for label, (mm, base) in quoted.items():
        assert f"| {label} | {found[mm, 'exp−mm']} | {found[base, 'exp−base']} |" in page


@pytest.mark.slow
def test_the_report_names_the_hardware_once_and_that_it_was_tuned_on_its_test_world(
    finished: Any,
) -> None:
    import torch
    import transformers

    written = (finished.out / "results.md").read_text(encoding="utf-8")
    told = f"on cpu with torch {torch.__version__}, transformers {transformers.__version__}"
    assert written.count(told) == written.count("on cpu") == 1
    assert "Tuned and tested on the same world (0)" in written
    saved = json.loads((finished.out / "settings.json").read_text(encoding="utf-8"))["main"]
    assert saved["drift_base_reversed"] == {"like": "drift_base"}


def test_a_regime_with_a_failed_trial_waits_and_the_others_do_not(
    miniature: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = made_up(miniature, tmp_path, regimes=("lora", "vision"), regime_trials=2, regime_worlds=1)
    bad = one.tuning_jobs("lora")[0].key

    def failing(job: Any, **_: Any) -> dict[str, Any]:
        if job.key == bad:
            raise ValueError("no room")
        return stand_in(job)

    monkeypatch.setattr(miniature.training, "needed", lambda job: ["base", "expert", "multimodal"])
    monkeypatch.setattr(miniature, "_run", failing)
    assert one.stage("regimes") == 1
    tested = of(one.results.lines(), stage="test")
    assert {line["regime"] for line in tested} == {"vision"}
    assert list(json.loads((tmp_path / "settings.json").read_text())) == ["vision"]
    monkeypatch.setattr(miniature, "_run", stand_in)
    assert one.stage("regimes") == 0
    tested = of(one.results.lines(), stage="test", regime="lora")
    assert {line["method"] for line in tested} == set(one.methods("lora"))


def test_a_checkpoint_that_does_not_know_enough_is_begun_again_and_never_written(
    miniature: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worlds = miniature.worlds
    plan = replace(worlds.PLANS["base"], most=1, batch=4)
    monkeypatch.setitem(worlds.PLANS, "base", plan)
    begun: list[int] = []
    fit = worlds._fit

    def counted(*given: Any) -> Any:
        begun.append(given[-1])
        return fit(*given)

    monkeypatch.setattr(worlds, "_fit", counted)
    with pytest.raises(RuntimeError, match=r"world 7, base: .*'facts': 0.99.* in 3 attempts"):
        worlds.train(tmp_path, 7, "base")
    assert begun == [0, 1, 2]
    assert not list(worlds.directory(tmp_path, 7, "base").parent.iterdir())
    monkeypatch.setitem(worlds.PLANS, "base", replace(plan, goals={"facts": 0.0}))
    found = worlds.train(tmp_path, 7, "base")
    assert (found["attempts"], found["steps"]) == (1, 1)
    assert worlds.exists(tmp_path, 7, "base")


def test_a_failed_checkpoint_does_not_stop_the_others_and_is_trained_again(
    miniature: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worlds = miniature.worlds
    one = made_up(miniature, tmp_path, test_worlds=(7, 8), validation_worlds=(7,))
    train = worlds.train

    def failing(root: Path, number: int, name: str, **_: Any) -> Any:
        if (number, name) == (7, "base"):
            raise RuntimeError("expected at least")
        return train(root, number, name, shrink=10_000)

    monkeypatch.setattr(worlds, "train", failing)
    assert one.train({(7, "expert"), (8, "base")}) == 2
    assert worlds.exists(tmp_path, 8, "base")
    assert [line["key"] for line in one.results.failed()] == ["checkpoint/7/base"]
    monkeypatch.setattr(worlds, "train", lambda *a, **_: train(*a, shrink=10_000))
    assert one.train({(7, "expert"), (8, "base")}) == 0
    assert not one.results.failed()


@pytest.mark.slow
def test_a_line_says_what_lambda_was_to_be_expected(finished: Any) -> None:
    import drift_fast

    line = of(finished.results.lines(), stage="test", method="drift_base", set=0)[0]
    # One step of warm-up rounded down to none, then a cosine of four steps.
    factors = [0.5 * (1 + math.cos(math.pi * step / 4)) for step in range(4)]
    assert line["rates"] == pytest.approx(line["settings"]["lr"] * sum(factors))
    worlds = finished.results.path.parent / "checkpoints" / "0"
    delta = drift_fast.compute_delta(
        worlds / "expert", worlds / "base", modules=("attn", "mlp"), threads=1
    )
    squares = sum(float(delta[name].double().square().sum()) for name in delta)
    count = sum(delta[name].numel() for name in delta)
    assert line["progress"]["base"]["rms"] == pytest.approx((squares / count) ** 0.5, rel=1e-5)
    (row,) = [
        row
        for row in (finished.out / "results.md").read_text(encoding="utf-8").splitlines()
        if row.startswith("| 0.5 |")
    ]
    doses = [
        line
        for line in of(finished.results.lines(), method="drift_base")
        if 0.42 < line["settings"]["alpha"] < 0.59
    ]
    found = [
        x["progress"]["base"]["all"] * x["progress"]["base"]["rms"] / x["rates"] for x in doses
    ]
    assert f"{statistics.median(found):.3f}" in row
