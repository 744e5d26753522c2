"""A directory that does not open says what it is, and what the message advises works."""

from __future__ import annotations

import errno
import importlib.util
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import drift_fast
from drift_fast import CheckpointError, check, compute_delta, inspect, merge
from drift_fast.checkpoints.diagnosis import explain
from drift_fast.checkpoints.place import Place
from support.processes import python
from support.synthetic import (
    Stored,
    language_model,
    opaque,
    refused,
    stored,
    write_checkpoint,
    write_file,
    write_index,
)

WEIGHT = "model.layers.0.self_attn.q_proj.weight"
OTHER = "model.layers.0.self_attn.k_proj.weight"
TENSORS = {WEIGHT: stored(np.ones((4, 4)))}
Build = Callable[[Path], object]


@pytest.fixture
def sound(tmp_path: Path) -> Path:
    return write_file(tmp_path / "sound.safetensors", {WEIGHT: stored(np.full((4, 4), 2.0))})


def touch(*names: str) -> Build:
    """Return a function that makes empty files; a name that ends in a slash is a folder."""

    def build(directory: Path) -> None:
        for name in names:
            path = directory / name
            (path if name.endswith("/") else path.parent).mkdir(parents=True, exist_ok=True)
            if not name.endswith("/"):
                path.write_bytes(b"x")

    return build


def model_in(*names: str, beside: tuple[str, ...] = ()) -> Build:
    """Return a function that writes a small model to each of the files, and empty ones."""

    def build(directory: Path) -> None:
        for name in names:
            write_file(directory / name, TENSORS)
        touch(*beside)(directory)

    return build


def cache_entry(directory: Path) -> None:
    """Write an entry of the Hub's cache with two commits, the second of which is main."""
    for commit in ("a1", "b2", "c3"):
        (directory / "snapshots" / commit).mkdir(parents=True)
    model_in("model.safetensors")(directory / "snapshots" / "a1")
    model_in("model.safetensors")(directory / "snapshots" / "b2")
    (directory / "refs").mkdir()
    (directory / "refs" / "main").write_text("b2\n")


def cache_entry_without_main(directory: Path) -> None:
    cache_entry(directory)
    (directory / "refs" / "main").write_text("../../../etc")


def other_index(directory: Path) -> None:
    path = write_index(directory, dict.fromkeys(TENSORS, "part.safetensors"))
    path.rename(directory / "model.safetensors.fp16.safetensors.index.json")
    model_in("part.safetensors")(directory)


