"""Fused weights matched with split ones by names and shapes, where transformers cannot be asked.

The canonical form is the fused one: `experts.gate_up_proj` of shape [experts, 2·inner, hidden] and
`experts.down_proj` of shape [experts, hidden, inner]; `qkv_proj` and `gate_up_proj` with the rows
of their parts one after another in the order that the name gives. Whether a fused weight is stored
transposed follows from the other weight of its experts: only one reading of gate_up and down fits
both shapes. Other orders, such as interleaved rows, are caught when the weights are compared
(`similarity`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from drift_fast.alignment.layout import Layout
from drift_fast.alignment.name_alignment import TensorIndex
from drift_fast.shapes import Shape

_EXPERT = re.compile(
    r"(?P<experts>.*\bexperts)\.(?P<number>\d{1,18})\.(?P<name>(gate|up|down)_proj)(\.weight)?$"
)
_FUSED_EXPERTS = re.compile(
    r"(?P<experts>.*\bexperts)\.(?P<name>gate_up_proj|down_proj)(\.weight)?$"
)
_EXPERT_PARTS = ("gate_proj", "up_proj", "down_proj")
# Names of fused projections, and those of their parts in order.
_FUSED_PROJECTIONS = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}


def canonical(tensors: Mapping[str, Layout], fuse: Iterable[str]) -> dict[str, Layout]:
    """Return every tensor under its canonical name, with experts and the named projections fused.

    `fuse` are the projections that either model stores fused; others are left split.
    """
    rest = dict(tensors)
    layouts = _fuse_experts(rest) | _orient_experts(rest)
    for name in fuse:
        layouts |= _fuse_projection(rest, name, _FUSED_PROJECTIONS[name])
    return layouts | rest


def canonical_layouts(
    reasoning: TensorIndex, multimodal: TensorIndex
) -> tuple[dict[str, Layout], dict[str, Layout], str]:
    """Return both sides in one form, and how that form was found."""
    asked = reasoning.convert(), multimodal.convert()
    sides = [
        answer or {name: Layout.stored(name, shape) for name, shape in side.shapes.items()}
        for side, answer in zip((reasoning, multimodal), asked, strict=True)
    ]
    fuse = fused_projections(sides[0]) | fused_projections(sides[1])
    method = "names and shapes" if None in asked else "transformers' conversion"
    return canonical(sides[0], fuse), canonical(sides[1], fuse), method


def is_unoriented(name: str, tensors: Mapping[str, Shape]) -> bool:
    """Whether nothing shows if fused experts are transposed: square, without their other weight."""
    shape = tensors[name]
    match = _FUSED_EXPERTS.match(name) if len(shape) == 3 and shape[1] == shape[2] else None
    if match is None:
        return False
    other = "down_proj" if match["name"] == "gate_up_proj" else "gate_up_proj"
    ending = match[3] or ""
    return f"{match['experts']}.{other}{ending}" not in tensors


def fused_projections(tensors: Iterable[str]) -> set[str]:
    """Return which of the fused projections outside experts occur among the names."""
    return {
        part
        for name in tensors
        for part in name.split(".")[-2:]
        if part in _FUSED_PROJECTIONS and not _FUSED_EXPERTS.match(name)
    }


def incomplete_experts(names: Iterable[str]) -> dict[str, str]:
    """Return the experts that cannot be fused, since others of their layer are missing."""
    reasons = {}
    for experts, kinds in _experts(names).items():
        count = 1 + max(number for named in kinds.values() for number in named)
        # A stranger may write any number, so only a gap is looked for.
        short = next((kind for kind in _EXPERT_PARTS if len(kinds.get(kind, {})) < count), None)
        if short is None:
            continue
        held = kinds.get(short, {})
        absent = next(number for number in range(count) if number not in held)
        for name in (name for named in kinds.values() for name in named.values()):
            reasons[name] = (
                f"some experts of its layer are missing: there is no {experts}.{absent}.{short}"
            )
    return reasons


def _experts(names: Iterable[str]) -> dict[str, dict[str, dict[int, str]]]:
    """Return names by container, projection and number."""
    found: dict[str, dict[str, dict[int, str]]] = {}
    for name in names:
        match = _EXPERT.match(name)
        if match:
            kinds = found.setdefault(match["experts"], {})
            kinds.setdefault(match["name"], {})[int(match["number"])] = name
    return found


def _fuse_experts(rest: dict[str, Layout]) -> dict[str, Layout]:
    layouts = {}
    incomplete = incomplete_experts(rest)
    for experts, kinds in _experts(rest).items():
        names = [name for named in kinds.values() for name in named.values()]
        if any(name in incomplete for name in names):
            continue
        if any(f"{experts}.{kind}" in rest for kind in ("gate_up_proj", "down_proj")):
            # Stored in both ways; nothing says which is meant.
            continue
        shapes = {kind: {rest[n].shape for n in named.values()} for kind, named in kinds.items()}
        if any(len(found) > 1 for found in shapes.values()):
            continue
        if shapes["gate_proj"] != shapes["up_proj"]:
            continue
        stacks = {
            kind: Layout.stacked([rest.pop(named[at]) for at in sorted(named)], 0)
            for kind, named in kinds.items()
        }
        both = [stacks["gate_proj"], stacks["up_proj"]]
        layouts[f"{experts}.gate_up_proj"] = Layout.concatenated(both, 1)
        layouts[f"{experts}.down_proj"] = stacks["down_proj"]
    return layouts


def _orient_experts(rest: dict[str, Layout]) -> dict[str, Layout]:
    found: dict[str, dict[str, str]] = {}
    for name, layout in rest.items():
        match = _FUSED_EXPERTS.match(name)
        if match and len(layout.shape) == 3:
            found.setdefault(match["experts"], {})[match["name"]] = name
    layouts = {}
    for experts, names in found.items():
        if set(names) != {"gate_up_proj", "down_proj"}:
            continue
        up, down = rest[names["gate_up_proj"]].shape, rest[names["down_proj"]].shape
        straight = (up[1], up[2]) == (2 * down[2], down[1])
        if not straight and (up[2], up[1]) != (2 * down[1], down[2]):
            continue
        for kind, name in names.items():
            layout = rest.pop(name)
            layouts[f"{experts}.{kind}"] = layout if straight else layout.transposed(1, 2)
    return layouts


def _fuse_projection(
    rest: dict[str, Layout], fused: str, parts: tuple[str, ...]
) -> dict[str, Layout]:
    layouts = {}
    for name in list(rest):
        before, found, after = name.rpartition(f"{parts[0]}.")
        if not found or (before and not before.endswith(".")):
            continue
        names = [f"{before}{part}.{after}" for part in parts]
        shapes = [rest[other].shape[1:] for other in names if other in rest]
        if len(shapes) < len(parts) or len(set(shapes)) > 1:
            continue
        if f"{before}{fused}.{after}" in rest:
            continue
        layouts[f"{before}{fused}.{after}"] = Layout.concatenated(
            [rest.pop(other) for other in names], 0
        )
    return layouts
