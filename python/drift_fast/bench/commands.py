"""The commands that the suite runs on a pair: ours, the rivals and the controls.

Owns the arguments of every process, and the reasons why one cannot run here. It starts nothing.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from drift_fast.bench import check, hardware
from drift_fast.bench.controls import READ_WAYS
from drift_fast.bench.pair import Pair
from drift_fast.bench.rivals import mergekit_configuration

# Weight of the reasoning model in timed merges. With a round number such as 0.3, merged values can
# be midpoints, where the last bit of float32 decides.
MERGE_WEIGHT = 0.3141592653
_LABELS = {
    "tuned": "tuned PyTorch streaming",
    "plain": "plain safe_open + PyTorch + save_file",
}
_HERE = Path(__file__).parent


@dataclass(frozen=True)
class Entry:
    """A command of a part (statistics, delta, merge), and where its results are.

    It writes to `out`, which is removed before and after. `checked` is the command whose results
    are compared, if that is not the one that is timed. Statistics go to `results` or, if `printed`,
    to standard output.
    """

    part: str
    who: str
    label: str
    command: Sequence[str]
    checked: Sequence[str] = ()
    out: Path | None = None
    results: Path | None = None
    printed: bool = False
    # Text names of the tensors whose Δ is compared.
    sample: Sequence[str] = ()
    absent: str = ""


def environment(threads: int) -> dict[str, str]:
    """Return the environment of every process, with the number of threads and without network."""
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
    """Return mergekit's command, found beside this Python or on the path."""
    return shutil.which("mergekit-yaml", path=str(Path(sys.executable).parent)) or shutil.which(
        "mergekit-yaml"
    )


def ours(pair: Pair, what: str, *, threads: int, out: Path | None = None) -> list[str]:
    """Return our own command for every tensor of the backbone."""
    command = [sys.executable, "-m", "drift_fast", what, str(pair.reasoning), str(pair.multimodal)]
    command += ["--modules", "all", "--rows", "index", "--threads", str(threads)]
    return command if out is None else [*command, "--out", str(out)]


def control(
    pair: Pair, what: str, *, threads: int = 1, way: str = "", out: Path | None = None
) -> list[str]:
    """Return the command of a control."""
    command = _script("controls.py", what, pair, threads)
    command += ["--way", way] if way else []
    return command if out is None else [*command, "--out", str(out)]


def inside(
    pair: Pair, what: str, *, threads: int, way: str = "", out: Path | None = None
) -> list[str]:
    """Return a process that does one pass at a time: ours, the control's or a tuned rival's."""
    command = [sys.executable, "-m", "drift_fast.bench.inside", what]
    command += [str(pair.reasoning), str(pair.multimodal), "--threads", str(threads)]
    command += ["--way", way] if way else []
    return command if out is None else [*command, "--out", str(out)]


def statistics_entries(pair: Pair, work: Path, *, threads: int, way: str) -> list[Entry]:
    """Return the commands for norms and cosines: the control, ours, the rivals."""
    results = work / "statistics.json"
    mine = ours(pair, "inspect", threads=threads)

    def rival(who: str) -> Entry:
        command = _script("rivals.py", who, pair, threads)
        checked = [*command, "--results", str(results)]
        label = _LABELS[who].removesuffix(" + save_file")
        absent = torch_missing()
        return Entry("statistics", who, label, command, checked, results=results, absent=absent)

    return [
        Entry(
            "statistics",
            "xor",
            f"control: XOR of both files ({way})",
            control(pair, "xor", threads=threads, way=way),
        ),
        Entry(
            "statistics",
            "ours",
            "**drift-fast inspect**",
            mine,
            [*mine, "--json"],
            results=results,
            printed=True,
        ),
        rival("tuned"),
        rival("plain"),
    ]


