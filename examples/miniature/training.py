"""One run: from a world's checkpoints by one method with given settings to what was measured.

Owns the fine-tuning and its measures. The drawing of samples and the evaluation are the demo's, the
merging, the injection and the motion the library's. Invariant: for one world and set every method
starts from the same checkpoint, sees the same batches in the same order and is measured on the same
problems; the digest of the batches is part of what is returned.
"""

from __future__ import annotations

import functools
import hashlib
import json
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import peft
import torch
import transformers
import worlds
from methods import METHODS, REGIMES, Method, Regime
from safetensors.torch import load_file, save_file
from torch.utils.data import SequentialSampler
from transformers import (
    LlavaForConditionalGeneration,
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

import drift_fast
from drift_fast.demo import experiment
from drift_fast.demo import world as w
from drift_fast.names import kind_of

Batch = dict[str, torch.Tensor]

PRIORS: Final[tuple[experiment.Prior, ...]] = ("multimodal", "base")
# The kinds of tensors that are merged, injected into and moved, unless a method says otherwise.
KINDS: Final = ("attn", "mlp")
LORA_RANK: Final = 16


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is to be run; `settings` is JSON, so that a job can be hashed and compared."""

    stage: str
    regime: str
    world: int
    set: int
    method: str
    settings: str = "{}"
    split: w.Split = "test"

    @property
    def key(self) -> str:
        """What the run is called in the file of results."""
        return "/".join(map(str, asdict(self).values()))

    def __str__(self) -> str:
        return self.key


def needed(job: Job) -> list[str]:
    """Return the checkpoints that a job reads."""
    regime = REGIMES[job.regime]
    names = ["base", "multimodal", regime.expert, regime.base]
    return [*names, "unrelated"] if METHODS[job.method].control == "unrelated" else names


def provenance(
    job: Job, protocol: experiment.Protocol, digest: Callable[[int, str], str]
) -> dict[str, Any]:
    """Return digests of what a run follows from: the checkpoints it reads, and the protocol.

    `digest` tells that of a world's checkpoint.
    """
    regime = REGIMES[job.regime]
    stated = [asdict(_protocol(job, protocol)), regime.lora, regime.vision, LORA_RANK]
    names = sorted(set(needed(job)))
    return {
        "checkpoints": {name: digest(job.world, name) for name in names},
        "protocol": hashlib.sha256(json.dumps(stated).encode()).hexdigest()[:16],
    }


def _protocol(job: Job, protocol: experiment.Protocol) -> experiment.Protocol:
    regime = REGIMES[job.regime]
    return replace(
        protocol,
        split=job.split,
        samples=regime.samples or protocol.samples,
        steps=regime.steps or protocol.steps,
    )


def run(
    job: Job, root: Path, protocol: experiment.Protocol, *, device: str = "cpu"
) -> dict[str, Any]:
    """Run a job and return its line of results, ready for JSON.

    λ is ⟨θ − θ_0, Δ⟩/‖Δ‖², θ_0 being the multimodal checkpoint before any merge, for
    Δ = expert − multimodal and Δ = expert − base of the regime, over all its tensors and by kind.
    `rates` is the sum of the learning rates of all steps.
    """
    start = time.perf_counter()
    method, regime = METHODS[job.method], REGIMES[job.regime]
    settings = json.loads(job.settings)
    protocol = _protocol(job, protocol)
    with tempfile.TemporaryDirectory() as scratch:
        source = worlds.directory(root, job.world, "multimodal")
        if method.merge is not None:
            source = _merged(job, root, method, regime, settings, Path(scratch) / "merged")
        model = LlavaForConditionalGeneration.from_pretrained(source, dtype=torch.float32)
        trained: dict[str, Any] = {}
        if method.way == "train":
            model, trained = _fine_tune(
                model, job, root, settings, protocol, device=device, scratch=Path(scratch)
            )
    model.train(False)
    measured = time.perf_counter()
    answers, digits = experiment.evaluate(model, _world(job.world), job.set, protocol)
    end = time.perf_counter()
    return {
        "key": job.key,
        **asdict(job),
        "settings": settings,
        "answers": answers,
        "digits": digits,
        "progress": _progress(model.cpu(), root, job),
        **trained,
        "seconds": {"train": round(measured - start, 2), "evaluate": round(end - measured, 2)},
        "device": device,
        "versions": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "drift_fast": drift_fast.__version__,
        },
    }


@functools.lru_cache(maxsize=8)
def batches(number: int, seed: int, protocol: experiment.Protocol) -> list[Batch]:
    """Return every batch of one fine-tuning set in order, ready to train on."""
    world = _world(number)
    samples = experiment.fine_tuning_set(world, seed, protocol)
    generator = np.random.default_rng([number, 40, seed])
    count = protocol.steps * protocol.batch
    epochs = -(-count // len(samples))
    order = np.concatenate([generator.permutation(len(samples)) for _ in range(epochs)])[:count]
    return [
        experiment.tensors([samples[i] for i in chosen])
        for chosen in order.reshape(protocol.steps, protocol.batch)
    ]


class _Seen:
    """Passes the one batch of each step on, and keeps a digest of all that were seen."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()

    def __call__(self, items: list[Batch]) -> Batch:
        (batch,) = items
        for name in sorted(batch):
            self._digest.update(batch[name].numpy())
        return batch

    def digest(self) -> str:
        return self._digest.hexdigest()[:16]


class _Rates(TrainerCallback):
    """Adds the learning rates of all optimizer steps up."""

    def __init__(self) -> None:
        self.total = 0.0

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.total += float(kwargs["optimizer"].param_groups[0]["lr"])


class _Prepared(Trainer):
    """Takes whole batches from its data set, in order."""

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)


