"""The commands that the suite runs on a pair: ours, the rivals and the controls.

Owns the arguments of every process, and the reasons why one cannot run here. Nothing is started.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from drift_fast.bench import hardware
from drift_fast.bench.controls import READ_WAYS
from drift_fast.bench.pair import Pair
from drift_fast.bench.rivals import mergekit_configuration, mergekit_linear

# Weight of the reasoning model in the merges that are timed. With a round one such as 0.3, merged
# values meet midpoints, where the last bit of float32 decides.
MERGE_WEIGHT = 0.3141592653
_HERE = Path(__file__).parent


@dataclass(frozen=True)
class Entry:
    """One command of a part (statistics, delta), and the same with its results in files.

    What it writes goes to `out`, which is removed before and after it. In `checked`, statistics go
    to `results`, or to standard output where `printed`.
    """

    part: str
    who: str
    label: str
    command: tuple[str, ...]
    checked: tuple[str, ...]
    out: Path | None = None
    results: Path | None = None
    printed: bool = False
    # Text names whose Δ is compared.
    sample: tuple[str, ...] = ()
    absent: str = ""


def environment(threads: int) -> dict[str, str]:
    """Return the environment of every process: the number of threads, and no network."""
    count = str(threads)
    return {
        **os.environ,
        "OMP_NUM_THREADS": count,
        "MKL_NUM_THREADS": count,
        "OPENBLAS_NUM_THREADS": count,
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


def mergekit() -> str | None:
    """Return mergekit's command, beside this Python or on the path."""
    return shutil.which("mergekit-yaml", path=str(Path(sys.executable).parent)) or shutil.which(
        "mergekit-yaml"
    )


def import_only() -> list[str]:
    """Return a process that imports the package and waits while its memory is sampled."""
    return [sys.executable, "-c", "import drift_fast, time; time.sleep(0.3)"]


def ours(pair: Pair, what: str, *, threads: int, out: Path | None = None) -> list[str]:
    """Return our own command over every tensor of the backbone."""
    command = [sys.executable, "-m", "drift_fast", what, str(pair.reasoning), str(pair.multimodal)]
    command += ["--modules", "all", "--rows", "index", "--threads", str(threads)]
    return command if out is None else [*command, "--out", str(out)]


def control(
    pair: Pair, what: str, *, threads: int = 1, way: str = "", out: Path | None = None
) -> list[str]:
    """Return a control as a process of its own."""
    command = _script("controls.py", what, pair, threads)
    command += ["--way", way] if way else []
    return command if out is None else [*command, "--out", str(out)]


def inside(
    pair: Pair, what: str, *, threads: int, way: str = "", out: Path | None = None
) -> list[str]:
    """Return a process that does one pass of ours, the control or a tuned rival on request."""
    command = [sys.executable, "-m", "drift_fast.bench.inside", what]
    command += [str(pair.reasoning), str(pair.multimodal), "--threads", str(threads)]
    command += ["--way", way] if way else []
    return command if out is None else [*command, "--out", str(out)]


def our_statistics(pair: Pair, work: Path, *, threads: int) -> Entry:
    """Return our command for norms and cosines."""
    command = tuple(ours(pair, "inspect", threads=threads))
    return Entry(
        "statistics",
        "ours",
        "**drift-fast inspect**",
        command,
        (*command, "--json"),
        results=work / "statistics.json",
        printed=True,
    )


def our_delta(pair: Pair, work: Path, *, threads: int, sample: tuple[str, ...]) -> Entry:
    """Return our command that writes Δ."""
    out = work / "out"
    command = tuple(ours(pair, "delta", threads=threads, out=out))
    return Entry("delta", "ours", "**drift-fast delta**", command, command, out, sample=sample)


def statistics_entries(pair: Pair, work: Path, *, threads: int, way: str) -> list[Entry]:
    """Return what computes norms and cosines, the control first."""
    results = work / "statistics.json"
    xor = tuple(control(pair, "xor", threads=threads, way=way))
    return [
        Entry("statistics", "xor", f"control: XOR of both files ({way})", xor, ()),
        our_statistics(pair, work, threads=threads),
        *(
            Entry(
                "statistics",
                who,
                label,
                tuple(_script("rivals.py", who, pair, threads)),
                (*_script("rivals.py", who, pair, threads), "--results", str(results)),
                results=results,
                absent=_missing("torch", "safetensors"),
            )
            for who, label in (
                ("tuned", "tuned PyTorch streaming"),
                ("plain", "plain safe_open + PyTorch"),
            )
        ),
    ]


