"""Measure injection over several GPUs: DDP, FSDP2 and DeepSpeed ZeRO, with NCCL or with gloo.

    python benches/multi_gpu.py [--gpus 2] [--stacks ddp fsdp2 zero2 zero3] [--out results.md]
    python benches/multi_gpu.py --device cpu --gpus 2 --size tiny --layers 2 --tokens 32

Qwen2.5-VL-7B's text backbone with random weights, in bfloat16. A pair of checkpoints is written to
--directory (a memory-backed one by default), its delta computed there, and every rank reads its own
rows of it. First every stack takes one step of a shrunken model in float32, and what its optimizer
received is compared with a float64 restatement of the whole batch in one process. Then whole
optimizer steps are timed, injected ones in turn with those that are not.

DDP and ZeRO hold more than a shard on every GPU, so they run at a smaller depth, and with the first
of --tokens only. NVLink multicast is left off.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import math
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
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import Qwen2Config, Qwen2ForCausalLM

import drift_fast
from drift_fast import Delta, Injection
from drift_fast.bench.pair import SIZES, make_pair

STACKS = ("ddp", "fsdp2", "zero2", "zero3")
SCALES = ("absolute", "gradnorm", "adaptive")
# Large beside the weights, so that their difference is the gradient to float32's precision.
LEARNING_RATE = 1e4


# --- what runs on every rank -----------------------------------------------------------------


def build(size: str, layers: int, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """Return the text backbone with random weights, the same on every rank."""
    shape = SIZES[size]
    config = Qwen2Config(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.inner,
        num_hidden_layers=layers,
        num_attention_heads=shape.hidden // shape.head,
        num_key_value_heads=shape.keys // shape.head,
        tie_word_embeddings=shape.tied,
    )
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            return Qwen2ForCausalLM(config)
    finally:
        torch.set_default_dtype(default)


class Stack:
    """A model as one stack trains it: `backward` on a batch, `step` of the optimizer."""

    def __init__(
        self, stack: str, model: nn.Module, device: torch.device, optimizer: Any, accumulation: int
    ) -> None:
        self.stack, self.device, self.accumulation = stack, device, accumulation
        self.zero = stack.startswith("zero")
        if self.zero:
            self._engine(model, optimizer)
            return
        if stack == "ddp":
            ids = [device.index] if device.type == "cuda" else None
            self.model: Any = nn.parallel.DistributedDataParallel(
                model, device_ids=ids, gradient_as_bucket_view=True
            )
        else:
            from torch.distributed.fsdp import fully_shard

            backbone: Any = model
            for layer in backbone.model.layers:
                fully_shard(layer)
            self.model = fully_shard(model)
        self.optimizer = optimizer([p for p in self.model.parameters() if p.requires_grad])

    def _engine(self, model: nn.Module, optimizer: Any) -> None:
        import deepspeed

        low = next(model.parameters()).dtype == torch.bfloat16
        config = {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": self.accumulation,
            "gradient_clipping": 0.0,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "bf16": {"enabled": low},
            "zero_optimization": {"stage": int(self.stack[-1])},
            "steps_per_print": 10**9,
        }
        self.model, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer(list(model.parameters())), config=config
        )

    def attach(self, delta: Delta, **options: Any) -> Injection:
        """Attach an injection where this stack wants it."""
        if self.zero:
            return drift_fast.attach(self.model, delta, **options)
        return Injection(self.model, delta, optimizer=self.optimizer, **options)

    def step(self, batches: list[torch.Tensor], injection: Injection | None) -> None:
        """Take one optimizer step over some micro-batches of one sequence each."""
        for number, tokens in enumerate(batches):
            last = number == len(batches) - 1
            if self.zero:
                self.model.backward(self.model(input_ids=tokens, labels=tokens).loss)
                self.model.step()
                continue
            if self.stack == "fsdp2":
                self.model.set_requires_gradient_sync(last)
                context: Any = contextlib.nullcontext()
            else:
                context = contextlib.nullcontext() if last else self.model.no_sync()
            pause: Any = contextlib.nullcontext()
            if injection is not None and not last:
                pause = injection.accumulating()
            with context, pause:
                loss = self.model(input_ids=tokens, labels=tokens).loss
                (loss / len(batches)).backward()
        if not self.zero:
            if injection is not None:
                injection.step()
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)

    def weights(self) -> dict[str, torch.Tensor]:
        """Return every parameter whole, in float64."""
        module: Any = self.model.module if self.zero or self.stack == "ddp" else self.model
        found = {}
        for name, parameter in module.named_parameters():
            if self.stack == "fsdp2":
                found[name] = parameter.full_tensor().detach().double()
            elif self.stack == "zero3":
                import deepspeed

                with deepspeed.zero.GatheredParameters([parameter]):
                    found[name] = parameter.detach().double().clone()
            else:
                found[name] = parameter.detach().double().clone()
        return found


def sgd(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=LEARNING_RATE)


def adamw(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    # Weights stay where they are, so that every variant times the same numbers.
    return torch.optim.AdamW(parameters, lr=0.0, weight_decay=0.0, fused=parameters[0].is_cuda)


def restated(
    model: nn.Module, batches: list[torch.Tensor], delta: Delta, scale: str
) -> dict[str, torch.Tensor]:
    """Return the method's gradients over the whole batch, in one process and in float64."""
    plain = model.double()
    plain.zero_grad()
    for tokens in batches:
        (plain(input_ids=tokens, labels=tokens).loss / len(batches)).backward()
    theirs = {name.replace("model.language_model.", "model."): name for name in delta}
    found = {}
    for name, parameter in plain.named_parameters():
        g = parameter.grad
        assert g is not None, name
        if name in theirs:
            d = delta[theirs[name]].to(g.device).double()
            c = {
                "absolute": g.new_ones(()),
                "gradnorm": g.norm() / d.norm(),
                "adaptive": (1 + (g * d).sum() / (g.norm() * d.norm())) / 2 * g.norm() / d.norm(),
            }[scale]
            g = g - c * d
        found[name] = g
    return found


