"""Measure injection over several GPUs: DDP, FSDP2 and DeepSpeed ZeRO, with NCCL or with gloo.

    python benches/multi_gpu.py [--gpus 2] [--stacks ddp fsdp2 zero2 zero3] [--out results.md]
    python benches/multi_gpu.py --lora [--minutes 4]
    python benches/multi_gpu.py --device cpu --gpus 2 --size tiny --layers 2 --tokens 32

Qwen2.5-VL-7B's text backbone with random weights, in bfloat16. A pair of checkpoints is written to
--directory (a memory-backed one by default), its delta computed there, and every rank reads its own
rows of it. First every stack takes steps of a shrunken model in float32, and what its optimizer
received is compared with a float64 restatement of the whole batch in one process. Then whole
optimizer steps are timed, injected ones in turn with those that are not.

Of whole weights, DDP and ZeRO hold more than a shard on every GPU, so they run at a smaller depth,
and with the first of --tokens only. With --lora all stacks have all layers, and one process alone
is timed too. NVLink multicast is left off. With --pretend 2 one process takes the place of two, and
sums over processes add nothing: a step but for what travels, whose gradients are not compared.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lora_steps import render_lora, time_lora
from stacks import ALONE, SCALES, STACKS, Clock, check

import drift_fast
from drift_fast import Delta
from drift_fast.bench.pair import SIZES, make_pair

# By importance, should the time not suffice.
ORDER = ("ddp", "fsdp2", ALONE, "zero3", "zero2")


# --- what runs on every rank -----------------------------------------------------------------


def enter(options: argparse.Namespace) -> None:
    """Check and time some stacks on this rank; rank 0 writes what was found."""
    rank = int(os.environ["LOCAL_RANK"])
    device = torch.device("cuda", rank) if options.device == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    if options.pretend:
        from torch.testing._internal.distributed.fake_pg import FakeStore

        store: Any = FakeStore()
        dist.init_process_group("fake", store=store, rank=0, world_size=options.pretend)
    else:
        # With CPU tensors too, for what is no tensor on a GPU.
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")

    def late() -> bool:
        """Whether the time is over, by the clock of rank 0."""
        over = torch.tensor(float(time.time() > options.deadline))
        dist.broadcast(over, 0)
        return bool(over)

    for stack in options.worker:
        if late():
            break
        # One process works alone, and the others must not ask it anything.
        if stack != ALONE or rank == 0:
            alone = stack == ALONE
            until = (lambda: time.time() > options.deadline) if alone else late
            run_stack(options, stack, device, until)
        dist.barrier()
    dist.destroy_process_group()


def run_stack(
    options: argparse.Namespace, stack: str, device: torch.device, late: Callable[[], bool]
) -> None:
    """Check and time one stack; on rank 0, write its report whenever a figure is there."""
    world = 1 if stack == ALONE else dist.get_world_size()
    report: dict[str, Any] = {"stack": stack, "world": world, "rows": []}
    directory = Path(options.directory)
    began = time.perf_counter()

    def write() -> None:
        if dist.get_rank() == 0:
            write_report(directory, report)

    def note(kind: str, row: dict[str, Any]) -> None:
        report.setdefault(kind, []).append(row)
        write()
        if dist.get_rank() == 0:
            short = {key: row[key] for key in ("label", "seconds", "memory") if key in row}
            if "times" in row:
                added = statistics.median(row["times"]) / statistics.median(row["base"]) - 1
                short["added"] = f"{added:+.1%}"
            print(f"{stack}, {world} processes: {short}", flush=True)

    try:
        if stack.startswith("zero"):
            start_deepspeed(device)
        if not options.pretend:
            shrunken = wait_for(directory / "shrunken")
            report["errors"] = check(stack, device, shrunken, rank=8 if options.lora else 0)
            report["checked"] = time.perf_counter() - began
            write()
        if not options.check_only:
            delta = wait_for(directory / "delta")
            time_stack(options, stack, device, report, note, late, delta)
        if device.type == "cuda":
            report["peak"] = torch.cuda.max_memory_allocated() / 1e9
    except Exception:
        report["failure"] = traceback.format_exc()
        print(f"rank {dist.get_rank()}: {report['failure']}", file=sys.stderr, flush=True)
    report["took"] = time.perf_counter() - began
    write()
    if "failure" in report:
        # Others may wait for this rank in a sum that it never reaches.
        os._exit(1)
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def start_deepspeed(device: torch.device) -> None:
    """Let DeepSpeed join the processes; on a CPU without compiling a kernel of its own."""
    import deepspeed

    if device.type == "cpu":
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="nccl" if device.type == "cuda" else "gloo")


def wait_for(directory: Path) -> Delta:
    """Open a delta that another process may still be computing; it is named when it is whole."""
    while not directory.is_dir():
        time.sleep(0.2)
    return Delta.open(directory)


def time_stack(
    options: argparse.Namespace,
    stack: str,
    device: torch.device,
    report: dict[str, Any],
    note: Callable[[str, dict[str, Any]], None],
    late: Callable[[], bool],
    whole: Delta,
) -> None:
    """Attach and time one stack, noting figures as they come."""
    few = not options.lora and stack != "fsdp2"
    report["layers"] = options.smaller_layers if few else options.layers
    clock = Clock(
        stack,
        device,
        size=options.size,
        layers=report["layers"],
        rank=options.rank if options.lora else 0,
    )
    if options.lora:
        time_lora(clock, whole, options, note, late)
        return
    layers = range(clock.layers)
    lengths = options.tokens if stack == "fsdp2" else options.tokens[:1]
    for tokens in lengths if report["world"] > 1 else ():
        recomputed = clock.use(tokens)
        for label, modules, scale in (
            ("attention + MLP, adaptive", ("attn", "mlp"), "adaptive"),
            ("attention + MLP, gradnorm", ("attn", "mlp"), "gradnorm"),
            ("attention only, adaptive", ("attn",), "adaptive"),
        ):
            if late():
                return
            what = {"modules": modules, "scale": scale, "layers": layers}
            row = clock.compare(whole, label, repeats=options.repeats, steps=options.steps, **what)
            note("rows", {**row, "tokens": tokens, "recomputed": recomputed})
    if report["world"] == 1:
        clock.use(options.tokens[0])
        injection, found = clock.attached(whole, layers=layers)
        note("rows", {"label": "attached", **found, "tokens": 0})
        injection.remove()


# --- what starts them ------------------------------------------------------------------------


def report_file(directory: Path, stack: str, world: int) -> Path:
    return directory / f"{stack}-{world}.json"


def write_report(directory: Path, report: dict[str, Any]) -> None:
    """Write a report under a name that only whole ones have."""
    file = report_file(directory, report["stack"], report["world"])
    part = file.with_suffix(".part")
    part.write_text(json.dumps(report))
    part.replace(file)


def launch(
    options: argparse.Namespace, stacks: Sequence[str], processes: int, directory: Path
) -> subprocess.Popen[bytes]:
    """Start some stacks, one after the other, in processes of their own."""
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
        *("--nproc-per-node", str(processes), __file__, "--worker", *stacks),
        *("--device", options.device, "--size", options.size, "--layers", str(options.layers)),
        *("--smaller-layers", str(options.smaller_layers), "--steps", str(options.steps)),
        *("--repeats", str(options.repeats), "--directory", str(directory)),
        *("--deadline", str(options.deadline), "--tokens", *map(str, options.tokens)),
        *("--rank", str(options.rank), "--attach-layers", str(options.attach_layers)),
        *(("--check-only",) if options.check_only else ()),
        *(("--lora",) if options.lora else ()),
        *("--pretend", str(options.pretend)),
    ]
    environment = {**os.environ, "NCCL_NVLS_ENABLE": "0", "TOKENIZERS_PARALLELISM": "false"}
    environment["TORCH_SYMM_MEM_DISABLE_MULTICAST"] = "1"
    if options.device == "cpu":
        environment |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, start_new_session=True)


def kill(process: subprocess.Popen[bytes]) -> None:
    """End a launcher, and its workers too: they would hold the GPUs."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


