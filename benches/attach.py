"""Time loading Δ for training beside the limit of the machine and a plain loop, all in one run.

    python benches/attach.py --size 7B --directory /dev/shm/attach [--repeats 2] [--out results.md]
    python benches/attach.py --size 0.5B --layers 4 --device cpu --directory /dev/shm/attach

Writes a synthetic pair of that size and its deltas in bfloat16 and int8 to the directory, once; the
page cache is warm. The limits are programs of a few lines: threads that read the same bytes with
`preadv` into reused page-locked buffers and copy them to the device; or into memory that is locked
afterwards; or into buffers alone. The rival is a loop over `safetensors.safe_open`. Two ranks are
two processes that share the device, or have one each: sharded by FSDP2 each holds its rows, with
whole parameters (as under DDP) each holds all of Δ. Before timing, what was loaded is compared
with the delta.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

import drift_fast
from drift_fast import Delta, Injection, _core
from drift_fast.bench.pair import Pair, make_pair, shards
from drift_fast.inject.placement.page_locked import lock, pages
from drift_fast.sizes import thread_count

BUFFER = 1 << 23
MODULES = ("attn", "mlp")


class Model(torch.nn.Module):
    """Parameters of the names and shapes of Δ, and nothing else."""

    def __init__(self, delta: Delta, device: torch.device) -> None:
        super().__init__()
        for name, shape in delta.shapes.items():
            *path, leaf = name.split(".")
            module: torch.nn.Module = self
            for part in path:
                if part not in module._modules:
                    module.add_module(part, torch.nn.Module())
                module = module.get_submodule(part)
            weight = torch.full(shape, 0.01, dtype=torch.bfloat16, device=device)
            module.register_parameter(leaf, torch.nn.Parameter(weight))


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(device: torch.device, action: Callable[[], Any], repeats: int) -> float:
    """Return the least seconds of some runs; what a run returns is freed before the next."""
    found = []
    for _ in range(repeats):
        wait(device)
        start = time.perf_counter()
        held = action()
        wait(device)
        found.append(time.perf_counter() - start)
        if isinstance(held, Injection):
            held.remove()
        del held
    return min(found)


# ------------------------------------------------------------------ the limit


def pieces(files: Sequence[Path]) -> list[tuple[int, int, int]]:
    """Return descriptor, offset and length of pieces of all files."""
    found = []
    for path in files:
        descriptor, nbytes = os.open(path, os.O_RDONLY), path.stat().st_size
        found += [(descriptor, at, min(BUFFER, nbytes - at)) for at in range(0, nbytes, BUFFER)]
    return found


def on_threads(work: Callable[[Any], None], items: Sequence[Any], threads: int) -> None:
    """Do work on threads, each on every `threads`th item."""
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, [items[at::threads] for at in range(threads)]))


def read_and_copy(files: Sequence[Path], device: torch.device, threads: int) -> torch.Tensor:
    """Read all bytes of files to a device: threads, each with two page-locked buffers."""
    total = sum(path.stat().st_size for path in files)
    out = torch.empty(total + BUFFER, dtype=torch.uint8, device=device)
    items = list(enumerate(pieces(files)))

    def work(mine: list[Any]) -> None:
        stream = torch.cuda.Stream(device)
        pinned = [torch.empty(BUFFER, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
        events: list[Any] = [None, None]
        with torch.cuda.stream(stream):
            for turn, (number, (descriptor, at, nbytes)) in enumerate(mine):
                buffer, event = pinned[turn % 2], events[turn % 2]
                if event is not None:
                    event.synchronize()
                os.preadv(descriptor, [buffer[:nbytes].numpy()], at)
                place = min(number * BUFFER, total)
                out[place : place + nbytes].copy_(buffer[:nbytes], non_blocking=True)
                events[turn % 2] = stream.record_event()
        stream.synchronize()

    on_threads(work, items, threads)
    return out


def read(files: Sequence[Path], threads: int) -> None:
    """Read all bytes of files into one buffer for each thread."""

    def work(mine: list[Any]) -> None:
        buffer = torch.empty(1 << 19, dtype=torch.uint8).numpy()
        for descriptor, at, nbytes in mine:
            for start in range(at, at + nbytes, len(buffer)):
                os.preadv(descriptor, [buffer[: min(len(buffer), at + nbytes - start)]], start)

    on_threads(work, pieces(files), threads)


class Owner:
    """As long as it lives, memory stays locked."""

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self.tensors = [lock(self, tensor) for tensor in tensors]


def read_to_host(files: Sequence[Path], threads: int) -> Owner:
    """Read all bytes of files into new memory, which is page-locked where there is a GPU."""
    items = pieces(files)
    sizes = [path.stat().st_size for path in files]
    outs = {item[0]: pages(n, torch.uint8) for item, n in zip(_firsts(items), sizes, strict=True)}

    def work(mine: list[Any]) -> None:
        for descriptor, at, nbytes in mine:
            os.preadv(descriptor, [outs[descriptor][at : at + nbytes].numpy()], at)

    on_threads(work, items, threads)
    return Owner(list(outs.values()))


def read_and_bring_back(
    files: Sequence[Path], nbytes: int, device: torch.device, threads: int
) -> list[Owner]:
    """Read all bytes of files to a device while so many others come to new page-locked memory."""
    there = torch.empty(BUFFER, dtype=torch.uint8, device=device)
    each = 1 << 27
    outs = [pages(min(each, nbytes - at), torch.uint8) for at in range(0, nbytes, each)]
    owners: list[Owner] = []

    def bring(mine: list[torch.Tensor]) -> None:
        stream = torch.cuda.Stream(device)
        for out in mine:
            # The system brings the pages in when they are written to.
            owners.append(Owner([out.zero_()]))
            with torch.cuda.stream(stream):
                for part in out.split(BUFFER):
                    part.copy_(there[: len(part)], non_blocking=True)
        stream.synchronize()

    with ThreadPoolExecutor(1) as pool:
        brought = pool.submit(on_threads, bring, outs, 4)
        read_and_copy(files, device, threads)
        brought.result()
    return owners


def _firsts(items: Sequence[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
    return [item for item in items if item[1] == 0]


def copy(nbytes: int, device: torch.device) -> Callable[[], None]:
    """Return what copies so many bytes from page-locked memory to a device."""
    pinned = torch.empty(1 << 26, dtype=torch.uint8, pin_memory=True)
    there = torch.empty(1 << 26, dtype=torch.uint8, device=device)

    def run() -> None:
        for _ in range(nbytes >> 26):
            there.copy_(pinned, non_blocking=True)

    return run


def rival(files: Sequence[Path], device: torch.device) -> dict[str, torch.Tensor]:
    """Load every tensor with safetensors, one after the other."""
    found = {}
    for path in files:
        with safe_open(path, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                # Mapped until it is copied.
                found[name] = opened.get_tensor(name).to(device, copy=True)
    return found


# ------------------------------------------------------------------ two ranks


@contextlib.contextmanager
def one_rank(options: argparse.Namespace) -> Iterator[torch.device]:
    """Join the other rank; on one GPU both have it."""
    import torch.distributed as dist

    rank, world = options.rank
    device = torch.device(options.device)
    if device.type == "cuda":
        device = torch.device("cuda", rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
    store = dist.FileStore(options.store, world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    yield device
    dist.barrier()
    dist.destroy_process_group()


def run_rank(options: argparse.Namespace) -> None:
    """Attach as one of two ranks, and print the seconds."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    with one_rank(options) as device:
        delta = Delta.open(options.delta)
        model: torch.nn.Module = Model(delta, device)
        if options.sharded:
            model = fully_shard(model, mesh=init_device_mesh(device.type, (options.rank[1],)))
        found = []
        for _ in range(options.repeats):
            wait(device)
            dist.barrier()
            start = time.perf_counter()
            injection = Injection(model, delta, residency="device")
            wait(device)
            dist.barrier()
            found.append(time.perf_counter() - start)
            injection.remove()
        print(json.dumps(min(found)), flush=True)


