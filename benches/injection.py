"""Time what an injection adds to a training step, beside the public code's formula as a rival.

    python benches/injection.py [--layers 28] [--tokens 2048] [--repeats 6] [--out results.md]
    python benches/injection.py --quick [--seconds 100]
    python benches/injection.py --device cpu --hidden 896 --layers 24 --tokens 256 --dtype float32

The model is the text backbone of Qwen2.5-VL-7B with random weights (narrower and with fewer layers
where the memory is smaller). A step is one forward and backward pass; variants take turns with the
step that is not injected, run by run, each after a warm-up of its own. The rivals: the public
code's adaptive formula re-stated (Δ of every tensor in pageable host memory, copied to the device
and reduced in a gradient hook), and the same formula in plain PyTorch, well written, Δ resident.
--quick times the scales and ways to overlap that the library does not offer. Before
timing, injected gradients are compared with float64, and no step may wait for the device (CUDA's
sync detector set to raise, and the profiler's trace searched).
"""

from __future__ import annotations

import argparse
import math
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

import drift_fast.inject.overlap as overlap_module
from drift_fast import Injection, _core
from drift_fast.delta.protocol import DeltaLike
from drift_fast.selection import Selection

# Steps before those that are timed: as many as use up what was copied ahead while nothing ran.
_LEAD = 5


class RandomDelta(Mapping[str, torch.Tensor]):
    """A delta of seeded random values, a tenth of a typical weight, kept in host memory."""

    def __init__(self, model: torch.nn.Module, selection: Selection) -> None:
        self.shapes = {
            name: tuple(p.shape) for name, p in model.named_parameters() if name in selection
        }
        self._device = next(model.parameters()).device
        self._made: dict[str, torch.Tensor] = {}

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self._made:
            seed = sum(map(ord, name))
            generator = torch.Generator(self._device).manual_seed(seed)
            values = torch.randn(self.shapes[name], generator=generator, device=self._device)
            self._made[name] = (values * 0.002).to(torch.bfloat16).cpu()
        return self._made[name]

    dtype = "bfloat16"

    def __iter__(self) -> Any:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def public_hooks(model: torch.nn.Module, delta: DeltaLike) -> list[Any]:
    """Hook every target with the public code's adaptive formula, Δ in pageable host memory."""
    handles = []
    for name, parameter in model.named_parameters():
        if name not in delta.shapes:
            continue
        host = delta[name].cpu()

        def hook(gradient: torch.Tensor, host: torch.Tensor = host) -> torch.Tensor:
            there = host.to(gradient.device, gradient.dtype, non_blocking=True)
            norm, size = gradient.norm().clamp_min(1e-12), there.norm().clamp_min(1e-12)
            if norm < 1e-12 or size < 1e-12:  # as there: a comparison that waits for the device
                cosine = gradient.new_tensor(0.0)
            else:
                cosine = torch.dot(gradient.flatten(), there.flatten()) / (norm * size)
            push = 0.5 * (cosine.clamp(-1.0, 1.0) + 1.0)
            return gradient - push * norm * (there / size)

        handles.append(parameter.register_hook(hook))
    return handles


def plain_hooks(model: torch.nn.Module, delta: DeltaLike) -> list[Any]:
    """Hook every target with the adaptive formula in plain PyTorch, Δ beside the gradients."""
    handles = []
    for name, parameter in model.named_parameters():
        if name not in delta.shapes:
            continue
        there = delta[name].to(parameter.device, parameter.dtype)
        size = torch.linalg.vector_norm(there, dtype=torch.float32)

        def hook(
            p: torch.nn.Parameter, there: torch.Tensor = there, size: torch.Tensor = size
        ) -> None:
            gradient = p.grad
            norm = torch.linalg.vector_norm(gradient, dtype=torch.float32)
            dot = torch.dot(gradient.view(-1), there.view(-1))
            c = (norm + dot / size) / (2 * size)
            gradient.addcmul_(there, c.to(gradient.dtype), value=-1)

        handles.append(parameter.register_post_accumulate_grad_hook(hook))
    return handles