# What is there, what the message has to say, and whether it names a path that opens.
SITUATIONS: dict[str, tuple[Build, list[str], bool]] = {
    "hub-entry": (cache_entry, ["Hub's cache", "give snapshots/b2"], True),
    "hub-entry-odd-main": (cache_entry_without_main, ["give snapshots/a1"], True),
    "hub-cache": (
        touch("models--org--name/snapshots/a1/config.json", "models--b--c/refs/"),
        ["cache of the Hub", "b/c, org/name"],
        False,
    ),
    "hub-entry-empty": (touch("snapshots/", "blobs/x"), ["without a snapshot", "download"], False),
    "trainer": (
        model_in(
            "checkpoint-9/model.safetensors",
            "checkpoint-10/model.safetensors",
            beside=("checkpoint-100/optimizer.pt", "training_args.bin", "runs/x"),
        ),
        ["Trainer", "give checkpoint-10"],
        True,
    ),
    "trainer-of-adapters": (
        touch("checkpoint-10/adapter_model.safetensors", "checkpoint-10/trainer_state.json"),
        ["Trainer", "checkpoint-10: this is an adapter", "merge_and_unload"],
        False,
    ),
    "trainer-under-zero-3": (
        touch("checkpoint-10/global_step10/x_model_states.pt", "checkpoint-10/zero_to_fp32.py"),
        ["Trainer", "zero_to_fp32.py", "--safe_serialization"],
        False,
    ),
    "fsdp": (
        touch("pytorch_model_fsdp_0/__0_0.distcp", "optimizer_0/__0_0.distcp", "rng_state_0.pth"),
        ["FSDP", "accelerate merge-weights", "pytorch_model_fsdp_0' merged"],
        False,
    ),
    "fsdp-inside": (touch("__0_0.distcp", ".metadata"), ["FSDP", "merge-weights"], False),
    "zero": (
        touch("zero_to_fp32.py", "latest", "global_step7/mp_rank_00_model_states.pt"),
        ["ZeRO", "zero_to_fp32.py", "merged --safe_serialization"],
        False,
    ),
    "zero-weights-removed": (touch("zero_to_fp32.py", "latest"), ["global_step", "missing"], False),
    "verl": (
        touch("global_step_9/actor/x", "global_step_10/actor/model_world_size_2_rank_0.pt"),
        ["verl.model_merger", "global_step_10/actor", "--target_dir merged"],
        False,
    ),
    "verl-with-model": (
        model_in(
            "actor/huggingface/model.safetensors",
            beside=("actor/model_world_size_1_rank_0.pt", "critic/x"),
        ),
        ["verl", "give huggingface"],
        True,
    ),
    "megatron": (
        touch("latest_checkpointed_iteration.txt", "iter_0000010/mp_rank_00/model.pt"),
        ["Megatron", "convert"],
        False,
    ),
    "adapter-with-state": (
        touch("adapter_config.json", "adapter_model.bin", "checkpoint-3/adapter_config.json"),
        ["PEFT", "merge_and_unload"],
        False,
    ),
    "diffusers": (
        model_in("text_encoder/model.safetensors", beside=("model_index.json", "unet/x.bin")),
        ["diffusers", "give text_encoder"],
        True,
    ),
    "folder": (
        model_in("Model-7B/model.safetensors", beside=("README.md", "figures/a.png")),
        ["not here but in a folder", "give Model-7B"],
        True,
    ),
    "folder-in-a-folder": (
        model_in("actor/global_step_100/model.safetensors", beside=("README.md",)),
        ["give actor/global_step_100"],
        True,
    ),
    "folder-of-shards": (
        model_in("llm/model-00001-of-00001.safetensors"),
        ["give llm"],
        True,
    ),
    "other-index": (other_index, ["another index", "give the index itself"], True),
    "consolidated": (
        model_in("consolidated.safetensors", beside=("params.json", "tekken.json")),
        ["give the file itself"],
        True,
    ),
    "variant": (model_in("model.fp16.safetensors"), ["give the file itself"], True),
    "several-files": (
        model_in("a.safetensors", "b.safetensors"),
        ["that holds the model", "a.safetensors", "b.safetensors"],
        False,
    ),
    "shards-missing": (
        model_in("model-00001-of-00003.safetensors", "model-00003-of-00003.safetensors"),
        ["index is missing", "of 3 shards 1 are not here", "model-00002-of-00003.safetensors"],
        False,
    ),
    "two-sets-of-shards": (
        model_in("a-00001-of-00001.safetensors", "b-00001-of-00001.safetensors"),
        ["which shards are the model", "download"],
        False,
    ),
    "cut-off": (
        touch("config.json", ".cache/huggingface/download/model.safetensors.1a.incomplete"),
        ["cut off", "run the download again"],
        False,
    ),
    "cut-off-by-aria2": (touch("model.safetensors.aria2"), ["cut off"], False),
    "gguf": (touch("model-Q4_K_M.gguf", "config.json"), ["GGUF", "not read", "unquant"], False),
    "flax": (touch("flax_model.msgpack"), ["Flax", "safetensors"], False),
    "training-state": (touch("optimizer.pt", "training_args.bin"), ["state of a training"], False),
    "configuration": (touch("config.json", "tokenizer.json"), ["no weights", "download"], False),
    "delta": (
        touch("drift.json", "delta.safetensors.index.json"),
        ["a delta", "Delta.open"],
        False,
    ),
}


@pytest.mark.parametrize("situation", SITUATIONS)
def test_what_a_directory_is_and_what_helps(tmp_path: Path, sound: Path, situation: str) -> None:
    build, words, opens = SITUATIONS[situation]
    directory = tmp_path / "a directory"
    directory.mkdir()
    build(directory)
    with pytest.raises(CheckpointError) as caught:
        inspect(directory, sound)
    message = str(caught.value)
    assert message.startswith(f"{directory}: ")
    assert [word for word in words if word not in message] == [], message
    if opens:
        # The path stands at the end, or before what else might be given.
        advised = re.search(rf": ({re.escape(str(directory))}/[^,]+?)(, or |$)", message)
        assert advised is not None, message
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("warnings.warn", lambda *_, **__: None)
            assert len(inspect(advised[1], sound).stats) == 1


def test_every_verb_says_it(tmp_path: Path, sound: Path) -> None:
    directory = tmp_path / "output"
    touch("checkpoint-10/adapter_config.json")(directory)
    sources = (directory, sound)
    for verb in (
        lambda: compute_delta(*sources),
        lambda: inspect(*sources),
        lambda: check(*sources),
        lambda: drift_fast.align(*sources),
        lambda: drift_fast.plan(*sources, steps=1),
        lambda: merge("linear", *sources, tmp_path / "merged", weight=0.5),
        lambda: merge("linear", sound, directory, tmp_path / "merged", weight=0.5),
    ):
        with refused(CheckpointError, "merge_and_unload"):
            verb()  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("file", ["", "delta*.safetensors", "delta.safetensors.index.json"])
