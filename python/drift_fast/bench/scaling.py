"""How statistics and writing scale over thread counts, beside the XOR control with the same counts.

Everything is warm and in process. The control's fastest way may differ, so it is picked again for
each count.
"""

from __future__ import annotations

import shutil

from drift_fast.bench import check, commands
from drift_fast.bench.options import BenchOptions
from drift_fast.bench.results import Results, Row
from drift_fast.bench.session import Say, open_session, pick_way
from drift_fast.bench.timing import time_inside
from drift_fast.bench.verify import check_entry


def run_scaling(options: BenchOptions, say: Say) -> Results:
    """Run ours and the control with each number of threads; check results with the largest one.

    Raises:
        DriftError: this is a debug build, or our results are wrong.
        OSError: not enough space.
    """
    session = open_session("scaling", options, say)
    pair, results = session.pair, session.results
    try:
        most = max(options.scaling)
        true = check.truth(pair, threads=most)
        for part in options.measured_parts:
            entry = commands.our_entry(part, pair, session.work, threads=most)
            check_entry(session, entry, Row(f"check/{part}/ours", entry.label), true)
        for threads in options.scaling:
            for part in options.parts:
                way = pick_way(session, part, threads)
                out = session.out if part == "delta" else None
                rows = {
                    who: Row(f"inside/{part}/{who}@{threads}", label, threads=threads)
                    for who, label in (("xor", f"control: XOR ({way})"), ("ours", "drift_fast"))
                }
                results.rows += rows.values()
                processes = [
                    (row, commands.inside(pair, who, threads=threads, way=way, out=out))
                    for who, row in rows.items()
                ]
                time_inside(session, processes, threads)
        picked = ", ".join(
            f"{row.key.rpartition('@')[0].split('/')[1]} with {row.threads} "
            f"{row.label.removeprefix('control: XOR ').strip('()')}"
            for row in results.rows
            if "/xor@" in row.key
        )
        results.notes += [
            "In process, warm, with imports and buffers ready beforehand; GB/s count the tensors "
            "that both models have, in both",
            f"The control's way, the fastest of several: {picked}",
        ]
    finally:
        shutil.rmtree(session.work, ignore_errors=True)
    return results
