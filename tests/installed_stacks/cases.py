"""How each stack is run from what `drift-fast setup` writes for it.

Owns what is changed in those files: nothing but the length of the run, and what a machine without
an accelerator needs.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

ACCUMULATION = 4
CLIP = 0.01
RATE = 1e-3
SAVED = 2


@dataclass(frozen=True)
class Run:
    """One run: with an injection or as the stack's own, how hard, how long, and from where."""

    injected: bool = True
    alpha: float = 1.0
    steps: int = 2
    resume: bool = False


RUNS = {
    "plain": Run(injected=False),
    "zero": Run(alpha=0.0),
    "injected": Run(steps=4),
    "resumed": Run(steps=4, resume=True),
    # What tells whether the stack itself resumes to the bit.
    "own": Run(injected=False, steps=4),
    "own-resumed": Run(injected=False, steps=4, resume=True),
}
Prepare = Callable[[Path, Run, str], list[str]]


def _replaced(path: Path, changes: dict[str, str]) -> None:
    """Replace by patterns, each of which must occur."""
    text = path.read_text(encoding="utf-8")
    for pattern, new in changes.items():
        text, count = re.subn(pattern, lambda _, new=new: new, text)
        assert count, f"{path}: {pattern} does not occur"
    path.write_text(text, encoding="utf-8")


def _trainer_script(folder: Path, run: Run, python: str) -> list[str]:
    """The Trainer's and TRL's."""
    short = f"max_steps={run.steps}, save_steps={SAVED}, max_grad_norm={CLIP}, use_cpu=True"
    changes = {
        r"num_train_epochs=3,": f"{short}, report_to='none',",
        r"learning_rate=[^,]*,": f"learning_rate={RATE},",
        r'lr_scheduler_type="cosine",': "lr_scheduler_type='constant',",
        r"warmup_steps=0.05,": "",
        r"bf16=True": "bf16=False",
        r"gradient_accumulation_steps=8": f"gradient_accumulation_steps={ACCUMULATION}",
        r"alpha=1.0": f"alpha={run.alpha}",
    }
    if run.resume:
        changes[r"\ntrainer.train\(\)"] = (
            f"\ntrainer.train(resume_from_checkpoint='saves/drift/checkpoint-{SAVED}')"
        )
        if "peft" not in (folder / "train.py").read_text():
            changes[r'MODEL = ".*"'] = f"MODEL = 'saves/drift/checkpoint-{SAVED}'"
    _replaced(folder / "train.py", changes)
    return [python, "train.py"]


def _of_each_loop(run: Run) -> dict[str, str]:
    """What every script with a loop or module of its own states alike."""
    return {r"lr=[\d.e-]+": f"lr={RATE}", r"alpha=1.0": f"alpha={run.alpha}"}


def _loop_script(folder: Path, run: Run, python: str) -> list[str]:
    """A loop of one's own and Accelerate's, over as many samples as the steps take."""
    changes = {
        **_of_each_loop(run),
        r"range\(3\)": "range(1)",
        r"splitlines\(\)\]": f"splitlines()[: {run.steps * ACCUMULATION}]]",
        r", 1\.0\)": f", {CLIP})",
        r"shuffle=True": "shuffle=False",
    }
    text = (folder / "train.py").read_text()
    if "ACCUMULATION = 8" in text:
        changes |= {"ACCUMULATION = 8": f"ACCUMULATION = {ACCUMULATION}", "bfloat16": "float32"}
        changes[r"with torch.autocast\(device, dtype=torch.bfloat16\)"] = "if True"
        changes.pop("bfloat16")
    else:
        changes[r'mixed_precision="bf16", gradient_accumulation_steps=8'] = (
            f"cpu=True, gradient_accumulation_steps={ACCUMULATION}"
        )
    _replaced(folder / "train.py", changes)
    return [python, "train.py"]


def _deepspeed_script(folder: Path, run: Run, python: str) -> list[str]:
    """One process under ZeRO-2, whose optimizer steps all parameters as one vector."""
    changes = {
        **_of_each_loop(run),
        r"range\(3\)": "range(1)",
        # Its sampler's order depends on the number of rows.
        r"for batch in loader": f"for _, batch in zip(range({run.steps * ACCUMULATION}), loader)",
        r'"gradient_accumulation_steps": 8': f'"gradient_accumulation_steps": {ACCUMULATION}',
        r'"gradient_clipping": 1.0': f'"gradient_clipping": {CLIP}',
        r'"bf16": \{"enabled": True\}': '"bf16": {"enabled": False}',
    }
    _replaced(folder / "train.py", changes)
    alone = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"]
    return ["env", "DS_ACCELERATOR=cpu", python, *alone, "train.py"]


