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
    _known: dict[int, torch.nn.Parameter] = {}
    # Of a vector that DeepSpeed's optimizer steps: the parameters that lie in it, and where.
    _parts: dict[int, list[tuple[str, int, torch.Size]]] = {}

    def _name_all() -> None:
        """The longest name is the outermost module's."""
        modules = [each for each in gc.get_objects() if isinstance(each, torch.nn.Module)]
        for module in modules:
            for name, parameter in module.named_parameters():
                if len(name) > len(_names.get(id(parameter), "")):
                    _names[id(parameter)] = name
                    _known[id(parameter)] = parameter

    def _find_parts(flat):
        """Return what DeepSpeed laid out one after the other; one process has all of it."""
        place = flat.untyped_storage().data_ptr()
        for key, parameter in _known.items():
            mapped = getattr(parameter, "_hp_mapping", None)
            if mapped is not None and mapped.hp_fragment.untyped_storage().data_ptr() == place:
                start = mapped.hp_fragment_address.start
                _parts.setdefault(id(flat), []).append((_names[key], start, parameter.shape))

    def _whole(tensor):
        """Return a tensor of FSDP2 whole, which every process must ask for."""
        return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor

    def _views(one):
        """Yield names, gradients and weights of what the optimizer steps."""
        if id(one) in _names:
            yield _names[id(one)], tuple(_whole(tensor) for tensor in (one.grad, one.detach()))
            return
        for name, start, shape in _parts[id(one)]:
            yield (
                name,
                tuple(
                    tensor[start : start + shape.numel()].view(shape)
                    for tensor in (one.grad, one.detach())
                ),
            )

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
            for one in parameters:
                if id(one) not in _names:
                    _find_parts(one)
        given = (_views(one) for one in parameters if one.grad is not None)
        found = {name: both for some in given for name, both in some}
        if not found or os.environ.get("RANK", "0") != "0":
            return
        digest = hashlib.sha256()
        for name in sorted(found):
            for tensor in found[name]:
                # Zeros of either sign are one number.
                digest.update((tensor.float() + 0.0).contiguous().cpu().numpy().tobytes())
        _steps.append(digest.hexdigest())
        _FOLDER.mkdir(parents=True, exist_ok=True)
        if len(_steps) == 1:
            for at, kind in enumerate(("gradients", "weights")):
                tensors = {name: both[at].float().clone() for name, both in found.items()}
                save_file(tensors, _FOLDER / f"{kind}.safetensors")
        (_FOLDER / "steps.json").write_text(json.dumps(_steps))

    register_optimizer_step_pre_hook(_before)
