"""The recipe for torchtitan in docs/stacks.md, in torchtitan's own step.

Owns: that the recipe injects into the gradient of all micro-batches, before torchtitan clips. Its
`train_step`, `forward_backward_step` and clipping are run; its start, which wants an accelerator,
and its models are not: the Trainer is given a small model and what a step asks of the rest.
"""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from support import reference
from support.injection_models import (
    Backbone,
    delta_towards,
    gradients_of,
    regression_batch,
    regression_loss,
)

pytest.importorskip("torchtitan.trainer")

PAGE = Path(__file__).parents[2] / "docs" / "stacks.md"
CLIP = 0.01


def recipe() -> Any:
    """Return the class that the page defines."""
    section = PAGE.read_text(encoding="utf-8").partition("\n## torchtitan\n")[2]
    code = re.search(r"```python\n(.*?)```", section, re.DOTALL)
    assert code is not None
    # A dataclass looks its module up by name.
    names: dict[str, Any] = {"__name__": __name__}
    exec(code[1], names)
    return names["DriftTrainer"]


class Optimizers:
    """What torchtitan holds its optimizers in, with one."""

    def __init__(self, model: Backbone, seen: list[dict[str, torch.Tensor]]) -> None:
        self._inner = torch.optim.SGD(model.parameters(), lr=0.0)
        self._inner.register_step_pre_hook(lambda *_: seen.append(gradients_of(model)))

    def zero_grad(self, set_to_none: bool) -> None:
        self._inner.zero_grad(set_to_none=set_to_none)

    def step(self) -> None:
        self._inner.step()


def trainer_of(model: Backbone, kind: Any, seen: Any, *, none: bool, accumulation: int) -> Any:
    def forward_backward(inputs: Any, labels: Any, tokens: Any, more: Any) -> torch.Tensor:
        loss = regression_loss(model, (inputs, labels)) / accumulation
        loss.backward()
        return loss

    nothing = SimpleNamespace(
        get_metrics=dict,
        step=lambda: None,
        should_log=lambda step: False,
        maybe_wait_for_staging=lambda: None,
    )
    trainer = object.__new__(kind)
    trainer.__dict__ |= {
        "config": SimpleNamespace(
            training=SimpleNamespace(max_norm=CLIP, disable_cuda_graphs=none)
        ),
        "optimizers": Optimizers(model, seen),
        "lr_schedulers": nothing,
        "metrics_processor": nothing,
        "checkpointer": nothing,
        "parallel_dims": SimpleNamespace(
            pp_enabled=False,
            dp_enabled=False,
            ep_enabled=False,
            get_optional_mesh=lambda name: None,
        ),
        "step": 1,
        "device": torch.device("cpu"),
        "model_parts": [model],
        "gradient_accumulation_steps": accumulation,
        "num_pipeline_parallel_microbatches": 1,
        "post_dataloading_process": lambda inputs, labels: (inputs["input"], labels, {}),
        "fwd_bwd_fn": forward_backward,
    }
    return trainer


@pytest.mark.parametrize("none", [True, False], ids=["gradients are freed", "gradients are zeroed"])
@pytest.mark.parametrize("accumulation", [1, 4])
def test_the_recipe_injects_the_whole_gradient_before_torchtitan_clips(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, accumulation: int, none: bool
) -> None:
    from torchtitan.trainer import Trainer

    delta = delta_towards(tmp_path, Backbone())
    delta.save(tmp_path / "delta")
    monkeypatch.chdir(tmp_path)

    def run(kind: Any) -> list[dict[str, torch.Tensor]]:
        seen: list[dict[str, torch.Tensor]] = []
        model = Backbone()
        trainer = trainer_of(model, kind, seen, none=none, accumulation=accumulation)
        batches = [
            ({"input": inputs}, labels)
            for inputs, labels in (regression_batch(seed=at) for at in range(2 * accumulation))
        ]
        rows = iter(batches)
        for _ in range(2):
            trainer.train_step(rows)
        return seen

    plain, found = run(Trainer), run(recipe())
    assert len(plain) == len(found) == 2
    for before, after in zip(plain, found, strict=True):
        # The adaptive push is proportional to the gradient, so one that was clipped will do.
        expected = {
            name: reference.inject(gradient, delta[name], alpha=1.0, scale="adaptive")
            if name in delta
            else reference.exact(gradient)
            for name, gradient in before.items()
        }
        total = reference.norm(
            reference.exact(torch.tensor([reference.norm(part) for part in expected.values()]))
        )
        for name, gradient in after.items():
            scaled = expected[name] * (CLIP / total)
            error = reference.norm(reference.exact(gradient) - scaled)
            assert error <= 1e-4 * reference.norm(scaled), name
