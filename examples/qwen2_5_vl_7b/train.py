"""Fine-tune a Qwen2.5-VL on images with an injection: the Trainer, or TRL's SFTTrainer.

    python train.py paper.yaml
    torchrun --nproc-per-node 8 train.py paper.yaml deepspeed=zero2.json
    accelerate launch --config_file fsdp2.yaml train.py ours.yaml output_dir=out

A configuration holds what `Recipe` names, a section `drift_fast` (a delta and any option of
`Injection`; without it this is plain fine-tuning), and any of transformers' TrainingArguments.
`key=value` on the command line takes precedence, `drift_fast.alpha=0.5` too. A key that none of
them has is an error. The trained model, its processor and the training state lie in `output_dir`,
and so does the injection's `csv` where it is a relative path.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml

import drift_fast
from data import Collator, Opening, Samples

OTHER_MODALITY = ("visual", "vision_tower", "multi_modal_projector")


@dataclasses.dataclass
class Recipe:
    """What the Trainer has no argument for."""

    model: str
    data: str
    # Where the paths of images start; the data's own directory by default.
    images: str | None = None
    min_pixels: int | None = None
    max_pixels: int | None = None
    max_length: int | None = None
    freeze_vision: bool = True
    # TRL's SFTTrainer in place of the Trainer.
    trl: bool = False
    # True goes on from the last checkpoint in output_dir.
    resume: bool = False


def read(arguments: list[str]) -> tuple[Recipe, dict[str, Any], dict[str, Any] | None]:
    """Return the recipe, the Trainer's arguments and the section of the injection."""
    path, *overrides = arguments
    given = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    section = given.pop("drift_fast", None)
    for override in overrides:
        key, _, text = override.partition("=")
        # YAML would make a truth value of "no".
        value = text if key.endswith("_strategy") else scalar(text)
        if key.startswith("drift_fast."):
            section = {**(section or {}), key.removeprefix("drift_fast."): value}
        elif key == "drift_fast":
            section = value
        else:
            given[key] = value
    names = {field.name for field in dataclasses.fields(Recipe)}
    recipe = Recipe(**{key: given.pop(key) for key in list(given) if key in names})
    if given.get("deepspeed"):
        # A file beside this script, or one of yours.
        beside = Path(__file__).parent / given["deepspeed"]
        given["deepspeed"] = str(beside if beside.is_file() else given["deepspeed"])
    known = {field.name for field in dataclasses.fields(transformers.TrainingArguments)}
    if "warmup_ratio" in given and "warmup_ratio" not in known:
        # transformers 5 takes a share of the steps as steps below one.
        given["warmup_steps"] = given.pop("warmup_ratio")
    return recipe, given, section


def scalar(text: str) -> Any:
    """Return what YAML makes of a word, and a number for 1e-6, which YAML takes for text."""
    value = yaml.safe_load(text)
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            return float(value)
    return value


def load_model(recipe: Recipe, arguments: Any) -> Any:
    """Load the weights in the precision that the optimizer is to work in.

    DeepSpeed and FSDP2 keep float32 copies or weights of their own; anywhere else they are loaded
    in float32, since at a learning rate of 1e-6 updates of bfloat16 weights are rounded away.
    """
    sharded = arguments.deepspeed or os.environ.get("ACCELERATE_USE_FSDP") == "true"
    low = sharded and arguments.bf16
    # Trainer's own loading of a checkpoint looks for a Qwen2.5-VL's weights under names that they
    # do not have on disk, and goes on from what is loaded here (seen in transformers 5.23).
    place = last_checkpoint(arguments.output_dir) if recipe.resume else recipe.model
    model = transformers.AutoModelForImageTextToText.from_pretrained(
        place, dtype=torch.bfloat16 if low else torch.float32
    )
    if recipe.freeze_vision:
        for name, parameter in model.named_parameters():
            if any(part in OTHER_MODALITY for part in name.split(".")):
                parameter.requires_grad_(False)
    return model


