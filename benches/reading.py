"""Time statistics with files read and files mapped, by how the page cache holds them.

    python benches/reading.py [--size 0.5B] [--threads 1,2] [--repeats 5] [--directory DIR]

How fast either way is depends on the units (folios) in which the kernel keeps a file's pages. They
are at most as large as the pieces that a file was written in, or, once it was read from the disk,
as the read-ahead allows. So the pair of `drift-fast bench` is copied in small and in large pieces,
then read anew, then read from the disk in every run. `in 2 MiB` is the share that the processor
maps in units of that size, as /proc/self/smaps has it. Readers and thread counts take turns in
every round of one process. GB per CPU second says more than GB/s where others use the machine. It
needs an installed drift_fast and nothing else.
"""

from __future__ import annotations

import argparse
import mmap
import os
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from drift_fast import inspect
from drift_fast.bench import hardware, page_cache
from drift_fast.bench.pair import SIZES, make_pair, shards
from drift_fast.bench.session import refuse_debug_build

READERS = ("pread", "mmap")
PIECES = {"written in pieces of 4 KiB": 4 << 10, "written in pieces of 2 MiB": 2 << 20}
ANEW, COLD = "read anew from the disk", "cold"
Figures = dict[tuple[str, int, str], list[tuple[float, float]]]


def copy(source: Path, target: Path, piece: int) -> None:
    """Write a checkpoint again in pieces of so many bytes, and flush it."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.safetensors"))
    for path in shards(source):
        with path.open("rb") as file, (target / path.name).open("wb", buffering=0) as out:
            while data := file.read(piece):
                out.write(data)
            os.fsync(out.fileno())


def mapped_in_2_mib(path: Path) -> float | None:
    """Return the share of a file in the page cache that is mapped in units of 2 MiB."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as view:
        for start in range(0, len(view), mmap.PAGESIZE):
            view[start]
        try:
            text = Path("/proc/self/smaps").read_text()
        except OSError:
            return None
    fields = text.partition(str(path))[2].split()
    if "FilePmdMapped:" not in fields:
        return None
    rss, huge = (int(fields[fields.index(name) + 1]) for name in ("Rss:", "FilePmdMapped:"))
    return huge / max(rss, 1)


def measure(
    state: str,
    sides: Sequence[Path],
    options: argparse.Namespace,
    figures: Figures,
    before: Callable[[], object],
) -> None:
    """Time readers and thread counts in turn; `before` runs ahead of each, outside the clock."""
    for repeat in range(options.repeats + 1):
        for threads in options.threads:
            for reader in READERS:
                before()
                cpu, wall = time.process_time(), time.perf_counter()
                inspect(*sides, modules="all", rows="index", threads=threads, reader=reader)
                figure = time.perf_counter() - wall, time.process_time() - cpu
                if repeat:  # the first round warms up
                    figures.setdefault((state, threads, reader), []).append(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="0.5B")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--threads", type=lambda text: [int(count) for count in text.split(",")], default=[1, 2]
    )
    default = Path(tempfile.gettempdir()) / "drift-fast"
    parser.add_argument("--directory", type=Path, default=default)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    refuse_debug_build()
    pair = make_pair(options.directory, options.size, outputs=2)
    work = Path(tempfile.mkdtemp(prefix="reading-", dir=options.directory))
    sides = [work / "text", work / "multimodal"]
    figures: Figures = {}
    huge: dict[str, float | None] = {}
    try:
        for state, piece in PIECES.items():
            for source, target in zip((pair.reasoning, pair.multimodal), sides, strict=True):
                copy(source, target, piece)
            huge[state] = mapped_in_2_mib(shards(sides[0])[0])
            measure(state, sides, options, figures, lambda: None)
        files = [path for side in sides for path in shards(side)]
        if page_cache.can_evict():
            page_cache.evict(files)
            page_cache.warm(files)
            huge[ANEW] = mapped_in_2_mib(shards(sides[0])[0])
            measure(ANEW, sides, options, figures, lambda: None)
            measure(COLD, sides, options, figures, lambda: page_cache.evict(files))
            huge[COLD] = None
    finally:
        shutil.rmtree(work, ignore_errors=True)
    table = report(pair.nbytes, options, figures, huge)
    print(table)
    if options.out:
        options.out.write_text(table + "\n")


def report(
    nbytes: int, options: argparse.Namespace, figures: Figures, huge: dict[str, float | None]
) -> str:
    """Return the table; its last column is mapping against reading, per CPU second."""
    machine = hardware.describe(options.directory)
    threads = ",".join(map(str, options.threads))
    lines = [
        f"# Statistics of a pair of 2 × {nbytes / 2e9:.2f} GB in bfloat16, read and mapped",
        "",
        f"`python benches/reading.py --size {options.size} --threads {threads} --repeats "
        f"{options.repeats}`, {time.strftime('%Y-%m-%d')}. {machine['processor']}, "
        f"{machine['cores']} cores, {machine['system']}, {machine['file_system']}; Python "
        f"{platform.python_version()}, drift_fast {hardware.versions()['drift_fast']}. Medians of "
        f"{options.repeats}, readers in turn; load {os.getloadavg()[0]:.0f} at the end.",
        "",
        "| page cache | in 2 MiB | threads | read, GB/s | mapped, GB/s | read, GB per CPU s "
        "| mapped, GB per CPU s | |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for state, count in dict.fromkeys(key[:2] for key in figures):
        rates = [
            [nbytes / 1e9 / statistics.median(part) for part in zip(*rows, strict=True)]
            for rows in (figures[state, count, reader] for reader in READERS)
        ]
        walls, cpus = zip(*rates, strict=True)
        share = "" if huge[state] is None else f"{huge[state]:.0%}".replace("%", " %")
        cells = [state, share, str(count), *(f"{rate:.2f}" for rate in (*walls, *cpus))]
        lines.append(f"| {' | '.join(cells)} | {cpus[1] / cpus[0]:.2f}× |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
