"""Run a training script where there is no accelerator, under launch files that ask for one.

    accelerate launch --config_file fsdp2.yaml … recipe_on_cpu.py train.py …
    torchrun … recipe_on_cpu.py train.py … deepspeed=zero3.json
    torchrun … recipe_on_cpu.py drift_fast.integrations.llamafactory … deepspeed=zero3.json

Owns two things that only a machine without accelerators needs: Accelerate ignores FSDP there, and
with `use_cpu` transformers does not let DeepSpeed start its communication, which ZeRO-3 needs when
weights are loaded. The script or module, its configuration and the launch file are as they stand.
What was attached on each rank is written to $RECIPE_REPORT-RANK.json.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
from pathlib import Path
from typing import Any


def allow_fsdp() -> None:
    """Let Accelerate's state keep its FSDP plugin although the processes are CPUs."""
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedType

    original = AcceleratorState.__init__

    def lifted(self: Any, *args: Any, fsdp_plugin: Any = None, **options: Any) -> None:
        original(self, *args, fsdp_plugin=fsdp_plugin, **options)
        kept = fsdp_plugin or self.__dict__.get("fsdp_plugin")
        if kept is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.FSDP
            if self._mixed_precision != "no":
                kept.set_mixed_precision(self._mixed_precision)
            self.fsdp_plugin = kept

    AcceleratorState.__init__ = lifted  # type: ignore[method-assign]


def report(attached: list[Any]) -> None:
    """Write how many parameters of which kind the last step injected."""
    injections = [one.injection for one in attached]
    shards = [group.shards for injection in injections for group in injection._groups]
    found = {
        "injected": sum(injection.injected for injection in injections),
        "shards": sorted({type(shard).__name__.strip("_") for some in shards for shard in some}),
    }
    path = f"{os.environ['RECIPE_REPORT']}-{os.environ['RANK']}.json"
    Path(path).write_text(json.dumps(found))


def keep_attached() -> list[Any]:
    """Return a list that every injection joins which the script attaches."""
    import drift_fast
    from drift_fast.integrations import attach as integrations

    kept: list[Any] = []
    attach = integrations.attach

    def keeping(*args: Any, **options: Any) -> Any:
        kept.append(attach(*args, **options))
        return kept[-1]

    # Scripts call the one, frameworks' integrations the other.
    drift_fast.attach = integrations.attach = keeping
    return kept


def main() -> None:
    script = sys.argv[1]
    sys.argv = sys.argv[1:]
    is_file = Path(script).is_file()
    if is_file:
        sys.path.insert(0, str(Path(script).parent))
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        allow_fsdp()
    if any(argument.startswith("deepspeed=") for argument in sys.argv):
        import deepspeed

        deepspeed.init_distributed(dist_backend="gloo")
    kept = keep_attached()
    run = runpy.run_path if is_file else runpy.run_module
    run(script, run_name="__main__")
    report(kept)


if __name__ == "__main__":
    main()
