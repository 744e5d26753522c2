"""One step of SGD in a real training framework, run as a process of its own.

    python framework_runs.py FRAMEWORK FOLDER plain|injected

Owns: the shortest run of each framework, from its own entry point, with its own extension point.
Frameworks change global state and pin their libraries, hence the process; what it compares with is
test_frameworks.py's. FOLDER holds `multimodal/` (model and tokenizer) and `delta/`, with images
`data/` too; the weights before and after the step are written to FOLDER/start.safetensors and
FOLDER/<run>.safetensors.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

RECIPE = Path(__file__).parents[2] / "examples" / "qwen2_5_vl_7b"
RATE = 1000.0
ALPHA = 0.7
CLIP = 0.01
SAMPLES = 8
SECTION = {"alpha": ALPHA, "scale": "adaptive"}


def messages() -> list[list[str]]:
    """Return prompts and answers."""
    return [[f"{3 * i} + {i * i}?", f"It is {3 * i + i * i}."] for i in range(SAMPLES)]


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: torch.clone(p.detach().float()) for name, p in model.named_parameters()}


def trained_by(run: Any, keep: dict[str, Any]) -> None:
    """Run, and keep the Trainer, whose own callback tells which it is."""
    from transformers import Trainer

    original = Trainer.train

    def train(self: Any, *args: Any, **kwargs: Any) -> Any:
        keep["trainer"] = self
        keep["start"] = weights(self.model)
        return original(self, *args, **kwargs)

    Trainer.train = train
    try:
        run()
    finally:
        Trainer.train = original


def llamafactory(folder: Path, injected: bool, keep: dict[str, Any]) -> None:
    rows = [{"instruction": ask, "input": "", "output": answer} for ask, answer in messages()]
    (folder / "rows.json").write_text(json.dumps(rows))
    (folder / "dataset_info.json").write_text(json.dumps({"rows": {"file_name": "rows.json"}}))
    run_llamafactory(folder, injected, keep, {"dataset": "rows", "template": "empty"})


def llamafactory_images(folder: Path, injected: bool, keep: dict[str, Any]) -> None:
    (folder / "data" / "dataset_info.json").write_text((RECIPE / "dataset_info.json").read_text())
    images = {
        "dataset_dir": str(folder / "data"),
        "dataset": "reasoning_with_images",
        "template": "qwen2_vl",
        "image_max_pixels": 1024,
        "image_min_pixels": 64,
        "freeze_vision_tower": True,
        "freeze_multi_modal_projector": True,
    }
    run_llamafactory(folder, injected, keep, images)


def run_llamafactory(
    folder: Path, injected: bool, keep: dict[str, Any], more: dict[str, Any]
) -> None:
    arguments: dict[str, Any] = {
        "model_name_or_path": str(folder / "multimodal"),
        "stage": "sft",
        "do_train": True,
        "finetuning_type": "full",
        "dataset_dir": str(folder),
        "cutoff_len": 256,
        "output_dir": str(folder / f"out_{injected}"),
        "per_device_train_batch_size": SAMPLES // 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": RATE,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "max_steps": 1,
        "max_grad_norm": CLIP if injected else 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "infer_dtype": "float32",
        **more,
    }
    if injected:
        from drift_fast.integrations.llamafactory import run

        arguments["drift_fast"] = {"delta": str(folder / "delta"), **SECTION}
        trained_by(lambda: run(arguments), keep)
    else:
        from llamafactory.train.tuner import run_exp

        trained_by(lambda: run_exp(arguments), keep)


def swift(folder: Path, injected: bool, keep: dict[str, Any]) -> None:
    rows = [
        {
            "messages": [
                {"role": "user", "content": ask},
                {"role": "assistant", "content": answer},
            ]
        }
        for ask, answer in messages()
    ]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    arguments = {
        "model": folder / "multimodal",
        "model_type": "qwen2",
        "template": "dummy",
        "tuner_type": "full",
        "torch_dtype": "float32",
        "dataset": folder / "rows.jsonl",
        "split_dataset_ratio": 0,
        "max_steps": 1,
        "optim": "sgd",
        "learning_rate": RATE,
        "lr_scheduler_type": "constant",
        "warmup_ratio": 0,
        "weight_decay": 0,
        "max_grad_norm": CLIP if injected else 0.0,
        "per_device_train_batch_size": SAMPLES // 2,
        "gradient_accumulation_steps": 2,
        "gradient_checkpointing": "false",
        "bf16": "false",
        "fp16": "false",
        "use_cpu": "true",
        "output_dir": folder / f"out_{injected}",
        "logging_steps": 1,
        "report_to": "none",
        "dataloader_num_workers": 0,
        "use_hf": "true",
    }
    if injected:
        (folder / "plugin").mkdir(exist_ok=True)
        (folder / "plugin" / "plugin.py").write_text("import drift_fast.integrations.swift\n")
        (folder / "drift.json").write_text(json.dumps({"delta": "delta", **SECTION}))
        os.environ["DRIFT_FAST_CONFIG"] = str(folder / "drift.json")
        arguments["external_plugins"] = folder / "plugin" / "plugin.py"
        arguments["callbacks"] = "drift_fast"
    from swift.pipelines import sft_main

    words = [word for key, value in arguments.items() for word in (f"--{key}", str(value))]
    trained_by(lambda: sft_main(words), keep)


def axolotl(folder: Path, injected: bool, keep: dict[str, Any]) -> None:
    rows = [{"instruction": ask, "input": "", "output": answer} for ask, answer in messages()]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    arguments: dict[str, Any] = {
        "base_model": str(folder / "multimodal"),
        "datasets": [{"path": str(folder / "rows.jsonl"), "ds_type": "json", "type": "alpaca"}],
        "dataset_prepared_path": str(folder / "prepared"),
        "val_set_size": 0,
        "output_dir": str(folder / f"out_{injected}"),
        "sequence_len": 512,
        "sample_packing": False,
        "micro_batch_size": SAMPLES // 2,
        "gradient_accumulation_steps": 2,
        "max_steps": 1,
        "num_epochs": 1,
        "optimizer": "sgd",
        "lr_scheduler": "constant",
        "learning_rate": RATE,
        "max_grad_norm": CLIP if injected else 0.0,
        "bf16": False,
        "fp16": False,
        "tf32": False,
        "gradient_checkpointing": False,
        "attn_implementation": "eager",
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "special_tokens": {"pad_token": "<pad>"},
    }
    if injected:
        arguments["plugins"] = ["drift_fast.integrations.axolotl.DriftPlugin"]
        arguments["drift_fast"] = {"delta": str(folder / "delta"), **SECTION}
    import yaml
    from axolotl.cli.config import load_cfg
    from axolotl.common.datasets import load_datasets
    from axolotl.train import train

    file = folder / "axolotl.yaml"
    file.write_text(yaml.safe_dump(arguments))
    cfg = load_cfg(str(file))
    trained_by(lambda: train(cfg=cfg, dataset_meta=load_datasets(cfg=cfg)), keep)


def main() -> None:
    framework, place, how = sys.argv[1:]
    folder, keep = Path(place), {}
    runs = {
        "llamafactory": llamafactory,
        "llamafactory_images": llamafactory_images,
        "swift": swift,
        "axolotl": axolotl,
    }
    runs[framework](folder, how == "injected", keep)
    trainer = keep["trainer"]
    assert trainer.state.global_step == 1
    logged = any("drift/progress" in row for row in trainer.state.log_history)
    assert logged == (how == "injected"), trainer.state.log_history
    save_file(keep["start"], folder / "start.safetensors")
    save_file(weights(trainer.model), folder / f"{how}.safetensors")


if __name__ == "__main__":
    main()