class Run:
    """The stacks that are still to be run, and what was found so far."""

    def __init__(self, options: argparse.Namespace, directory: Path) -> None:
        self.options, self.directory = options, directory
        self.made: dict[str, float] = {}
        # Stacks that share a launch: of LoRA all, which saves imports.
        self.turns = [[*options.stacks]] if options.lora else [[one] for one in options.stacks]
        self.turns = [turn for turn in self.turns if turn]
        self.expected = [(stack, self.world(stack)) for turn in self.turns for stack in turn]
        if "fsdp2" in options.stacks and not (options.lora or options.check_only):
            # What one process alone holds, to compare a rank's share with.
            self.expected += [("fsdp2", 1)] if options.gpus > 1 else []

    def world(self, stack: str) -> int:
        return 1 if stack == ALONE else int(self.options.pretend or self.options.gpus)

    def everything(self) -> None:
        """Run all stacks, the first ones while the large delta is made."""
        first: Any = None
        if self.options.after is None:
            first = launch(self.options, self.turns[0], self.options.gpus, self.directory)
        try:
            self.made = make_deltas(self.options, self.directory)
            while self.options.after is not None and not self.options.after.exists():
                time.sleep(0.5)
            while self.turns:
                turn = self.turns.pop(0)
                process = first or launch(self.options, turn, self.options.gpus, self.directory)
                first = None
                self.wait(process)
                self.again(turn)
            if ("fsdp2", 1) in self.expected and self.options.gpus > 1:
                self.wait(launch(self.options, ["fsdp2"], 1, self.directory))
        finally:
            if first is not None:
                kill(first)

    def wait(self, process: subprocess.Popen[bytes]) -> None:
        """Wait for a launch to end, and write what there is now and then."""
        try:
            while process.poll() is None:
                if time.time() > self.options.deadline + 30:
                    break
                time.sleep(1)
                self.write()
        finally:
            kill(process)
        self.write()

    def again(self, turn: Sequence[str]) -> None:
        """Run what follows a stack that failed, and ended all processes, in new ones."""
        failed = [
            at
            for at, stack in enumerate(turn)
            if "failure" in self.report(stack, self.world(stack))
        ]
        rest = turn[failed[-1] + 1 :] if failed else ()
        if rest and time.time() < self.options.deadline:
            self.turns.insert(0, list(rest))

    def report(self, stack: str, world: int) -> dict[str, Any]:
        file = report_file(self.directory, stack, world)
        if file.is_file():
            found: dict[str, Any] = json.loads(file.read_text())
            return found
        return {"stack": stack, "world": world, "rows": [], "missing": "not run"}

    def reports(self) -> list[dict[str, Any]]:
        return [self.report(*one) for one in self.expected]

    def write(self) -> None:
        if self.options.out:
            self.options.out.write_text(render(self.options, self.reports(), self.made))