def _lightning_script(folder: Path, run: Run, python: str) -> list[str]:
    changes = {
        **_of_each_loop(run),
        r"max_epochs=3": f"max_steps={run.steps}, accelerator='cpu', logger=False",
        r"accumulate_grad_batches=8": f"accumulate_grad_batches={ACCUMULATION}",
        r"gradient_clip_val=1.0": f"gradient_clip_val={CLIP}",
        r'precision="bf16-mixed"': "precision='32-true'",
        r"shuffle=True": "shuffle=False",
        r"callbacks=\[drift\]": (
            "callbacks=[drift, pl.callbacks.ModelCheckpoint('saves', filename='{step}', "
            f"every_n_train_steps={SAVED}, save_top_k=-1)]"
        ),
    }
    if run.resume:
        changes[r"fit\(Module\(\), loader\)"] = (
            f"fit(Module(), loader, ckpt_path='saves/step={SAVED}.ckpt')"
        )
    _replaced(folder / "train.py", changes)
    return [python, "train.py"]


def _llamafactory(folder: Path, run: Run, python: str) -> list[str]:
    given = yaml.safe_load((folder / "train.yaml").read_text())
    given |= {
        "max_steps": run.steps,
        "save_steps": SAVED,
        "logging_steps": 1,
        "learning_rate": RATE,
        "lr_scheduler_type": "constant",
        "warmup_ratio": 0.0,
        "gradient_accumulation_steps": ACCUMULATION,
        "max_grad_norm": CLIP,
        "bf16": False,
        "infer_dtype": "float32",
        "use_cpu": True,
        "report_to": "none",
        "image_max_pixels": 1024,
        "image_min_pixels": 64,
    }
    if run.resume:
        given["resume_from_checkpoint"] = f"saves/drift/checkpoint-{SAVED}"
        if given["finetuning_type"] == "full":
            # examples/llamafactory says why.
            given["model_name_or_path"] = f"saves/drift/checkpoint-{SAVED}"
    if not run.injected:
        del given["drift_fast"]
    else:
        given["drift_fast"]["alpha"] = run.alpha
    (folder / "train.yaml").write_text(yaml.safe_dump(given))
    own = "from llamafactory.train.tuner import run_exp; run_exp()"
    module = ["-m", "drift_fast.integrations.llamafactory"]
    return [python, *(module if run.injected else ["-c", own]), "train.yaml"]


def _swift(folder: Path, run: Run, python: str) -> list[str]:
    changes = {r"--torch_dtype \w+": "--torch_dtype float32", r"--bf16 true": "--bf16 false"}
    if not run.injected:
        changes |= {
            r"DRIFT_FAST_CONFIG=drift.yaml ": "",
            r" \\\n *--external_plugins plugin.py": "",
            r" \\\n *--callbacks drift_fast": "",
        }
    _replaced(folder / "train.sh", changes)
    _replaced(folder / "drift.yaml", {r"alpha: 1.0": f"alpha: {run.alpha}"})
    more: dict[str, Any] = {
        "max_steps": run.steps,
        "save_steps": SAVED,
        "logging_steps": 1,
        "learning_rate": RATE,
        "lr_scheduler_type": "constant",
        "warmup_ratio": 0,
        "gradient_accumulation_steps": ACCUMULATION,
        "max_grad_norm": CLIP,
        "use_cpu": "true",
        "report_to": "none",
        "dataloader_num_workers": 0,
        "use_hf": "true",
        "gradient_checkpointing": "false",
        "attn_impl": "eager",
        "add_version": "false",
    }
    if run.resume:
        more["resume_from_checkpoint"] = f"saves/drift/checkpoint-{SAVED}"
        if "tuner_type full" in (folder / "train.sh").read_text():
            # The Trainer finds none of a Qwen2.5-VL's weights by itself.
            more["model"] = f"saves/drift/checkpoint-{SAVED}"
    words = [word for key, value in more.items() for word in (f"--{key}", str(value))]
    return ["bash", "train.sh", *words]


def _with_parts(path: Path) -> str:
    """Return rows whose messages hold their images, as Axolotl takes them."""
    lines = []
    for line in path.read_text().splitlines():
        row = json.loads(line)
        images = [{"type": "image", "path": image} for image in row["images"]]
        for turn in row["messages"]:
            text = {"type": "text", "text": turn["content"].replace("<image>", "")}
            turn["content"] = [*(images if turn["role"] == "user" else []), text]
        lines.append(json.dumps({"messages": row["messages"]}) + "\n")
    return "".join(lines)


