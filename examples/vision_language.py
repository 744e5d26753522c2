"""A small Qwen2.5-VL, fine-tuned with a Trainer along the Δ of an expert that was really trained.

    python examples/vision_language.py [--steps 300] [--out folder]

The expert adds digits modulo ten in text; the multimodal model names the digit that the brightness
of an image stands for; fine-tuning asks for the sum of an image and a written digit, with few
samples. Everything is made here, from the transformers classes, with fixed seeds. What each step
did goes to the training log, a CSV file and, with `--out`, a picture.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import json
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers

import drift_fast

DIGITS, IMAGE, START, PLUS, EQUALS, PAD, VISION = 10, 10, 11, 12, 13, 14, 15
TEXT: dict[str, Any] = {
    "vocab_size": 16,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": START,
    "eos_token_id": PAD,
    "pad_token_id": PAD,
}


def text_model() -> Any:
    torch.manual_seed(0)
    return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**TEXT))


def multimodal_model(base: Any) -> Any:
    torch.manual_seed(1)
    config = transformers.Qwen2_5_VLConfig(
        text_config={**TEXT, "rope_scaling": {"type": "mrope", "mrope_section": [4, 6, 6]}},
        vision_config={
            "depth": 2,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_heads": 4,
            "out_hidden_size": 128,
            "patch_size": 4,
            "spatial_merge_size": 2,
            "fullatt_block_indexes": [1],
            "window_size": 16,
        },
        image_token_id=IMAGE,
        vision_start_token_id=VISION,
    )
    model = transformers.Qwen2_5_VLForConditionalGeneration(config)
    model.model.language_model.load_state_dict(base.model.state_dict())
    model.lm_head.load_state_dict(base.lm_head.state_dict())
    return model


def sums(count: int, seed: int) -> list[dict[str, torch.Tensor]]:
    """Written sums, for the expert."""
    pairs = torch.randint(0, DIGITS, (count, 2), generator=torch.Generator().manual_seed(seed))
    return [_sample([START, a, PLUS, b, EQUALS], (a + b) % 10) for a, b in pairs.tolist()]


def images(count: int, seed: int, *, add: bool) -> list[dict[str, torch.Tensor]]:
    """Images to name, or to add a written digit to."""
    generator = torch.Generator().manual_seed(seed)
    result = []
    for a, b in torch.randint(0, DIGITS, (count, 2), generator=generator).tolist():
        prompt = [START, VISION, IMAGE, IMAGE, IMAGE, IMAGE, *([PLUS, b] if add else []), EQUALS]
        sample = _sample(prompt, (a + b) % 10 if add else a)
        noise = torch.randn(16, 96, generator=generator)
        sample["pixel_values"] = (a - 4.5) / 3 + 0.2 * noise
        sample["image_grid_thw"] = torch.tensor([1, 4, 4])
        sample["mm_token_type_ids"] = (sample["input_ids"] == IMAGE).long()
        result.append(sample)
    return result


def _sample(prompt: list[int], answer: int) -> dict[str, torch.Tensor]:
    tokens = torch.tensor([*prompt, answer])
    labels = torch.full_like(tokens, -100)
    labels[-1] = answer
    return {"input_ids": tokens, "labels": labels}


def collate(samples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    batch = {key: torch.stack([s[key] for s in samples]) for key in ("input_ids", "labels")}
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    if "pixel_values" in samples[0]:
        batch["pixel_values"] = torch.cat([s["pixel_values"] for s in samples])
        batch["image_grid_thw"] = torch.stack([s["image_grid_thw"] for s in samples])
        batch["mm_token_type_ids"] = torch.stack([s["mm_token_type_ids"] for s in samples])
    return batch


def trainer(model: Any, data: Any, folder: Path, steps: int, rate: float = 2e-3) -> Any:
    return transformers.Trainer(
        model=model,
        args=transformers.TrainingArguments(
            output_dir=str(folder),
            max_steps=steps,
            per_device_train_batch_size=32,
            gradient_accumulation_steps=2,
            learning_rate=rate,
            lr_scheduler_type="cosine",
            warmup_steps=steps // 20,
            logging_steps=max(1, steps // 30),
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,
            bf16=torch.cuda.is_available(),
            use_cpu=not torch.cuda.is_available(),
            seed=0,
        ),
        train_dataset=data,
        data_collator=collate,
    )


@torch.no_grad()
def right(model: Any, samples: list[dict[str, torch.Tensor]]) -> float:
    """Return the share of answers that are right."""
    batch = {key: value.to(model.device) for key, value in collate(samples).items()}
    labels = batch.pop("labels")[:, -1]
    guess = model.eval()(**batch).logits[:, -2].argmax(-1)
    return float((guess == labels).float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    # What a short run heads for is in the log, too.
    warnings.filterwarnings("ignore", "progress along", drift_fast.DriftWarning)
    with tempfile.TemporaryDirectory() as temporary:
        out = options.out or Path(temporary)
        out.mkdir(parents=True, exist_ok=True)
        base = text_model()
        expert, start = text_model(), multimodal_model(base)
        trainer(expert, sums(4096, 1), out, 4 * options.steps).train()
        trainer(start, images(2048, 2, add=False), out, 2 * options.steps, 5e-4).train()
        expert.save_pretrained(out / "expert")
        start.save_pretrained(out / "multimodal")
        print(f"the expert adds {right(expert, sums(512, 3)):.0%} right in text")
        print(f"the multimodal model names {right(start, images(512, 4, add=False)):.0%} of images")

        pair = out / "expert", out / "multimodal"
        print(drift_fast.check(*pair).table())
        delta = drift_fast.compute_delta(*pair, out / "delta", overwrite=True)
        few, test = images(256, 5, add=True), images(1024, 6, add=True)
        for label in ("SFT", "DRIFT"):
            model = type(start).from_pretrained(out / "multimodal", dtype=torch.float32)
            run = trainer(model, few, out, options.steps, 5e-4)
            if label == "DRIFT":
                (out / "metrics.csv").unlink(missing_ok=True)
                injection = drift_fast.attach(run, delta, alpha=1.0, csv=out / "metrics.csv")
            run.train()
            print(f"{label}: {right(model, test):.0%} of sums right, of 1,024 new images")
        history = run.state.log_history
        last = [row for row in history if "drift/progress" in row][-1]
        print({key: round(value, 4) for key, value in last.items() if "/" in key})
        with (out / "metrics.csv").open() as file:
            print(f"{sum(1 for _ in csv.reader(file)) - 1} values in metrics.csv")
        (out / "log_history.json").write_text(json.dumps(history))
        if options.out and importlib.util.find_spec("matplotlib"):
            injection.plot(out / "telemetry.png")


if __name__ == "__main__":
    main()
