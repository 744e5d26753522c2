"""The synthetic pairs of the benchmark suite, and what it calls wrong."""

from __future__ import annotations

import json
import math
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from drift_fast import DriftError
from drift_fast.bench import (
    check,
    commands,
    timing,
    verify,
)
from drift_fast.bench import pair as pairs
from drift_fast.bench.commands import Entry
from drift_fast.bench.options import BenchOptions
from drift_fast.bench.pair import Pair, make_pair
from drift_fast.bench.report import markdown
from drift_fast.bench.session import Session
from support.bench_runs import planted_rival
from support.synthetic import refused, round_once


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


def test_rounding_once_to_bfloat16_is_the_reference_s() -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(0, 1, 20_000) * 2.0 ** rng.integers(-60, 60, 20_000)
    # Halfway between two neighbors: to the even one.
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
        None, sum(math.prod(tiny.shapes[name]) for name in names)
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
        assert found == check.Verdict(None, numel)
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
