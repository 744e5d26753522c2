"""Which tensors a user selects: `modules=` and `layers=`, parsed once and asked about names.

Presets never select a vision or audio tower or a projector, whatever the names of its tensors; a
pattern given as `re:…` selects what it matches, with or without the components of wrappers.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice

from drift_fast.names import (
    MODULE_KINDS,
    bare,
    kind_of,
    may_be_missed,
    module_of,
    parsed,
)

Modules = str | Sequence[str]
Layers = str | int | Iterable[int] | None

PRESETS = (*MODULE_KINDS, "all")

# The pattern that every name matches: what an injection takes when no modules are named.
EVERYTHING = "re:.*"


@dataclass(frozen=True)
class Selection:
    """Modules and layers, ready to be asked about names.

    `named` says that the modules were asked for, rather than being a default.
    """

    modules: tuple[str, ...]
    layers: tuple[range, ...] | None
    named: bool = True

    @classmethod
    def parse(cls, modules: Modules, layers: Layers, *, named: bool = True) -> Selection:
        """Check and normalize what a user gives.

        `modules` is one or several of the presets `attn`, `mlp`, `norm`, `embed`, `head`, `all`, or
        `re:` followed by a regular expression that is searched in the name. `layers` is a number, a
        range or other iterable of numbers, or text such as "0-3,8". None is all layers, and then
        also tensors outside the layers (embeddings, head) if their module is selected.

        Raises:
            ValueError: an unknown preset, a pattern that does not compile, an empty or malformed
                range of layers.
        """
        given = (modules,) if isinstance(modules, str) else tuple(modules)
        for item in given:
            if not isinstance(item, str):
                raise ValueError(f"a module must be a preset or re:…, got {item!r}")
        names = tuple(part.strip() for item in given for part in _split(item))
        if not names:
            raise ValueError("modules is empty; name at least one of " + ", ".join(PRESETS))
        for name in names:
            if name == "re:":
                raise ValueError("the pattern after re: is empty; write modules='all' or re:.*")
            if name.startswith("re:"):
                try:
                    re.compile(name[3:])
                except re.error as error:
                    raise ValueError(f"the pattern {name!r} does not compile: {error}") from error
            elif name not in PRESETS:
                pattern = "re:" + re.escape(name).replace("\\-", "-")
                raise ValueError(
                    f"unknown module preset {name!r}; expected one of {', '.join(PRESETS)}, "
                    f"or a regular expression that a name contains, such as {pattern}"
                )
        return cls(names, _parse_layers(layers), named)

    def check_layers(self, names: Iterable[str]) -> None:
        """Refuse selected layers that none of `names` is in.

        Raises:
            ValueError: a selected layer does not exist; the message says which do.
        """
        found = set(map(parsed, names))
        present = {one.layer for one in found if one.layer is not None}
        # A range may be far longer than any model is deep, so it is not expanded.
        absent = [
            layer
            for layers in self.layers or ()
            for layer in islice((layer for layer in layers if layer not in present), 8)
        ]
        if absent:
            raise ValueError(
                f"there is no layer {', '.join(map(str, absent[:8]))}: the {len(present)} layers "
                f"are {min(present, default=0)} to {max(present, default=0)}"
            )

    @property
    def presets(self) -> tuple[str, ...]:
        """The kinds of modules that are named, each once."""
        return tuple(dict.fromkeys(name for name in self.modules if name in MODULE_KINDS))

    def idle_presets(self, names: Iterable[str]) -> list[str]:
        """Return the presets that select none of `names`.

        A head without a tensor of its own is the embedding, where that is selected.
        """
        kinds = {kind_of(name) for name in names if name in self}
        if "embed" in kinds:
            kinds.add("head")
        return [preset for preset in self.presets if preset not in kinds]

    def describe_idle(self, idle: Sequence[str], names: Sequence[str]) -> str:
        """Say which presets select none of `names`, what is there, and what to do."""
        kinds = Counter(kind_of(name) for name in names)
        present = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
        others = [name for name in names if kind_of(name) == "other"]
        unknown = [name for name in others if may_be_missed(name, idle)] or others
        shown = f" ({', '.join(list(dict.fromkeys(map(module_of, others)))[:8])})" if others else ""
        remedy = f"leave {' and '.join(idle)} out of modules"
        if self.layers is not None and any(one in ("embed", "head") for one in idle):
            remedy += ", or leave layers out, since embeddings and heads are in no layer"
        elif unknown:
            chosen = [*(one for one in self.modules if one not in idle), pattern_of(unknown)]
            remedy += f", or name what is meant by a pattern, such as modules={chosen}"
        elif "head" in idle:
            remedy += ", or add 'embed', which a tied head is one with"
        return (
            f"{' and '.join(idle)} selects none of these {len(names)} tensors, which are "
            f"{present}{shown}; {remedy}"
        )

    def named_by_pattern(self, name: str) -> bool:
        """Whether a pattern, and not only a preset, selects a tensor."""
        return bool(self._patterns) and name in self._of_patterns

    def __contains__(self, name: str) -> bool:
        found = parsed(name)
        if self.layers is not None and (
            found.layer is None or not any(found.layer in layers for layers in self.layers)
        ):
            return False
        if found.kind in self.modules or ("all" in self.modules and not found.is_other_modality):
            return True
        return any(one.search(bare(name)) or one.search(name) for one in self._patterns)

    @cached_property
    def _patterns(self) -> list[re.Pattern[str]]:
        return [re.compile(module[3:]) for module in self.modules if module.startswith("re:")]

    @cached_property
    def _of_patterns(self) -> Selection:
        return replace(self, modules=tuple(one for one in self.modules if one.startswith("re:")))

    def __str__(self) -> str:
        text = f"modules={','.join(self.modules)}"
        if self.layers is None:
            return text
        spans = (f"{r[0]}-{r[-1]}" if len(r) > 1 else str(r[0]) for r in self.layers)
        return f"{text} layers={','.join(spans)}"


def pattern_of(names: Iterable[str]) -> str:
    """Return a pattern that selects the modules of these tensors in every layer, the first few."""
    modules = list(dict.fromkeys(map(module_of, names)))[:8]
    return rf"re:\.({'|'.join(map(re.escape, modules))})(\.|$)"


def _split(item: str) -> list[str]:
    # A comma separates presets on the command line, but may be part of a pattern.
    return [item] if item.startswith("re:") else item.split(",")


def _parse_layers(layers: Layers) -> tuple[range, ...] | None:
    if layers is None:
        return None
    if isinstance(layers, int):
        layers = (layers,)
    spans = []
    if isinstance(layers, str):
        for part in layers.split(","):
            found = re.fullmatch(r"\s*(\d{1,18})\s*(?:-\s*(\d{1,18})\s*)?", part)
            if not found:
                raise ValueError(f"layers must look like '0-3,8', got {layers!r}")
            first, last = int(found[1]), int(found[2] or found[1])
            if last < first:
                raise ValueError(f"the range of layers {part.strip()!r} runs backwards")
            spans.append(range(first, last + 1))
    elif isinstance(layers, range):
        spans = [layers] if len(layers) else []
        if spans and min(layers[0], layers[-1]) < 0:
            raise ValueError(f"a layer must be a non-negative integer, got {layers!r}")
    else:
        for layer in layers:
            if isinstance(layer, bool) or not isinstance(layer, int) or layer < 0:
                raise ValueError(f"a layer must be a non-negative integer, got {layer!r}")
            spans.append(range(layer, layer + 1))
    if not spans:
        raise ValueError("layers is empty; leave it out for every layer")
    return tuple(spans)
