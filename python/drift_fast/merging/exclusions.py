"""Why a tensor is not merged although it is selected and matched: buffers, tied heads, routers."""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path

from drift_fast._core import Checkpoint
from drift_fast.alignment.embeddings import TIED
from drift_fast.alignment.model_pair import AlignedPair
from drift_fast.alignment.name_alignment import Pair
from drift_fast.checkpoints.opened import Opened
from drift_fast.errors import CheckpointError, DriftWarning
from drift_fast.merging.method_options import REST
from drift_fast.names import kind_of
from drift_fast.selection import Selection

# Integers and booleans, as the format names them.
_WHOLE = re.compile(r"[IU]\d+|BOOL")
_POSITIONS = ("inv_freq", "original_inv_freq")
_COMPARED_NBYTES = 8 << 20

LEFT_OUT_AS_TIED = "left out: tied by the configuration to the embedding, which is merged"


def why_a_buffer(pair: Pair, aligned: AlignedPair) -> str:
    """Return why a pair is not a weight, or nothing; a pattern that names it overrides this."""
    name = pair.name
    patterns = [one for one in aligned.selection.modules if one.startswith("re:")]
    if any(name in Selection((one,), None) for one in patterns):
        return ""
    if name.rpartition(".")[2] in _POSITIONS:
        return "a buffer of position frequencies, not a weight"
    stored = [
        aligned.multimodal.dtypes[name],
        *(aligned.reasoning.dtypes[source] for source in pair.sources),
    ]
    whole = next((dtype for dtype in stored if _WHOLE.fullmatch(dtype)), None)
    return "" if whole is None else f"a buffer of {whole}, not a weight"


def warn_of_routers(merged: Collection[str], names: Collection[str]) -> None:
    """Warn of routers that stay the multimodal model's while the experts they choose are merged."""
    blocks = {name.partition(".experts.")[0] for name in merged if ".experts." in name}
    routers = [
        name
        for name in names
        if name not in merged
        and kind_of(name) == "other"
        and any(name.startswith(f"{block}.") for block in blocks)
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


def tied_heads(
    reasons: Mapping[str, str], merged: Collection[str], multimodal: Opened
) -> dict[str, str]:
    """Return each stored head that is tied to a merged embedding, with that embedding."""
    shapes = {name: tuple(shape) for name, _, shape, _ in multimodal.checkpoint.tensors()}
    embeddings = [name for name in merged if kind_of(name) == "embed"]
    return {
        head: embedding
        for head, reason in reasons.items()
        if reason == TIED and head in shapes
        for embedding in embeddings
        if shapes[head] == shapes[embedding]
    }


def check_tied(tied: Mapping[str, str], multimodal: Opened) -> None:
    """Refuse a head that the configuration ties to an embedding which it differs from.

    Raises:
        CheckpointError: a head differs.
    """
    for head, embedding in tied.items():
        if not _equal(multimodal.checkpoint, head, embedding):
            raise CheckpointError(
                f"{multimodal.source.path}: the configuration ties {head} to {embedding}, but "
                "they differ; set tie_word_embeddings to false in config.json to merge both, or "
                "leave the embedding as it is with modules=('attn', 'mlp', 'norm')"
            )


def _equal(checkpoint: Checkpoint, first: str, second: str) -> bool:
    """Whether two tensors of a checkpoint have the same dtype and bytes."""
    dtypes = {name: dtype for name, dtype, *_ in checkpoint.tensors()}
    if dtypes[first] != dtypes[second]:
        return False
    places = [checkpoint.place(name) for name in (first, second)]
    with contextlib.ExitStack() as stack:
        files = []
        for path, start, _ in places:
            files.append(stack.enter_context(Path(path).open("rb")))
            files[-1].seek(start)
        rest = places[0][2] - places[0][1]
        while rest:
            a, b = (file.read(min(rest, _COMPARED_NBYTES)) for file in files)
            if a != b or not a:
                return False
            rest -= len(a)
    return True
