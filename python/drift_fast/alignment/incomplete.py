"""Which tensors a checkpoint should hold and does not, judged by what the other one has.

Owns two ways: an index that promises a tensor which no shard holds, and weights of shape [0], which
DeepSpeed ZeRO-3 leaves where it saves what other processes hold.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from drift_fast.alignment.model_pair import ModelPair
from drift_fast.checkpoints.opened import Opened
from drift_fast.names import kind_of


@dataclass(frozen=True)
class Lacking:
    """What one side lacks: names that its index promises, and weights without elements."""

    side: Opened
    promised: list[str]
    empty: list[str]


def find_lacking(pair: ModelPair) -> list[Lacking]:
    """Return what each side lacks of the tensors that have a match in the other.

    Where nothing matches, which may be for the lack of it, that is every weight.
    """
    first, second = (f"{prefix}." if prefix else "" for prefix in pair.alignment.prefixes)
    return [
        _lacking(pair.reasoning, None if pair.failure else pair.multimodal, first, second),
        _lacking(pair.multimodal, None if pair.failure else pair.reasoning, second, first),
    ]


def _lacking(side: Opened, other: Opened | None, prefix: str, others: str) -> Lacking:
    def is_there(name: str) -> bool:
        if other is None:
            return kind_of(name) != "other"
        return math.prod(other.shapes.get(others + name.removeprefix(prefix), (0,))) > 0

    empty = [name for name, shape in side.shapes.items() if shape == (0,)]
    return Lacking(side, *([n for n in names if is_there(n)] for names in (side.absent, empty)))


def explain_promised(side: Opened, names: list[str]) -> str:
    """Return the message about names that an index promises."""
    return (
        f"{side.source.path}: tensor {names[0]!r}: the index places it in "
        f"{side.absent[names[0]]!r}, which does not hold it{_and_more(names)}; download the "
        "checkpoint again"
    )


def explain_empty(side: Opened, names: list[str]) -> str:
    """Return the message about weights without elements."""
    return (
        f"{side.source.path}: tensor {names[0]!r} has shape [0]{_and_more(names)}: the weights "
        "were sharded by DeepSpeed ZeRO-3 when they were saved, and not gathered. Join the shards "
        "with the zero_to_fp32.py of that checkpoint, or save again with "
        "stage3_gather_16bit_weights_on_model_save"
    )


def _and_more(names: list[str]) -> str:
    return f", and {len(names) - 1} more" if names[1:] else ""