def test_no_verb_takes_a_delta_for_a_model(tmp_path: Path, sound: Path, file: str) -> None:
    other = write_file(tmp_path / "other.safetensors", {WEIGHT: stored(np.full((4, 4), 3.0))})
    delta = whole = compute_delta(sound, other, tmp_path / "delta").path
    if file:
        (delta,) = whole.glob(file)
    for verb in (
        lambda: compute_delta(delta, other),
        lambda: compute_delta(sound, delta),
        lambda: inspect(sound, delta),
        lambda: check(delta, other),
        lambda: drift_fast.align(delta, other),
        lambda: drift_fast.plan(delta, other, steps=1),
        lambda: merge("linear", sound, delta, tmp_path / "merged", weight=0.5),
        lambda: merge("task_arithmetic", sound, other, tmp_path / "merged", base=delta),
    ):
        with refused(CheckpointError, "a delta, not a checkpoint", str(whole)):
            verb()  # type: ignore[no-untyped-call]


def test_an_object_is_no_path(tmp_path: Path, sound: Path) -> None:
    other = write_file(tmp_path / "other.safetensors", {WEIGHT: stored(np.full((4, 4), 3.0))})
    delta = compute_delta(sound, other)
    combined: Any = drift_fast.combine({delta: 0.5})
    for verb in (
        lambda: compute_delta(delta, other),  # type: ignore[arg-type]
        lambda: check(delta, other),  # type: ignore[arg-type]
        lambda: merge("task_arithmetic", combined, other, tmp_path / "merged"),
    ):
        with refused(TypeError, "expected a path, Hub id or URL", ".save(path)"):
            verb()  # type: ignore[no-untyped-call]


def test_what_is_not_recognized_is_listed(tmp_path: Path, sound: Path) -> None:
    touch("notes.txt", "photos/a.jpg")(tmp_path / "odd")
    with refused(FileNotFoundError, "expected model.safetensors", "notes.txt, photos/"):
        inspect(tmp_path / "odd", sound)
    (tmp_path / "empty").mkdir()
    with refused(FileNotFoundError, "found nothing"):
        inspect(tmp_path / "empty", sound)


def test_a_link_that_leads_nowhere_says_where_it_led(tmp_path: Path, sound: Path) -> None:
    directory = tmp_path / "copy"
    directory.mkdir()
    (directory / "model.safetensors").symlink_to("../../blobs/0123")
    with refused(CheckpointError, "a link to ../../blobs/0123", "cp -rL"):
        inspect(directory, sound)
    (tmp_path / "latest").symlink_to(tmp_path / "removed")
    with refused(FileNotFoundError, "a link to", "removed"):
        inspect(tmp_path / "latest", sound)


def test_a_file_that_cannot_be_looked_for_is_not_called_missing(
    tmp_path: Path, sound: Path
) -> None:
    for name in ("model.safetensors", "model.safetensors.index.json"):
        directory = tmp_path / name.partition(".")[2]
        directory.mkdir()
        (directory / name).symlink_to(name)
        with pytest.raises(OSError, match=re.escape(name)) as caught:
            inspect(directory, sound)
        assert caught.value.errno == errno.ELOOP


def test_names_of_strangers_cannot_steer_the_terminal(tmp_path: Path) -> None:
    place = Place.on_the_hub("org/name", ["\x1b[2J.txt", "adapter\x07"])
    assert str(explain(place)).isprintable()
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "\\u001b[2J"}')
    assert str(explain(Place.on_disk(tmp_path))).isprintable()


@pytest.mark.parametrize("gathered", [0, 1, 3])
@pytest.mark.parametrize("prefix", ["model.", "model.language_model."])
def test_weights_that_zero_3_did_not_gather_are_refused(
    tmp_path: Path, gathered: int, prefix: str
) -> None:
    rng = np.random.default_rng(0)
    whole = language_model(rng, layers=3)
    kept = re.compile(r"norm|layers\.[" + "012"[:gathered] + r"x]\.")
    stub = {
        name.replace("model.", prefix): tensor if kept.search(name) else Stored("BF16", (0,), b"")
        for name, tensor in whole.items()
    }
    directory, other = tmp_path / "stub", write_checkpoint(tmp_path / "whole", whole)
    write_checkpoint(directory, stub)
    for sources in ((directory, other), (other, directory)):
        for verb in (inspect, compute_delta):
            with refused(CheckpointError, directory, "[0]", "ZeRO-3", "zero_to_fp32.py"):
                verb(*sources)
        assert any("ZeRO-3" in one.message for one in check(*sources).findings)