def make_deltas(options: argparse.Namespace, directory: Path) -> dict[str, float]:
    """Write both deltas and remove the checkpoints they come from; return how long it took."""
    tiny = make_pair(directory / "pairs", "tiny")
    drift_fast.compute_delta(tiny.reasoning, tiny.multimodal, directory / "shrunken")
    if options.check_only:
        return {}
    start = time.perf_counter()
    pair = make_pair(directory / "pairs", options.size, layers=options.layers, outputs=1)
    written = time.perf_counter()
    drift_fast.compute_delta(pair.reasoning, pair.multimodal, directory / "delta")
    found = {"pair": written - start, "delta": time.perf_counter() - written}
    shutil.rmtree(directory / "pairs")
    return found


def render(options: argparse.Namespace, reports: list[dict[str, Any]], made: Any) -> str:
    """Return the results as Markdown."""
    cuda = options.device == "cuda"
    name = torch.cuda.get_device_name() if cuda else f"CPU ({platform.machine()})"
    what = "LoRA" if options.lora else "Injection"
    lines = [
        f"# {what} over {options.gpus} × {name}",
        "",
        f"`python benches/multi_gpu.py {' '.join(sys.argv[1:])}`, {time.strftime('%Y-%m')}, torch "
        f"{torch.__version__}, drift_fast {drift_fast.__version__}.",
        "",
        "## What each optimizer received, against float64 in one process",
        "",
        "A shrunken model in float32, accumulation 2, every rank its own micro-batches, the fourth "
        "step: the largest relative error of any parameter's gradient.",
        "",
        f"| | processes | {' | '.join(SCALES)} |",
        "|---|---|" + "---|" * len(SCALES),
    ]
    for report in reports:
        errors = report.get("errors")
        unknown = "not compared" if options.pretend else "not yet"
        missing = report.get("missing", "failed" if "failure" in report else unknown)
        cells = [f"{errors[scale]:.1e}" for scale in SCALES] if errors else [missing] * 3
        lines.append(f"| {report['stack']} | {report['world']} | {' | '.join(cells)} |")
    lines += ["", *(render_lora if options.lora else render_whole)(reports, options), ""]
    if made:
        lines.append(
            f"The pair was written in {made['pair']:.0f} s and its delta in {made['delta']:.1f} s."
        )
    took = [f"{r['stack']} {r['took']:.0f}" for r in reports if "took" in r]
    if took:
        lines.append(f"Seconds of each stack, with the check: {', '.join(took)}.")
    for report in reports:
        if "failure" in report:
            last = report["failure"].strip().splitlines()[-1]
            lines.append(f"\n{report['stack']} with {report['world']} processes failed: {last}")
    return "\n".join(lines) + "\n"


