"""What 16 bits take away: from weights while they train, and from Δ and a merge.

Each part runs twice, in bfloat16 and in float32, and shows what the library says of it.
"""

import tempfile
import warnings
from pathlib import Path

import tiny
import torch

import drift_fast

STEPS, RATE = 120, 1e-5
# ‖Δ‖/‖W‖ of a model that was fine-tuned for reasoning is of this size.
SHARE = 0.012


def show(caught: list[warnings.WarningMessage]) -> None:
    for message in caught:
        if issubclass(message.category, drift_fast.DriftWarning):
            print(f"    warning: {str(message.message)[:200]}…")


def train(folder: Path, dtype: torch.dtype) -> None:
    """Train with an injection; weights of 16 bits without float32 copies stay where they are."""
    model, delta = tiny.pair(folder, text_only=True)
    model.to(dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with drift_fast.Injection(model, delta, optimizer=optimizer) as injection:
            for batch in tiny.batches(STEPS):
                model(**batch).loss.backward()
                injection.step()
                optimizer.step()
                optimizer.zero_grad()
            print(f"{dtype}: λ after {STEPS} steps is {injection.metrics()['progress']:.4f}")
    show(caught)


def subtract(folder: Path, dtype: torch.dtype) -> None:
    """Subtract and merge two checkpoints that are near each other."""
    expert, model = tiny.text_model(), tiny.text_model()
    with torch.no_grad():
        for parameter in expert.parameters():
            parameter.add_(SHARE * parameter.square().mean().sqrt() * torch.randn_like(parameter))
    expert.to(dtype).save_pretrained(folder / "reasoning")
    model.to(dtype).save_pretrained(folder / "multimodal")
    pair = folder / "reasoning", folder / "multimodal"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        delta = drift_fast.compute_delta(*pair, folder / "delta", dtype="float32")
        merged = drift_fast.merge(
            "linear",
            *pair,
            folder / "merged",
            weight=0.5,
            rows="index",
            dtype=str(dtype).removeprefix("torch."),
        )
    print(
        f"{dtype}: rounding is {delta.stats.total.rounding_share:.1%} of ‖Δ‖, "
        f"and {merged.rounding_share:.1%} of what a merge changes"
    )
    show(caught)


if __name__ == "__main__":
    for part in (train, subtract):
        print(part.__doc__)
        for dtype in (torch.bfloat16, torch.float32):
            with tempfile.TemporaryDirectory() as folder:
                part(Path(folder), dtype)
