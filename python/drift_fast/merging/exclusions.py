"""Why a tensor is not merged although it is selected and matched: buffers and routers."""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Iterable
from itertools import accumulate

from drift_fast.alignment.model_pair import AlignedPair
from drift_fast.alignment.name_alignment import Pair
from drift_fast.errors import DriftWarning
from drift_fast.merging.method_options import REST
from drift_fast.names import kind_of

# Integers and booleans, as the format names them.
_WHOLE = re.compile(r"[IU]\d+|BOOL")
_POSITIONS = ("inv_freq", "original_inv_freq")

LEFT_OUT_AS_TIED = "left out: tied by the configuration to the embedding, which is merged"


def why_a_buffer(pair: Pair, aligned: AlignedPair) -> str:
    """Return why a pair is not a weight, or nothing; a pattern that names it overrides this."""
    name = pair.name
    if aligned.selection.named_by_pattern(name):
        return ""
    if name.rpartition(".")[2] in _POSITIONS:
        return "a buffer of position frequencies, not a weight"
    stored = [
        aligned.multimodal.dtypes[name],
        *(aligned.reasoning.dtypes[source] for source in pair.sources),
    ]
    whole = next((dtype for dtype in stored if _WHOLE.fullmatch(dtype)), None)
    return "" if whole is None else f"a buffer of {whole}, not a weight"


def _modules_around(name: str) -> Iterable[str]:
    return accumulate(name.split(".")[:-1], "{}.{}".format)


def warn_of_routers(merged: Collection[str], names: Collection[str]) -> None:
    """Warn of routers that stay the multimodal model's while the experts they choose are merged."""
    blocks = {name.partition(".experts.")[0] for name in merged if ".experts." in name}
    routers = [
        name
        for name in names
        if name not in merged
        and kind_of(name) == "other"
        and any(module in blocks for module in _modules_around(name))
    ]
    if routers:
        warnings.warn(
            f"{len(routers)} tensors that choose among experts stay the multimodal model's while "
            f"those experts are merged: {', '.join(routers[:8])}"
            f"{f' and {len(routers) - 8} more' if len(routers) > 8 else ''}. Merge them too with "
            "modules=[…] and a pattern such as r're:\\.(gate|router)\\.', and, if weight is a "
            f"mapping, a number for {REST!r}",
            DriftWarning,
            stacklevel=5,
        )
