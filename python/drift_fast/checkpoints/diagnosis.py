"""What a directory is that does not open as a checkpoint, and what to do about it.

Owns one table, `KINDS`, of functions that recognize a kind by the names of its files and say what
helps. The first that does so counts, so what explains the others comes before them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path

from drift_fast.checkpoints.place import FOLDERS_LIMIT, INDEX, SHARD, SINGLE, Place
from drift_fast.config_files import JsonFile, printable
from drift_fast.errors import CheckpointError

CONVERT = (
    "a pickled checkpoint is never loaded, since unpickling runs code: convert it to safetensors "
    "(load it once where you trust it and call model.save_pretrained(directory, "
    "safe_serialization=True))"
)
PICKLE = re.compile(r"\.(bin|pt|pth|ckpt|pkl)(\.index\.json)?\Z")
_STEP = re.compile(r"checkpoint-(\d{1,18})")
# What trainers save beside the weights.
_STATE = re.compile(r"(training_args|optimizer|scheduler|scaler|rng_state|random_states|trainer_s)")
_OTHER_FORMATS = {
    ".gguf": "GGUF",
    ".ggml": "GGML",
    ".onnx": "ONNX",
    ".h5": "TensorFlow's",
    ".msgpack": "Flax's",
    ".npz": "MLX's or NumPy's",
    ".tflite": "TensorFlow Lite's",
}


class NoDelta(FileNotFoundError):
    """Something else is where a delta was asked for."""


def explain_no_delta(place: Place) -> NoDelta:
    """Return the error for a place without a delta."""
    if place.holds_checkpoint:
        told = (
            "there is no drift.json: this is a model, not a delta; compute_delta(reasoning, "
            "multimodal, out) writes the Δ of two models"
        )
    else:
        told = (
            "not a delta: expected a directory with drift.json, which compute_delta(reasoning, "
            f"multimodal, out) writes, found {_listed(place.files) if place.files else 'nothing'}"
        )
    return NoDelta(f"{place.called}: {told}")


def explain(place: Place) -> CheckpointError | FileNotFoundError:
    """Return the error for a place that does not open: what it is, and what helps."""
    for kind in KINDS:
        told = kind(place)
        if told is not None:
            return CheckpointError(f"{place.called}: {told}")
    names = [*place.files, *(f"{name}/" for name in place.folders)]
    found = _listed(names) if names else "nothing"
    return FileNotFoundError(
        f"{place.called}: expected {SINGLE} or {INDEX} in the directory, found {found}"
    )


def _listed(names: Sequence[str], limit: int = 8) -> str:
    # A file's name has 255 bytes at most, a path 4,096.
    shown = ", ".join(printable(name, 4096) for name in names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit:,} more"


# ------------------------------------------------------------------ the kinds


def _delta(place: Place) -> str | None:
    if "drift.json" in place.files:
        return "this is a delta, not a checkpoint; Delta.open reads it"
    return None


def _broken_link(place: Place) -> str | None:
    for name in (SINGLE, INDEX):
        if place.path is not None and name in place.files and (place.path / name).is_symlink():
            return (
                f"{name} is a link to {(place.path / name).readlink()}, which is not there; copy "
                "the directory again with `cp -rL`, which copies what links lead to, or download it"
            )
    return None


def _hub_entry(place: Place) -> str | None:
    if "snapshots" not in place.folders:
        return None
    snapshots = place.inside("snapshots")
    chosen = None if place.path is None else _main_of(place.path)
    if chosen not in snapshots.folders:
        chosen = next(iter(snapshots.opening(snapshots.folders) or snapshots.folders), None)
    if chosen is None:
        return "this is an entry of the Hub's cache without a snapshot; download the model again"
    return (
        "this is the root of an entry of the Hub's cache, which holds a directory for each commit; "
        f"{place.give('snapshots', chosen)}"
    )


def _main_of(entry: Path) -> str | None:
    """Return the commit that the main branch is at, as the cache notes it."""
    ref = entry / "refs" / "main"
    try:
        if not ref.is_file():
            return None
        with ref.open("rb") as file:
            return file.read(100).decode().strip()
    except (OSError, ValueError):
        return None


def _hub_cache(place: Place) -> str | None:
    models = [name for name in place.folders if name.startswith("models--")]
    if not models:
        return None
    ids = [name.removeprefix("models--").replace("--", "/") for name in models]
    return (
        f"this is a cache of the Hub; give the id of a model in it ({_listed(ids, 4)}) or its "
        "snapshot, a directory below models--…/snapshots"
    )


def _adapter(place: Place) -> str | None:
    if "adapter_config.json" not in place.files and not any(
        name.startswith("adapter_model.") for name in place.files
    ):
        return None
    base = ""
    if place.path is not None:
        try:
            stated = JsonFile(place.path / "adapter_config.json", 1_000_000, "").read(dict)
            base = str(stated.get("base_model_name_or_path") or "")
        except (OSError, CheckpointError):
            base = ""
    named = f" ({printable(base, 200)})" if base else ""
    return (
        "this is an adapter of PEFT (LoRA or another), not a model: merge it into the model that "
        f"it was trained on{named} and give the result. With that model loaded as `base`: "
        f"PeftModel.from_pretrained(base, {place.called!r}).merge_and_unload()"
        ".save_pretrained('merged')"
    )


def _pipeline(place: Place) -> str | None:
    if "model_index.json" not in place.files:
        return None
    models = place.opening(place.folders)
    told = "this is a pipeline of diffusers, which keeps each model in a folder of its own"
    if not models:
        return f"{told}; none of them is a language model in safetensors"
    return f"{told}; {place.give(models[0])}" + (
        f", or one of {_listed(models[1:])}" if models[1:] else ""
    )


def _runs(place: Place) -> str | None:
    steps = sorted(
        ((int(found[1]), name) for name in place.folders if (found := _STEP.fullmatch(name))),
        reverse=True,
    )
    if not steps:
        return None
    told = "this is the output of a Trainer, which has its checkpoints in folders"
    models = place.opening(name for _, name in steps)
    if models:
        return f"{told}, of which this is the last with weights; {place.give(models[0])}"
    newest = place.inside(steps[0][1])
    return f"{told}. The last one does not open either: {explain(newest)}"


def _fsdp(place: Place) -> str | None:
    folders = [name for name in place.folders if name.startswith("pytorch_model_fsdp_")]
    here = bool(place.with_ending(".distcp"))
    if not here and not folders:
        some = islice(place.folders, FOLDERS_LIMIT)
        folders = [name for name in some if place.inside(name).with_ending(".distcp")][:1]
    if not here and not folders:
        return None
    return (
        "these are the sharded weights of FSDP (.distcp), one file for each process; join them "
        f"with `accelerate merge-weights {place.quoted('' if here else folders[0])} merged`, copy "
        "config.json into merged, and give that"
    )


def _zero(place: Place) -> str | None:
    steps = [name for name in place.folders if re.fullmatch(r"global_step\d+", name)]
    has_script = "zero_to_fp32.py" in place.files
    if not has_script and not steps:
        return None
    if not steps:
        return (
            "this is what is left of a checkpoint of DeepSpeed: its global_step folder, which has "
            "the weights, is missing; copy it here or take another checkpoint"
        )
    script = place.quoted("zero_to_fp32.py") if has_script else "DeepSpeed's zero_to_fp32.py"
    return (
        "these are the weights of DeepSpeed ZeRO, sharded over processes; join them with "
        f"`python {script} {place.quoted()} merged --safe_serialization`, copy config.json into "
        "merged, and give that"
    )


def _verl(place: Place) -> str | None:
    steps = [name for name in place.folders if re.fullmatch(r"global_step_\d{1,18}", name)]
    if steps:
        place = place.inside(max(steps, key=lambda name: int(name.rpartition("_")[2])))
    if "actor" in place.folders:
        place = place.inside("actor")
    if not any(re.fullmatch(r"model_world_size_\d+_rank_\d+\.pt", name) for name in place.files):
        return None
    told = "these are the sharded weights of verl, one file for each process"
    if "huggingface" in place.folders and place.inside("huggingface").opens:
        return f"{told}; {place.give('huggingface')}"
    return (
        f"{told}; join them with `python -m verl.model_merger merge --backend fsdp --local_dir "
        f"{place.quoted()} --target_dir merged` and give merged"
    )


def _megatron(place: Place) -> str | None:
    if "latest_checkpointed_iteration.txt" not in place.files and not any(
        name.startswith("mp_rank_") for name in place.folders
    ):
        return None
    return (
        "this is a checkpoint of Megatron, whose weights are split over processes; convert it to "
        "the format of transformers (Megatron-Bridge, or `swift export --to_hf true`) and give that"
    )


def _other_index(place: Place) -> str | None:
    found = place.with_ending(".safetensors.index.json")
    if not found or INDEX in found:
        return None
    return (
        f"there is no {INDEX}, but another index; give the index itself: "
        f"{_listed([str(Path(place.called) / name) for name in found], 4)}"
    )


def _shards(place: Place) -> str | None:
    if not place.series:
        return None
    if len(place.series) > 1:
        stems = [f"{stem}-*-of-{count}" for stem, count in place.series]
        return (
            f"the index is missing that says which shards are the model: there are {_listed(stems)}"
            f"; download {INDEX}"
        )
    (stem, count), numbers = next(iter(place.series.items()))
    expected = range(0 if 0 in numbers else 1, (0 if 0 in numbers else 1) + count)
    missing = [number for number in islice(expected, 10_000) if number not in set(numbers)]
    width = len(next(match for name in place.files if (match := SHARD.fullmatch(name)))["number"])
    names = [f"{stem}-{n:0{width}}-of-{count:0{width}}.safetensors" for n in missing]
    if not names:
        return "the index is missing; download the shards, which are read without it from a disk"
    return (
        f"the index is missing, and of {count:,} shards {len(missing):,} are not here: "
        f"{_listed(names, 4)}; download the rest"
    )


def _cut_off(place: Place) -> str | None:
    endings = (".incomplete", ".aria2", ".part", ".crdownload", ".download")
    found = place.with_ending(*endings)
    at = place
    for name in (".cache", "huggingface", "download"):
        if found or name not in at.folders:
            break
        at = at.inside(name)
        found = at.with_ending(*endings)
    if not found:
        return None
    return (
        f"a download was cut off ({_listed(found, 2)}), and no weights are whole; run the download "
        "again, which goes on where it stopped"
    )


def _other_file(place: Place) -> str | None:
    found = place.with_ending(".safetensors")
    if not found:
        return None
    paths = [str(Path(place.called) / name) for name in found]
    told = f"there is no {SINGLE}; "
    if place.path is None:
        return f"{told}download one of {_listed(found)} and give the file itself"
    if len(found) == 1:
        return f"{told}give the file itself: {paths[0]}"
    return f"{told}give the file itself that holds the model: {_listed(paths, 4)}"


def _pickled(place: Place) -> str | None:
    found = [name for name in place.files if PICKLE.search(name) and not _STATE.match(name)]
    return f"found no safetensors among {_listed(place.files)}: {CONVERT}" if found else None


def _other_format(place: Place) -> str | None:
    for ending, owner in _OTHER_FORMATS.items():
        if place.with_ending(ending):
            return (
                f"the weights are in {owner} format, which is not read; give the unquantized "
                "safetensors checkpoint that they were made from"
            )
    return None


def _folder(place: Place) -> str | None:
    folders = list(place.folders)
    for _ in range(2):
        models = place.opening(folders)
        if models:
            return f"the weights are not here but in a folder; {place.give(models[0])}" + (
                f", or one of {_listed(models[1:], 4)}" if models[1:] else ""
            )
        some = folders[:FOLDERS_LIMIT]
        folders = [f"{one}/{inner}" for one in some for inner in place.below(one).folders]
    return None


def _no_weights(place: Place) -> str | None:
    state = [name for name in place.files if _STATE.match(name)]
    told = None
    if state and "config.json" not in place.files:
        told = f"there are no weights but the state of a training run ({_listed(state, 4)})"
    elif "config.json" in place.files or "tokenizer.json" in place.files:
        told = "there is a configuration but there are no weights"
    return told and (
        f"{told}: expected {SINGLE} or {INDEX}; download or copy the model with its weights"
    )


KINDS: tuple[Callable[[Place], str | None], ...] = (
    _delta,
    _broken_link,
    _hub_entry,
    _hub_cache,
    _adapter,
    _pipeline,
    _runs,
    _fsdp,
    _zero,
    _verl,
    _megatron,
    _other_index,
    _shards,
    _other_file,
    _cut_off,
    _other_format,
    _pickled,
    _folder,
    _no_weights,
)