def check(stack: str, device: torch.device, delta: Delta) -> dict[str, float]:
    """Return, by scale, the largest relative error of what a stack's optimizer received."""
    rank, world = dist.get_rank(), dist.get_world_size()
    accumulation = 2
    generator = torch.Generator().manual_seed(1)
    batches = [
        torch.randint(4, SIZES["tiny"].vocab - 8, (1, 24), generator=generator).to(device)
        for _ in range(accumulation * world)
    ]
    worst = {}
    for scale in SCALES:
        model = build("tiny", SIZES["tiny"].layers, torch.float32, device)
        exact = restated(
            build("tiny", SIZES["tiny"].layers, torch.float32, device), batches, delta, scale
        )
        trained = Stack(stack, model, device, sgd, accumulation)
        before = trained.weights()
        with trained.attach(delta, scale=scale, residency="device") as injection:
            trained.step(batches[rank::world], injection)
            if not injection.injected:
                raise AssertionError(f"{stack}: nothing was injected")
        after = trained.weights()
        errors = []
        for name, expected in exact.items():
            received = (before[name] - after[name]) / LEARNING_RATE
            errors.append(float((received - expected).norm() / expected.norm()))
        worst[scale] = max(errors)
        if not worst[scale] <= 1e-5:
            raise AssertionError(f"{stack}, {scale}: a gradient is off by {worst[scale]:.1e}")
    return worst


@contextlib.contextmanager
def collectives() -> Iterator[list[int]]:
    """Count the numbers in every sum over processes that this library asks for."""
    original, counted = dist.all_reduce, []

    def all_reduce(tensor: torch.Tensor, *arguments: Any, **keywords: Any) -> Any:
        if str(sys._getframe(1).f_globals.get("__name__", "")).startswith("drift_fast"):
            counted.append(tensor.numel())
        return original(tensor, *arguments, **keywords)

    dist.all_reduce = all_reduce
    try:
        yield counted
    finally:
        dist.all_reduce = original