def render_whole(reports: list[dict[str, Any]], options: argparse.Namespace) -> list[str]:
    """Return the steps of whole weights as lines of Markdown."""
    lines = [
        "## What an injection adds to an optimizer step",
        "",
        f"{options.size} in bfloat16, one sequence for each process, forward, backward and AdamW. "
        f"Medians of {options.repeats} rounds of {options.steps} steps in a row, in turn with "
        "steps that are not injected. *Summed*: numbers in the library's own sums over processes "
        "in a step, and in how many sums.",
        "",
        "| | processes | layers | tokens | variant | step ms | without | added | summed "
        "| Δ, GB a rank | attached in, s |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for report in reports:
        for row in report["rows"]:
            start = f"| {report['stack']} | {report['world']} | {report.get('layers')} "
            end = f"{row['memory']:.2f} | {row['seconds']:.1f} |"
            if "times" not in row:
                lines.append(f"{start}| | attached only | | | | | {end}")
                continue
            time_, base = statistics.median(row["times"]), statistics.median(row["base"])
            spread = f"{time_:.1f} ({min(row['times']):.1f} to {max(row['times']):.1f})"
            tokens = f"{row['tokens']}{', recomputed' if row['recomputed'] else ''}"
            sums = f"{sum(row['sums'])} in {len(row['sums'])}"
            lines.append(
                f"{start}| {tokens} | {row['label']} | {spread} | {base:.1f} "
                f"| {time_ / base - 1:+.1%} | {sums} | {end}"
            )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    cuda = torch.cuda.is_available()
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if cuda else "cpu")
    parser.add_argument("--gpus", type=int, default=max(1, torch.cuda.device_count()))
    parser.add_argument("--lora", action="store_true", help="train LoRA's factors")
    parser.add_argument("--rank", type=int, default=64, help="of LoRA")
    parser.add_argument("--stacks", nargs="+", choices=ORDER)
    parser.add_argument("--size", choices=tuple(SIZES), default="7B")
    parser.add_argument("--layers", type=int, default=28, help="of FSDP2, and of all with --lora")
    parser.add_argument("--smaller-layers", type=int, default=8, help="of DDP and ZeRO")
    parser.add_argument("--attach-layers", type=int, default=8, help="for times of attaching")
    parser.add_argument("--tokens", type=int, nargs="+", default=(2048, 8192))
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=60, help="start nothing after these")
    parser.add_argument("--pretend", type=int, default=0, help="be one process of so many")
    parser.add_argument("--after", type=Path, help="use no GPU before this file is there")
    parser.add_argument("--check-only", action="store_true")
    parser.add_argument("--directory", help="for the pair and its delta; default in memory")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--worker", nargs="+", choices=ORDER, help=argparse.SUPPRESS)
    parser.add_argument("--deadline", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        enter(options)
        return
    options.gpus = 1 if options.pretend else options.gpus
    options.smaller_layers = min(options.smaller_layers, options.layers)
    options.deadline = time.time() + 60 * options.minutes
    if options.stacks is None:
        every = ORDER if options.lora else STACKS
        alone = options.lora and options.gpus == 1 and not options.pretend
        options.stacks = [ALONE] if alone else list(every)
    memory = Path("/dev/shm")
    home = options.directory or (memory if memory.is_dir() else None)
    with tempfile.TemporaryDirectory(dir=home) as folder:
        run = Run(options, Path(folder))
        run.everything()
        run.write()
        reports = run.reports()
        print(render(options, reports, run.made))
    if any("failure" in report for report in reports):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
