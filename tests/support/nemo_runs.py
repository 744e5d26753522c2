"""Short runs of NeMo AutoModel's recipes on the CPU, in a process of their own.

    python nemo_runs.py FOLDER MODEL ACCUMULATION RUN…

Owns: runs of its `setup()` and its loop on FOLDER/multimodal, with the recipe of docs/stacks.md or
with `attach`. MODEL is `own` for NeMo's implementation of Qwen2, `hf` for that of transformers, and
`images` for the step of its recipe of images and text, around a Qwen2.5-VL, without `setup()`.
FOLDER/<run>/ gets what `installed_stacks/checks.py` reads. The recipe asks for a GPU in places,
which are named where they are lifted.
"""

# ruff: noqa: E402

from __future__ import annotations

import os
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

# NeMo goes without it, and its LoRA kernels do not load under Triton 3.9.
sys.modules["triton"] = None  # type: ignore[assignment]

from nemo_automodel._transformers import auto_model
from nemo_automodel.components.config.loader import ConfigNode
from nemo_automodel.recipes.llm.train_ft import TrainFinetuneRecipeForNextTokenPrediction

import drift_fast
from support.injection_models import text_batch, tiny_qwen2_5_vl
from support.step_record import Record

PAGE = Path(__file__).parents[2] / "docs" / "stacks.md"
LLM, VLM = "TrainFinetuneRecipeForNextTokenPrediction", "FinetuneRecipeForVLM"
STEPS = 4
SAVED = 2
CLIP = 0.01
SCHEDULE = f'"delta", schedule="cosine", total_steps={STEPS}'


def without_gpu() -> None:
    """Lift what the recipe asks of CUDA, whatever it trains on."""
    torch.cuda.reset_peak_memory_stats = lambda *_: None
    torch.cuda.current_device = lambda: 0
    place = auto_model.apply_model_infrastructure

    def on_cpu(*given: Any, **options: Any) -> Any:
        return place(*given, **{**options, "device": torch.device("cpu")})

    auto_model.apply_model_infrastructure = on_cpu


def recipe(delta: str = '"delta"', *, images: bool = False) -> Any:
    """Return the class that the page defines, with options, or for the other recipe it names."""
    section = PAGE.read_text(encoding="utf-8").partition("\n## NeMo AutoModel\n")[2]
    code = re.search(r"```python\n(.*?)```", section, re.DOTALL)
    assert code is not None
    names: dict[str, Any] = {"__name__": __name__}
    text = code[1].replace('"delta"', delta)
    if images:
        text = text.replace("llm.train_ft", "vlm.finetune").replace(LLM, VLM)
    exec(text, names)
    return names["DriftRecipe"]


class Forgetful(TrainFinetuneRecipeForNextTokenPrediction):
    """An injection whose call is missing, as where NeMo would clip by another function."""

    def load_checkpoint(self, restore_from: str | None = None) -> None:
        self.injection = drift_fast.Injection(self.model_parts[0], "delta")
        super().load_checkpoint(restore_from)


def settings(folder: Path, model: str, accumulation: int, *, saves: Path | None) -> ConfigNode:
    data = "nemo_automodel.components.datasets"
    return ConfigNode(
        {
            "seed": 1,
            "dist_env": {"backend": "gloo"},
            "step_scheduler": {
                "global_batch_size": 2 * accumulation,
                "local_batch_size": 2,
                "max_steps": STEPS,
                "ckpt_every_steps": SAVED,
            },
            "model": {
                "_target_": "nemo_automodel.NeMoAutoModelForCausalLM.from_pretrained",
                "pretrained_model_name_or_path": str(folder / "multimodal"),
                "torch_dtype": "float32",
                "attn_implementation": "sdpa",
                "force_hf": model == "hf",
            },
            "distributed": {"strategy": "fsdp2"},
            "loss_fn": {"_target_": "nemo_automodel.components.loss.masked_ce.MaskedCrossEntropy"},
            "dataset": {
                "_target_": f"{data}.llm.mock.build_unpacked_dataset",
                "num_sentences": 64,
                "vocab_size": 64,
                "mean_len": 10.0,
                "max_sentence_len": 16,
            },
            "dataloader": {
                "_target_": "torchdata.stateful_dataloader.StatefulDataLoader",
                "collate_fn": f"{data}.utils.default_collater",
            },
            "optimizer": {"_target_": "torch.optim.AdamW", "lr": 1e-3},
            "clip_grad_norm": {"max_norm": CLIP},
            "checkpoint": {
                "enabled": saves is not None,
                "checkpoint_dir": str(saves or folder / "logs"),
            },
        }
    )