class Clock:
    """Times steps of one stack at full width."""

    def __init__(self, options: argparse.Namespace, stack: str, device: torch.device) -> None:
        self.options, self.device, self.cuda = options, device, device.type == "cuda"
        self.layers = options.layers if stack == "fsdp2" else options.smaller_layers
        model = build(options.size, self.layers, torch.bfloat16, device)
        self.checkpointed: Any = model
        self.stack = Stack(stack, model, device, adamw, 1)
        self.tokens = torch.zeros(1, 1, dtype=torch.long, device=device)

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()
        dist.barrier()

    def memory(self) -> float:
        return torch.cuda.memory_allocated() / 1e9 if self.cuda else math.nan

    def use(self, tokens: int) -> bool:
        """Choose the length of a sequence; return whether activations are recomputed."""
        recomputed = tokens > 4096
        module = self.checkpointed
        if recomputed:
            module.gradient_checkpointing_enable({"use_reentrant": False})
        else:
            module.gradient_checkpointing_disable()
        generator = torch.Generator().manual_seed(dist.get_rank())
        most = SIZES[self.options.size].vocab - 8
        self.tokens = torch.randint(4, most, (1, tokens), generator=generator).to(self.device)
        return recomputed

    def run(self, injection: Injection | None) -> float:
        """Return the milliseconds of a step, the mean of several in a row."""
        self.wait()
        start = time.perf_counter()
        for _ in range(self.options.steps):
            self.stack.step([self.tokens], injection)
        self.wait()
        return (time.perf_counter() - start) * 1e3 / int(self.options.steps)

    def attached(self, delta: Delta, **options: Any) -> tuple[Injection, dict[str, float]]:
        """Attach; return the injection, the seconds that took and the memory it holds."""
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()
        self.wait()
        before, start = self.memory(), time.perf_counter()
        injection = self.stack.attach(delta, residency="device", **options)
        self.wait()
        seconds = time.perf_counter() - start
        return injection, {"seconds": seconds, "memory": self.memory() - before}

    def compare(self, delta: Delta, label: str, **options: Any) -> dict[str, Any]:
        """Time injected steps in turn with those of the same stack without an injection."""
        base, times = [], []
        attaching: dict[str, float] = {}
        sums: list[int] = []
        for round_ in range(self.options.repeats):
            for _ in range(3):
                self.stack.step([self.tokens], None)
            base.append(self.run(None))
            injection, found = self.attached(delta, **options)
            if round_ == 0:
                attaching = found
            # Recordings and the allocator settle.
            for _ in range(3):
                with collectives() as counted:
                    self.stack.step([self.tokens], injection)
                sums = counted
            times.append(self.run(injection))
            if injection.injected != len(injection.targets):
                raise AssertionError(f"{injection.injected} of {len(injection.targets)} injected")
            injection.remove()
        return {"label": label, "base": base, "times": times, "sums": sums, **attaching}


def enter(options: argparse.Namespace) -> None:
    """Check and time one stack on this rank; rank 0 writes what was found."""
    stack = options.worker
    rank = int(os.environ["LOCAL_RANK"])
    device = torch.device("cuda", rank) if options.device == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    backend = "nccl" if device.type == "cuda" else "gloo"
    # With CPU tensors too, for what is no tensor on a GPU.
    dist.init_process_group("cpu:gloo,cuda:nccl" if backend == "nccl" else "gloo")
    report: dict[str, Any] = {"stack": stack, "world": dist.get_world_size(), "rows": []}
    directory = Path(options.directory)
    try:
        if stack.startswith("zero"):
            start_deepspeed(backend)
        report["errors"] = check(stack, device, Delta.open(directory / "shrunken"))
        if not options.check_only:
            time_stack(options, stack, device, report)
    except Exception:
        report["failure"] = traceback.format_exc()
        print(f"rank {rank}: {report['failure']}", file=sys.stderr, flush=True)
    if rank == 0:
        Path(options.report).write_text(json.dumps(report))
    if "failure" in report:
        # Others may wait for this rank in a sum that it never reaches.
        os._exit(1)
    dist.barrier()
    dist.destroy_process_group()


def start_deepspeed(backend: str) -> None:
    """Let DeepSpeed join the processes; on a CPU without compiling a kernel of its own."""
    import deepspeed

    if backend == "gloo":
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend=backend)


def time_stack(
    options: argparse.Namespace, stack: str, device: torch.device, report: dict[str, Any]
) -> None:
    """Attach and time one stack, adding to the report as figures come."""
    clock = Clock(options, stack, device)
    report["layers"] = clock.layers
    whole = Delta.open(Path(options.directory) / "delta")
    layers = range(clock.layers)
    lengths = options.tokens if stack == "fsdp2" else options.tokens[:1]
    for tokens in lengths if report["world"] > 1 else ():
        recomputed = clock.use(tokens)
        for label, modules, scale in (
            ("attention + MLP, adaptive", ("attn", "mlp"), "adaptive"),
            ("attention + MLP, gradnorm", ("attn", "mlp"), "gradnorm"),
            ("attention only, adaptive", ("attn",), "adaptive"),
        ):
            row = clock.compare(whole, label, modules=modules, scale=scale, layers=layers)
            report["rows"].append({**row, "tokens": tokens, "recomputed": recomputed})
            if dist.get_rank() == 0:
                added = statistics.median(row["times"]) / statistics.median(row["base"]) - 1
                print(f"{stack}, {tokens} tokens, {label}: {added:+.1%}", flush=True)
    if report["world"] == 1:
        clock.use(options.tokens[0])
        injection, found = clock.attached(whole, layers=layers)
        report["rows"].append({"label": "attached", **found, "tokens": 0})
        injection.remove()
    if device.type == "cuda":
        report["peak"] = torch.cuda.max_memory_allocated() / 1e9