def test_no_elements_are_as_good_as_any_where_the_other_has_none(tmp_path: Path) -> None:
    tensors = {**TENSORS, OTHER: Stored("BF16", (0,), b""), "model.buffer": opaque("I64", 0)}
    first = write_checkpoint(tmp_path / "first", tensors)
    second = write_checkpoint(tmp_path / "second", {**tensors, WEIGHT: stored(np.ones((4, 4)) * 2)})
    assert len(inspect(first, second).stats) == 2


def test_too_many_open_files_say_how_to_allow_more(tmp_path: Path, sound: Path) -> None:
    tensors = {f"model.layers.{n}.mlp.up_proj.weight": stored(np.ones((2, 2))) for n in range(60)}
    directory = write_checkpoint(tmp_path / "many", tensors, shards=60)
    script = (
        "import resource, sys, drift_fast\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))\n"
        "try:\n"
        "    drift_fast.inspect(*sys.argv[1:])\n"
        "except OSError as error:\n"
        "    print(error.errno, error.strerror)\n"
    )
    result = python(script, directory, directory)
    assert result.stdout.startswith("24 ")
    assert "many/model-000" in result.stdout
    assert "ulimit -n" in result.stdout


# ------------------------------------------------------------------ following what is advised


def test_merging_an_adapter_as_advised_gives_a_model_that_opens(
    tmp_path: Path, sound: Path
) -> None:
    peft = pytest.importorskip("peft")
    transformers: Any = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, vocab_size=16,
    )  # fmt: skip
    base = transformers.LlamaForCausalLM(config)
    base.save_pretrained(tmp_path / "base")
    adapted = peft.get_peft_model(
        transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base"),
        peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False),
    )
    adapted.save_pretrained(tmp_path / "adapter")
    with pytest.raises(CheckpointError, match=re.escape(str(tmp_path / "base"))) as caught:
        inspect(tmp_path / "adapter", tmp_path / "base")
    advised = str(caught.value).partition("loaded as `base`: ")[2].replace("'merged'", "merged")
    exec(advised, {"PeftModel": peft.PeftModel, "base": base, "merged": tmp_path / "merged"})
    delta = compute_delta(
        tmp_path / "merged", tmp_path / "base", modules="attn", check_weights=False
    )
    changed = [name for name in delta if delta[name].any()]
    assert changed == ["model.layers.0.self_attn.q_proj.weight"]


def test_joining_the_shards_of_fsdp_as_advised_gives_a_model_that_opens(
    tmp_path: Path, sound: Path
) -> None:
    torch = pytest.importorskip("torch")
    accelerate: Any = pytest.importorskip("accelerate.utils")
    from torch.distributed import checkpoint

    folder = tmp_path / "checkpoint-3" / "pytorch_model_fsdp_0"
    state = {"model": {WEIGHT: torch.ones(4, 4, dtype=torch.bfloat16)}}
    checkpoint.save(state, checkpoint_id=folder, no_dist=True)
    with pytest.raises(CheckpointError) as caught:
        inspect(tmp_path / "checkpoint-3", sound)
    command = str(caught.value).partition("`accelerate merge-weights ")[2].partition("`")[0]
    source, merged = command.split()
    accelerate.merge_fsdp_weights(source, str(tmp_path / merged))
    (row,) = inspect(tmp_path / merged, sound).stats
    assert row.reasoning_norm == 4.0


def test_the_script_of_deepspeed_takes_what_is_advised() -> None:
    found = importlib.util.find_spec("deepspeed")
    if found is None or found.origin is None:
        pytest.skip("deepspeed is not installed")
    script = (Path(found.origin).parent / "utils" / "zero_to_fp32.py").read_text()
    flags = re.findall(r"add_argument\(\s*\"([\w-]+)\"", script)
    assert flags[:2] == ["checkpoint_dir", "output_dir"]
    assert "--safe_serialization" in flags


def test_numbered_shards_beside_a_stale_index_are_read_once_it_is_removed(
    tmp_path: Path, sound: Path
) -> None:
    directory = tmp_path / "model"
    model_in("model-00001-of-00001.safetensors")(directory)
    write_index(directory, dict.fromkeys(TENSORS, "model-00002-of-00030.safetensors"))
    with refused(FileNotFoundError, "model-00002-of-00030.safetensors", "download"):
        inspect(directory, sound)
    os.remove(directory / "model.safetensors.index.json")
    with pytest.warns(drift_fast.DriftWarning, match="is missing; all 1 shards are there"):
        assert len(inspect(directory, sound).stats) == 1