def _axolotl(folder: Path, run: Run, python: str) -> list[str]:
    rows = _with_parts(folder / "train.jsonl")
    (folder / "train.jsonl").unlink()
    (folder / "train.jsonl").write_text(rows)
    given = yaml.safe_load((folder / "train.yaml").read_text())
    given |= {
        "max_steps": run.steps,
        "save_steps": SAVED,
        "logging_steps": 1,
        "learning_rate": RATE,
        "lr_scheduler": "constant",
        "warmup_steps": 0,
        "gradient_accumulation_steps": ACCUMULATION,
        "max_grad_norm": CLIP,
        "seed": 42,
        "optimizer": "adamw_torch",
        "bf16": False,
        "tf32": False,
        "use_cpu": True,
        "attn_implementation": "eager",
    }
    given.pop("warmup_ratio", None)
    if run.resume:
        given["resume_from_checkpoint"] = f"saves/drift/checkpoint-{SAVED}"
        if "adapter" not in given:
            checkpoint = folder / given["resume_from_checkpoint"]
            # Its checkpoints hold no processor, which it saves beside them.
            for file in checkpoint.parent.glob("*processor*"):
                shutil.copy(file, checkpoint)
            given["base_model"] = given["resume_from_checkpoint"]
    if run.injected:
        given["drift_fast"]["alpha"] = run.alpha
    else:
        del given["drift_fast"], given["plugins"]
    (folder / "train.yaml").write_text(yaml.safe_dump(given))
    return [python, "-m", "axolotl.cli.train", "train.yaml"]


def _verl(folder: Path, run: Run, python: str) -> list[str]:
    """Its own SFT trainer over two processes under FSDP2, on GPUs where there are two."""
    code = """
import pandas
rows = pandas.read_json("train.jsonl", lines=True)
rows["images"] = [[{"image": image} for image in images] for images in rows["images"]]
# Twice, so that no checkpoint is at the end of an epoch: verl goes on with another order there.
pandas.concat([rows, rows]).to_parquet("train.parquet")
"""
    subprocess.run([python, "-c", code], cwd=folder, check=True)
    modules = [] if on_gpus("verl") else ["verl_on_cpu"]
    modules += ["drift_fast.integrations.verl"] if run.injected else []
    changes = {
        # Where torch is linked, its commands are not.
        r"torchrun --nproc-per-node 8": f"{python} -m torch.distributed.run --nproc-per-node 2",
        r"(?<=VERL_USE_EXTERNAL_MODULES=).*": ",".join(modules),
    }
    _replaced(folder / "train.sh", changes)
    _replaced(folder / "drift.yaml", {r"alpha: 1.0": f"alpha: {run.alpha}"})
    more: dict[str, Any] = {
        "trainer.device": "cuda" if on_gpus("verl") else "cpu",
        "trainer.logger": "[console]",
        "trainer.total_training_steps": run.steps,
        "trainer.save_freq": SAVED,
        "trainer.default_local_dir": "saves",
        "optim.lr": RATE,
        "optim.clip_grad": CLIP,
        "data.train_batch_size": 2 * ACCUMULATION,
        "data.micro_batch_size_per_gpu": 1,
        "data.use_dynamic_bsz": False,
        "data.num_workers": 0,
        # Without flash-attn, and in float32 throughout.
        "model.use_remove_padding": False,
        "+model.override_config.attn_implementation": "eager",
        "engine.use_torch_compile": False,
        "+engine.mixed_precision.param_dtype": "fp32",
    }
    if run.resume:
        more["trainer.resume_mode"] = "resume_path"
        more["trainer.resume_from_path"] = f"saves/global_step_{SAVED}"
    return ["bash", "train.sh", *(f"{key}={value}" for key, value in more.items())]


STACKS: dict[str, Prepare] = {
    "trl": _trainer_script,
    "trainer": _trainer_script,
    "accelerate": _loop_script,
    "loop": _loop_script,
    "deepspeed": _deepspeed_script,
    "lightning": _lightning_script,
    "llamafactory": _llamafactory,
    "swift": _swift,
    "axolotl": _axolotl,
    "verl": _verl,
}
# They resume from no checkpoint.
WITHOUT_RESUMING = {"accelerate", "loop", "deepspeed"}
# Where their own code for a Qwen2.5-VL fails in a batch without images.
ONLY_IMAGES = {"verl": "in _get_input_embeds"}
# Scripts, whose own run is the same file beside a stand-in of drift_fast.
SCRIPTS = {"trl", "trainer", "accelerate", "loop", "deepspeed", "lightning"}


def on_gpus(stack: str) -> bool:
    """Whether a stack runs on GPUs: verl's two processes do, where there are two."""
    return stack == "verl" and torch.cuda.device_count() > 1


def rows(world: Path, *, images: bool, count: int) -> None:
    """Write train.jsonl beside the pictures of the recipe's stand-in."""
    given = json.loads((world / "data" / "train.json").read_text())[:count]
    for row in given:
        if not images:
            row["images"] = []
            for turn in row["messages"]:
                turn["content"] = turn["content"].replace("<image>", "")
    name = "images.jsonl" if images else "text.jsonl"
    (world / "data" / name).write_text("".join(json.dumps(row) + "\n" for row in given))