def delta_entries(
    pair: Pair, work: Path, *, threads: int, way: str, sample: tuple[str, ...]
) -> list[Entry]:
    """Return what computes Δ, the control first; all of them write, except the public way."""
    out = work / "out"
    prefixed = [pair.multimodal_name(name) for name in sample]
    torch = _missing("torch", "safetensors")

    def writes(who: str, label: str, command: list[str], absent: str, needs: int) -> Entry:
        whole = (*command, "--out", str(out))
        reason = absent or _too_large(needs)
        return Entry("delta", who, label, whole, whole, out=out, sample=sample, absent=reason)

    xor = tuple(control(pair, "write", threads=threads, way=way, out=out))
    public = _script("rivals.py", "public", pair, threads)
    inner = tuple(name for name in sample if ".self_attn." in name or ".mlp." in name)
    return [
        Entry("delta", "xor", f"control: XOR, written and flushed ({way})", xor, (), out=out),
        our_delta(pair, work, threads=threads, sample=sample),
        writes(
            "tuned",
            "tuned PyTorch streaming",
            _script("rivals.py", "tuned", pair, threads),
            torch,
            0,
        ),
        writes(
            "plain",
            "plain safe_open + PyTorch + save_file",
            _script("rivals.py", "plain", pair, threads),
            torch,
            pair.delta_nbytes,
        ),
        Entry(
            "delta",
            "public",
            "public way: two from_pretrained, attention + MLP, nothing written",
            tuple(public),
            (*public, "--out", str(out), "--sample", *prefixed),
            out=out,
            sample=inner,
            absent=_missing("torch", "safetensors", "transformers")
            or _too_large(pair.nbytes + pair.delta_nbytes),
        ),
        _mergekit_entry(pair, work, out, threads, sample),
    ]


def merge_entries(
    pair: Pair, work: Path, *, threads: int, way: str, sample: tuple[str, ...]
) -> list[Entry]:
    """Return what merges linearly and writes a whole model, the control first."""
    out = work / "out"
    mine = [sys.executable, "-m", "drift_fast", "merge", "linear"]
    mine += [str(pair.reasoning), str(pair.multimodal), "--weight", str(MERGE_WEIGHT)]
    mine += ["--rows", "index", "--threads", str(threads), "--out", str(out)]
    plain = _script("rivals.py", "merge", pair, threads)
    plain += ["--weight", str(MERGE_WEIGHT), "--out", str(out)]
    theirs, absent = _mergekit_command(
        pair, work, out, threads, lambda a, b: mergekit_linear(a, b, MERGE_WEIGHT)
    )

    def merges(who: str, label: str, command: Sequence[str], absent: str = "") -> Entry:
        whole = tuple(command)
        return Entry("merge", who, label, whole, whole, out, sample=sample, absent=absent)

    xor = tuple(control(pair, "write", threads=threads, way=way, out=out))
    return [
        Entry("merge", "xor", f"control: XOR, written and flushed ({way})", xor, (), out=out),
        merges("ours", "**drift-fast merge linear**", mine),
        merges(
            "plain",
            "plain safe_open + PyTorch + save_file",
            plain,
            _missing("torch", "safetensors") or _too_large(pair.delta_nbytes),
        ),
        merges("mergekit", "mergekit, linear", theirs, absent or _too_large(pair.nbytes)),
    ]


def torch_missing() -> str:
    """Return why the PyTorch rivals cannot run, or nothing."""
    return _missing("torch", "safetensors")


def cold_reads(pair: Pair) -> Mapping[str, list[str]]:
    """Return the sequential reads that a cold run is compared with, by their label."""
    return {way: control(pair, "read", way=way) for way in READ_WAYS}


def _mergekit_entry(
    pair: Pair, work: Path, out: Path, threads: int, sample: tuple[str, ...]
) -> Entry:
    command, absent = _mergekit_command(pair, work, out, threads, mergekit_configuration)
    return Entry(
        "delta",
        "mergekit",
        "mergekit, linear with weights 1 and −1",
        command,
        command,
        out=out,
        sample=sample,
        absent=absent or _too_large(pair.nbytes),
    )


def _mergekit_command(
    pair: Pair, work: Path, out: Path, threads: int, configure: Callable[[Path, Path], str]
) -> tuple[tuple[str, ...], str]:
    """Return mergekit's command with a configuration written to `work`, or why there is none."""
    found = mergekit()
    if not found:
        return (), "mergekit is not installed"
    if pair.renamed is None:
        return (), "no checkpoint under the text model's names was made"
    text = configure(pair.reasoning, pair.renamed)
    work.mkdir(parents=True, exist_ok=True)
    configuration = work / f"{configure.__name__.strip('<>')}.yaml"
    configuration.write_text(text)
    flags = ("--lazy-unpickle", "--no-copy-tokenizer", "--no-write-model-card", "--quiet")
    return (found, str(configuration), str(out), *flags, "--num-threads", str(threads)), ""


def _script(name: str, what: str, pair: Pair, threads: int) -> list[str]:
    # -P keeps this folder off the path, where its modules would hide others of the same name.
    command = [sys.executable, "-P", str(_HERE / name), what]
    return [*command, str(pair.reasoning), str(pair.multimodal), "--threads", str(threads)]


def _missing(*modules: str) -> str:
    absent = [module for module in modules if importlib.util.find_spec(module) is None]
    return f"{' and '.join(absent)} not installed" if absent else ""


def _too_large(nbytes: int) -> str:
    available = hardware.available_nbytes()
    if available is None or nbytes <= available:
        return ""
    return f"needs about {nbytes / 1e9:.0f} GB of memory, {available / 1e9:.0f} GB are available"
