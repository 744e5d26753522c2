"""The benchmark suite: its pairs, what it calls wrong, what it runs, and what it reports.

No time that is measured here decides anything.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from drift_fast import DriftError
from drift_fast.bench import (
    aims,
    check,
    commands,
    controls,
    hardware,
    measure,
    page_cache,
    timing,
    verify,
)
from drift_fast.bench import pair as pairs
from drift_fast.bench import session as session_module
from drift_fast.bench.commands import Entry
from drift_fast.bench.options import RIVALS, BenchOptions
from drift_fast.bench.pair import Pair, make_pair
from drift_fast.bench.report import markdown
from drift_fast.bench.results import Results, Row, above_baseline_of
from drift_fast.bench.session import Session
from drift_fast.cli.main import main
from support.synthetic import refused, round_once

LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
NO_RIVALS = tuple(f"--without={name}" for name in RIVALS)


def quiet(line: str) -> None:
    """Say nothing."""


@pytest.fixture(scope="session")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bench")


@pytest.fixture(scope="session")
def tiny(directory: Path) -> Pair:
    """A tiny pair with the renamed checkpoint; read only."""
    return make_pair(directory, "tiny", renamed=True)


@pytest.fixture
def session(tiny: Pair, directory: Path, tmp_path: Path) -> Session:
    """A session on the tiny pair that has run nothing yet."""
    return Session(
        BenchOptions(size="tiny", repeats=2, cold=True),
        tiny,
        tmp_path,
        empty_results(tiny),
        quiet,
        commands.environment(1),
    )


def empty_results(pair: Pair, kind: str = "delta") -> Results:
    return Results(
        kind=kind,
        size=pair.label,
        nbytes=pair.nbytes,
        delta_nbytes=pair.delta_nbytes,
        threads=2,
        repeats=2,
        command="drift-fast bench",
        hardware={
            "processor": "a processor",
            "machine": "x86_64",
            "cores": 2,
            "memory_nbytes": 2**34,
            "system": "Linux",
            "file_system": "ext4",
        },
        versions={"drift_fast": "0.1.0", "python": "3.11"},
        date="2026-11-24",
    )


# ------------------------------------------------------------------ pairs


def test_a_pair_opens_as_two_models_of_one_backbone(tiny: Pair) -> None:
    import drift_fast

    report = drift_fast.inspect(tiny.reasoning, tiny.multimodal, modules="all", rows="index")

    assert report.coverage.fraction == 1.0
    assert {row.name for row in report.stats} == {tiny.multimodal_name(n) for n in tiny.shapes}
    assert report.nbytes == tiny.nbytes


@pytest.mark.parametrize(
    ("size", "gigabytes", "tensors"),
    [("0.5B", 0.99, 290), ("1.5B", 3.09, 338), ("3B", 6.17, 434), ("7B", 15.23, 339)],
)
def test_the_sizes_are_those_of_the_real_models(size: str, gigabytes: float, tensors: int) -> None:
    model = pairs.SIZES[size]
    shapes = pairs.backbone(model, model.layers)

    assert len(shapes) == tensors
    assert 2 * sum(map(math.prod, shapes.values())) / 1e9 == pytest.approx(gigabytes, abs=0.005)


def test_no_two_tensors_of_a_pair_are_equal(tiny: Pair) -> None:
    for path in (tiny.reasoning, tiny.multimodal):
        stored = check.Stored(path)
        names = tiny.shapes if path == tiny.reasoning else map(tiny.multimodal_name, tiny.shapes)
        contents = [bytes(stored.bits(name)[:32]) for name in names]
        assert len(set(contents)) == len(contents) == len(tiny.shapes)


def test_the_renamed_checkpoint_holds_the_multimodal_values(tiny: Pair) -> None:
    assert tiny.renamed is not None
    renamed, multimodal = check.Stored(tiny.renamed), check.Stored(tiny.multimodal)
    for name in tiny.shapes:
        assert np.array_equal(renamed.bits(name), multimodal.bits(tiny.multimodal_name(name)))


def test_shards_stay_below_their_size(tmp_path: Path) -> None:
    pair = make_pair(tmp_path, "tiny", shard_nbytes=60_000)

    files = pairs.shards(pair.reasoning)
    assert len(files) > 2
    assert all(path.stat().st_size < 60_000 + 4096 for path in files)
    assert set(check.Stored(pair.reasoning)._places) == set(pair.shapes)


def test_a_whole_pair_is_kept_and_a_damaged_one_written_anew(tmp_path: Path) -> None:
    first = make_pair(tmp_path, "tiny")
    file = pairs.shards(first.reasoning)[0]
    whole, written = file.read_bytes(), file.stat().st_mtime_ns

    make_pair(tmp_path, "tiny")
    assert file.stat().st_mtime_ns == written

    os.truncate(file, len(whole) - 2)
    make_pair(tmp_path, "tiny")
    assert file.read_bytes() == whole

    seal = first.reasoning.with_name("text.seal.json")
    seal.write_text("[]")
    make_pair(tmp_path, "tiny")
    assert file.stat().st_mtime_ns != written
    assert json.loads(seal.read_bytes())["files"][file.name] == len(whole)


def test_a_pair_is_refused_where_it_does_not_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pairs.shutil, "disk_usage", lambda _: SimpleNamespace(free=1_000_000_000))
    with refused(OSError, "3.0 GB", "1.0 GB are free", "--layers"):
        make_pair(tmp_path, "0.5B", outputs=1)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_pairs_without_meaning_are_refused(tmp_path: Path) -> None:
    with refused(ValueError, "2B", "1.5B"):
        make_pair(tmp_path, "2B")
    with refused(ValueError, "at least one layer", "0"):
        make_pair(tmp_path, "tiny", layers=0)


# ------------------------------------------------------------------ right and wrong


def test_rounding_once_to_bfloat16_is_the_reference_s() -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(0, 1, 20_000) * 2.0 ** rng.integers(-60, 60, 20_000)
    # Halfway between two neighbours: to the even one.
    halves = (np.arange(1, 400, 2) / 2 + 128) * 2.0 ** rng.integers(-20, 20, 200)
    for some in (values, halves, -halves, np.zeros(3)):
        assert np.array_equal(check.round_to_bfloat16(some), round_once(some, "BF16"))


def test_the_truth_is_that_of_float64_and_is_kept(tiny: Pair) -> None:
    true = check.truth(tiny, threads=2)

    a, b = check.Stored(tiny.reasoning), check.Stored(tiny.multimodal)
    for name in tiny.shapes:
        x, y = check.widened(a.bits(name)), check.widened(b.bits(tiny.multimodal_name(name)))
        norms = [float(np.linalg.norm(v)) for v in (x - y, x, y)]
        wanted = [*norms, float(x @ y) / norms[1] / norms[2]]
        assert true[tiny.multimodal_name(name)] == pytest.approx(wanted, rel=1e-12)
    kept = tiny.reasoning.with_name("truth.json")
    before = kept.stat().st_mtime_ns
    assert check.truth(tiny, threads=1) == true
    assert kept.stat().st_mtime_ns == before


def test_statistics_that_are_off_by_more_than_a_millionth_are_wrong(tiny: Pair) -> None:
    true = check.truth(tiny, threads=2)
    name = next(iter(true))

    def planted(column: int, value: float) -> check.Verdict:
        return check.check_statistics(
            true | {name: [value if i == column else x for i, x in enumerate(true[name])]}, true
        )

    assert not check.check_statistics(true, true).wrong
    assert not planted(0, true[name][0] * (1 + 5e-7)).wrong
    for verdict in (planted(2, true[name][2] * (1 + 5e-6)), planted(3, true[name][3] - 5e-6)):
        assert name in verdict.wrong
        assert verdict.error == pytest.approx(5e-6, rel=1e-3)
    assert name in planted(1, math.nan).wrong
    assert (
        "1 tensors are missing or not expected"
        in check.check_statistics(
            {key: row for key, row in true.items() if key != name}, true
        ).wrong
    )


def test_one_wrong_bit_of_a_delta_is_found(tiny: Pair, tmp_path: Path) -> None:
    import drift_fast

    out = tmp_path / "delta"
    drift_fast.compute_delta(tiny.reasoning, tiny.multimodal, out, modules="all", rows="index")
    names = check.sample(tiny)
    assert check.check_delta(tiny, out, names) == check.Verdict(
        None, 10, sum(math.prod(tiny.shapes[name]) for name in names)
    )

    file = pairs.shards(out)[0]
    content = bytearray(file.read_bytes())
    at = check.Stored(out)._places[tiny.multimodal_name(names[3])][1]
    content[at + 2] ^= 1
    file.write_bytes(content)
    wrong = check.check_delta(tiny, out, names).wrong
    assert tiny.multimodal_name(names[3]) in wrong
    assert "1 of" in wrong
    assert not check.check_delta(tiny, out, names[:2]).wrong


def test_a_merge_is_compared_bit_for_bit_or_to_float32(tiny: Pair, tmp_path: Path) -> None:
    import drift_fast

    out = tmp_path / "merged"
    weight = commands.MERGE_WEIGHT
    drift_fast.merge("linear", tiny.reasoning, tiny.multimodal, out, weight=weight, rows="index")
    names = check.sample(tiny)
    numel = sum(math.prod(tiny.shapes[name]) for name in names)
    for exact in (True, False):
        found = check.check_merge(tiny, out, names, weight, exact=exact)
        assert found == check.Verdict(None, 10, numel)
    assert "differ" in check.check_merge(tiny, out, names, 0.5, exact=False).wrong

    file = pairs.shards(out)[0]
    content = bytearray(file.read_bytes())
    at = check.Stored(out)._places[tiny.multimodal_name(names[3])][1]
    content[at] ^= 1
    file.write_bytes(content)
    assert "1 of" in check.check_merge(tiny, out, names, weight, exact=True).wrong
    found = check.check_merge(tiny, out, names, weight, exact=False)
    assert not found.wrong
    assert found.error is not None
    assert 0 < found.error < 2**-7
    content[at + 1] ^= 0x80
    file.write_bytes(content)
    assert "1 of" in check.check_merge(tiny, out, names, weight, exact=False).wrong
    assert "is missing" in check.check_merge(tiny, tmp_path, names, weight, exact=True).wrong


def test_the_merges_are_run_only_when_asked_for() -> None:
    assert BenchOptions().parts == ["statistics", "delta"]
    assert BenchOptions(only=("merge",)).parts == ["merge"]


def test_a_delta_that_lacks_a_tensor_is_wrong(tiny: Pair, tmp_path: Path) -> None:
    assert "is missing" in check.check_delta(tiny, tmp_path, check.sample(tiny)).wrong


def planted_rival(tmp_path: Path, results: Mapping[str, Any]) -> Entry:
    """Return a rival whose statistics are these."""
    path = tmp_path / "planted.json"
    code = f"import pathlib; pathlib.Path({str(path)!r}).write_text({json.dumps(results)!r})"
    command = (sys.executable, "-c", code)
    return Entry("statistics", "planted", "a planted rival", command, command, results=path)


def test_a_rival_that_is_wrong_is_marked_and_timed_all_the_same(
    session: Session, tmp_path: Path
) -> None:
    true = check.truth(session.pair, threads=1)
    name = next(iter(true))
    off = true | {name: [true[name][0] * 1.01, *true[name][1:]]}

    rows = verify.check_entries(session, [planted_rival(tmp_path, off)])
    row = rows["statistics", "planted"]
    session.results.rows.append(row)
    timing.time_rounds(session, [(row, planted_rival(tmp_path, off))])

    assert row.error == pytest.approx(0.01)
    assert len(row.walls) == 2
    assert f"**wrong**: {name} is off by 1.0e-02" in markdown(session.results)


def test_nothing_is_timed_where_our_own_results_are_wrong(session: Session, tmp_path: Path) -> None:
    true = check.truth(session.pair, threads=1)
    entry = planted_rival(tmp_path, {name: [0.0, 1.0, 1.0, 0.0] for name in true})
    ours = Entry("statistics", "ours", "ours", entry.command, entry.checked, results=entry.results)
    with refused(DriftError, "nothing was timed", "process/statistics/ours", "is off by"):
        verify.check_entries(session, [ours])


def test_a_rival_that_fails_says_so_and_the_others_run(session: Session, tmp_path: Path) -> None:
    code = "import sys; sys.exit('no such luck')"
    broken = (sys.executable, "-c", code)
    entries = [
        Entry("statistics", "broken", "a broken rival", broken, broken),
        planted_rival(tmp_path, check.truth(session.pair, threads=1)),
    ]
    rows = verify.check_entries(session, entries)

    assert rows["statistics", "broken"].absent == "failed: no such luck"
    assert not rows["statistics", "planted"].wrong
    session.results.rows += rows.values()
    assert "| a broken rival | failed: no such luck |" in markdown(session.results)


# ------------------------------------------------------------------ measuring


def test_a_run_has_its_times_and_a_failed_one_its_last_line() -> None:
    environment = commands.environment(1)
    timing = measure.run([sys.executable, "-c", "sum(range(10**6))"], environment=environment)
    assert 0 < timing.cpu < 60
    assert timing.wall > 0
    with refused(measure.CommandError, "ValueError: of what it died"):
        measure.run(
            [sys.executable, "-c", "raise ValueError('of what it died')"], environment=environment
        )
    with refused(measure.CommandError, "signal 9"):
        measure.run(
            [sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"], environment=environment
        )


@LINUX
def test_memory_that_a_process_takes_is_seen_as_anonymous_or_mapped(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(bytes(40_000_000))
    wait = "import time; time.sleep(0.3)"
    code = {
        "nothing": wait,
        "anonymous": f"held = bytearray(b'1') * 40_000_000; {wait}",
        "mapped": f"import mmap; f = open({str(file)!r}, 'rb'); m = mmap.mmap(f.fileno(), 0, "
        f"prot=mmap.PROT_READ); sum(m[::4096]); {wait}",
    }
    seen = {
        what: measure.watch([sys.executable, "-c", text], environment=commands.environment(1))
        for what, text in code.items()
    }
    base = seen["nothing"]
    assert base.anonymous is not None
    for what, anonymous in (("anonymous", 40_000_000), ("mapped", 0)):
        found = seen[what]
        assert found.anonymous is not None
        assert found.nbytes - base.nbytes == pytest.approx(40_000_000, abs=4_000_000)
        assert found.anonymous - base.anonymous == pytest.approx(anonymous, abs=4_000_000)
        assert [sample.seconds for sample in found.samples] == sorted(
            sample.seconds for sample in found.samples
        )


@LINUX
def test_a_file_is_evicted_and_warmed(tmp_path: Path) -> None:
    if hardware.describe(tmp_path)["file_system"] not in ("ext4", "xfs", "btrfs"):
        pytest.skip("only a file system on a disk gives its pages up")
    file = tmp_path / "file"
    file.write_bytes(os.urandom(3_000_001))
    (tmp_path / "empty").touch()
    files = [file, tmp_path / "empty"]

    page_cache.evict(files)
    assert page_cache.resident(files) == 0
    page_cache.warm(files)
    assert page_cache.resident(files) == 1


def test_every_cold_run_begins_with_an_empty_cache_and_no_warm_one_does(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    monkeypatch.setattr(page_cache, "can_evict", lambda: True)
    monkeypatch.setattr(page_cache, "evict", lambda files: done.append(f"evict {len(files)}"))
    monkeypatch.setattr(page_cache, "resident", lambda _: 0.0)

    def run(command: list[str], **_: Any) -> measure.Timing:
        done.append(" ".join(command[:6]))
        return measure.Timing(1.0, 1.0)

    monkeypatch.setattr(measure, "run", run)
    entries = commands.statistics_entries(
        session.pair, session.work, threads=2, way="pread, 1 MiB"
    )[:2]
    rows = {entry: Row(f"process/statistics/{entry.who}", entry.label) for entry in entries}

    timing.time_rounds(session, [(row, entry) for entry, row in rows.items()])
    assert len(done) == 4
    assert not any(line.startswith("evict") for line in done)

    done.clear()
    timing.time_cold(session, entries)
    # Both sides and the renamed one, before each of two reads and two commands, twice.
    assert done[::2] == ["evict 3"] * 8
    assert [line.startswith("evict") for line in done] == [True, False] * 8
    assert sum("controls.py read" in line for line in done) == 4
    assert sum("drift_fast inspect" in line for line in done) == 2


def test_a_slow_row_is_timed_in_the_first_half_of_the_rounds() -> None:
    slow = Row("process/delta/plain", "plain", walls=[timing.SLOW_SECONDS + 1])
    fast = Row("process/delta/ours", "ours", walls=[timing.SLOW_SECONDS - 1])
    assert [timing.sits_out(slow, repeat, 3) for repeat in range(3)] == [False, False, True]
    assert not any(timing.sits_out(fast, repeat, 3) for repeat in range(3))


# ------------------------------------------------------------------ commands and controls


def test_our_commands_are_the_ones_a_user_would_type(tiny: Pair, tmp_path: Path) -> None:
    command = commands.ours(tiny, "delta", threads=3, out=tmp_path / "out")
    assert command[1:3] == ["-m", "drift_fast"]
    assert command[3:] == [
        "delta",
        str(tiny.reasoning),
        str(tiny.multimodal),
        *("--modules", "all", "--rows", "index", "--threads", "3"),
        *("--out", str(tmp_path / "out")),
    ]


def test_every_process_gets_the_same_number_of_threads() -> None:
    environment = commands.environment(7)
    assert [environment[f"{name}_NUM_THREADS"] for name in ("OMP", "MKL", "OPENBLAS")] == ["7"] * 3


def test_a_rival_that_is_not_installed_or_does_not_fit_says_so(
    tiny: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def reasons() -> dict[str, str]:
        entries = commands.statistics_entries(tiny, tmp_path, threads=2, way="")
        entries += commands.delta_entries(tiny, tmp_path, threads=2, way="", sample=())
        return {f"{entry.part}/{entry.who}": entry.absent for entry in entries}

    monkeypatch.setattr(commands, "mergekit", lambda: None)
    monkeypatch.setattr(
        commands.importlib.util, "find_spec", lambda name: None if name == "transformers" else name
    )
    found = reasons()
    assert found.pop("delta/mergekit") == "mergekit is not installed"
    assert found.pop("delta/public") == "transformers not installed"
    assert set(found.values()) == {""}

    monkeypatch.setattr(commands.importlib.util, "find_spec", lambda _: None)
    found = reasons()
    assert (
        found["statistics/tuned"] == found["delta/plain"] == "torch and safetensors not installed"
    )
    assert found["statistics/ours"] == found["statistics/xor"] == found["delta/ours"] == ""

    monkeypatch.setattr(commands.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(commands.hardware, "available_nbytes", lambda: 1)
    assert "of memory" in reasons()["delta/public"]


@pytest.mark.parametrize("way", controls.WRITE_WAYS)
def test_the_control_writes_the_xor_of_both_files(tiny: Pair, tmp_path: Path, way: str) -> None:
    out = tmp_path / "out"
    try:
        controls.Xor(tiny.reasoning, tiny.multimodal, threads=3, way=way, out=out).run()
    except OSError:
        if "direct" not in way:
            raise
        pytest.skip("this file system has no direct writing")

    spans = controls.spans(tiny.reasoning, tiny.multimodal)
    assert [nbytes for _, _, nbytes in spans] == [pairs.shards(tiny.reasoning)[0].stat().st_size]
    for number, (left, right, nbytes) in enumerate(spans):
        a, b = (np.frombuffer(path.read_bytes()[:nbytes], np.uint8) for path in (left, right))
        assert (out / f"xor-{number}").read_bytes() == (a ^ b).tobytes()


@pytest.mark.parametrize("way", controls.XOR_WAYS)
def test_the_control_reads_every_byte_of_both_files_whatever_its_way(
    tiny: Pair, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    covered: list[tuple[int, int]] = []
    real = controls._Files.xor

    def xor(self: Any, start: int, nbytes: int, buffers: Any) -> None:
        covered.append((start, nbytes))
        real(self, start, nbytes, buffers)

    monkeypatch.setattr(controls._Files, "xor", xor)
    if controls.XOR_WAYS[way].forked:
        # In this process, so that it can be seen.
        monkeypatch.setattr(controls.Xor, "_fork", in_turn)
    controls.Xor(tiny.reasoning, tiny.multimodal, threads=2, way=way).run()
    end = 0
    for start, nbytes in sorted(covered):
        assert start == end
        end += nbytes
    assert end == controls.spans(tiny.reasoning, tiny.multimodal)[0][2]


def in_turn(self: Any, files: list[Any], chunks: list[tuple[int, int, int]]) -> None:
    for index, start, nbytes in chunks:
        files[index].xor(start, nbytes, self._buffers[0])


# ------------------------------------------------------------------ aims and reports


def reaching(pair: Pair, factor: float) -> Results:
    """Return results that reach every aim `factor` times over."""
    results = empty_results(pair)
    for key, wall in {
        "inside/statistics/xor": 0.9,
        "inside/statistics/ours": 1.0,
        "inside/statistics/tuned": 2.5,
        "inside/delta/xor": 0.9,
        "inside/delta/ours": 1.0,
        "process/statistics/ours": 1.0,
        "process/statistics/tuned": 4.5,
        "process/statistics/plain": 35.0,
        "process/delta/ours": 1.0,
        "process/delta/tuned": 1.8,
        "process/delta/mergekit": 10.0,
        "process/delta/public": 6.0,
        "process/merge/ours": 1.0,
        "process/merge/mergekit": 8.0,
        "cold/read/one after the other": 1.9,
        "cold/read/both at a time": 0.9,
        "cold/statistics/ours": 1.0,
    }.items():
        mine = key.endswith("ours")
        results.rows.append(Row(key, key, walls=[wall if mine else wall * factor]))
    above = int(64e6 / factor)
    results.baseline_nbytes = 10_000_000
    for part in ("statistics", "delta"):
        row = results.row(f"process/{part}/ours")
        assert row is not None
        row.peak_nbytes = results.baseline_nbytes + above
        row.error, row.compared = 1e-6 / factor, 10
    return results


@pytest.mark.parametrize(("factor", "met"), [(1.05, True), (0.95, False)])
def test_every_aim_is_met_or_missed_by_its_own_figures(
    tiny: Pair, tmp_path: Path, factor: float, met: bool
) -> None:
    results = reaching(tiny, factor)
    other = reaching(tiny, factor)
    beside = tmp_path / "other.json"
    row = other.row("process/delta/ours")
    assert row is not None
    assert row.peak_nbytes is not None
    row.peak_nbytes += int(10e6 / factor)
    other.write_json(beside)
    if not met:
        mine = results.row("process/delta/ours")
        assert mine is not None
        mine.wrong = "Δ differs"

    found = aims.evaluate(results, beside)
    assert len(found) == len(aims.AIMS) + 1
    assert [aim["met"] for aim in found] == [met] * len(found)


def test_the_report_holds_every_aim_even_those_not_measured(tiny: Pair) -> None:
    results = empty_results(tiny)
    results.aims = aims.evaluate(results, None)
    report = markdown(results)
    for aim in (*aims.AIMS, "peak memory, difference"):
        text = aim if isinstance(aim, str) else aim.text
        line = next(line for line in report.splitlines() if line.startswith(f"| {text}"))
        assert line.endswith("| not measured |  |")


def test_a_result_of_something_else_is_no_comparison(tmp_path: Path) -> None:
    path = tmp_path / "other.json"
    path.write_text('{"format_version": 1, "rows": []}')
    with refused(DriftError, path, "expected the JSON of an earlier run"):
        above_baseline_of(path)


# ------------------------------------------------------------------ whole runs


def test_a_debug_build_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(session_module, "debug_build", True)
    for more in ([], ["--scaling", "1"], ["--trace"]):
        shared = ["--directory", str(tmp_path), "--out", str(tmp_path / "out"), *NO_RIVALS]
        assert main(["bench", "--size", "tiny", *shared, *more]) == 1
        assert "debug build" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_suite_imports_no_torch() -> None:
    code = (
        "import sys, drift_fast.bench, drift_fast.bench.scaling, drift_fast.bench.trace, "
        "drift_fast.bench.inside, drift_fast.bench.chart; "
        "sys.exit(' '.join({'torch', 'transformers', 'matplotlib'} & set(sys.modules)) or None)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.fixture
def command(directory: Path, tiny: Pair, tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """Run `drift-fast bench` on the tiny pair and return where its results lie."""
    out = tmp_path / "results"

    def run(*more: str) -> Path:
        shared = ["bench", "--size", "tiny", "--directory", str(directory), "--out", str(out)]
        assert main([*shared, "--repeats", "1", *more]) == 0
        return out

    yield run
    assert not list(directory.glob("work-*")), "a run left its folder behind"


def test_a_run_without_rivals_leaves_a_table_json_and_a_picture(
    command: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    out = command("--cold", *NO_RIVALS)

    report = capsys.readouterr().out
    (table,), (stored,), (picture,) = (
        list(out.glob(f"delta-tiny_*core_*.{suffix}")) for suffix in ("md", "json", "png")
    )
    assert table.read_text() == report.removesuffix("\n")
    assert picture.read_bytes().startswith(b"\x89PNG")
    for aim in aims.AIMS:
        assert f"| {aim.text} |" in report
    assert "| tuned PyTorch streaming | left out |" in report
    found = json.loads(stored.read_bytes())
    assert found["command"].startswith("drift-fast bench --size tiny")
    assert {"processor", "cores", "file_system"} <= found["hardware"].keys()
    rows = {row["key"]: row for row in found["rows"]}
    for key in ("process/statistics/ours", "process/delta/ours"):
        assert len(rows[key]["walls"]) == 1
        assert rows[key]["peak_nbytes"] > 0
        assert not rows[key]["wrong"]
    assert rows["process/statistics/ours"]["error"] < 1e-6
    assert rows["process/delta/ours"]["compared"] > 10_000
    assert rows["process/delta/mergekit"]["absent"] == "left out"
    assert {"inside/statistics/xor", "inside/delta/ours", "cold/read/both at a time"} <= set(rows)


def test_only_the_parts_and_settings_that_are_named_run(command: Callable[..., Path]) -> None:
    out = command("--only", "statistics", "--only", "process", *NO_RIVALS)

    (stored,) = out.glob("*.json")
    timed = {row["key"] for row in json.loads(stored.read_bytes())["rows"] if row["walls"]}
    assert timed == {"process/statistics/ours", "process/statistics/xor"}


@pytest.mark.slow
def test_every_rival_runs_and_what_it_computes_is_looked_at(command: Callable[..., Path]) -> None:
    out = command()

    (stored,) = out.glob("*.json")
    rows = {row["key"]: row for row in json.loads(stored.read_bytes())["rows"]}
    for who in ("tuned", "plain"):
        # A sum in float32 may be off by more than is allowed, but not by much on so few values.
        assert rows[f"process/statistics/{who}"]["error"] < 1e-4
    for who in ("ours", "tuned", "plain", "public"):
        row = rows[f"process/delta/{who}"]
        assert not row["absent"]
        assert not row["wrong"]
        assert row["compared"] > 10_000
    assert rows["inside/statistics/tuned"]["walls"]
    assert rows["inside/delta/lean"]["walls"]
    if shutil.which("mergekit-yaml") is None:
        assert rows["process/delta/mergekit"]["absent"] == "mergekit is not installed"


def test_scaling_compares_ours_with_the_control_at_every_count(
    command: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    out = command("--scaling", "1,3")

    lines = capsys.readouterr().out.splitlines()
    assert [line.split("|")[1].strip() for line in lines if line.startswith("| ")][1:] == ["1", "3"]
    (stored,) = out.glob("scaling-tiny_*.json")
    rows = json.loads(stored.read_bytes())["rows"]
    assert {row["key"] for row in rows} == {
        f"inside/{part}/{who}@{threads}"
        for part in ("statistics", "delta")
        for who in ("ours", "xor")
        for threads in (1, 3)
    }
    assert all(row["walls"] for row in rows)
    assert list(out.glob("scaling-tiny_*.png"))


@LINUX
def test_a_trace_leaves_its_samples_and_a_picture(command: Callable[..., Path]) -> None:
    out = command("--trace")

    (table,), (stored,) = out.glob("trace-tiny_*.csv"), out.glob("trace-tiny_*.json")
    header, *lines = table.read_text().splitlines()
    assert header == "command,seconds,resident,anonymous,mapped"
    assert {line.split(",")[0] for line in lines} == {"drift-fast inspect", "drift-fast delta"}
    for line in lines:
        resident, anonymous, mapped = map(int, line.split(",")[2:])
        assert resident == anonymous + mapped
    rows = {row["key"]: row for row in json.loads(stored.read_bytes())["rows"]}
    peak = max(int(line.split(",")[2]) for line in lines)
    assert max(row["peak_nbytes"] for row in rows.values()) >= peak
    assert list(out.glob("trace-tiny_*.png"))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"only": ("speed",)}, ("speed", "statistics", "cold")),
        ({"without": ("numpy",)}, ("numpy", "mergekit")),
        ({"threads": 0}, ("positive", "0")),
        ({"repeats": 0}, ("positive", "0")),
    ],
)
def test_options_without_meaning_are_refused(
    options: dict[str, Any], words: tuple[str, ...]
) -> None:
    with refused(ValueError, *words):
        BenchOptions(**options)


def test_scaling_wants_positive_counts_and_no_trace(capsys: pytest.CaptureFixture[str]) -> None:
    with refused(ValueError, "positive", "0"):
        BenchOptions(scaling=(1, 0))
    with refused(ValueError, "choose one"):
        BenchOptions(scaling=(1,), trace=True)
    with pytest.raises(SystemExit):
        main(["bench", "--scaling", "one,two"])
    assert "argument --scaling: scaling must be" in capsys.readouterr().err
