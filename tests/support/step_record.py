"""What a model's optimizer is given, in the files that `installed_stacks/checks.py` reads."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch.optim.optimizer import register_optimizer_step_pre_hook


class Record:
    """What the optimizer is given: all of the first step, a checksum of each."""

    def __init__(self, model: torch.nn.Module, folder: Path) -> None:
        self._names = {id(p): name for name, p in model.named_parameters()}
        self._folder = folder
        self._steps: list[str] = []
        folder.mkdir(exist_ok=True)
        self._handle = register_optimizer_step_pre_hook(self._before)

    def _before(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        found = {
            self._names[id(p)]: (p.grad.clone(), p.detach().clone())
            for group in optimizer.param_groups
            for p in group["params"]
            if p.grad is not None
        }
        if not self._steps:
            for at, kind in enumerate(("gradients", "weights")):
                tensors = {name: both[at] for name, both in found.items()}
                save_file(tensors, self._folder / f"{kind}.safetensors")
        digest = hashlib.sha256()
        for name in sorted(found):
            for tensor in found[name]:
                # Zeros of either sign are one number.
                digest.update((tensor.cpu() + 0.0).contiguous().numpy().tobytes())
        self._steps.append(digest.hexdigest())

    def close(self) -> None:
        self._handle.remove()
        (self._folder / "steps.json").write_text(json.dumps(self._steps))
