"""Record what an optimizer is given, in a process that knows nothing of it.

Python imports this by its name when its directory is on PYTHONPATH. Owns the record: the gradients
and weights of the first step, by the names that modules give them, and a checksum of both for every
step, in the directory that STACKS_RECORD names.
"""

import os

if os.environ.get("STACKS_RECORD"):
    import gc
    import hashlib
    import json
    from pathlib import Path

    import torch
    from safetensors.torch import save_file
    from torch.optim.optimizer import register_optimizer_step_pre_hook

    # Axolotl makes its adapters before it sets a seed.
    torch.manual_seed(0)
    _FOLDER = Path(os.environ["STACKS_RECORD"])
    _steps: list[str] = []
    _names: dict[int, str] = {}

    def _name_all() -> None:
        """The longest name is the outermost module's."""
        modules = [each for each in gc.get_objects() if isinstance(each, torch.nn.Module)]
        for module in modules:
            for name, parameter in module.named_parameters():
                if len(name) > len(_names.get(id(parameter), "")):
                    _names[id(parameter)] = name

    def _before(optimizer, args, kwargs):
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            return _record(optimizer)

        def recorded():
            # A closure computes the gradients that are then used.
            loss = closure()
            _record(optimizer)
            return loss

        if "closure" in kwargs:
            return args, {**kwargs, "closure": recorded}
        return (args[0], recorded, *args[2:]), kwargs

    def _record(optimizer):
        parameters = [one for group in optimizer.param_groups for one in group["params"]]
        if not _steps:
            _name_all()
        found = {
            _names[id(one)]: (one.grad, one.detach()) for one in parameters if one.grad is not None
        }
        if not found:
            return
        digest = hashlib.sha256()
        for name in sorted(found):
            for tensor in found[name]:
                # Zeros of either sign are one number.
                digest.update((tensor.float() + 0.0).contiguous().numpy().tobytes())
        _steps.append(digest.hexdigest())
        _FOLDER.mkdir(parents=True, exist_ok=True)
        if len(_steps) == 1:
            for at, kind in enumerate(("gradients", "weights")):
                tensors = {name: both[at].float().clone() for name, both in found.items()}
                save_file(tensors, _FOLDER / f"{kind}.safetensors")
        (_FOLDER / "steps.json").write_text(json.dumps(_steps))

    register_optimizer_step_pre_hook(_before)
