"""Several processes write one delta: with the bytes of one, or with nothing that opens.

Every rank is a real process. Those that end early are killed by themselves at a known place, so
that no test waits for a moment.
"""

from __future__ import annotations

import json
import sys
import threading
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch.distributed import FileStore, HashStore

from drift_fast import CheckpointError, Delta, DriftError, NonFiniteError, compute_delta
from drift_fast.delta import process_group
from drift_fast.delta.parallel import identify, parse_ranks
from drift_fast.delta.process_group import Meeting, _error_of
from drift_fast.delta.shared_writing import balance
from support.commands import PROGRAM
from support.processes import TESTS, Child, environment, finish
from support.synthetic import Pair, everything_under, refused, write_pair

# Two layers of such tensors are 8 shards.
SHARD = 400
LAUNCHERS = {
    "torchrun": ("RANK", "WORLD_SIZE"),
    "mpirun": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    "srun": ("SLURM_PROCID", "SLURM_NTASKS"),
}
ALL_VARIABLES = tuple(name for names in LAUNCHERS.values() for name in names)


def start(
    pair: Pair,
    out: Path,
    rank: int,
    size: int,
    *,
    launcher: str | None = "torchrun",
    limit: float = 30.0,
    **arguments: Any,
) -> Child:
    """Start one rank; what is in `arguments` replaces the pair's paths, or is the worker's."""
    variables = environment(*ALL_VARIABLES, DRIFT_FAST_RANK_TIMEOUT=limit)
    if launcher is not None:
        variables |= dict(zip(LAUNCHERS[launcher], (str(rank), str(size)), strict=True))
    given = {
        "reasoning": str(pair.reasoning),
        "multimodal": str(pair.multimodal),
        "out": str(out),
        "rank": rank,
        "size": size,
    }
    given |= arguments
    given["keywords"] = {"max_shard_size": SHARD} | arguments.get("keywords", {})
    worker = TESTS / "support" / "rank_worker.py"
    return Child(sys.executable, worker, json.dumps(given), env=variables, forked=True)


def reports(*ranks: Child) -> list[dict[str, Any]]:
    """Return what each rank printed, and its standard error; a killed one printed nothing."""
    return [
        (json.loads(ended.stdout) if ended.stdout else {}) | {"stderr": ended.stderr}
        for ended in finish(ranks)
    ]


def run(pair: Pair, out: Path, size: int, **arguments: Any) -> list[dict[str, Any]]:
    return reports(*(start(pair, out, rank, size, **arguments) for rank in range(size)))


