"""The command line as a script and a person meet it: streams, statuses, progress, interruption.

Everything runs in a process of its own, since what is printed and how the process ends is what
is tested.
"""

from __future__ import annotations

import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

import drift_fast
from drift_fast import Delta
from drift_fast.bench.options import BenchOptions
from drift_fast.delta.options import DeltaOptions, InspectOptions
from drift_fast.merging.options import MergeOptions
from drift_fast.options import Options, about_of
from drift_fast.planner.options import PlanOptions
from drift_fast.preflight.options import CheckOptions
from support.synthetic import Pair, contents, everything_under, stored, write_file, write_sparse

PROGRAM = [sys.executable, "-m", "drift_fast"]

# Runs the command line in a process where importing torch fails.
WITHOUT_TORCH = """
import runpy, sys
sys.modules["torch"] = None
sys.argv = ["drift-fast", *sys.argv[1:]]
runpy.run_module("drift_fast", run_name="__main__", alter_sys=True)
"""


def run(
    *arguments: object, program: list[str] = PROGRAM, **options: Any
) -> subprocess.CompletedProcess[str]:
    command = [*program, *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=60, check=False, **options
    )


def succeeds(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    result = run(*arguments, **options)
    assert result.returncode == 0, result.stderr
    return result


def strict(text: str) -> Any:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


def rows_of(document: Any) -> dict[str, Any]:
    return {row["name"]: row for row in document["tensors"]}


# ------------------------------------------------------------------ results


def test_delta_writes_what_the_library_writes(pair: Pair, tmp_path: Path) -> None:
    succeeds("delta", pair.reasoning, pair.multimodal, "--out", tmp_path / "cli")
    drift_fast.compute_delta(pair.reasoning, pair.multimodal, tmp_path / "library")
    assert contents(tmp_path / "cli") == contents(tmp_path / "library")


def test_delta_takes_the_options_of_the_library(pair: Pair, tmp_path: Path) -> None:
    succeeds(
        "delta", pair.reasoning, pair.multimodal, "--out", tmp_path / "cli",
        "--modules", "attn,norm", "--layers", "1-1", "--dtype", "float32", "--threads", "2",
    )  # fmt: skip
    drift_fast.compute_delta(
        pair.reasoning,
        pair.multimodal,
        tmp_path / "library",
        modules=("attn", "norm"),
        layers=[1],
        dtype="float32",
    )
    assert contents(tmp_path / "cli") == contents(tmp_path / "library")
    assert Delta.open(tmp_path / "cli").dtype == Delta.open(tmp_path / "library").dtype


def test_inspect_prints_a_table_with_a_row_for_each_module(pair: Pair) -> None:
    result = succeeds("inspect", pair.reasoning, pair.multimodal)
    assert "attn" in result.stdout
    assert "mlp" in result.stdout
    assert "14" in result.stdout, "the number of matched tensors is not in the summary"
    assert result.stderr == ""


@pytest.mark.parametrize("command", ["inspect", "delta"])
def test_json_is_valid_json_and_nothing_else(pair: Pair, out: Path, command: str) -> None:
    options = ["--out", out] if command == "delta" else []
    result = succeeds(command, pair.reasoning, pair.multimodal, "--json", *options)
    rows = rows_of(strict(result.stdout))
    expected = {row.name: row for row in drift_fast.inspect(pair.reasoning, pair.multimodal).stats}
    assert set(rows) == set(expected)
    for name, row in rows.items():
        for key in (
            "delta_norm",
            "reasoning_norm",
            "multimodal_norm",
            "relative",
            "cosine",
            "numel",
            "layer",
            "module",
        ):
            assert row[key] == getattr(expected[name], key)
        assert tuple(row["shape"]) == tuple(expected[name].shape)
    assert result.stderr == ""


def test_json_of_undefined_ratios_is_still_valid(tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    a = write_file(tmp_path / "a.safetensors", {name: stored([0.0, 0.0])})
    b = write_file(tmp_path / "b.safetensors", {name: stored([0.0, 0.0])})
    assert name in rows_of(strict(run("inspect", a, b, "--json").stdout))


def test_a_name_outside_ascii_is_printed_whatever_the_terminals_encoding(tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.q_proj.größe"
    a = write_file(tmp_path / "a.safetensors", {name: stored([1.0])})
    b = write_file(tmp_path / "b.safetensors", {name: stored([2.0])})
    for encoding in ("ascii", "utf-8"):
        environment = {**os.environ, "PYTHONIOENCODING": encoding}
        for options in ([], ["--json"]):
            result = run(
                "inspect", a, b, "--modules", "all", *options, env=environment, encoding="utf-8"
            )
            assert result.returncode == 0, result.stderr


# ------------------------------------------------------------------ exit statuses


def test_help_and_version_succeed_on_stdout() -> None:
    for arguments, word in (
        (["--help"], "inspect"),
        (["delta", "--help"], "--modules"),
        (["--version"], drift_fast.__version__),
    ):
        result = succeeds(*arguments)
        assert word in result.stdout
        assert result.stderr == ""


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["unknown"],
        ["delta"],
        ["delta", "{a}", "{b}"],
        ["delta", "{a}", "{b}", "--out"],
        ["inspect", "{a}"],
        ["inspect", "{a}", "{b}", "--unknown"],
        ["inspect", "{a}", "{b}", "--threads", "many"],
        ["delta", "{a}", "{b}", "--out", "{out}", "--dtype", "float8"],
    ],
    ids=" ".join,
)
def test_wrong_usage_is_status_two_with_the_usage_on_stderr(
    pair: Pair, out: Path, arguments: list[str]
) -> None:
    filled = [text.format(a=pair.reasoning, b=pair.multimodal, out=out) for text in arguments]
    result = run(*filled)
    assert result.returncode == 2
    assert "usage" in result.stderr.lower()
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    assert not out.exists()


@pytest.mark.parametrize(
    "options",
    [["--modules", "atn"], ["--layers", "3-1"], ["--layers", "x"], ["--threads", "0"]],
    ids=" ".join,
)
def test_a_bad_value_is_status_two_or_one_and_named(
    pair: Pair, out: Path, options: list[str]
) -> None:
    result = run("delta", pair.reasoning, pair.multimodal, "--out", out, *options)
    assert result.returncode in (1, 2)
    assert options[1] in result.stderr
    assert "Traceback" not in result.stderr
    assert not out.exists()


def test_a_failure_is_status_one_with_one_message_and_no_traceback(
    pair: Pair, tmp_path: Path
) -> None:
    existing = tmp_path / "existing"
    existing.mkdir()
    (existing / "file").write_text("")
    for arguments, word in (
        (["inspect", tmp_path / "absent", pair.multimodal], "absent"),
        (["inspect", __file__, pair.multimodal], Path(__file__).name),
        (["delta", pair.reasoning, pair.multimodal, "--out", existing], "existing"),
    ):
        for as_json in ([], ["--json"]):
            result = run(*arguments, *as_json)
            assert result.returncode == 1
            assert result.stdout == ""
            assert word in result.stderr
            assert "Traceback" not in result.stderr


def test_a_reader_that_closes_the_pipe_early_gets_no_traceback(pair: Pair) -> None:
    program = f"{sys.executable} -m drift_fast"
    shell = f"{program} inspect {pair.reasoning} {pair.multimodal} --json | head -c 1"
    result = subprocess.run(
        ["bash", "-c", shell], capture_output=True, text=True, timeout=60, check=False
    )
    assert "Traceback" not in result.stderr
    assert "BrokenPipe" not in result.stderr


def test_the_same_checkpoint_twice_warns_on_stderr_and_keeps_json_clean(pair: Pair) -> None:
    result = succeeds("inspect", pair.reasoning, pair.reasoning, "--json")
    assert "zero everywhere" in result.stderr
    strict(result.stdout)


def test_overwrite_is_asked_for_by_name(pair: Pair, out: Path) -> None:
    succeeds("delta", pair.reasoning, pair.multimodal, "--out", out)
    result = run("delta", pair.reasoning, pair.multimodal, "--out", out)
    assert result.returncode == 1
    assert "overwrite" in result.stderr
    succeeds("delta", pair.reasoning, pair.multimodal, "--out", out, "--overwrite")


def test_the_output_may_be_the_empty_directory_one_stands_in(pair: Pair, tmp_path: Path) -> None:
    here = tmp_path / "here"
    here.mkdir()
    succeeds("delta", pair.reasoning, pair.multimodal, "--out", ".", cwd=here)
    assert len(Delta.open(here)) == 14


def test_paths_may_be_relative_and_outside_ascii(pair: Pair, tmp_path: Path) -> None:
    (tmp_path / "reasoning").symlink_to(pair.reasoning)
    succeeds("delta", "reasoning", pair.multimodal, "--out", "größe/Δ", cwd=tmp_path)
    assert len(Delta.open(tmp_path / "größe" / "Δ")) == 14


# ------------------------------------------------------------------ start-up


def test_inspect_works_where_torch_cannot_be_imported(pair: Pair) -> None:
    program = [sys.executable, "-c", WITHOUT_TORCH]
    result = run("inspect", pair.reasoning, pair.multimodal, "--json", program=program)
    assert result.returncode == 0, result.stderr
    assert len(rows_of(strict(result.stdout))) == 14


def test_delta_too_works_where_torch_cannot_be_imported(pair: Pair, out: Path) -> None:
    result = run(
        "delta",
        pair.reasoning,
        pair.multimodal,
        "--out",
        out,
        program=[sys.executable, "-c", WITHOUT_TORCH],
    )
    assert result.returncode == 0, result.stderr
    assert len(Delta.open(out)) == 14


def test_nothing_heavy_is_imported_to_inspect(pair: Pair) -> None:
    program = [sys.executable, "-X", "importtime", "-m", "drift_fast"]
    result = run("inspect", pair.reasoning, pair.multimodal, program=program)
    imported = {
        line.rsplit("|", 1)[-1].strip().split(".")[0]
        for line in result.stderr.splitlines()
        if "|" in line
    }
    assert "drift_fast" in imported
    assert not imported & {"torch", "transformers", "matplotlib", "huggingface_hub", "pandas"}


# ------------------------------------------------------------------ progress


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A pair of 256 GB that takes no disk and, to read, longer than any test."""
    directory = tmp_path_factory.mktemp("endless")
    shapes = {f"model.layers.{n}.self_attn.q_proj.weight": (1 << 14, 1 << 14) for n in range(512)}
    return write_sparse(directory / "a.safetensors", shapes), write_sparse(
        directory / "b.safetensors", shapes
    )


@pytest.fixture(scope="module")
def brief(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A pair of 1 GB in all, which takes some tenths of a second to read."""
    directory = tmp_path_factory.mktemp("brief")
    shapes = {f"model.layers.{n}.self_attn.q_proj.weight": (1 << 13, 1 << 12) for n in range(8)}
    return (
        write_sparse(directory / "a.safetensors", shapes, seed=1),
        write_sparse(directory / "b.safetensors", shapes, seed=2),
    )


def read_terminal(master: int, until: float) -> str:
    """Read what a program writes to its terminal until it closes it or the time is over."""
    os.set_blocking(master, False)
    text = b""
    while time.monotonic() < until:
        try:
            piece = os.read(master, 65536)
        except BlockingIOError:
            time.sleep(0.01)
            continue
        except OSError:  # Linux reports the far end's closing as EIO.
            break
        if not piece:
            break
        text += piece
    return text.decode(errors="replace")


def test_a_progress_bar_with_its_rate_appears_on_a_terminal(brief: tuple[Path, Path]) -> None:
    master, slave = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100"}
    with subprocess.Popen(
        [*PROGRAM, "inspect", *map(str, brief), "--json"],
        stdout=subprocess.PIPE,
        stderr=slave,
        env=environment,
        text=True,
    ) as process:
        os.close(slave)
        drawn = read_terminal(master, time.monotonic() + 60)
        assert process.stdout is not None
        strict(process.stdout.read())
    os.close(master)
    assert process.returncode == 0
    assert "\r" in drawn, "nothing was redrawn in place"
    assert re.search(r"GB/s|MB/s", drawn), drawn[-400:]
    assert re.search(r"\b\d+\s*/\s*8\b", drawn), drawn[-400:]
    assert not re.search(r"\n\s*\n", drawn.replace("\r\n", "\n")), "the bar leaves empty lines"


def test_no_bar_appears_in_a_pipe(brief: tuple[Path, Path]) -> None:
    result = succeeds("inspect", *brief, "--json")
    assert result.stderr == ""
    strict(result.stdout)


# ------------------------------------------------------------------ interruption


def wait_for(condition: Any, seconds: float, process: subprocess.Popen[Any]) -> None:
    limit = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, "the program ended before it could be interrupted"
        assert time.monotonic() < limit, "the program never got that far"
        time.sleep(0.005)


def interrupt(process: subprocess.Popen[Any]) -> float:
    """Send Ctrl-C and return the seconds until the process is gone."""
    begin = time.monotonic()
    process.send_signal(signal.SIGINT)
    try:
        process.wait(20)
    finally:
        if process.poll() is None:
            process.kill()
    return time.monotonic() - begin


def test_ctrl_c_stops_inspect_within_a_second(endless: tuple[Path, Path]) -> None:
    process = subprocess.Popen(
        [*PROGRAM, "inspect", *map(str, endless)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    statm = Path(f"/proc/{process.pid}/maps")
    wait_for(
        lambda: "a.safetensors" in statm.read_text() or cpu_seconds(process.pid) > 0.6, 30, process
    )
    time.sleep(0.3)
    seconds = interrupt(process)
    output, errors = process.communicate()
    assert process.returncode == 130
    assert seconds < 1.5
    assert output == ""
    assert "Traceback" not in errors


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@pytest.fixture(scope="module")
def writable(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A pair whose delta of 6 GB fits on the disk and takes seconds to write."""
    directory = tmp_path_factory.mktemp("writable")
    shapes = {f"model.layers.{n}.self_attn.q_proj.weight": (1 << 13, 1 << 13) for n in range(48)}
    pair = (
        write_sparse(directory / "a.safetensors", shapes),
        write_sparse(directory / "b.safetensors", shapes),
    )
    if os.statvfs(directory).f_bavail * os.statvfs(directory).f_frsize < 8 << 30:
        pytest.skip("needs 8 GB of free disk")
    return pair


def start_delta(pair: tuple[Path, Path], out: Path, *options: str) -> subprocess.Popen[str]:
    """Start a run of many seconds and return it in the middle of its writing."""
    command = [*PROGRAM, "delta", *map(str, pair), "--out", str(out), *options]
    before = everything_under(out.parent)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: everything_under(out.parent) != before, 60, process)
    time.sleep(0.5)
    assert process.poll() is None, "the run was over before it could be interrupted"
    return process


def kill(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()


def test_an_interrupted_delta_leaves_nothing_and_says_so_by_its_status(
    writable: tuple[Path, Path], out: Path
) -> None:
    process = start_delta(writable, out, "--max-shard-size", "100MB")
    seconds = interrupt(process)
    output, errors = process.communicate()
    assert process.returncode == 130, errors
    assert everything_under(out.parent) == set()
    assert seconds < 1.5
    assert output == ""
    assert "Traceback" not in errors


def test_a_killed_run_can_be_started_again_and_leaves_no_remains(
    writable: tuple[Path, Path], out: Path
) -> None:
    kill(start_delta(writable, out))
    assert not (out / "drift.json").exists()
    with pytest.raises((drift_fast.DriftError, OSError)):
        Delta.open(out)
    succeeds("delta", *writable, "--out", out, "--layers", "0-0")
    assert len(Delta.open(out)) == 1
    assert everything_under(out.parent) == {
        "delta",
        "delta/drift.json",
        "delta/delta.safetensors.index.json",
        "delta/delta-00001-of-00001.safetensors",
    }


def test_a_link_in_place_of_what_a_killed_run_left_is_not_followed(
    writable: tuple[Path, Path], pair: Pair, tmp_path: Path, out: Path
) -> None:
    # In a directory that others may write to, cleaning up must not reach anywhere else.
    kill(start_delta(writable, out))
    remains = [path for path in out.parent.iterdir() if path != out]
    assert remains, "nothing to replace; this test needs another way to find the temporary name"
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("three years of work")
    for path in remains:
        shutil.rmtree(path)
        path.symlink_to(precious)
    run("delta", pair.reasoning, pair.multimodal, "--out", out)
    assert everything_under(precious) == {"thesis.txt"}


def test_an_interrupted_overwrite_keeps_the_former_delta(
    writable: tuple[Path, Path], pair: Pair, out: Path
) -> None:
    drift_fast.compute_delta(pair.reasoning, pair.multimodal, out)
    before = contents(out)
    process = start_delta(writable, out, "--overwrite")
    interrupt(process)
    process.communicate()
    assert process.returncode == 130
    assert contents(out) == before
    assert everything_under(out.parent) == {
        "delta",
        *(f"delta/{path.name}" for path in out.iterdir()),
    }
    assert len(Delta.open(out)) == 14


def test_two_runs_into_one_directory_do_not_mix(pair: Pair, sharded_pair: Pair, out: Path) -> None:
    commands = [
        [*PROGRAM, "delta", str(each.reasoning), str(each.multimodal), "--out", str(out)]
        for each in (pair, sharded_pair)
    ]
    processes = [
        subprocess.Popen(c, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for c in commands
    ]
    errors = [process.communicate(timeout=60)[1] for process in processes]
    statuses = [process.returncode for process in processes]
    assert sorted(statuses) in ([0, 0], [0, 1]), errors
    delta = Delta.open(out)
    candidates = []
    for each in (pair, sharded_pair):
        alone = drift_fast.compute_delta(each.reasoning, each.multimodal)
        candidates.append(all(bool((delta[name] == alone[name]).all()) for name in alone))
    assert any(candidates)
    assert everything_under(out) == {*contents(out), "drift.json"}


def test_a_signal_handler_of_the_caller_stops_the_library_too(endless: tuple[Path, Path]) -> None:
    class Alarm(Exception):
        pass

    def ring(*_: object) -> None:
        raise Alarm

    former = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, 0.5)
    begin = time.monotonic()
    try:
        with pytest.raises(Alarm):
            drift_fast.inspect(*endless)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, former)
    assert time.monotonic() - begin < 2.0


def test_an_exception_in_the_progress_callback_stops_the_run_and_is_raised(
    brief: tuple[Path, Path], out: Path
) -> None:
    calls: list[tuple[Any, ...]] = []

    class Enough(Exception):
        pass

    def progress(*arguments: Any, **named: Any) -> None:
        calls.append((*arguments, *named.values()))
        if len(calls) == 2:
            raise Enough

    with pytest.raises(Enough):
        drift_fast.compute_delta(*brief, out, on_progress=progress)
    assert len(calls) == 2
    assert everything_under(out.parent) == set()


def test_python_threads_run_while_a_delta_is_computed(endless: tuple[Path, Path]) -> None:
    import threading

    beats = 0
    done = threading.Event()

    def beat() -> None:
        nonlocal beats
        while not done.wait(0.01):
            beats += 1

    thread = threading.Thread(target=beat)

    class Alarm(Exception):
        pass

    def ring(*_: object) -> None:
        raise Alarm

    former = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, 0.7)
    thread.start()
    try:
        with pytest.raises(Alarm):
            drift_fast.inspect(*endless, threads=1)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, former)
        done.set()
        thread.join()
    assert beats > 15, "the interpreter was held while Rust was reading"


# ------------------------------------------------------------------ options and --config


@pytest.mark.parametrize(
    ("command", "options"),
    [
        ("delta", DeltaOptions),
        ("inspect", InspectOptions),
        ("check", CheckOptions),
        ("merge", MergeOptions),
        ("plan", PlanOptions),
        ("bench", BenchOptions),
    ],
)
def test_every_option_of_a_command_is_a_flag_with_its_help(
    command: str, options: type[Options]
) -> None:
    environment = {**os.environ, "COLUMNS": "1000"}
    shown = succeeds(command, "--help", env=environment).stdout
    for each in fields(options):
        if about_of(each).in_file:
            assert f"--{each.name.replace('_', '-')}" in shown
            assert about_of(each).help in shown


def test_a_dtype_that_is_gone_says_what_to_write(pair: Pair, out: Path) -> None:
    arguments = ("delta", pair.reasoning, pair.multimodal, "--out", out)
    result = run(*arguments, "--dtype", "float8_e4m3")
    assert result.returncode == 2
    assert "storing Δ as float8_e4m3 is gone" in result.stderr
    assert "int8" in result.stderr


@pytest.mark.parametrize("section", [True, False], ids=["in a section", "at the top"])
@pytest.mark.parametrize("ending", ["yaml", "json"])
def test_a_configuration_file_sets_options_and_flags_win(
    pair: Pair, tmp_path: Path, section: bool, ending: str
) -> None:
    pytest.importorskip("yaml")
    values: dict[str, Any] = {"modules": ["attn"], "layers": "0", "strict": False}
    content = {"inspect": values, "delta": {"dtype": "float32"}} if section else values
    path = tmp_path / f"drift.{ending}"
    # JSON is YAML, too.
    path.write_text(json.dumps(content))
    arguments = ("inspect", pair.reasoning, pair.multimodal, "--json", "--config", path)
    names = set(rows_of(strict(succeeds(*arguments).stdout)))
    assert names
    assert all(".layers.0.self_attn." in name for name in names)
    names = set(rows_of(strict(succeeds(*arguments, "--layers", "1").stdout)))
    assert names
    assert all(".layers.1.self_attn." in name for name in names)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"module": "attn"}, ["'module'", "did you mean 'modules'?"]),
        ({"inspect": {"thread": 2}}, ["'thread'", "did you mean 'threads'?"]),
        ({"inspect": {"singular": 3}}, ["'singular'", "it is gone"]),
        ({"threads": "many"}, ["threads must be an integer", "'many'"]),
        ({"delta": {"threads": 2}}, ["a section 'inspect'", "delta"]),
        (["attn"], ["a mapping of options"]),
    ],
)
def test_a_configuration_file_that_is_wrong_is_named_with_the_key(
    pair: Pair, tmp_path: Path, content: Any, words: list[str]
) -> None:
    path = tmp_path / "drift.json"
    path.write_text(json.dumps(content))
    result = run("inspect", pair.reasoning, pair.multimodal, "--config", path)
    assert result.returncode in (1, 2)
    for word in [str(path), *words]:
        assert word in result.stderr


def test_a_bar_that_is_not_wanted_is_not_drawn(brief: tuple[Path, Path]) -> None:
    master, slave = pty.openpty()
    command = [*PROGRAM, "inspect", *map(str, brief), "--json", "--no-progress-bar"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=slave) as process:
        os.close(slave)
        drawn = read_terminal(master, time.monotonic() + 60)
    os.close(master)
    assert process.returncode == 0
    assert drawn == ""
