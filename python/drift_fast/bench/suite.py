"""The suite: prepare a pair, check every result, time everything in turn, report.

Owns the order. Invariants: nothing is timed before its result was compared with float64; whatever
is compared with each other runs in turn within the same rounds; and a row that cannot run says why.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from drift_fast import _core
from drift_fast.bench import check, commands, hardware, measure, page_cache
from drift_fast.bench.aims import evaluate
from drift_fast.bench.commands import Entry
from drift_fast.bench.measure import Sample
from drift_fast.bench.pair import Pair, make_pair
from drift_fast.bench.report import markdown
from drift_fast.bench.results import Results, Row
from drift_fast.errors import DriftError

# A row that takes longer is timed in half of the rounds.
SLOW_SECONDS = 4.0
PARTS = ("statistics", "delta", "merge")
# Without one being named; a merge takes as long again, and is asked for.
USUAL = PARTS[:2]
SETTINGS = ("process", "inside", "cold")
Say = Callable[[str], object]


def cache_directory() -> Path:
    """Return where pairs are kept unless another place is named."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "drift-fast" / "bench"


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to run; sizes are `pair.SIZES`, `without` names rivals."""

    size: str = "0.5B"
    layers: int | None = None
    threads: int = 2
    repeats: int = 3
    cold: bool = False
    # Of PARTS and SETTINGS: parts and settings that are not named are left out, unless none is.
    only: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    # Where pairs are kept; None is `cache_directory()`.
    directory: Path | None = None
    # The JSON of a run at another size, for the aim that memory does not depend on size.
    beside: Path | None = None
    command: str = "drift-fast bench"

    def __post_init__(self) -> None:
        for name in self.only:
            if name not in (*PARTS, *SETTINGS):
                raise ValueError(f"only {name!r}: choose of {', '.join((*PARTS, *SETTINGS))}")
        for name in self.without:
            if name not in commands.RIVALS:
                raise ValueError(f"without {name!r}: choose of {', '.join(commands.RIVALS)}")
        if self.threads < 1 or self.repeats < 1:
            raise ValueError(
                f"threads and repeats must be positive, got {self.threads} and {self.repeats}"
            )

    @property
    def parts(self) -> list[str]:
        """The parts to run."""
        return [part for part in PARTS if part in self.only] or list(USUAL)

    @property
    def settings(self) -> list[str]:
        """The settings to run, without `cold` unless it was asked for."""
        named = [setting for setting in SETTINGS if setting in self.only]
        settings = named or ["process", "inside"]
        return settings + (["cold"] if self.cold and "cold" not in settings else [])


@dataclass
class Session:
    """A pair that is ready, a folder for what is written, and the results so far."""

    options: Options
    pair: Pair
    work: Path
    results: Results
    say: Say
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def out(self) -> Path:
        """Where what is being timed writes its Δ."""
        return self.work / "out"

    def clear(self) -> None:
        """Remove what the last command wrote, and have the disk done with everything."""
        shutil.rmtree(self.out, ignore_errors=True)
        os.sync()


def refuse_debug_build() -> None:
    """Refuse to time what was built for debugging.

    Raises:
        DriftError: it was.
    """
    if _core.debug_build:
        raise DriftError(
            "this is a debug build of drift_fast, whose timings mean nothing; build it with "
            "cargo build --release, or pip install ."
        )


def open_session(kind: str, options: Options, say: Say) -> Session:
    """Refuse a debug build, make the pair, back memory, and warm the page cache.

    Raises:
        DriftError: a debug build.
        OSError: not enough space.
    """
    refuse_debug_build()
    directory = options.directory or cache_directory()
    renamed = (
        kind == "delta"
        and not {"delta", "merge"}.isdisjoint(options.parts)
        and "mergekit" not in options.without
        and commands.mergekit() is not None
    )
    say(f"pair {options.size} in {directory}")
    pair = make_pair(directory, options.size, layers=options.layers, renamed=renamed, outputs=1)
    results = Results(
        kind=kind,
        size=pair.label,
        nbytes=pair.nbytes,
        delta_nbytes=pair.delta_nbytes,
        threads=options.threads,
        repeats=options.repeats,
        command=options.command,
        hardware=hardware.describe(directory),
        versions=hardware.versions(),
        date=time.strftime("%Y-%m-%d"),
    )
    work = Path(tempfile.mkdtemp(prefix="work-", dir=directory))
    session = Session(options, pair, work, results, say, commands.environment(options.threads))
    _back_memory(session)
    warm(session)
    return session


def _back_memory(session: Session) -> None:
    wanted = session.pair.nbytes + session.pair.delta_nbytes
    available = hardware.available_nbytes()
    if available is not None:
        wanted = min(wanted, int(available * 0.8))
    session.say(f"touching {wanted / 1e9:.1f} GB of memory")
    code = f"from drift_fast.bench.page_cache import touch; touch({wanted})"
    done = subprocess.run([sys.executable, "-c", code], check=False, env=session.environment)
    session.results.notes.append(
        f"Before anything ran, a process of its own wrote to every page of {wanted / 1e9:.1f} GB "
        "and ended, so that memory a virtual machine gets only once used decides nothing"
        if done.returncode == 0
        else f"Touching {wanted / 1e9:.1f} GB of memory beforehand failed"
    )


def warm(session: Session) -> None:
    """Read the pair once, if it can fit, and note if it does not stay in memory."""
    available = hardware.available_nbytes()
    if available is not None and session.pair.nbytes > available:
        session.results.notes.append(
            f"**Not warm**: the pair has {session.pair.nbytes / 1e9:.1f} GB, and "
            f"{available / 1e9:.1f} GB of memory are there"
        )
        return
    page_cache.warm(session.pair.files)
    share = page_cache.resident(session.pair.files)
    if share is not None and share < page_cache.WARM:
        session.results.notes.append(
            f"**Not warm**: {share:.0%} of the pair lies in memory after it was read once"
        )


def run_table(options: Options, say: Say) -> Results:
    """Run everything that `options` asks for and return it, aims included.

    Raises:
        DriftError: a debug build, or results of ours that are wrong.
        OSError: not enough space.
    """
    session = open_session("delta", options, say)
    try:
        ways = {part: pick_way(session, part, options.threads) for part in options.parts}
        entries = _entries(session, ways)
        rows = _check(session, entries)
        ready = [entry for entry in entries if not rows[entry.part, entry.who].absent]
        session.results.rows += rows.values()
        if "process" in options.settings:
            _rounds(session, [(rows[entry.part, entry.who], entry) for entry in ready])
        if "inside" in options.settings:
            _inside(session, ways)
        if "cold" in options.settings:
            _cold(session, ready)
        _explain(session)
        session.results.aims = evaluate(session.results, options.beside)
    finally:
        shutil.rmtree(session.work, ignore_errors=True)
    return session.results


def pick_way(session: Session, part: str, threads: int) -> str:
    """Return the fastest way of the XOR control with so many threads."""
    out = session.out if part in ("delta", "merge") else None
    command = commands.control(session.pair, "pick", threads=threads, out=out)
    found: dict[str, float] = json.loads(
        subprocess.run(
            command, check=True, capture_output=True, env=commands.environment(threads)
        ).stdout
    )
    session.clear()
    session.say(f"control of {part}, {threads} threads: {next(iter(found))}")
    return next(iter(found))


def _entries(session: Session, ways: Mapping[str, str]) -> list[Entry]:
    options, pair = session.options, session.pair
    found: list[Entry] = []
    if "statistics" in options.parts:
        way = ways["statistics"]
        found += commands.statistics_entries(pair, session.work, threads=options.threads, way=way)
    if "delta" in options.parts:
        found += commands.delta_entries(
            pair,
            session.work,
            threads=options.threads,
            way=ways["delta"],
            sample=tuple(check.sample(pair)),
        )
    if "merge" in options.parts:
        found += commands.merge_entries(
            pair,
            session.work,
            threads=options.threads,
            way=ways["merge"],
            sample=tuple(check.sample(pair)),
        )
    return [
        replace(entry, absent="left out") if entry.who in options.without else entry
        for entry in found
    ]


def _check(session: Session, entries: Iterable[Entry]) -> dict[tuple[str, str], Row]:
    """Run each command once, watched, and compare its results; this round also warms up."""
    true = check.truth(session.pair, threads=session.options.threads)
    baseline = measure.watch(commands.import_only(), environment=session.environment)
    session.results.baseline_nbytes = baseline.nbytes
    session.results.baseline_anonymous_nbytes = baseline.anonymous
    rows = {}
    for entry in entries:
        row = Row(f"process/{entry.part}/{entry.who}", entry.label, absent=entry.absent)
        rows[entry.part, entry.who] = row
        if row.absent:
            continue
        session.say(f"checking {row.key}")
        try:
            check_entry(session, entry, row, true)
        except measure.CommandError as error:
            if entry.who in ("ours", "xor"):
                raise DriftError(f"{' '.join(entry.command)} failed: {error}") from error
            row.absent = f"failed: {error}"
        if row.wrong and entry.who == "ours":
            raise DriftError(f"nothing was timed, since {row.key} is wrong: {row.wrong}")
        session.clear()
    return rows


def check_entry(
    session: Session, entry: Entry, row: Row, true: Mapping[str, list[float]]
) -> measure.Memory:
    """Run a command once, note its memory, and compare what it computed with the truth.

    Raises:
        CommandError: it failed.
    """
    session.clear()
    command = entry.checked or entry.command
    printed = entry.results if entry.printed else None
    memory = measure.watch(command, environment=session.environment, output=printed)
    row.peak_nbytes, row.peak_anonymous_nbytes = memory.nbytes, memory.anonymous
    if entry.results is not None:
        verdict = check.check_statistics(_statistics(entry), true)
        row.error, row.wrong = verdict.error, verdict.wrong
    elif entry.part == "merge" and entry.sample and entry.out is not None:
        weight = commands.MERGE_WEIGHT
        exact = entry.who == "ours"
        verdict = check.check_merge(session.pair, entry.out, entry.sample, weight, exact=exact)
        row.error, row.compared, row.wrong = verdict.error, verdict.values, verdict.wrong
    elif entry.sample and entry.out is not None:
        verdict = check.check_delta(session.pair, entry.out, entry.sample)
        row.compared, row.wrong = verdict.values, verdict.wrong
    return memory


def _statistics(entry: Entry) -> dict[str, list[float]]:
    assert entry.results is not None
    found: dict[str, Any] = json.loads(entry.results.read_bytes())
    if not entry.printed:
        return found
    columns = ("delta_norm", "reasoning_norm", "multimodal_norm", "cosine")
    return {row["name"]: [row[column] for column in columns] for row in found["tensors"]}


def _rounds(session: Session, timed: list[tuple[Row, Entry]]) -> None:
    for repeat in range(session.options.repeats):
        for row, entry in timed:
            if row.absent or _sits_out(row, repeat, session.options.repeats):
                continue
            session.clear()
            session.say(f"round {repeat + 1}, {row.key}")
            time_once(session, row, entry.command)
    session.clear()


def _sits_out(row: Row, repeat: int, repeats: int) -> bool:
    """Return whether a slow row was timed often enough."""
    return bool(row.walls) and row.walls[0] > SLOW_SECONDS and repeat >= (repeats + 1) // 2


def time_once(session: Session, row: Row, command: Iterable[str]) -> None:
    """Run a command and add what it took to the row; if it fails, the row says so instead."""
    try:
        timing = measure.run(list(command), environment=session.environment)
    except measure.CommandError as error:
        row.absent = f"failed: {error}"
        row.walls.clear()
        row.cpus.clear()
        return
    row.walls.append(timing.wall)
    row.cpus.append(timing.cpu)


def _inside(session: Session, ways: Mapping[str, str]) -> None:
    options = session.options
    labels = {
        "xor": "control: XOR",
        "ours": "**drift_fast**",
        "tuned": "tuned PyTorch streaming",
        "lean": "tuned PyTorch streaming, Δ without statistics",
    }
    missing = "left out" if "tuned" in options.without else commands.torch_missing()
    absent = {"tuned": missing, "lean": missing}
    # A merge is timed as a process only.
    for part in (part for part in options.parts if part != "merge"):
        out = session.out if part == "delta" else None
        rows = {
            who: Row(f"inside/{part}/{who}", label, absent=absent.get(who, ""))
            for who, label in labels.items()
            if part == "delta" or who != "lean"
        }
        rows["xor"].label += f" ({ways[part]})"
        session.results.rows += rows.values()
        processes = [
            (
                rows[who],
                commands.inside(
                    session.pair, who, threads=options.threads, way=ways[part], out=out
                ),
            )
            for who in rows
            if not rows[who].absent
        ]
        time_inside(session, processes, options.threads)


def time_inside(session: Session, processes: Iterable[tuple[Row, list[str]]], threads: int) -> None:
    """Time passes in turn, one process for each row, after one pass each that is not timed."""
    environment = commands.environment(threads)
    inside = [(row, measure.Inside(command, environment=environment)) for row, command in processes]
    try:
        for repeat in range(session.options.repeats + 1):
            for row, process in inside:
                if row.absent:
                    continue
                session.clear()
                session.say(f"pass {repeat}, {row.key}")
                try:
                    timing = process.run()
                except measure.CommandError as error:
                    row.absent = f"failed: {error}"
                    continue
                if repeat:
                    row.walls.append(timing.wall)
                    row.cpus.append(timing.cpu)
    finally:
        for _, process in inside:
            process.close()


def _cold(session: Session, ready: Iterable[Entry]) -> None:
    rows: list[tuple[Row, tuple[str, ...], Path | None]] = [
        (Row(f"cold/read/{way}", way), tuple(command), None)
        for way, command in commands.cold_reads(session.pair).items()
    ]
    rows += [
        (Row(f"cold/{entry.part}/{entry.who}", entry.label), entry.command, entry.out)
        for entry in ready
    ]
    session.results.rows += [row for row, _, _ in rows]
    if not page_cache.can_evict():
        for row, _, _ in rows:
            row.absent = "this system gives no pages up on request"
        return
    files = list(session.pair.files)
    if session.pair.renamed is not None:
        files += session.pair.renamed.glob("*.safetensors")
    left = 0.0
    for repeat in range(session.options.repeats):
        for row, command, _ in rows:
            if row.absent or _sits_out(row, repeat, session.options.repeats):
                continue
            session.clear()
            page_cache.evict(files)
            left = max(left, page_cache.resident(files) or 0.0)
            session.say(f"cold round {repeat + 1}, {row.key}")
            time_once(session, row, command)
    session.clear()
    if left > 1 - page_cache.WARM:
        session.results.notes.append(
            f"**Not cold**: up to {left:.0%} of the pair was still in memory"
        )


def _explain(session: Session) -> None:
    session.results.notes += [
        f"Rows that take more than {SLOW_SECONDS:.0f} s were timed in the first half of the rounds",
        "Every command ran once before it was timed; that run was checked against float64 and its "
        "memory watched, which timed runs are not",
        "Files were flushed and the last output removed outside the clock; buffers in process were "
        "touched before it. Our Δ, the tuned ones and the control allocate their file first and "
        "flush it; plain, public and mergekit do not flush",
        "Statistics and Δ are of every tensor of the backbone but in the public way, which loads "
        "transformers' own Qwen2ForCausalLM and Qwen2_5_VLForConditionalGeneration (a vision tower "
        "of one block) and subtracts attention and MLP",
        "mergekit pairs by name only, so it gets the multimodal weights under the text model's "
        "names; GB/s count the bytes of the tensors that both models have, on both sides",
    ]
    if "merge" in session.options.parts:
        session.results.notes.append(
            "Merges write all of the backbone, ours and the plain one the vision tower too. "
            "Ours is compared bit for bit with float64 rounded once; the others compute in float32 "
            "and may differ in the last bit of one value in a thousand"
        )
    if "cold" in session.options.settings:
        session.results.notes.append(
            "Cold: both checkpoints flushed and given up with posix_fadvise before each run, "
            "checked with mincore; what the host of a virtual machine keeps is out of reach"
        )


def write(
    results: Results, directory: Path, traces: Mapping[str, tuple[Sample, ...]] | None = None
) -> list[Path]:
    """Write the report, its JSON and, where matplotlib is installed, its picture; return them."""
    directory.mkdir(parents=True, exist_ok=True)
    stem = directory / name(results)
    paths = [stem.with_name(stem.name + suffix) for suffix in (".md", ".json", ".png")]
    try:
        from drift_fast.bench import chart

        if traces is None:
            chart.draw(results, paths[2])
        else:
            chart.draw_trace(traces, results.baseline_nbytes or 0, paths[2])
    except ImportError:
        results.notes.append("No picture: matplotlib is not installed")
        paths.pop()
    paths[0].write_text(markdown(results))
    results.write_json(paths[1])
    return paths


def name(results: Results) -> str:
    """Return what_hardware_yyyymm, the stem of a run's files."""
    size = results.size.replace(", ", "-").replace(" ", "")
    month = results.date.replace("-", "")[:6]
    return f"{results.kind}-{size}_{results.hardware['cores']}core_{month}"