def every_byte(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


@pytest.fixture(scope="module")
def alone(pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process writes."""
    out = tmp_path_factory.mktemp("alone") / "delta"
    compute_delta(pair.reasoning, pair.multimodal, out, max_shard_size=SHARD, ranks=None)
    return out


# ------------------------------------------------------------------ the same bytes


@pytest.mark.parametrize(("launcher", "size"), [("torchrun", 2), ("mpirun", 3), ("srun", 2)])
def test_ranks_write_the_bytes_of_one_process(
    pair: Pair, alone: Path, out: Path, launcher: str, size: int
) -> None:
    found = run(pair, out, size, launcher=launcher)
    expected = Delta.open(alone)
    assert [one.get("names") for one in found] == [expected.names] * size, found
    assert every_byte(out) == every_byte(alone)
    assert len(every_byte(out)) > 2 * size
    assert everything_under(out.parent) == {"delta", *(f"delta/{n}" for n in every_byte(alone))}


def test_the_ranks_of_torch_distributed_write_the_bytes_of_one_process(
    pair: Pair, alone: Path, out: Path, tmp_path: Path
) -> None:
    # No launcher's variable is set, so only the process group can tell.
    found = run(pair, out, 2, launcher=None, gloo=str(tmp_path / "store"))
    assert all(one.get("names") for one in found), found
    assert every_byte(out) == every_byte(alone)
    assert everything_under(out.parent) == {"delta", *(f"delta/{n}" for n in every_byte(alone))}


def test_stated_ranks_need_no_launcher_and_more_ranks_than_shards_is_no_error(
    pair: Pair, out: Path, tmp_path: Path
) -> None:
    one = tmp_path / "one"
    keywords: dict[str, Any] = {"max_shard_size": "1GB", "modules": "attn"}
    compute_delta(pair.reasoning, pair.multimodal, one, **keywords)
    started = [
        start(pair, out, rank, 2, launcher=None, keywords=keywords | {"ranks": [rank, 2]})
        for rank in range(2)
    ]
    found = reports(*started)
    assert all(one.get("names") for one in found), found
    assert every_byte(out) == every_byte(one)
    assert "1 shards over 2 ranks are uneven" in found[0]["stderr"]
    assert "max_shard_size=" in found[0]["stderr"]
    assert "uneven" not in found[1]["stderr"]


def test_an_empty_directory_that_stands_is_filled_and_an_old_delta_is_replaced(
    pair: Pair, alone: Path, out: Path
) -> None:
    out.mkdir()
    assert all(one.get("names") for one in run(pair, out, 2))
    assert every_byte(out) == every_byte(alone)
    taken = run(pair, out, 2)
    assert [one["error"] for one in taken] == ["FileExistsError"] * 2
    assert taken[1]["text"].startswith("rank 0: ")
    assert "overwrite" in taken[1]["text"]
    assert every_byte(out) == every_byte(alone), "a refused run changed the delta"
    keywords = {"overwrite": True, "modules": "attn"}
    found = run(pair, out, 2, keywords=keywords)
    assert [len(one["names"]) for one in found] == [8, 8]
    assert everything_under(out.parent) == {"delta", *(f"delta/{n}" for n in every_byte(out))}


def test_a_stored_delta_is_saved_by_several_ranks(pair: Pair, alone: Path, out: Path) -> None:
    assert all(one.get("names") for one in run(pair, out, 2, saved=str(alone)))
    assert every_byte(out) == every_byte(alone)


def test_none_is_this_process_alone_whatever_a_launcher_says(
    pair: Pair, alone: Path, out: Path
) -> None:
    found = reports(start(pair, out, 0, 3, keywords={"ranks": None}))
    assert found[0].get("names"), found
    assert every_byte(out) == every_byte(alone)


# ------------------------------------------------------------------ nothing that opens


def assert_nothing_opens(out: Path) -> None:
    assert not out.exists()
    assert not list(out.parent.rglob("drift.json"))


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_stops_the_others_and_the_next_run_cleans_up(
    pair: Pair, alone: Path, out: Path, victim: int
) -> None:
    started = [
        start(pair, out, rank, 2, at_progress="die" if rank == victim else None)
        for rank in range(2)
    ]
    found = reports(*started)
    survivor = found[1 - victim]
    assert started[victim].returncode == -9
    assert survivor["error"] == "DriftError", survivor
    assert f"rank {victim} exited unexpectedly" in survivor["text"]
    assert_nothing_opens(out)
    # Rank 0 removes everything; without it the hidden directory stays, for the next run.
    assert bool(everything_under(out.parent)) == (victim == 0)
    if victim == 0:
        stale = out.with_name(".delta.incomplete")
        assert stale.is_dir()
        assert all(one.get("names") for one in run(pair, out, 2))
        assert every_byte(out) == every_byte(alone)
        assert not stale.exists()


def test_a_single_process_cleans_up_after_several(pair: Pair, alone: Path, out: Path) -> None:
    hidden = out.with_name(".delta.incomplete")
    hidden.mkdir(parents=True)
    (hidden / "delta-00001-of-00009.safetensors").write_text("left behind")
    compute_delta(pair.reasoning, pair.multimodal, out, max_shard_size=SHARD)
    assert every_byte(out) == every_byte(alone)


def test_what_a_crashed_run_left_in_the_store_is_not_taken_for_this_runs(
    pair: Pair, alone: Path, out: Path
) -> None:
    file = out.with_name(".delta.ranks")
    left = FileStore(str(file), -1)
    for key in ("here-1", "go-stale", "failed", "seen-0", "seen-1"):
        left.set(key, '{"rank": 1, "kind": "ValueError", "text": "old"}')
    # Rank 1 meets the leavings alone for a while.
    second = start(pair, out, 1, 2)
    second.wait_until(lambda: not left.get("here-1").startswith(b"{"), limit=30)
    found = reports(start(pair, out, 0, 2), second)
    assert all(one.get("names") for one in found), found
    assert every_byte(out) == every_byte(alone)
    assert not file.exists()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_never_comes_is_named_and_the_remedy_said(
    pair: Pair, out: Path, rank: int
) -> None:
    (found,) = reports(start(pair, out, rank, 3, limit=0.5))
    assert found["error"] == "DriftError"
    expected = "ranks 1, 2 of 3 never came" if rank == 0 else "rank 1 timed out waiting for rank 0"
    assert expected in found["text"]
    assert "ranks=None" in found["text"]
    assert everything_under(out.parent) == set()


def test_only_the_rank_that_did_not_come_is_named(pair: Pair, out: Path) -> None:
    first, last = reports(*(start(pair, out, rank, 3, limit=8.0) for rank in (0, 2)))
    assert "rank 1 of 3 never came" in first["text"]
    assert "rank 2 timed out waiting for rank 0" in last["text"]
    assert everything_under(out.parent) == set()


def test_a_rank_that_came_and_gave_up_sooner_is_not_named(tmp_path: Path) -> None:
    meeting = process_group.Meeting(rank=0, size=3, target=tmp_path / "delta", limit=1.0)
    with process_group._store(meeting) as store:
        other = FileStore(str(tmp_path / ".delta.ranks"), -1)
        other.set("here-2", "token")
        leaving = threading.Timer(0.5, other.delete_key, ["here-2"])
        leaving.start()
        with pytest.raises(DriftError, match=r"^rank 1 of 3 never came"):
            process_group._call_roll(store, meeting)
        leaving.join()
        assert not store.has("here-2")
        del leaving, other


@pytest.mark.parametrize("question", ["check", "get"])
def test_a_store_that_rank_0_removes_during_a_question_answers_soon(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, question: str
) -> None:
    monkeypatch.setattr(process_group, "_GONE", timedelta(seconds=0.1))
    file = tmp_path / "store"
    store = process_group._Store(lambda: FileStore(str(file), -1), file)
    store.set("key", "text")
    looked = iter([True, False])
    if question == "get":
        store._store = SimpleNamespace(check=lambda keys: True, get=store._store.get)
        looked = iter([True, True, False])
    # It is there for the last time that anybody looks before the question.
    monkeypatch.setattr(process_group._Store, "is_there", property(lambda self: next(looked)))
    file.unlink()
    assert store.get("key") is None
    assert not file.exists()


@pytest.mark.parametrize("marked", [True, False])
def test_a_file_that_a_late_rank_makes_is_removed_and_rank_0s_is_not(
    tmp_path: Path, marked: bool
) -> None:
    meeting = process_group.Meeting(rank=1, size=2, target=tmp_path / "delta", limit=1.0)
    file = tmp_path / ".delta.ranks"
    FileStore(str(file), -1).set(process_group._MARK if marked else "refcount", "")
    with process_group._store(meeting):
        pass
    assert file.exists() == marked


@pytest.mark.slow  # torch is loaded twice
def test_rank_0_alone_under_a_process_group_does_not_wait_for_ever(
    pair: Pair, out: Path, tmp_path: Path
) -> None:
    # Rank 1 joins the group, then writes alone, as a script does that computes on one rank only.
    store = str(tmp_path / "store")
    started = [
        start(pair, out, 0, 2, launcher=None, limit=1.0, gloo=store),
        start(pair, tmp_path / "own", 1, 2, launcher=None, gloo=store, keywords={"ranks": None}),
    ]
    first, second = reports(*started)
    assert "rank 1 of 2 never came" in first["text"], first
    assert second.get("names"), second
    assert_nothing_opens(out)


def test_a_rank_that_sees_other_files_is_refused_and_all_hear_of_it(
    pair: Pair, out: Path, tmp_path: Path
) -> None:
    other = write_pair(tmp_path / "other", seed=9)
    started = [
        start(pair, out, 0, 2),
        start(pair, out, 1, 2, reasoning=str(other.reasoning)),
    ]
    first, second = reports(*started)
    assert "rank 1 sees another reasoning than rank 0" in second["text"], second
    assert first["text"].startswith("rank 1: rank 1 sees another reasoning")
    assert everything_under(out.parent) == set()


def test_other_arguments_on_one_rank_are_refused(pair: Pair, out: Path) -> None:
    started = [
        start(pair, out, rank, 2, keywords={"dtype": dtype})
        for rank, dtype in enumerate(("bfloat16", "float32"))
    ]
    assert "another arguments" in reports(*started)[1]["text"]
    assert everything_under(out.parent) == set()


def test_a_missing_source_on_one_rank_reaches_all_with_its_rank(pair: Pair, out: Path) -> None:
    missing = str(out.parent / "absent")
    started = [start(pair, out, 0, 2), start(pair, out, 1, 2, multimodal=missing)]
    first, second = reports(*started)
    assert (first["error"], second["error"]) == ("FileNotFoundError", "FileNotFoundError")
    assert first["text"].startswith("rank 1: ")
    assert missing in first["text"]
    assert everything_under(out.parent) == set()


def test_an_interruption_of_one_rank_ends_all(pair: Pair, out: Path) -> None:
    started = [start(pair, out, 0, 2), start(pair, out, 1, 2, at_progress="interrupt")]
    first, second = reports(*started)
    assert second["error"] == "KeyboardInterrupt"
    assert "rank 1 was interrupted" in first["text"], first
    assert everything_under(out.parent) == set()


def test_nan_in_one_ranks_share_is_refused_as_in_one_process_or_counted(
    out: Path, tmp_path: Path
) -> None:
    broken = write_pair(tmp_path / "broken", seed=2)
    (path,) = broken.reasoning.glob("*.safetensors")
    content = path.read_bytes()
    # The last bytes are some tensor's, in one rank's share.
    path.write_bytes(content[:-2] + b"\xff\x7f")
    keywords = {"modules": "all", "rows": "index"}
    with pytest.raises(NonFiniteError) as caught:
        compute_delta(broken.reasoning, broken.multimodal, out, **keywords)  # type: ignore[arg-type]
    found = run(broken, out, 2, keywords=keywords)
    assert [one["error"] for one in found] == ["NonFiniteError"] * 2
    assert found[0]["text"] == str(caught.value)
    assert found[1]["text"] == f"rank 0: {caught.value}"
    assert everything_under(out.parent) == set()
    counted: dict[str, Any] = keywords | {"allow_nonfinite": True}
    assert all(one.get("names") for one in run(broken, out, 2, keywords=counted))
    one = tmp_path / "one"
    compute_delta(broken.reasoning, broken.multimodal, one, max_shard_size=SHARD, **counted)
    assert every_byte(out) == every_byte(one)
    assert Delta.open(out).stats.total.nonfinite == 1


# ------------------------------------------------------------------ how they meet


def test_one_process_group_serves_again(pair: Pair, alone: Path, out: Path, tmp_path: Path) -> None:
    found = run(pair, out, 2, launcher=None, gloo=str(tmp_path / "store"), again=True)
    assert all(one.get("names") for one in found), found
    assert every_byte(out) == every_byte(alone)


def test_a_rank_answered_while_it_called_again_leaves_no_call_for_the_next_run(
    tmp_path: Path,
) -> None:
    shared = HashStore()
    caller, answerer = (process_group._Store(lambda: shared) for _ in range(2))
    first = Meeting(0, 2, tmp_path, 10.0)
    rank_0 = threading.Thread(target=process_group._call_roll, args=(answerer, first))
    has = caller.has

    def has_and_lets_the_other_answer(key: str) -> bool:
        found = has(key)
        if shared.num_keys() and not rank_0.is_alive() and not rank_0.ident:
            rank_0.start()
            rank_0.join()
        return found

    caller.has = has_and_lets_the_other_answer  # type: ignore[method-assign]
    process_group._call_roll(caller, Meeting(1, 2, tmp_path, 10.0))
    assert rank_0.ident, "rank 0 never answered"
    assert not answerer.has("here-1")


def test_a_call_that_is_answered_while_it_is_read_keeps_nobody_waiting() -> None:
    # A store's own limit is half an hour, and nothing may set it on the user's.
    shared = HashStore()
    store = process_group._Store(lambda: shared)
    store.set("here-1", "token")

    def check(keys: list[str]) -> bool:
        process_group._Store(lambda: shared).clear("here-1")
        return True

    store._store = SimpleNamespace(check=check, get=shared.get)
    assert store.get("here-1") is None


@pytest.mark.parametrize("kind", [CheckpointError, FileExistsError, ValueError, OSError])
def test_an_error_reaches_the_others_as_its_own_kind_with_the_rank(kind: type[Exception]) -> None:
    found = _error_of({"rank": 1, "kind": kind.__name__, "text": "a shard is cut off"})
    assert type(found) is kind
    assert str(found) == "rank 1: a shard is cut off"


@pytest.mark.parametrize("kind", ["SystemExit", "print", "absent", "UnicodeDecodeError"])
def test_an_error_that_cannot_be_made_again_is_a_drift_error(kind: str) -> None:
    found = _error_of({"rank": 2, "kind": kind, "text": "what it said"})
    assert type(found) is DriftError
    assert str(found) == "rank 2: what it said"


def test_nothing_is_pickled_between_ranks() -> None:
    source = Path(process_group.__file__).read_text(encoding="utf-8")
    assert "_object" not in source
    assert "dist.send(" in source


def test_other_ranks_than_those_of_the_process_group_are_refused(
    pair: Pair, out: Path, tmp_path: Path
) -> None:
    found = run(
        pair,
        out,
        2,
        launcher=None,
        gloo=str(tmp_path / "store"),
        keywords={"ranks": [0, 3]},
    )
    assert {one["error"] for one in found} == {"ValueError"}
    assert "rank 1 of 2" in found[1]["text"]


# ------------------------------------------------------------------ who takes part


def test_a_launcher_is_known_by_its_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ALL_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    assert identify("auto") == (0, 1)
    for rank, size in LAUNCHERS.values():
        with monkeypatch.context() as patch:
            patch.setenv(rank, "2")
            patch.setenv(size, "5")
            assert identify("auto") == (2, 5)
            assert identify(None) == (0, 1)
            assert identify((1, 3)) == (1, 3)
    with monkeypatch.context() as patch:
        patch.setenv("WORLD_SIZE", "4")
        assert identify("auto") == (0, 1), "a size without a rank is no launcher"


def test_a_slurm_batch_script_itself_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ALL_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in {"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_JOB_ID": "7"}.items():
        monkeypatch.setenv(name, value)
    assert identify("auto") == (0, 1)
    monkeypatch.setenv("SLURM_STEP_ID", "0")
    assert identify("auto") == (0, 4)


@pytest.mark.parametrize("ranks", [(2, 2), (-1, 2), (0, 0), (0,), "all", (0, "2")])
def test_ranks_without_meaning_are_refused(ranks: Any) -> None:
    with refused(ValueError, "rank"):
        identify(ranks)


def test_what_the_command_line_calls_ranks() -> None:
    assert [parse_ranks(text) for text in ("auto", "none", "1/4")] == ["auto", None, (1, 4)]
    for text in ("4", "4/4", "a/b", ""):
        with refused(ValueError, "rank"):
            parse_ranks(text)


@pytest.mark.parametrize("limit", ["0", "-1", "soon", "nan", "inf"])
def test_a_time_limit_without_meaning_is_refused(
    pair: Pair, out: Path, monkeypatch: pytest.MonkeyPatch, limit: str
) -> None:
    monkeypatch.setenv("DRIFT_FAST_RANK_TIMEOUT", limit)
    with refused(ValueError, "DRIFT_FAST_RANK_TIMEOUT", limit):
        compute_delta(pair.reasoning, pair.multimodal, out, ranks=(0, 2))


def test_the_largest_shards_go_first_and_each_to_whoever_has_least() -> None:
    shares = balance([5, 1, 4, 3, 2], 2)
    assert sorted(shard for share in shares for shard in share) == [0, 1, 2, 3, 4]
    assert [sum([5, 1, 4, 3, 2][shard] for shard in share) for share in shares] == [8, 7]
    assert all(share == sorted(share) for share in shares)
    assert balance([7], 3) == [[0], [], []]


# ------------------------------------------------------------------ the command


def command(pair: Pair, out: Path, rank: int, size: int, *more: object) -> Child:
    variables = environment(RANK=rank, WORLD_SIZE=size, DRIFT_FAST_RANK_TIMEOUT=30)
    paths = [pair.reasoning, pair.multimodal, "--out", out]
    return Child(*PROGRAM, "delta", *paths, *more, env=variables)


def test_the_command_writes_with_all_ranks_and_one_of_them_talks(
    pair: Pair, alone: Path, out: Path
) -> None:
    first, second = finish(
        [command(pair, out, rank, 2, "--max-shard-size", SHARD) for rank in range(2)]
    )
    assert (first.returncode, second.returncode) == (0, 0), (first, second)
    assert "written to" in first.stdout
    assert (second.stdout, second.stderr) == ("", "")
    assert every_byte(out) == every_byte(alone)
    again = command(pair, out.with_name("other"), 0, 2, "--ranks", "none").finish()
    assert again.stdout
    assert again.returncode == 0