def last_checkpoint(folder: str) -> str:
    found = transformers.trainer_utils.get_last_checkpoint(folder)
    if found is None:
        raise FileNotFoundError(f"{folder}: there is no checkpoint to resume from")
    return str(found)


def load_processor(recipe: Recipe) -> Any:
    """Load tokenizer and image processor; pictures are scaled to the recipe's numbers of pixels."""
    if importlib.util.find_spec("torchvision") is None:
        raise ImportError("Qwen2.5-VL's processor needs torchvision: pip install torchvision")
    processor = transformers.AutoProcessor.from_pretrained(recipe.model)
    bounds = {"shortest_edge": recipe.min_pixels, "longest_edge": recipe.max_pixels}
    given = {name: value for name, value in bounds.items() if value is not None}
    processor.image_processor.size = {**dict(processor.image_processor.size), **given}
    for name, value in (("min_pixels", recipe.min_pixels), ("max_pixels", recipe.max_pixels)):
        # What transformers 4 reads in the place of the size.
        if value is not None and hasattr(processor.image_processor, name):
            setattr(processor.image_processor, name, value)
    return processor


def build(recipe: Recipe, arguments: dict[str, Any]) -> Any:
    """Return a Trainer that has everything but an injection."""
    arguments = {"remove_unused_columns": False, **arguments}
    processor = load_processor(recipe)
    samples: Any = Samples(recipe.data, recipe.images)
    collate: Any = Collator(processor, max_length=recipe.max_length)
    kind: Any = transformers.Trainer
    if recipe.trl:
        from datasets import Dataset
        from trl import SFTConfig, SFTTrainer

        # SFTTrainer takes tables only, and would mask and cut in its own way: it gets the rows'
        # numbers, and the collator opens them.
        kind, collate = SFTTrainer, Opening(samples, collate)
        samples = Dataset.from_dict({"row": list(range(len(samples)))})
        prepared = {"dataset_kwargs": {"skip_prepare_dataset": True}, "max_length": None}
        settings = SFTConfig(**prepared, **arguments)
    else:
        settings = transformers.TrainingArguments(**arguments)
    # The arguments come first: under ZeRO-3 weights are then loaded where they will lie.
    return kind(
        model=load_model(recipe, settings),
        args=settings,
        train_dataset=samples,
        data_collator=collate,
        processing_class=processor,
    )


def in_output_dir(path: str, folder: str, *, resume: bool) -> str:
    """Return where a run's CSV file lies: rows of two runs in one file could not be told apart."""
    file = Path(folder) / path
    if file.exists() and not resume:
        raise FileExistsError(
            f"{file} holds the rows of a run before this one: move it away, choose another "
            "output_dir, or go on from that run's checkpoint with resume=true"
        )
    return str(file)


def main(arguments: list[str]) -> Any:
    """Train and save; return the Trainer."""
    recipe, settings, section = read(arguments)
    trainer = build(recipe, settings)
    folder = trainer.args.output_dir
    if section is not None:
        from drift_fast.integrations.settings import Settings

        given = Settings.from_mapping(section)
        csv = given.csv and in_output_dir(given.csv, folder, resume=recipe.resume)
        drift_fast.attach(trainer, given.delta, given, csv=csv)
    trainer.train(resume_from_checkpoint=last_checkpoint(folder) if recipe.resume else None)
    trainer.save_model()
    if trainer.is_world_process_zero():
        trainer.save_state()
        moved = [
            row["drift/progress"] for row in trainer.state.log_history if "loss" in row and section
        ]
        if moved:
            print(f"λ after {trainer.state.global_step} steps: {moved[-1]:.4f}")
    return trainer


if __name__ == "__main__":
    if len(sys.argv) < 2:
        raise SystemExit(__doc__)
    main(sys.argv[1:])
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
