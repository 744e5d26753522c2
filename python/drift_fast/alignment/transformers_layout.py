"""Ask transformers how the tensors on disk become the parameters in memory.

transformers 5 converts while it loads: it renames, fuses, splits and transposes by tables of its
own. Owns calling that machinery on layouts in place of tensors, so that each parameter is known as
blocks of stored tensors and nothing is loaded. What cannot be followed, such as an operation that
mixes elements, gives no answer in place of a guess; `fused` then uses names and shapes.
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any

from drift_fast.alignment.fused import canonical
from drift_fast.alignment.layout import Layout
from drift_fast.checkpoints.config_json import read_entries
from drift_fast.shapes import Shape

if TYPE_CHECKING:
    from torch import nn

logger = logging.getLogger(__name__)


class _Traced(Layout):
    """A layout that answers to the tensor operations that a conversion uses."""

    @classmethod
    def __torch_function__(
        cls,
        function: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        operation = getattr(cls, f"_{function.__name__}", None)
        if operation is None:
            raise TypeError(f"{function.__name__} cannot be followed on a layout")
        return operation(*args, **(kwargs or {}))

    @classmethod
    def _stack(cls, tensors: Sequence[Layout], dim: int = 0) -> Layout:
        return cls.stacked(tensors, dim)

    @classmethod
    def _cat(cls, tensors: Sequence[Layout], dim: int = 0) -> Layout:
        return cls.concatenated(tensors, dim)

    @classmethod
    def _transpose(cls, tensor: Layout, dim0: int, dim1: int) -> Layout:
        return tensor.transposed(dim0, dim1)

    @classmethod
    def _chunk(cls, tensor: Layout, chunks: int, dim: int = 0) -> tuple[Layout, ...]:
        size = -(-tensor.shape[dim] // chunks)
        return cls._split(tensor, size, dim)

    @classmethod
    def _split(cls, tensor: Layout, sizes: int | Sequence[int], dim: int = 0) -> tuple[Layout, ...]:
        extent = tensor.shape[dim]
        if isinstance(sizes, int):
            sizes = [min(sizes, extent - first) for first in range(0, extent, sizes)]
        parts, first = [], 0
        for size in sizes:
            parts.append(tensor.narrowed(dim, first, size))
            first += size
        return tuple(parts)

    def contiguous(self) -> Layout:
        """Return the layout itself: it says where elements are, not how memory is ordered."""
        return self

    def squeeze(self, dim: int) -> Layout:
        """Drop a dimension of size one, as a tensor does."""
        return self.squeezed(dim) if self.shape[dim] == 1 else self

    def size(self, dim: int) -> int:
        """Return the size of one dimension."""
        return self.shape[dim]


def convert(model: nn.Module, tensors: Mapping[str, Shape]) -> dict[str, Layout] | None:
    """Return each of the model's parameters as blocks of the tensors of its checkpoint.

    Names are those of the model without wrappers. None if transformers has no such machinery
    (before 5.0), the model is not one of its own, or a conversion cannot be followed. Stored
    tensors that do not become a parameter keep their names.
    """
    if "transformers" not in sys.modules:
        # A model of transformers would have brought it along.
        return None
    from transformers import PreTrainedModel

    # The largest of several models side by side; a whole model comes before its parts.
    inner = max(
        (one for one in model.modules() if isinstance(one, PreTrainedModel)),
        key=lambda one: sum(parameter.numel() for parameter in one.parameters()),
        default=None,
    )
    # Wrappers and sharding change a model's class and names, so an unwrapped copy is asked.
    kind = next(
        (c for c in type(inner).__mro__ if c.__module__.startswith("transformers.models.")), None
    )
    if inner is None or kind is None:
        return None
    return _attempt(lambda: _trace(_without_memory(kind, inner.config), tensors))


def convert_checkpoint(directory: Path, tensors: Mapping[str, Shape]) -> dict[str, Layout] | None:
    """Return what `convert` does, for a checkpoint on disk and the model that its config names.

    The model is built from `config.json` without memory for weights. A config is untrusted: what
    would lead to code, kernels or other models is removed, and a model with more modules than the
    checkpoint has tensors is not built.

    Raises:
        CheckpointError: a config.json that is not a JSON object.
    """
    stated = read_entries(directory)
    if stated is None:
        return None
    entries = _own(stated)
    excess = _excess(entries, max(1024, len(tensors)))
    if excess:
        logger.info("%s: no model is made from its config.json: %s", directory, excess)
        return None

    def follow() -> dict[str, Layout] | None:
        import transformers
        import transformers.conversion_mapping  # before a model is built for nothing

        config = transformers.CONFIG_MAPPING[entries["model_type"]].from_dict(entries)
        kind = getattr(transformers, (config.architectures or [""])[0], None)
        if (
            not isinstance(kind, type)
            or not kind.__module__.startswith("transformers.models.")
            or not issubclass(kind, transformers.PreTrainedModel)
        ):
            logger.info("%s names no architecture of transformers", directory)
            return None
        return _trace(_without_memory(kind, config), tensors)

    return _attempt(follow)


# What makes transformers look for code, kernels, weights or other models outside of itself.
_FOREIGN = re.compile(
    r"auto_map|trust_remote_code|.*backbone.*|.*attn_implementation.*|experts_implementation"
    r"|quantization_config|compression_config|_name_or_path|.*kernel_config"
)
_COUNT = re.compile(r"layer|depth|expert|block|stage|head")


def _own(entries: Any) -> Any:
    """Return a config's entries without those that lead outside of transformers."""
    if isinstance(entries, dict):
        return {key: _own(value) for key, value in entries.items() if not _FOREIGN.fullmatch(key)}
    if isinstance(entries, list):
        return [_own(value) for value in entries]
    return entries


