"""One run: from a pair's checkpoints by one method with given settings to what was measured.

Owns fine-tuning and its measures. Deltas, injection, motion and protection are the library's.
Invariant: for one pair and seed every method starts from the same weights, sees the same batches in
the same order and is measured on the same problems.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import batches
import lessons
import numpy as np
import problems
import torch
from batches import Batch, Encoder
from methods import METHODS, Method, Protection
from transformers import PreTrainedModel, get_cosine_schedule_with_warmup

import drift_fast
from drift_fast.names import bare, kind_of, layer_of

KINDS: Final = ("attn", "mlp")
LORA_RANK: Final = 16
_SOURCES: Final[Mapping[str, tuple[lessons.Name, lessons.Name]]] = {
    "R-B": ("expert", "base"),
    "R-V": ("expert", "multimodal"),
    "O-V": ("other_expert", "multimodal"),
    "O-B": ("other_expert", "base"),
    "O-OB": ("other_expert", "other_base"),
    "U-B": ("unrelated", "base"),
    "B-V": ("base", "multimodal"),
}


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """How long a run is, and on how much it is measured."""

    samples: int = 768
    steps: int = 150
    batch: int = 16
    tested: int = 1000
    read: int = 1000
    # Test problems of a run that only tunes.
    tuned_on: int = 400
    # Samples of what a protected Δ leaves alone.
    kept: int = 256


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is to be run; `settings` is JSON, so that a job can be hashed and compared."""

    stage: str
    pair: int
    seed: int
    method: str
    settings: str = "{}"

    @property
    def key(self) -> str:
        """What the run is called in the file of results."""
        return "/".join(map(str, asdict(self).values()))

    def __str__(self) -> str:
        return self.key


def run(job: Job, root: Path, protocol: Protocol, *, device: str) -> dict[str, Any]:
    """Run a job and return its line of results, ready for JSON."""
    start = time.perf_counter()
    method, settings = METHODS[job.method], json.loads(job.settings)
    model = _fresh(root, job.pair, method, device)
    origin = _weights(model)
    trained: dict[str, Any] = {}
    if job.method != "as_is":
        trained = _fine_tune(model, job, method, settings, root, protocol)
        if method.lora:
            model = trained.pop("model").merge_and_unload()
    middle = time.perf_counter()
    progress = _progress(model, origin, job, root)
    if (rates := trained.pop("rates", None)) is not None:
        trained |= {"rates": sum(rates), "foreseen": foreseen(method, settings, rates, progress)}
    tuning = job.stage == "tune"
    answers, read = _measure(model, job, root, protocol, tuning=tuning)
    return {
        "key": job.key,
        **asdict(job),
        "settings": settings,
        "answers": answers,
        "reading": read,
        "progress": progress,
        **trained,
        "seconds": [round(middle - start, 2), round(time.perf_counter() - middle, 2)],
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
    }


class Tensors(dict[str, torch.Tensor]):
    """A Δ held as tensors: what the library takes in a delta's place."""

    def on_host(self) -> Tensors:
        """Return a copy in host memory, where the library reads Δ from."""
        return Tensors((name, tensor.cpu()) for name, tensor in self.items())

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape by name."""
        return {name: tuple(tensor.shape) for name, tensor in self.items()}


@functools.lru_cache(maxsize=2)
def _start(root: Path, pair: int, device: str) -> tuple[PreTrainedModel, dict[str, torch.Tensor]]:
    """Return a pair's multimodal model on the device, and a copy of its weights to begin with."""
    model = lessons.load(root, pair, "multimodal").to(device)
    return model, {name: tensor.clone() for name, tensor in model.state_dict().items()}


def _fresh(root: Path, pair: int, method: Method, device: str) -> PreTrainedModel:
    if method.lora or method.dtype != "float32":
        dtype = getattr(torch, method.dtype)
        model = lessons.load(root, pair, "multimodal", dtype).to(device)
    else:
        model, state = _start(root, pair, device)
        model.load_state_dict(state)
    # What trains is the backbone: not the tower, the projector or the embeddings.
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(kind_of(name) in (*KINDS, "norm") and "language_model" in name)
        parameter.grad = None
    return model