# --- what starts them ------------------------------------------------------------------------


def launch(options: argparse.Namespace, stack: str, processes: int, directory: Path) -> Any:
    """Run one stack in processes of its own; return its report."""
    file = directory / f"{stack}-{processes}.json"
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
        *("--nproc-per-node", str(processes), __file__, "--worker", stack),
        *("--device", options.device, "--size", options.size, "--layers", str(options.layers)),
        *("--smaller-layers", str(options.smaller_layers), "--steps", str(options.steps)),
        *("--repeats", str(options.repeats), "--directory", str(directory)),
        *("--report", str(file), "--tokens", *map(str, options.tokens)),
        *(("--check-only",) if options.check_only else ()),
    ]
    environment = {**os.environ, "NCCL_NVLS_ENABLE": "0", "TOKENIZERS_PARALLELISM": "false"}
    if options.device == "cpu":
        environment |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, start_new_session=True)
    try:
        process.wait(options.limit)
    except subprocess.TimeoutExpired:
        # Its workers too: they would hold the GPUs while the next stack is timed.
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    if not file.is_file():
        return {"stack": stack, "world": processes, "rows": [], "failure": "no report"}
    return json.loads(file.read_text())


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
    lines = [
        f"# Injection over {options.gpus} × {name}",
        "",
        f"`python benches/multi_gpu.py {' '.join(sys.argv[1:])}`, {time.strftime('%Y-%m')}, torch "
        f"{torch.__version__}, drift_fast {drift_fast.__version__}.",
        "",
        "## What each optimizer received, against float64 in one process",
        "",
        "A shrunken model in float32, accumulation 2, every rank its own micro-batches: the "
        "largest relative error of any parameter's gradient.",
        "",
        f"| | processes | {' | '.join(SCALES)} |",
        "|---|---|" + "---|" * len(SCALES),
    ]
    for report in reports:
        errors = report.get("errors")
        cells = [f"{errors[scale]:.1e}" for scale in SCALES] if errors else ["failed"] * 3
        lines.append(f"| {report['stack']} | {report['world']} | {' | '.join(cells)} |")
    lines += [
        "",
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
    lines.append("")
    if made:
        lines.append(
            f"The pair was written in {made['pair']:.0f} s and its delta in {made['delta']:.1f} s."
        )
    for report in reports:
        if "failure" in report:
            last = report["failure"].strip().splitlines()[-1]
            lines.append(f"\n{report['stack']} with {report['world']} processes failed: {last}")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    cuda = torch.cuda.is_available()
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if cuda else "cpu")
    parser.add_argument("--gpus", type=int, default=max(1, torch.cuda.device_count()))
    parser.add_argument("--stacks", nargs="+", choices=STACKS, default=STACKS)
    parser.add_argument("--size", choices=tuple(SIZES), default="7B")
    parser.add_argument("--layers", type=int, default=28, help="of FSDP2")
    parser.add_argument("--smaller-layers", type=int, default=8, help="of DDP and ZeRO")
    parser.add_argument("--tokens", type=int, nargs="+", default=(2048, 8192))
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--limit", type=float, default=600, help="seconds for one stack")
    parser.add_argument("--check-only", action="store_true")
    parser.add_argument("--directory", help="for the pair and its delta; default in memory")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--worker", choices=STACKS, help=argparse.SUPPRESS)
    parser.add_argument("--report", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.smaller_layers = min(options.smaller_layers, options.layers)
    if options.worker:
        enter(options)
        return
    memory = Path("/dev/shm")
    home = options.directory or (memory if memory.is_dir() else None)
    with tempfile.TemporaryDirectory(dir=home) as folder:
        made = make_deltas(options, Path(folder))
        reports = []
        for stack in options.stacks:
            reports.append(launch(options, stack, options.gpus, Path(folder)))
            if stack == "fsdp2" and options.gpus > 1 and not options.check_only:
                # What one process alone holds, to compare a rank's share with.
                reports.append(launch(options, stack, 1, Path(folder)))
            if options.out:
                options.out.write_text(render(options, reports, made))
    print(render(options, reports, made))
    if any("failure" in report for report in reports):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
