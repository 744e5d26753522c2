"""What an injection cannot reach: refused at attachment, with a remedy.

A target that stayed out unnoticed would train without Δ.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch

from drift_fast.errors import DriftError
from drift_fast.inject.config import InjectionConfig
from drift_fast.inject.shards.base import Shard, Whole
from drift_fast.inject.target import Target


def check_trained(targets: Sequence[Target]) -> None:
    """Refuse frozen targets.

    Raises:
        DriftError: a target does not require a gradient.
    """
    frozen = [target.name for target in targets if not target.parameter.requires_grad]
    if frozen:
        remedy = "unfreeze it, or leave it out with modules=… or layers=…"
        if any(target.adapted is not None for target in targets):
            remedy = (
                "add its module to target_modules of the LoraConfig, leave it out with modules=… "
                "or layers=…, or pass strict=False to inject into the adapted ones only"
            )
        raise DriftError(
            f"{len(frozen)} of {len(targets)} targets are frozen (requires_grad is False), "
            f"{frozen[0]} first: {remedy}"
        )


def check_optimized(targets: Sequence[Target], optimizer: torch.optim.Optimizer) -> None:
    """Refuse targets that the optimizer does not step.

    Raises:
        DriftError: a target is in none of its parameter groups.
    """
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    absent = [t.name for t in targets if any(id(p) not in held for p in t.trained)]
    if absent:
        raise DriftError(
            f"{len(absent)} of {len(targets)} targets are not in the optimizer, {absent[0]} first: "
            "build the optimizer from this model's parameters, or leave them out with modules=… "
            "or layers=…"
        )


def check_adapted(targets: Sequence[Target], config: InjectionConfig) -> None:
    """Refuse what has no meaning where weights move through adapters' factors.

    Raises:
        DriftError: such an option, and an adapted target.
    """
    adapted = next((target for target in targets if target.adapted is not None), None)
    if adapted is None:
        return
    reasons = {
        'scope="microbatch"': 'whose own gradient is never formed: use scope="step"',
        "overlap=True": "whose factors are injected into together: use overlap=False",
        "rescale": "whose norm, including a quantized part, is not known: leave it out",
    }
    given = (config.scope == "microbatch", config.overlap, config.rescale is not None)
    for option, reason in itertools.compress(reasons.items(), given):
        raise DriftError(f"{option} is not for {adapted.name}, an adapted weight {reason}")


def check_sharding(
    targets: Sequence[Target], shards: Sequence[Shard], config: InjectionConfig
) -> None:
    """Refuse options that need whole, final gradients inside backward where there are none.

    Raises:
        DriftError: a scope or an overlap that this way of training does not allow.
    """
    if config.scope == "step" and not config.overlap:
        return
    what = "overlap=True" if config.scope == "step" else f'scope="{config.scope}"'
    for target, shard in zip(targets, shards, strict=True):
        if not isinstance(shard, Whole):
            raise DriftError(
                f"{what} needs whole gradients inside backward, and {target.name} is sharded "
                f"({shard.sharding}): a hook there sees a part, or never runs. Use "
                'scope="step" and overlap=False, or train with DDP or on one device'
            )
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if config.overlap and distributed and torch.distributed.get_world_size() > 1:
        raise DriftError(
            "overlap=True needs gradients that are final inside backward; with several processes "
            "they are reduced after it. Use overlap=False"
        )
