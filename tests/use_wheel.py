"""Run by `make test-wheel` in a clean environment: a delta and one injected step from the wheel.

The environment holds the wheel and its declared dependencies, so neither transformers nor the
checkout can help.
"""

import importlib.util
import sys
import tempfile
from importlib.metadata import files
from pathlib import Path

import drift_fast

here = Path(__file__).resolve().parents[1]
assert here / "python" not in Path(drift_fast.__file__).parents, "the checkout was imported"
assert "torch" not in sys.modules, "importing drift_fast imported torch"
assert importlib.util.find_spec("transformers") is None, "the environment is not a clean one"
shipped = {str(file) for file in files("drift-fast") or []}
assert "drift_fast/py.typed" in shipped
assert "drift_fast/_core.pyi" in shipped
assert {"drift_fast/bench/rivals.py", "drift_fast/bench/controls.py"} <= shipped

import torch  # noqa: E402

checkpoints = Path(drift_fast.__file__).parent / "demo" / "checkpoints"
with tempfile.TemporaryDirectory() as directory:
    delta = drift_fast.compute_delta(
        checkpoints / "expert", checkpoints / "multimodal", Path(directory) / "delta"
    )
    assert len(delta) > 0
    assert delta.coverage.fraction == 1.0

    # Modules nested as the names say stand for the model.
    model = torch.nn.Module()
    for name, shape in delta.shapes.items():
        *path, leaf = name.split(".")
        module = model
        for part in path:
            if part not in dict(module.named_children()):
                module.add_module(part, torch.nn.Module())
            module = module.get_submodule(part)
        module.register_parameter(leaf, torch.nn.Parameter(torch.randn(shape) * 0.02))

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with drift_fast.Injection(model, delta, alpha=1.0, scale="gradnorm") as injection:
        sum(parameter.square().sum() for parameter in model.parameters()).backward()
        injection.step()
        optimizer.step()
        assert injection.injected == len(delta)
        progress = injection.metrics()["progress"]
        assert progress > 0, progress

print(f"the wheel works: {len(delta)} tensors, progress {progress:.4f} after one step")