def run(folder: Path, model: str, accumulation: int, name: str) -> None:
    plain = TrainFinetuneRecipeForNextTokenPrediction
    kinds = {
        "injected": recipe,
        "zero": lambda: recipe('"delta", alpha=0.0'),
        "scheduled": lambda: recipe(SCHEDULE),
        "resumed": lambda: recipe(SCHEDULE),
        "forgetful": lambda: Forgetful,
    }
    kind = kinds.get(name, lambda: plain)()
    saves = folder / "saves" if name in ("scheduled", "resumed") else None
    config = settings(folder, model, accumulation, saves=saves)
    if name == "resumed":
        config.set_by_dotted("checkpoint.restore_from", f"epoch_0_step_{SAVED - 1}")
        # NeMo writes no checkpoint over another.
        shutil.rmtree(folder / "saves" / f"epoch_0_step_{STEPS - 1}")
        (folder / "saves" / "LATEST").unlink()
    job = kind(config)
    job.setup()
    attached = {"attached": 1.0, "attached-zero": 0.0}.get(name)
    if attached is not None:
        drift_fast.attach(job.optimizer[0], "delta", model=job.model_parts[0], alpha=attached)
    record = Record(job.model_parts[0], folder / name)
    try:
        job.run_train_validation_loop()
    except drift_fast.DriftError as error:
        (folder / name / "error").write_text(str(error))
    record.close()


def run_images(folder: Path, accumulation: int, name: str) -> None:
    """Steps of the recipe of images and text, which is given what a step asks for."""
    from nemo_automodel.components.loss.masked_ce import MaskedCrossEntropy
    from nemo_automodel.recipes.vlm import finetune

    names = {"plain": None, "injected": '"delta"', "zero": '"delta", alpha=0.0'}
    delta = names[name]
    # As the page says: the same class on the other recipe.
    kind = finetune.FinetuneRecipeForVLM if delta is None else recipe(delta, images=True)
    model = tiny_qwen2_5_vl()
    job = object.__new__(kind)
    job.__dict__ |= {
        "cfg": {},
        "dist_env": SimpleNamespace(device=torch.device("cpu")),
        "model_parts": [model],
        "optimizer": [torch.optim.AdamW(model.parameters(), lr=1e-3)],
        "lr_scheduler": None,
        "loss_fn": MaskedCrossEntropy(),
        "pp": None,
        "pp_enabled": False,
        "device_mesh": None,
        "moe_mesh": None,
        "distributed_config": None,
        "mesh_context": SimpleNamespace(cp_size=1),
        "checkpointer": SimpleNamespace(
            config=SimpleNamespace(enabled=False), maybe_wait_for_staging=lambda: None
        ),
        "step_scheduler": SimpleNamespace(step=0, epoch=0, is_remote_logging_step=False),
        "timestamp": 0.0,
    }
    job.load_checkpoint()
    record = Record(model, folder / name)
    for step in range(STEPS):
        first = step * accumulation
        batches = [text_batch(seed=at) for at in range(first, first + accumulation)]
        job._run_train_optim_step(batches, CLIP)
    record.close()


def main(folder: Path, model: str, accumulation: int, names: list[str]) -> None:
    os.chdir(folder)
    torch.set_num_threads(1)
    without_gpu()
    for name in names:
        if model == "images":
            run_images(folder, accumulation, name)
        else:
            run(folder, model, accumulation, name)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4:])