def delta_entries(pair: Pair, work: Path, *, threads: int, way: str) -> list[Entry]:
    """Return the commands for Δ: the control, ours, the rivals. Only the public way writes none."""
    out, sample = work / "out", check.sample(pair)

    def entry(who: str, label: str, command: Sequence[str], absent: str = "") -> Entry:
        return Entry("delta", who, label, command, out=out, sample=sample, absent=absent)

    def rival(who: str, nbytes: int) -> Entry:
        command = [*_script("rivals.py", who, pair, threads), "--out", str(out)]
        return entry(who, _LABELS[who], command, torch_missing() or _too_large(nbytes))

    public = _script("rivals.py", "public", pair, threads)
    prefixed = [pair.multimodal_name(name) for name in sample]
    theirs, absent = _mergekit_command(pair, work, threads, (1.0, -1.0), "dtype: bfloat16")
    return [
        _writing_control("delta", pair, out, threads, way),
        entry("ours", "**drift-fast delta**", ours(pair, "delta", threads=threads, out=out)),
        rival("tuned", 0),
        rival("plain", pair.delta_nbytes),
        Entry(
            "delta",
            "public",
            "public way: two from_pretrained, attention + MLP, nothing written",
            public,
            [*public, "--out", str(out), "--sample", *prefixed],
            out=out,
            sample=[name for name in sample if ".self_attn." in name or ".mlp." in name],
            absent=_missing("torch", "safetensors", "transformers")
            or _too_large(pair.nbytes + pair.delta_nbytes),
        ),
        entry(
            "mergekit",
            "mergekit, linear with weights 1 and −1",
            theirs,
            absent or _too_large(pair.nbytes),
        ),
    ]


def merge_entries(pair: Pair, work: Path, *, threads: int, way: str) -> list[Entry]:
    """Return the commands for a linear merge of a whole model: the control, ours, the rivals."""
    out, sample = work / "out", check.sample(pair)
    mine = [sys.executable, "-m", "drift_fast", "merge", "linear"]
    mine += [str(pair.reasoning), str(pair.multimodal), "--weight", str(MERGE_WEIGHT)]
    mine += ["--rows", "index", "--threads", str(threads), "--out", str(out)]
    plain = _script("rivals.py", "merge", pair, threads)
    plain += ["--weight", str(MERGE_WEIGHT), "--out", str(out)]
    theirs, absent = _mergekit_command(
        pair, work, threads, (MERGE_WEIGHT, 1 - MERGE_WEIGHT), "dtype: float32\nout_dtype: bfloat16"
    )

    def entry(who: str, label: str, command: Sequence[str], absent: str = "") -> Entry:
        return Entry("merge", who, label, command, out=out, sample=sample, absent=absent)

    without_torch = torch_missing() or _too_large(pair.delta_nbytes)
    return [
        _writing_control("merge", pair, out, threads, way),
        entry("ours", "**drift-fast merge linear**", mine),
        entry("plain", _LABELS["plain"], plain, without_torch),
        entry("mergekit", "mergekit, linear", theirs, absent or _too_large(pair.nbytes)),
    ]


# By part.
ENTRIES = {"statistics": statistics_entries, "delta": delta_entries, "merge": merge_entries}


def our_entry(part: str, pair: Pair, work: Path, *, threads: int) -> Entry:
    """Return our own command of a part."""
    entries = ENTRIES[part](pair, work, threads=threads, way="")
    return next(entry for entry in entries if entry.who == "ours")


def _writing_control(part: str, pair: Pair, out: Path, threads: int, way: str) -> Entry:
    command = control(pair, "write", threads=threads, way=way, out=out)
    return Entry(part, "xor", f"control: XOR, written and flushed ({way})", command, out=out)


def torch_missing() -> str:
    """Return why the PyTorch rivals cannot run, or nothing if they can."""
    return _missing("torch", "safetensors")


def cold_reads(pair: Pair) -> Mapping[str, list[str]]:
    """Return the sequential reads to compare a cold run with, by label."""
    return {way: control(pair, "read", way=way) for way in READ_WAYS}


def _mergekit_command(
    pair: Pair, work: Path, threads: int, weights: tuple[float, float], dtypes: str
) -> tuple[list[str], str]:
    """Write mergekit's configuration to `work` and return its command, or why there is none."""
    found = mergekit()
    if not found:
        return [], "mergekit is not installed"
    if pair.renamed is None:
        return [], "no checkpoint with the text model's names was written"
    work.mkdir(parents=True, exist_ok=True)
    configuration = work / f"{weights[0]}.yaml"
    configuration.write_text(mergekit_configuration(pair.reasoning, pair.renamed, weights, dtypes))
    command = [found, str(configuration), str(work / "out"), "--lazy-unpickle", "--quiet"]
    command += ["--no-copy-tokenizer", "--no-write-model-card", "--num-threads", str(threads)]
    return command, ""


def _script(name: str, what: str, pair: Pair, threads: int) -> list[str]:
    # -P keeps this folder off the path, so that its modules do not hide others of the same name.
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