def _fine_tune(
    model: PreTrainedModel,
    job: Job,
    method: Method,
    settings: Mapping[str, float],
    root: Path,
    protocol: Protocol,
) -> dict[str, Any]:
    """Train in place and return what training showed."""
    device = str(next(model.parameters()).device)
    delta = _delta(job, method, root, protocol, device)
    if method.merges:
        shift = _by_kind(settings, half=method.family == "mixed")
        add(model, delta, shift)
    torch.manual_seed(job.seed)
    trained = _with_adapters(model) if method.lora else model
    optimizer = torch.optim.AdamW(
        [p for p in trained.parameters() if p.requires_grad],
        lr=settings["rate"],
        weight_decay=0.0,
        fused=device.startswith("cuda"),
    )
    rates = get_cosine_schedule_with_warmup(optimizer, protocol.steps // 20, protocol.steps)
    stepped: list[float] = []
    loss = torch.zeros(())
    seen: dict[str, float] = {}
    steps = _fine_tuning_set(job, method, root, protocol)
    trained.train()
    for part in range(method.parts):
        if part:
            delta = _protected_now(model, root, job.pair, method, protocol)
        with (
            warnings.catch_warnings(),
            _attached(trained, optimizer, delta, method, settings, protocol) as attached,
        ):
            for batch in steps[part * len(steps) // method.parts :][: len(steps) // method.parts]:
                with batches.autocast(torch.device(device)):
                    loss = trained(**batches.to(batch, device)).loss
                loss.backward()
                if isinstance(attached, drift_fast.Injection):
                    attached.step()
                torch.nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
                stepped.append(optimizer.param_groups[0]["lr"])
                optimizer.step()
                optimizer.zero_grad()
                rates.step()
            seen = attached.summary() if isinstance(attached, drift_fast.Injection) else {}
    shown = {name: seen[name] for name in ("progress", "cosine", "relative_push") if name in seen}
    found: dict[str, Any] = {"loss": float(loss.detach()), "rates": stepped, "telemetry": shown}
    if not math.isfinite(found["loss"]):
        raise FloatingPointError(f"{job}: the loss is {found['loss']}")
    return found | ({"model": trained} if method.lora else {})


def foreseen(
    method: Method, settings: Mapping[str, float], rates: list[float], progress: Mapping[str, float]
) -> float | None:
    """Return the λ that `predict_progress` says of a run by injection, None of other runs."""
    # λ along the whole Δ is foreseen, not along a part of it.
    whole = not method.first_layer and not method.control
    simple = method.injects and not method.merges and not method.lora and whole
    if not simple or "cap" in settings or method.dtype != "float32":
        return None
    options = _strength(method, settings)
    return drift_fast.predict_progress(
        options["alpha"],
        rates,
        progress["rms"],
        scale=options.get("scale", "adaptive"),
        schedule=options.get("schedule"),
    )


@contextlib.contextmanager
def _attached(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    delta: Tensors,
    method: Method,
    settings: Mapping[str, float],
    protocol: Protocol,
) -> Iterator[Any]:
    """Attach what a method attaches, if anything, for as long as it trains."""
    # Where λ ends is a column of the tables.
    warnings.filterwarnings("ignore", category=drift_fast.DriftWarning)
    if method.moves:
        with drift_fast.PlannedMotion(
            model,
            delta.on_host(),
            progress=_by_kind(settings),
            steps=max(1, protocol.steps // 10),
            optimizer=optimizer,
        ) as motion:
            yield motion
        return
    if not method.injects:
        yield None
        return
    options = _strength(method, settings)
    if "cap" in settings:
        left = 0.5 if method.family == "mixed" else 1.0
        options["progress_cap"] = left * settings["cap"]
    if "schedule" in options:
        options["total_steps"] = protocol.steps
    with drift_fast.Injection(model, delta.on_host(), optimizer=optimizer, **options) as injection:
        yield injection


def _strength(method: Method, settings: Mapping[str, float]) -> dict[str, Any]:
    """Return α and the other options of a method; grad-norm takes half of the α it is like."""
    options = dict(method.options)
    if "alpha" in settings:
        half = 0.5 if options.get("scale") == "gradnorm" else 1.0
        options["alpha"] = half * settings["alpha"]
    return options


def _by_kind(settings: Mapping[str, float], *, half: bool = False) -> dict[str, float]:
    """Return λ of attention and of MLP; half of a mixed method's, whose cap is the whole."""
    if half:
        return dict.fromkeys(KINDS, settings["cap"] / 2)
    return {kind: settings.get(kind, settings.get("weight", 0.0)) for kind in KINDS}


@torch.no_grad()
def add(model: torch.nn.Module, delta: Tensors, weight: Mapping[str, float]) -> None:
    """Add λ·Δ to a model's weights in place: `drift_fast.merge` by task arithmetic, in memory."""
    parameters = dict(model.named_parameters())
    for name, source in drift_fast.match_parameters(model, delta).items():
        parameters[name].add_(
            delta[source].to(parameters[name].device), alpha=weight[kind_of(name)]
        )


def _with_adapters(model: PreTrainedModel) -> Any:
    import peft

    return peft.get_peft_model(
        model,
        peft.LoraConfig(
            r=LORA_RANK,
            lora_alpha=2 * LORA_RANK,
            target_modules=r".*language_model.*\.(q|k|v|o|gate|up|down)_proj",
        ),
    )


@functools.lru_cache(maxsize=4)
def _batches(root: Path, pair: int, seed: int, reading: float, protocol: Protocol) -> list[Batch]:
    rng = np.random.default_rng([pair, seed, 1])
    samples = [
        problems.reading(rng)
        if at < reading * protocol.samples
        else problems.story(rng, 1 + at % 2, image=True)
        for at in range(protocol.samples)
    ]
    count = protocol.steps * protocol.batch
    epochs = -(-count // len(samples))
    order = np.concatenate([rng.permutation(len(samples)) for _ in range(epochs)])[:count]
    encoder = Encoder(lessons.tokenizer(root), 100 * pair + seed, "train")
    return [
        encoder.training([samples[at] for at in chosen])
        for chosen in order.reshape(protocol.steps, protocol.batch)
    ]


def _fine_tuning_set(job: Job, method: Method, root: Path, protocol: Protocol) -> list[Batch]:
    return _batches(root, job.pair, job.seed, method.reading, protocol)


def _measure(
    model: PreTrainedModel, job: Job, root: Path, protocol: Protocol, *, tuning: bool
) -> tuple[float, float]:
    """Return the shares of stories of 3 to 5 steps and of numbers read that are right."""
    # Tuning has problems of its own.
    rng = np.random.default_rng([job.pair, 2, tuning])
    words = lessons.tokenizer(root)
    tested = protocol.tuned_on if tuning else protocol.tested
    read = protocol.tuned_on if tuning else protocol.read
    stories = [problems.story(rng, 3 + at % 3, image=True) for at in range(tested)]
    numbers = [problems.reading(rng) for _ in range(read)]
    encoder = Encoder(words, 1000 + 10 * job.pair + tuning, "test")
    return (
        batches.right(model, encoder, stories),
        batches.right(model, encoder, numbers, longest=6),
    )


def _delta(job: Job, method: Method, root: Path, protocol: Protocol, device: str) -> Tensors:
    """Return the Δ of a method as tensors on the device: its direction, or a control's."""
    if not (method.merges or method.injects or method.moves):
        return Tensors()
    direction = "U-B" if method.control == "unrelated" else method.delta
    delta = _direction(root, job.pair, direction, device)
    if method.control == "unrelated":
        wanted = _direction(root, job.pair, method.delta, device)
        return Tensors((name, d * (wanted[name].norm() / d.norm())) for name, d in delta.items())
    if method.control == "reversed":
        return Tensors((name, -d) for name, d in delta.items())
    if method.control == "shuffled":
        generator = torch.Generator(device).manual_seed(job.seed)
        return Tensors(
            (name, d.flatten()[_order(d.numel(), generator)].view_as(d))
            for name, d in delta.items()
        )
    if method.protection is not None:
        delta = _protected(root, job.pair, direction, method.protection, protocol, device)
    if method.first_layer:
        return Tensors((n, d) for n, d in delta.items() if layer_of(n) >= method.first_layer)
    if method.depth is not None:
        return _by_depth(delta, method.depth)
    if method.spared:
        return _without_largest(delta, _direction(root, job.pair, "B-V", device), method.spared)
    return delta


def _by_depth(delta: Tensors, depth: str) -> Tensors:
    """Return Δ with weights that rise or fall linearly over the layers, of mean 1."""
    layers = {name: int(layer_of(name) or 0) for name in delta}
    count = max(layers.values()) + 1
    rising = {name: (2 * layer + 1) / count for name, layer in layers.items()}
    return Tensors(
        (name, d * (rising[name] if depth == "late" else 2 - rising[name]))
        for name, d in delta.items()
    )


def _without_largest(delta: Tensors, other: Tensors, rank: int) -> Tensors:
    """Return each matrix of Δ without the largest left and right singular directions of another."""
    matrices = {bare(name).split("layers.")[-1]: matrix for name, matrix in other.items()}
    found = Tensors()
    for name, d in delta.items():
        torch.manual_seed(0)
        matrix = matrices[bare(name).split("layers.")[-1]]
        left, _, right = torch.svd_lowrank(matrix, q=rank + 8, niter=4)
        left, right = left[:, :rank], right[:, :rank]
        rows = d - left @ (left.mT @ d)
        found[name] = rows - (rows @ right) @ right.mT
    return found


@functools.lru_cache(maxsize=5)
def _direction(root: Path, pair: int, direction: str, device: str) -> Tensors:
    """Return Δ between two checkpoints, in float32."""
    left, right = (lessons.directory(root, pair, name) for name in _SOURCES[direction])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=drift_fast.DriftWarning)
        delta = drift_fast.compute_delta(left, right, modules=KINDS, threads=1)
        return Tensors((name, delta[name].float().to(device)) for name in delta)


@functools.lru_cache(maxsize=4)
def _protected(
    root: Path,
    pair: int,
    direction: str,
    protection: Protection,
    protocol: Protocol,
    device: str,
) -> Tensors:
    """Return a Δ without the span of gradients on what is to be kept."""
    delta = _direction(root, pair, direction, device)
    if protection.of == "random":
        generator = torch.Generator(device).manual_seed(pair)
        return Tensors(
            (
                name,
                _without(
                    d,
                    torch.randn(
                        protection.directions, d.numel(), device=device, generator=generator
                    ),
                ),
            )
            for name, d in delta.items()
        )
    model, state = _start(root, pair, device)
    model.load_state_dict(state)
    return _without_gradients(model, delta, root, pair, protection, protocol)


def _protected_now(
    model: PreTrainedModel, root: Path, pair: int, method: Method, protocol: Protocol
) -> Tensors:
    """Return a method's Δ, protected where the model's weights are now."""
    assert method.protection is not None
    delta = _direction(root, pair, method.delta, str(next(model.parameters()).device))
    return _without_gradients(model, delta, root, pair, method.protection, protocol)


def _without_gradients(
    model: PreTrainedModel,
    delta: Tensors,
    root: Path,
    pair: int,
    protection: Protection,
    protocol: Protocol,
) -> Tensors:
    rng = np.random.default_rng([pair, 3])
    draw = problems.reading if protection.of == "reading" else _short_story
    encoder = Encoder(lessons.tokenizer(root), 2000 + pair, "train")
    device = next(model.parameters()).device
    size = min(16, protocol.kept // protection.directions)
    kept = [
        batches.to(encoder.training([draw(rng) for _ in range(size)]), device)
        for _ in range(protocol.kept // size)
    ]
    if protection.span == "one":
        return _without_one_span(model, delta, kept, protection.directions)
    protected = drift_fast.protect(
        model, delta.on_host(), kept, directions=protection.directions, progress_bar=False
    )
    return Tensors((name, protected[name].float().to(device)) for name in protected)


def _without_one_span(
    model: PreTrainedModel, delta: Tensors, kept: Sequence[Batch], directions: int
) -> Tensors:
    """Return Δ without the span of gradients of all weights together, not tensor by tensor."""
    sources = drift_fast.match_parameters(model, delta)
    weights = dict(model.named_parameters())
    model.eval()
    sums: list[list[torch.Tensor]] = []
    for first in range(directions):
        model.zero_grad(set_to_none=True)
        for batch in kept[first::directions]:
            model(**batch).loss.backward()
        sums.append([weights[name].grad.flatten() for name in sources])
    model.zero_grad(set_to_none=True)
    vectors = {
        source: torch.stack(rows) for source, *rows in zip(sources.values(), *sums, strict=True)
    }
    gram = torch.stack([rows.double() @ rows.double().T for rows in vectors.values()]).sum(0)
    along = torch.stack(
        [rows.double() @ delta[name].double().flatten() for name, rows in vectors.items()]
    ).sum(0)
    coefficients = torch.linalg.pinv(gram, hermitian=True) @ along
    return Tensors(
        (
            source,
            (d.double().flatten() - coefficients @ vectors[source].double()).float().view_as(d),
        )
        for source, d in delta.items()
    )


def _short_story(rng: np.random.Generator) -> problems.Problem:
    return problems.story(rng, int(rng.integers(1, 3)), image=True)


def _order(number: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randperm(number, device=generator.device, generator=generator)


def _without(delta: torch.Tensor, directions: torch.Tensor) -> torch.Tensor:
    basis = torch.linalg.qr(directions.double().T)[0]
    flat = delta.double().flatten()
    return (flat - basis @ (basis.T @ flat)).float().view_as(delta)


def _weights(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {
        name: parameter.detach().clone()
        for name, parameter in model.named_parameters()
        if "language_model" in name and kind_of(name) in KINDS
    }


@torch.no_grad()
def _progress(
    model: PreTrainedModel, origin: Mapping[str, torch.Tensor], job: Job, root: Path
) -> dict[str, float]:
    """Return λ along expert − base, the motion's length in ‖Δ‖ and its cosine with Δ, and rms(Δ).

    For a method of another Δ, along that.
    """
    method = METHODS[job.method]
    device = str(next(model.parameters()).device)
    delta = _direction(root, job.pair, method.delta, device)
    weights = dict(model.named_parameters())
    along = squares = moved = 0.0
    count = 0
    for name, source in drift_fast.match_parameters(model, delta).items():
        motion = weights[name].double() - origin[name].double()
        d = delta[source].double()
        along += float((motion * d).sum())
        squares += float((d * d).sum())
        moved += float((motion * motion).sum())
        count += d.numel()
    return {
        "along": along / squares,
        "distance": math.sqrt(moved / squares),
        "cosine": along / math.sqrt(moved * squares) if moved else 0.0,
        "rms": drift_fast.rms(math.sqrt(squares), count),
    }