def check(model: torch.nn.Module, delta: DeltaLike, step: Callable[[], None]) -> float:
    """Compare injected gradients with float64, without a host sync in the step."""
    step()
    names = list(delta.shapes)
    sample = names[:: max(1, len(names) // 12)]
    before = {name: model.get_parameter(name).grad.double() for name in sample}
    worst = 0.0
    with Injection(model, delta, scale="adaptive", residency="device") as injection:
        cuda = next(model.parameters()).is_cuda
        if cuda:
            torch.cuda.set_sync_debug_mode("error")
        injection.step()
        if cuda:
            torch.cuda.set_sync_debug_mode("default")
        assert injection.injected == len(names)
        for name, g in before.items():
            d = delta[name].to(g.device).double()
            cosine = (g * d).sum() / (g.norm() * d.norm())
            exact = g - 0.5 * (1 + cosine) * g.norm() * d / d.norm()
            found = model.get_parameter(name).grad.double()
            # Rounding a value to bfloat16 moves it by at most 2^-8 of itself.
            unit = 2**-8 if g.dtype != torch.float32 else 2**-23
            bound = exact.abs() * unit + (exact - g).abs() * 1e-4 + 1e-30
            worst = max(worst, float(((found - exact).abs() / bound).max()))
    assert worst <= 1.0, f"an injected gradient is off by {worst} roundings"
    return worst


@dataclass
class Row:
    """One variant: how long its steps took, and what it holds on the device."""

    label: str
    times: list[float]
    base: list[float]
    held: float
    # Until the host had launched a step, and the same of the step that is not injected.
    launched: float = math.nan
    launched_base: float = math.nan

    def added(self) -> float:
        """Return the share that it adds to the steps that took turns with it."""
        return statistics.median(self.times) / statistics.median(self.base) - 1


class Bench:
    """A model, its steps, and a clock that waits for the device."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.began = time.perf_counter()
        self.device = torch.device(options.device)
        self.cuda = self.device.type == "cuda"
        self.rows: list[Row] = []
        self.in_a_row = options.in_a_row
        self.launched = math.nan
        torch.manual_seed(0)
        heads = max(1, options.hidden // 128)
        config = Qwen2Config(
            vocab_size=152_064 if options.hidden >= 2048 else 32_000,
            hidden_size=options.hidden,
            intermediate_size=round(options.hidden * 18_944 / 3584),
            num_hidden_layers=options.layers,
            num_attention_heads=heads,
            num_key_value_heads=max(1, heads // 7),
            tie_word_embeddings=False,
        )
        with self.device:
            default = torch.get_default_dtype()
            torch.set_default_dtype(getattr(torch, options.dtype))
            self.model = Qwen2ForCausalLM(config)
            torch.set_default_dtype(default)
        self.tokens = torch.randint(0, 32_000, (1, options.tokens), device=self.device)
        self.everything = RandomDelta(self.model, Selection.parse(("attn", "mlp"), None))
        self.attention = RandomDelta(self.model, Selection.parse("attn", None))
        self.attention._made = self.everything._made

    def step(self) -> None:
        self.model.zero_grad(set_to_none=True)
        self.backward()

    def backward(self) -> None:
        self.model(input_ids=self.tokens, labels=self.tokens).loss.backward()

    def late(self) -> bool:
        """Whether the time that was asked for is over."""
        return time.perf_counter() - self.began > self.options.seconds

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def timed(self, action: Callable[[], None]) -> float:
        self.wait()
        start = time.perf_counter()
        action()
        self.launched = (time.perf_counter() - start) * 1e3
        self.wait()
        return (time.perf_counter() - start) * 1e3

    def memory(self) -> float:
        return torch.cuda.memory_allocated() / 1e9 if self.cuda else 0.0

    def timed_run(self, action: Callable[[], None]) -> float:
        """Return the milliseconds of one of several in a row.

        On a GPU by its own clock and after some that are not timed, as in a long training. Copies
        from the host run ahead into the next step: a clock that waits for the device before and
        after would count their pause at first, and at last those for a step that does not come.
        """
        if not self.cuda:
            return self.timed(action)
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for _ in range(_LEAD):
            action()
        start.record()
        for _ in range(self.in_a_row):
            action()
        stop.record()
        self.wait()
        return start.elapsed_time(stop) / self.in_a_row

    def compare(self, label: str, injected: Callable[[], None], held: float, repeats: int) -> Row:
        """Time a variant in turn with the step that is not injected."""
        # Allocations settle, what is launched as one is recorded, and clocks rise. Steps of both
        # kinds, since either may lay its gradients elsewhere than the other.
        for _ in range(3):
            self.plain()
            injected()
            injected()
        row = Row(label, [], [], held)
        launched: tuple[list[float], list[float]] = ([], [])
        for _ in range(repeats):
            for times, action, host in (
                (row.base, self.plain, launched[0]),
                (row.times, injected, launched[1]),
            ):
                times.append(self.timed_run(action))
                if self.cuda:
                    self.timed(action)
                host.append(self.launched)
        row.launched_base, row.launched = map(statistics.median, launched)
        self.rows.append(row)
        print(
            f"{label}: {row.added():+.1%}, {min(row.times):.1f} to {max(row.times):.1f} of "
            f"{min(row.base):.1f} to {max(row.base):.1f} ms; launched in {row.launched:.1f} of "
            f"{row.launched_base:.1f} ms",
            flush=True,
        )
        return row

    def plain(self) -> None:
        self.step()

    def injection(self, label: str, delta: Any, **options: Any) -> None:
        """Time an injection, unless the time is over."""
        if self.late():
            return
        self.model.zero_grad(set_to_none=True)
        before = self.memory()
        held = Injection(self.model, delta, **options)
        after = self.memory()

        def injected() -> None:
            self.step()
            held.step()

        pause = held.accumulating

        def base() -> None:
            with pause():
                self.step()

        self.plain = base  # type: ignore[method-assign]
        self.compare(label, injected, after - before, self.options.repeats)
        del self.plain
        held.remove()

    def overlaps(self, delta: Any) -> None:
        """Time other ways to overlap, which the library does not offer."""
        held = Injection(self.model, delta, residency="device", overlap=True)
        scope: Any = held._scope
        groups = len(scope.groups[0].store.buckets)

        def injected() -> None:
            self.step()
            held.step()

        def base() -> None:
            with held.accumulating():
                self.step()

        self.plain = base  # type: ignore[method-assign]
        for priority, streams, share in (
            (-1, 1, 1.0),
            (-1, 2, 1.0),
            (-1, 4, 1.0),
            (0, 1, 1.0),
            (0, 4, 1.0),
            (-1, 1, 0.5),
            (-1, 4, 0.5),
            (-1, 1, 0.75),
        ):
            if self.late():
                break
            for handle in scope.overlap.handles:
                handle.remove()
            scope.overlap.close()
            overlap_module._PRIORITY, overlap_module._STREAMS = priority, streams
            scope.overlap = overlap_module.Overlap(scope.groups, scope.pushes.begin)
            # Hooks are in the order of buckets; those of the last ones are left to the step.
            inside = [b - a for a, b in scope.groups[0].store.buckets[: round(share * groups)]]
            for handle in scope.overlap.handles[sum(inside) :]:
                handle.remove()
            label = f"overlapped, priority {priority}, {streams} streams, {share:.0%} inside"
            self.compare(label, injected, math.nan, self.options.repeats)
        del self.plain
        held.remove()

    def alone(self, delta: Any, **options: Any) -> float:
        """Return the milliseconds of one injection on gradients that are there."""
        times = []
        with Injection(self.model, delta, **options) as held:
            for _ in range(9):
                self.step()
                times.append(self.timed(held.step))
        return statistics.median(times[4:])

    def syncs(self, delta: Any) -> int:
        """Return how many times an injection made the host wait, by the profiler's trace."""
        from torch.profiler import ProfilerActivity, profile

        self.step()
        with Injection(self.model, delta, residency="device") as held:
            held.step()
            self.step()
            self.wait()
            with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as trace:
                held.step()
            waits = [
                event.key
                for event in trace.key_averages()
                if "ynchronize" in event.key or "DtoH" in event.key or "item" in event.key
            ]
        # The profiler itself waits once when it stops.
        return len([key for key in waits if key != "cudaDeviceSynchronize"])

    def accumulated(self, micro_batches: int) -> None:
        """Time whole optimizer steps with several micro-batches."""
        optimizer = torch.optim.SGD(
            [p for p in self.model.parameters() if p.requires_grad], lr=1e-9, fused=self.cuda
        )

        def whole() -> None:
            self.model.zero_grad(set_to_none=True)
            for _ in range(micro_batches):
                self.backward()
            optimizer.step()

        self.plain = whole  # type: ignore[method-assign]
        before = self.memory()
        for overlap in (False, True):
            # Attached for the injected steps only: the watchdog would stop the others.
            row = Row(
                f"drift_fast, adaptive, attention + MLP, accumulation {micro_batches} and SGD step"
                + (", overlapped" if overlap else ""),
                [],
                [],
                0.0,
            )
            for _ in range(max(2, self.options.repeats // 3)):
                row.base.append(self.timed(whole))
            with Injection(
                self.model, self.everything, residency="device", overlap=overlap
            ) as held:
                row.held = self.memory() - before

                def injected(held: Injection = held) -> None:
                    self.model.zero_grad(set_to_none=True)
                    with held.accumulating():
                        for _ in range(micro_batches - 1):
                            self.backward()
                    self.backward()
                    held.step()
                    optimizer.step()

                for _ in range(3):
                    injected()
                for _ in range(max(2, self.options.repeats // 3)):
                    row.times.append(self.timed(injected))
            for _ in range(max(2, self.options.repeats // 3)):
                row.base.append(self.timed(whole))
            self.rows.append(row)
            print(f"{row.label}: {row.added():+.1%}", flush=True)
        del self.plain

    def rival(
        self,
        label: str,
        hooks: Callable[..., list[Any]],
        repeats: int,
        clock: Callable[[Callable[[], None]], float],
    ) -> None:
        before = self.memory()
        base = [clock(self.step) for _ in range(repeats)]
        handles = hooks(self.model, self.everything)
        held = self.memory() - before
        self.step()
        row = Row(label, [clock(self.step) for _ in range(repeats)], base, held)
        for handle in handles:
            handle.remove()
        self.rows.append(row)
        print(f"{label}: {row.added():+.1%}", flush=True)

    def limits(self) -> list[str]:
        """Return what the machine allows: six passes over gradients, and copies from the host."""
        gradients = [
            p.grad for n, p in self.model.named_parameters() if n in self.everything.shapes
        ]
        largest = max(g.numel() for g in gradients)
        buffer = torch.empty(largest, dtype=gradients[0].dtype, device=self.device)

        def copy() -> None:
            for gradient in gradients:
                buffer[: gradient.numel()].copy_(gradient.view(-1))

        copy()
        floor = 3 * statistics.median(self.timed(copy) for _ in range(5))
        lines = [
            f"Six passes over the gradients (norm 1, dot 2, axpy 3) at the rate of a copy: "
            f"{floor:.1f} ms. An adaptive injection alone, Δ resident: "
            f"{(alone := self.alone(self.everything, residency='device')):.1f} ms, "
            f"{alone / floor:.2f} × that."
        ]
        if self.cuda:
            nbytes = sum(g.nbytes for g in gradients)
            host = torch.empty(1 << 30, dtype=torch.uint8, pin_memory=True)
            there = torch.empty(1 << 30, dtype=torch.uint8, device=self.device)
            rate = (1 << 30) / statistics.median(
                self.timed(lambda: there.copy_(host, non_blocking=True)) for _ in range(5)
            )
            del host, there
            limit = nbytes / rate
            alone = self.alone(self.everything, residency="host")
            lines.append(
                f"Copying {nbytes / 1e9:.2f} GB from page-locked host memory at "
                f"{rate / 1e6:.1f} GB/s: {limit:.0f} ms. The same injection alone, Δ in host "
                f"memory: {alone:.0f} ms, {alone / limit:.2f} × that."
            )
            lines.append(
                f"Waits for the device in a step by the profiler: {self.syncs(self.everything)}."
            )
        return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--hidden", type=int, default=3584)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--repeats", type=int, default=6)
    parser.add_argument("--in-a-row", type=int, default=5, help="steps of a run, on a GPU")
    parser.add_argument("--quick", action="store_true", help="scales, and ways to overlap, only")
    parser.add_argument("--seconds", type=float, default=math.inf, help="start nothing after these")
    parser.add_argument("--rival-repeats", type=int, default=2)
    parser.add_argument("--accumulation", type=int, default=8)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if _core.debug_build:
        raise SystemExit("this is a debug build; timings of it mean nothing")
    bench = Bench(options)
    everything = bench.everything
    worst = check(bench.model, everything, bench.step)
    for _ in range(2):
        bench.step()

    both = "attention + MLP"
    for scale in ("adaptive", "gradnorm", "absolute", "project")[: 3 if options.quick else 4]:
        bench.injection(f"drift_fast, {scale}, {both}", everything, scale=scale, residency="device")
    if options.quick:
        bench.overlaps(everything)
        report(bench, worst, [])
        return
    full(bench, worst)


def full(bench: Bench, worst: float) -> None:
    """Time everything else too, and the limits of the machine."""
    options, everything, attention = bench.options, bench.everything, bench.attention
    both = "attention + MLP"
    limits = bench.limits()
    print("\n".join(limits), flush=True)
    bench.injection(
        f"drift_fast, adaptive, {both}, overlapped", everything, residency="device", overlap=True
    )
    bench.injection("drift_fast, adaptive, attention only", attention, residency="device")
    bench.injection(
        "drift_fast, adaptive, attention only, overlapped",
        attention,
        residency="device",
        overlap=True,
    )
    if bench.cuda:
        int8 = {"residency": "device-int8"}
        bench.injection(f"drift_fast, adaptive, {both}, device-int8", everything, **int8)
        bench.injection(
            f"drift_fast, adaptive, {both}, device-int8, overlapped",
            everything,
            overlap=True,
            **int8,
        )
        host = {"residency": "host", "prefetch": "1GB"}
        bench.injection(f"drift_fast, adaptive, {both}, host, 1GB ahead", everything, **host)
        int8 = {"residency": "host-int8", "prefetch": "1GB"}
        bench.injection(f"drift_fast, adaptive, {both}, host-int8, 1GB ahead", everything, **int8)
        for residency in ("host", "host-int8"):
            for prefetch in ("1GB", "4GB", "8GB"):
                bench.injection(
                    f"drift_fast, adaptive, {both}, {residency}, overlapped, {prefetch} ahead",
                    everything,
                    residency=residency,
                    overlap=True,
                    prefetch=prefetch,
                )
    if options.accumulation:
        bench.accumulated(options.accumulation)
    plain, public = (
        f"plain PyTorch hooks, adaptive, {both}, Δ resident",
        f"public formula in hooks, {both}",
    )
    bench.rival(plain, plain_hooks, options.repeats, bench.timed_run)
    # So much slower that one step will do.
    bench.rival(public, public_hooks, options.rival_repeats, bench.timed)
    report(bench, worst, limits)


def report(bench: Bench, worst: float, limits: list[str]) -> None:
    """Print what was found as Markdown, and write it."""
    options, everything = bench.options, bench.everything
    what = torch.cuda.get_device_name() if bench.cuda else f"{platform.machine()} CPU"
    numel = sum(torch.Size(s).numel() for s in everything.shapes.values())
    lines = [
        f"# What an injection adds to a step: {what}, {options.dtype}",
        "",
        f"`python benches/injection.py --device {options.device} --layers {options.layers} "
        f"--hidden {options.hidden} --tokens {options.tokens} --dtype {options.dtype}`, "
        f"{time.strftime('%Y-%m')}, torch {torch.__version__}, drift_fast {_core.__version__}, "
        f"{torch.get_num_threads()} threads. Forward and backward of {options.tokens} tokens "
        f"through {options.layers} layers of width {options.hidden}; attention + MLP are "
        f"{len(everything)} tensors, {numel * 2 / 1e9:.2f} GB of Δ in bfloat16. "
        f"Medians (min to max) of {options.repeats} runs of "
        + (f"{bench.in_a_row} steps in a row behind {_LEAD} others" if bench.cuda else "one step")
        + ", each variant in turn with the step that is not injected, after nine steps that are "
        "not timed; rivals after their base, and accumulation and the public formula by single "
        "steps. *Launched*: until the host had launched one step. Before timing: injected "
        f"gradients within {worst:.2f} of the bound of one rounding against float64"
        + (", no host sync in the step." if bench.cuda else "."),
        "",
        *limits,
        "",
        "| | step ms | without | added | launched, ms | without | on the device, GB |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in bench.rows:
        middle = statistics.median(row.times)
        lines.append(
            f"| {row.label} | {middle:.1f} ({min(row.times):.1f} to {max(row.times):.1f}) | "
            f"{statistics.median(row.base):.1f} ({min(row.base):.1f} to {max(row.base):.1f}) | "
            f"{row.added() * 100:+.1f} % | {row.launched:.1f} | {row.launched_base:.1f} | "
            f"{row.held:.2f} |"
        )
    table = "\n".join(lines)
    print(table)
    if options.out:
        options.out.write_text(table + "\n")


if __name__ == "__main__":
    main()