def _fine_tune(
    model: PreTrainedModel,
    job: Job,
    root: Path,
    settings: Mapping[str, Any],
    protocol: experiment.Protocol,
    *,
    device: str,
    scratch: Path,
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Fine-tune and return the model, adapters merged, and what training showed."""
    method, regime = METHODS[job.method], REGIMES[job.regime]
    seen = _Seen()
    model.model.vision_tower.requires_grad_(regime.vision)
    torch.manual_seed(job.set)
    trained = _with_adapters(model) if regime.lora else model
    trainer = _Prepared(
        model=trained,
        args=TrainingArguments(
            output_dir=str(scratch),
            max_steps=protocol.steps,
            per_device_train_batch_size=1,
            learning_rate=settings["lr"],
            lr_scheduler_type="cosine",
            warmup_steps=protocol.steps // 20,
            max_grad_norm=1.0,
            logging_strategy="no",
            logging_nan_inf_filter=False,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=device == "cpu",
            seed=job.set,
            remove_unused_columns=False,
            dataloader_pin_memory=False,
        ),
        train_dataset=batches(job.world, job.set, protocol),
        data_collator=seen,
    )
    trainer.remove_callback(PrinterCallback)
    rates = _Rates()
    trainer.add_callback(rates)
    attached = _attach(trainer, method, _delta(job, root), settings)
    with warnings.catch_warnings():
        # Where λ ends is a column of the tables.
        warnings.filterwarnings("ignore", "progress along", drift_fast.DriftWarning)
        loss = trainer.train().training_loss
    if attached is not None:
        attached.remove()
    if regime.lora:
        model = trained.merge_and_unload()
    return model, {"loss": loss, "batches": seen.digest(), "rates": rates.total}


def _with_adapters(model: PreTrainedModel) -> peft.PeftModel:
    adapted = peft.get_peft_model(
        model,
        peft.LoraConfig(
            r=LORA_RANK,
            lora_alpha=LORA_RANK,
            target_modules=r".*language_model.*\.(q|k|v|o|gate|up|down)_proj",
        ),
    )
    # As in the other regimes the projector trains, which lies outside the backbone.
    adapted.base_model.model.model.multi_modal_projector.requires_grad_(True)
    return adapted


def _attach(
    trainer: Trainer, method: Method, delta: Any, settings: Mapping[str, Any]
) -> drift_fast.Injection | drift_fast.integrations.trainer_motion.TrainerMotion | None:
    if method.moves:
        return drift_fast.attach_motion(trainer, delta, progress=_by_kind(settings), window=0.1)
    if not method.injects:
        return None
    options = dict(method.options)
    if "attn" in settings:
        options["progress_cap"] = _by_kind(settings)
    return drift_fast.attach(trainer, delta, alpha=settings["alpha"], **options)


def _by_kind(settings: Mapping[str, Any]) -> dict[str, float]:
    return {kind: settings[kind] for kind in KINDS}


def _merged(
    job: Job,
    root: Path,
    method: Method,
    regime: Regime,
    settings: Mapping[str, Any],
    out: Path,
) -> Path:
    """Merge the expert into the multimodal model, in float32, and return where it lies."""
    expert = "unrelated" if method.control == "unrelated" else regime.expert
    stated = ("weight", "multimodal_weight", "density", "keep_layers")
    options: dict[str, Any] = {name: settings[name] for name in stated if name in settings}
    if "attn" in settings:
        options["weight"] = _by_kind(settings)
    if settings.get("modules") == "all":
        # One vocabulary throughout, and no tokenizer to tell so.
        options["rows"] = "index"
    else:
        options["modules"] = KINDS
    if method.prior == "base":
        base = "base" if method.control == "unrelated" else regime.base
        options["base"] = worlds.directory(root, job.world, base)
    source = worlds.directory(root, job.world, expert)
    if method.control == "unrelated":
        source = _rescaled_expert(job, root, out.with_name("unrelated"))
    if method.merge in ("dare_linear", "dare_ties"):
        options["seed"] = job.set
    drift_fast.merge(
        method.merge,
        source,
        worlds.directory(root, job.world, "multimodal"),
        out,
        dtype="float32",
        threads=1,
        **options,
    )
    return out


def _delta(job: Job, root: Path) -> Any:
    """Return the Δ that a method attaches, a control's in its place; None if it attaches none."""
    method, regime = METHODS[job.method], REGIMES[job.regime]
    if not (method.injects or method.moves):
        return None
    delta = _true_delta(root, job.world, regime, method.prior)
    if method.control == "unrelated":
        return Rescaled(_unrelated_delta(root, job.world, method.prior), delta)
    if method.control == "reversed":
        return drift_fast.combine([(delta, -1.0)])
    return Shuffled(delta, seed=job.set) if method.control == "shuffled" else delta


def _true_delta(
    root: Path, world: int, regime: Regime, prior: experiment.Prior
) -> drift_fast.Delta:
    return _streamed(
        worlds.directory(root, world, regime.expert),
        worlds.directory(root, world, "multimodal" if prior == "multimodal" else regime.base),
    )


def _unrelated_delta(root: Path, world: int, prior: experiment.Prior) -> drift_fast.Delta:
    return _streamed(
        worlds.directory(root, world, "unrelated"), worlds.directory(root, world, prior)
    )


def _rescaled_expert(job: Job, root: Path, out: Path) -> Path:
    """Write, in float32, the base plus the control's Δ, which a merge takes for its expert."""
    base = worlds.directory(root, job.world, "base")
    state = {
        name: tensor.float()
        for path in sorted(base.glob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }
    delta = Rescaled(
        _unrelated_delta(root, job.world, "base"),
        _true_delta(root, job.world, REGIMES[job.regime], "base"),
    )
    for name in delta:
        state[name] += delta[name]
    out.mkdir()
    shutil.copyfile(base / "config.json", out / "config.json")
    save_file(state, out / "model.safetensors", metadata={"format": "pt"})
    return out


def _streamed(expert: Path, reference: Path) -> drift_fast.Delta:
    return drift_fast.compute_delta(expert, reference, modules=KINDS, threads=1)


class Rescaled(Mapping[str, torch.Tensor]):
    """A delta, each tensor of it with the norm of the one that it stands for; float32.

    Raises:
        ValueError: when such a tensor is read, one of zeros that stands for one that is not.
    """

    def __init__(self, delta: drift_fast.Delta, stands_for: drift_fast.Delta) -> None:
        self._delta = delta
        self._stands_for = stands_for
        self.shapes = dict(stands_for.shapes)

    def __getitem__(self, name: str) -> torch.Tensor:
        tensor = self._delta[name].float()
        norm, wanted = tensor.norm(), self._stands_for[name].float().norm()
        if wanted == 0:
            return torch.zeros_like(tensor)
        if norm == 0:
            raise ValueError(f"{name}: expected a control of norm {wanted:.3g}, found only zeros")
        return tensor * (wanted / norm)

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


class Shuffled(Mapping[str, torch.Tensor]):
    """A delta with the elements of each tensor in a random order: its norms and nothing else."""

    def __init__(self, delta: drift_fast.Delta, *, seed: int) -> None:
        self._delta = delta
        self._seed = seed
        self.shapes = dict(delta.shapes)

    def __getitem__(self, name: str) -> torch.Tensor:
        tensor = self._delta[name]
        generator = np.random.default_rng([self._seed, 50, list(self.shapes).index(name)])
        order = torch.from_numpy(generator.permutation(tensor.numel()))
        return tensor.flatten()[order].view(tensor.shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


@functools.lru_cache(maxsize=16)
def _world(number: int) -> w.World:
    return w.World(number)


@functools.lru_cache(maxsize=8)
def _references(
    root: Path, world: int, regime: str
) -> dict[str, list[tuple[str, torch.Tensor, torch.Tensor]]]:
    """Return for each prior (parameter, θ_0, Δ), all float32."""
    model = LlavaForConditionalGeneration.from_pretrained(
        worlds.directory(root, world, "multimodal"), dtype=torch.float32
    )
    start = {name: parameter.detach() for name, parameter in model.named_parameters()}
    found = {}
    for prior in PRIORS:
        delta = _true_delta(root, world, REGIMES[regime], prior)
        matched = drift_fast.match_parameters(model, delta)
        found[prior] = [(name, start[name], delta[at].float()) for name, at in matched.items()]
    return found


@torch.no_grad()
def _progress(model: PreTrainedModel, root: Path, job: Job) -> dict[str, dict[str, float]]:
    """Return for each prior λ over all tensors and by kind, how far the weights are in ‖Δ‖, and
    the root mean square of Δ's elements."""
    weights = dict(model.named_parameters())
    result = {}
    for prior, tensors in _references(root, job.world, job.regime).items():
        along, squares, moved = dict.fromkeys(KINDS, 0.0), dict.fromkeys(KINDS, 0.0), 0.0
        for name, start, delta in tensors:
            motion = (weights[name] - start).double().flatten()
            direction = delta.double().flatten()
            kind = kind_of(name)
            along[kind] += float(motion @ direction)
            squares[kind] += float(direction @ direction)
            moved += float(motion @ motion)
        total = sum(squares.values())
        result[prior] = {
            "all": sum(along.values()) / total,
            **{kind: along[kind] / squares[kind] for kind in KINDS},
            "distance": (moved / total) ** 0.5,
            "rms": (total / sum(delta.numel() for _, _, delta in tensors)) ** 0.5,
        }
    return result