def _excess(entries: object, most: int) -> str:
    """Return which count of modules is larger than the checkpoint can hold, or nothing."""
    pending = [("", entries)]
    while pending:
        key, value = pending.pop()
        if isinstance(value, dict):
            pending += value.items()
        elif isinstance(value, list):
            pending += [(key, item) for item in value]
        elif isinstance(value, int | float) and _COUNT.search(key) and value > most:
            return f"{key} of {value} is more than the checkpoint can hold"
    return ""


def _attempt(follow: Callable[[], dict[str, Layout] | None]) -> dict[str, Layout] | None:
    """Return None on any error: the machinery is private and a config is untrusted."""
    try:
        return follow()
    except ImportError as error:
        logger.info("transformers cannot be asked for its conversions: %s", error)
    except Exception as error:
        logger.info("transformers' conversion could not be followed: %s", error)
    return None


def _without_memory(kind: type, config: Any) -> Any:
    import torch

    with torch.device("meta"):
        return kind(config)


def _trace(model: Any, tensors: Mapping[str, Shape]) -> dict[str, Layout] | None:
    """Follow the loading of a state dict, in the order of transformers."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        dot_natural_key,
        rename_source_key,
    )

    transforms = get_model_conversion_mapping(model)
    renamings = [one for one in transforms if isinstance(one, WeightRenaming)]
    converters = [one for one in transforms if isinstance(one, WeightConverter)]
    by_pattern = {pattern: one for one in converters for pattern in one.source_patterns}
    parameters = model.state_dict()
    layouts: dict[str, Layout] = {}
    pending: dict[str, Any] = {}
    for name in sorted(tensors, key=dot_natural_key):
        renamed, pattern = rename_source_key(
            name, renamings, converters, model.base_model_prefix, parameters
        )
        if renamed not in parameters and name in parameters:
            renamed, pattern = name, None
        stored = _Traced.stored(name, tensors[name])
        if pattern is None:
            layouts[renamed] = stored
            continue
        if renamed not in pending:
            pending[renamed] = deepcopy(by_pattern[pattern])
        pending[renamed].add_tensor(renamed, name, pattern, stored)
    for renamed, converter in pending.items():
        made = converter.convert(renamed, model=model, config=model.config)
        for target, value in made.items():
            layouts[target] = value[0] if isinstance(value, list) else value
    wrong = next(
        (n for n, made in layouts.items() if n in parameters and made.shape != parameters[n].shape),
        None,
    )
    if wrong is not None:
        logger.info("%s would not have its shape after conversion", wrong)
        return None
    return layouts if _oriented_alike(layouts, tensors) else None


def _oriented_alike(layouts: Mapping[str, Layout], tensors: Mapping[str, Shape]) -> bool:
    """Whether experts are transposed as their shapes show.

    Transformers decides by the shape of one weight whether it is stored transposed. A square one
    does not show that; together with the other weight of its experts it does.
    """
    stored = {name: Layout.stored(name, shape) for name, shape in tensors.items()}
    expected = {
        layout.sources[0]: layout.blocks[0].strides
        for layout in canonical(stored, ()).values()
        if len(layout.shape) == 3 and len(layout.blocks) == 1
    }
    for layout in layouts.values():
        block = layout.blocks[0]
        if len(layout.blocks) == 1 and expected.get(block.source, block.strides) != block.strides:
            logger.info("%s is stored transposed, but would be loaded as it is", block.source)
            return False
    return True