def ranks(options: argparse.Namespace, delta: Path, *, sharded: bool) -> float:
    """Return the seconds that two ranks took, from a barrier to a barrier."""
    store = options.directory / f"store-{os.getpid()}-{sharded}"
    command = [sys.executable, __file__, "--store", str(store), "--delta", str(delta)]
    command += ["--device", options.device, "--repeats", str(options.repeats)]
    command += ["--directory", str(options.directory), *(["--sharded"] if sharded else [])]
    running = [
        subprocess.Popen([*command, "--rank", str(rank), "2"], stdout=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    texts = [process.communicate(timeout=300)[0] for process in running]
    store.unlink(missing_ok=True)
    return max(float(text.split()[-1]) for text in texts)


# ------------------------------------------------------------------ the run


def check(injection: Injection, delta: Delta) -> None:
    """Compare some of what was loaded with the delta."""
    for group in injection._groups:
        for _, _, deltas in group.store.batches():
            for target, found in list(zip(group.targets, deltas, strict=True))[::40]:
                expected = delta[target.delta_name].reshape(-1)
                assert torch.equal(found.cpu(), expected), target.name


def make(options: argparse.Namespace) -> tuple[Pair, dict[str, Path]]:
    """Return the pair, and the directories of its deltas by dtype."""
    pair = make_pair(options.directory, options.size, layers=options.layers, outputs=2)
    deltas = {}
    for dtype in ("bfloat16", "int8"):
        deltas[dtype] = pair.reasoning.parent / f"delta-{dtype}"
        if not deltas[dtype].exists():
            drift_fast.compute_delta(
                pair.reasoning, pair.multimodal, deltas[dtype], modules=MODULES, dtype=dtype
            )
    return pair, deltas


def measure(options: argparse.Namespace) -> list[str]:
    """Return the lines of a table."""
    device, threads = torch.device(options.device), thread_count(None)
    pair, deltas = make(options)
    stored = {dtype: Delta.open(path) for dtype, path in deltas.items()}
    files = {dtype: shards(path) for dtype, path in deltas.items()}
    streamed = drift_fast.compute_delta(pair.reasoning, pair.multimodal, modules=MODULES)
    nbytes = sum(2 * math.prod(shape) for shape in stored["bfloat16"].shapes.values())
    model = Model(stored["bfloat16"], device)
    with Injection(model, stored["bfloat16"], residency="device") as injection:
        check(injection, stored["bfloat16"])
    repeats, on_gpu = options.repeats, device.type == "cuda"

    def limit(action: Callable[[], Any]) -> float:
        return timed(device, action, repeats)

    to_host = limit(lambda: read_to_host(files["bfloat16"], threads))
    alone = limit(lambda: read(files["bfloat16"], threads))
    # What both checkpoints have of it, twice as much as Δ.
    both = 2 * alone
    there, codes, copied = to_host, limit(lambda: read_to_host(files["int8"], threads)), 0.0
    if on_gpu:
        there = limit(lambda: read_and_copy(files["bfloat16"], device, threads))
        codes = limit(lambda: read_and_copy(files["int8"], device, threads))
        copied = limit(copy(nbytes, device))
    # As int8, Δ goes to the device to be rounded, and its codes come back.
    back = there
    if on_gpu and options.all:
        codes_nbytes = sum(path.stat().st_size for path in files["int8"])
        back = limit(lambda: read_and_bring_back(files["bfloat16"], codes_nbytes, device, threads))
    rows: list[tuple[str, float, float | None]] = []

    def attach(label: str, delta: Delta, residency: str, at_best: float) -> float:
        seconds = timed(device, lambda: Injection(model, delta, residency=residency), repeats)
        rows.append((label, seconds, at_best))
        return seconds

    one = attach("device, from a delta", stored["bfloat16"], "device", there)
    # Where the weights start along Δ is measured on the device, so that Δ goes there once.
    attach("host, from a delta", stored["bfloat16"], "host", to_host + copied)
    if on_gpu or options.all:
        attach("device-int8, from a delta", stored["bfloat16"], "device-int8", there)
    if options.all:
        attach("host-int8, from a delta", stored["bfloat16"], "host-int8", back)
    attach("device-int8, from an int8 delta", stored["int8"], "device-int8", codes)
    attach("disk, from a delta", stored["bfloat16"], "disk", there if on_gpu else alone)
    attach("device, streamed", streamed, "device", max(both, copied, there if not on_gpu else 0))
    attach("host, streamed", streamed, "host", max(both, to_host) + copied)
    plain = timed(device, lambda: rival(files["bfloat16"], device), 1)
    rows.append(("safetensors.safe_open in a loop, to the device", plain, there))
    model.to("meta")
    if on_gpu:
        torch.cuda.empty_cache()
    for label, sharded in (("FSDP2, rows", True), ("DDP, all of Δ each", False)):
        try:
            seconds = ranks(options, deltas["bfloat16"], sharded=sharded)
        except (IndexError, ValueError, subprocess.TimeoutExpired) as error:
            print(f"two ranks, {label}: {error!r}", file=sys.stderr)
            continue
        rows.append((f"two ranks, {label} (beside one rank)", seconds, one))
    name = torch.cuda.get_device_name(device) if on_gpu else platform.processor() or "CPU"
    lines = [
        f"{pair.label}, attention + MLP, Δ {nbytes / 1e9:.2f} GB in bfloat16; {name}, "
        f"{threads} threads, torch {torch.__version__}, least of {repeats}",
        "",
        f"limits: read to buffers {nbytes / alone / 1e9:.1f} GB/s, to new host memory "
        f"{nbytes / to_host / 1e9:.1f} GB/s, read and copied {nbytes / there / 1e9:.1f} GB/s, "
        f"copied {nbytes / copied / 1e9 if copied else math.nan:.1f} GB/s",
        "",
        "| loading | seconds | GB/s of Δ | limit, s | ratio |",
        "|---|---|---|---|---|",
    ]
    for label, seconds, at_best in rows:
        beside = "" if at_best is None else f"{at_best:.2f} | {seconds / at_best:.2f}"
        lines.append(f"| {label} | {seconds:.2f} | {nbytes / seconds / 1e9:.2f} | {beside} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="7B")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--directory", type=Path, default=Path("/dev/shm/attach"))
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--all", action="store_true", help="every way of int8 too")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rank", type=int, nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--store", help=argparse.SUPPRESS)
    parser.add_argument("--delta", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--sharded", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank is not None:
        run_rank(options)
        return
    if _core.debug_build:
        raise SystemExit("the compiled module is a debug build; build it with --release")
    start = time.perf_counter()
    lines = measure(options)
    text = "\n".join([*lines, "", f"The run took {time.perf_counter() - start:.0f} s."]) + "\n"
    print(text)
    if options.out is not None:
        options.out.write_text(text)


if __name__ == "__main__":
    main()
