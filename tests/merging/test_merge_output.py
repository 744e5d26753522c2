"""The directory that a merge leaves: what is in it, that it loads, that it is whole or absent."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from drift_fast import CheckpointError, DriftWarning, NonFiniteError
from drift_fast._core import Checkpoint
from drift_fast.cli.main import main
from drift_fast.merging.merge import merge
from drift_fast.progress_bar import Progress
from support.disks import MEGABYTE
from support.merged_models import stored_tensors
from support.processes import python
from support.synthetic import (
    contents,
    everything_under,
    language_model,
    moved,
    opaque,
    projector,
    refused,
    stored,
    vision_tower,
    write_checkpoint,
)

SAFE = {
    "config.json": '{"model_type": "llava"}',
    "generation_config.json": "{}",
    "tokenizer_config.json": "{}",
    "tokenizer.model": "\0\1\2",
    "special_tokens_map.json": "{}",
    "preprocessor_config.json": '{"size": 3}',
    "processor_config.json": "{}",
    "chat_template.jinja": "{{ messages }}",
    "LICENSE": "as is",
}
UNSAFE = {
    "modeling_evil.py": "raise SystemExit",
    "pytorch_model.bin": "pickle",
    "training_args.bin": "pickle",
    "optimizer.pt": "pickle",
    "scaler.pkl": "pickle",
    "notes.txt": "mine",
    "license.py": "raise SystemExit",
    "NOTICE.pkl": "pickle",
    "licence.safetensors": "weights",
    "merge.json": "{}",
    "drift.json": "{}",
}


def write_sources(directory: Path, *, layers: int = 2, hidden: int = 8) -> tuple[Path, Path]:
    rng = np.random.default_rng(11)
    text = language_model(rng, layers=layers, hidden=hidden)
    vlm = {
        **vision_tower(rng, hidden=hidden, dtype="F16"),
        **projector(rng, hidden=hidden, dtype="F32"),
        "model.position_ids": opaque("I64", 1, 9),
        "model.mask": opaque("BOOL", 3),
        "model.nothing": opaque("F32", 0, 4),
        # More than is copied at a time.
        "model.visual.large": stored(rng.normal(0, 1, (3, 200_000)), "F32"),
        **moved(rng, text),
    }
    reasoning = write_checkpoint(directory / "text", text, shards=2)
    multimodal = write_checkpoint(directory / "vlm", vlm, shards=3)
    (multimodal / "config.json").write_text(SAFE["config.json"])
    return reasoning, multimodal


@pytest.fixture
def sources(tmp_path: Path) -> tuple[Path, Path]:
    return write_sources(tmp_path / "sources")


ATTN: dict[str, Any] = {"weight": 0.5, "modules": "attn"}


# ------------------------------------------------------------------ what is in it


def test_what_is_not_merged_is_carried_over_byte_for_byte(
    sources: tuple[Path, Path], out: Path
) -> None:
    merged = merge("linear", *sources, out, **ATTN, max_shard_size=2000)
    before, after = stored_tensors(sources[1]), stored_tensors(out)
    assert before.keys() == after.keys()
    assert {name for name in before if before[name] != after[name]} == set(merged.merged)
    assert {"model.position_ids", "model.mask", "model.nothing"} <= set(merged.copied)
    assert "model.visual.large" in merged.copied
    assert any("vision_tower" in name and "q_proj" in name for name in merged.copied)
    index = json.loads((out / "model.safetensors.index.json").read_bytes())
    assert index["weight_map"].keys() == before.keys()
    assert index["metadata"]["total_size"] == sum(len(data) for *_, data in before.values())
    files = set(index["weight_map"].values())
    assert len(files) > 2
    assert all(re.fullmatch(r"model-\d{5}-of-\d{5}\.safetensors", name) for name in files)
    assert files == {path.name for path in out.glob("*.safetensors")}
    assert [name for name, *_ in Checkpoint(out).tensors()] == [
        tensor.name for tensor in merged.tensors
    ]


def test_settings_go_along_and_code_pickles_and_strangers_do_not(
    sources: tuple[Path, Path], out: Path
) -> None:
    for name, text in {**SAFE, **UNSAFE}.items():
        (sources[1] / name).write_text(text)
    (sources[1] / "additional").mkdir()
    (sources[1] / "vocab.json").symlink_to(sources[1] / "config.json")
    with pytest.warns(DriftWarning, match=r"license\.py, modeling_evil\.py"):
        merged = merge("linear", *sources, out, **ATTN)
    assert set(merged.files) == SAFE.keys() | {"vocab.json"}
    assert set(merged.left_behind) == UNSAFE.keys() | {"additional/"}
    for name, text in SAFE.items():
        assert (out / name).read_text() == text
    assert not (out / "vocab.json").is_symlink()
    written = {path.name for path in out.iterdir()}
    weights = {path.name for path in out.glob("*.safetensors")}
    assert written == weights | set(merged.files) | {
        "merge.json",
        "model.safetensors.index.json",
    }


def test_a_link_out_of_the_model_stays_behind_and_the_hubs_blobs_go_along(
    tmp_path: Path, out: Path
) -> None:
    reasoning, written = write_sources(tmp_path / "written")
    cache = tmp_path / "models--a--b"
    model, blobs = cache / "snapshots" / "0123", cache / "blobs"
    model.parent.mkdir(parents=True)
    written.rename(model)
    blobs.mkdir()
    (model / "config.json").rename(blobs / "c0ffee")
    (model / "config.json").symlink_to("../../blobs/c0ffee")
    secret = tmp_path / "secret"
    secret.write_text("{}")
    (model / "NOTICE").symlink_to(secret)
    with pytest.warns(DriftWarning, match="links out of .* NOTICE"):
        merged = merge("linear", reasoning, model, out, **ATTN)
    assert merged.files == ("config.json",)
    assert merged.left_behind == ("NOTICE",)
    assert (out / "config.json").read_text() == SAFE["config.json"]
    (model / "config.json").unlink()
    (model / "config.json").symlink_to(secret)
    with refused(FileNotFoundError, "config.json but a link to elsewhere"):
        merge("linear", reasoning, model, tmp_path / "other", **ATTN)


def with_tied_head(directory: Path, head: str | None = None) -> tuple[Path, Path]:
    """A pair whose configuration ties the head; the multimodal model stores one nevertheless."""
    rng = np.random.default_rng(5)
    text = language_model(rng, head=None)
    vlm = moved(rng, text)
    embedding = vlm["model.language_model.embed_tokens.weight"]
    vlm["lm_head.weight"] = embedding if head is None else stored(rng.normal(0, 1, (16, 8)), head)
    pair = write_checkpoint(directory / "text", text), write_checkpoint(directory / "vlm", vlm)
    for path in pair:
        (path / "config.json").write_text('{"model_type": "llama", "tie_word_embeddings": true}')
    return pair


@pytest.mark.parametrize("method", ["linear", "dare_linear"])
def test_a_stored_head_that_is_tied_leaves_no_old_head_beside_a_merged_embedding(
    tmp_path: Path, out: Path, method: str
) -> None:
    options = {"density": 0.5} if method == "dare_linear" else {}
    pair = with_tied_head(tmp_path)
    merged = merge(method, *pair, out, weight=0.5, rows="index", **options)
    rows = {tensor.name: tensor for tensor in merged.tensors}
    assert rows["model.language_model.embed_tokens.weight"].sources
    assert "tied" in rows["lm_head.weight"].reason
    assert "left out" in rows["lm_head.weight"].reason
    assert "lm_head.weight" not in stored_tensors(out)
    assert stored_tensors(out).keys() == {*merged.merged, *merged.copied}
    kept = merge("linear", *pair, tmp_path / "kept", **ATTN)
    assert "lm_head.weight" in kept.copied
    assert "lm_head.weight" in stored_tensors(tmp_path / "kept")


@pytest.mark.parametrize("dtype", ["BF16", "F32"])
def test_a_head_that_is_tied_and_differs_is_refused(tmp_path: Path, out: Path, dtype: str) -> None:
    pair = with_tied_head(tmp_path, head=dtype)
    with refused(CheckpointError, "ties lm_head.weight", "differ", "tie_word_embeddings"):
        merge("linear", *pair, out, weight=0.5, rows="index")
    assert not out.exists()


def test_a_home_directory_is_found(
    sources: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    merged = merge("linear", *sources, "~/merged", **ATTN)
    assert merged.path == tmp_path / "merged"
    assert (tmp_path / "merged/merge.json").is_file()


def test_no_warning_where_there_is_no_code(sources: tuple[Path, Path], out: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        merge("linear", *sources, out, **ATTN)


def test_merge_json_says_what_was_done_from_what(sources: tuple[Path, Path], out: Path) -> None:
    base = shutil.copytree(sources[0], out.with_name("base"))
    merged = merge(
        "dare_ties",
        *sources,
        out,
        base=base,
        weight={"attn": 0.5},
        multimodal_weight=0.25,
        density=0.75,
        seed=9,
    )
    told = json.loads((out / "merge.json").read_bytes())
    assert told["method"] == "dare_ties"
    assert told["weight"] == {"attn": 0.5}
    assert (told["multimodal_weight"], told["density"], told["seed"]) == (0.25, 0.75, 9)
    assert told["sources"].keys() == {"reasoning", "multimodal", "base"}
    digests = [shard["sha256_of_samples"] for shard in told["sources"]["base"]["shards"]]
    assert digests == [digest for *_, digest in Checkpoint(sources[0]).fingerprint()]
    assert told["coverage"]["reasoning"] == merged.coverage.to_dict()
    assert told["files"] == ["config.json"]
    assert [row["name"] for row in told["tensors"]] == [one.name for one in merged.tensors]
    assert all("reason" in row or "kept_reasoning" in row for row in told["tensors"])
    assert told["format_version"] == 1


def test_a_model_without_a_configuration_is_refused(sources: tuple[Path, Path], out: Path) -> None:
    (sources[1] / "config.json").unlink()
    with refused(FileNotFoundError, sources[1], "config.json", "save_pretrained"):
        merge("linear", *sources, out, **ATTN)
    assert not out.exists()


# ------------------------------------------------------------------ where it goes


def test_a_source_is_never_written_to(sources: tuple[Path, Path], tmp_path: Path) -> None:
    before = {path: everything_under(path) for path in sources}
    link = tmp_path / "link"
    link.symlink_to(sources[1])
    for target in (
        sources[1],
        sources[0],
        sources[1] / "merged",
        sources[0] / "a" / "b",
        link / "merged",
        sources[1] / ".." / sources[1].name,
    ):
        with refused(ValueError, "source of this merge", "another directory"):
            merge("linear", *sources, target, **ATTN, overwrite=True)
    assert {path: everything_under(path) for path in sources} == before


def test_beside_a_single_file_there_is_room(tmp_path: Path) -> None:
    reasoning, multimodal = write_sources(tmp_path / "sources", layers=1)
    merge("linear", reasoning, multimodal, tmp_path / "first", **ATTN)
    (file,) = (tmp_path / "first").glob("*.safetensors")
    merge("linear", reasoning, file, tmp_path / "first" / "second", **ATTN)
    assert (tmp_path / "first" / "second" / "merge.json").exists()


def test_a_merged_model_is_replaced_only_when_asked_and_nothing_else_ever(
    sources: tuple[Path, Path], out: Path
) -> None:
    (sources[1] / "generation_config.json").write_text("{}")
    merge("linear", *sources, out, **ATTN)
    first = contents(out)
    with refused(FileExistsError, "merged model", "overwrite=True"):
        merge("linear", *sources, out, weight=0.9, modules="attn")
    assert contents(out) == first
    (sources[1] / "generation_config.json").unlink()
    merge("linear", *sources, out, weight=0.9, modules="attn", overwrite=True)
    assert contents(out) != first
    assert not (out / "generation_config.json").exists()
    (out / "results.json").write_text("mine")
    with refused(FileExistsError, "results.json"):
        merge("linear", *sources, out, **ATTN, overwrite=True)
    assert (out / "results.json").read_text() == "mine"
    stranger = out.parent / "stranger"
    stranger.mkdir()
    (stranger / "thesis.tex").write_text("mine")
    with refused(FileExistsError, stranger):
        merge("linear", *sources, stranger, **ATTN, overwrite=True)
    empty = out.parent / "empty"
    empty.mkdir()
    merge("linear", *sources, empty, **ATTN)
    assert "merge.json" in everything_under(empty)
    assert stored_tensors(empty).keys() == stored_tensors(out).keys()


@pytest.mark.parametrize("named", ["thesis.txt", "model-00001-of-00009.safetensors", "vocab.json"])
def test_a_list_that_anybody_may_have_written_removes_nothing(
    sources: tuple[Path, Path], out: Path, named: str
) -> None:
    merge("linear", *sources, out, **ATTN)
    described = json.loads((out / "merge.json").read_text())
    (out / "merge.json").write_text(json.dumps(described | {"files": ["config.json", named]}))
    # No merge leaves a directory, or a file of another name.
    mine = out / named if named.endswith(".txt") else out / named / "mine"
    mine.parent.mkdir(exist_ok=True)
    mine.write_text("mine")
    with refused(FileExistsError, named):
        merge("linear", *sources, out, **ATTN, overwrite=True)
    assert mine.read_text() == "mine"


# ------------------------------------------------------------------ whole or not at all


def test_what_a_killed_run_left_of_another_model_is_removed(
    sources: tuple[Path, Path], out: Path
) -> None:
    left = out.parent / f".{out.name}.incomplete"
    left.mkdir(parents=True)
    for name in ("vocab.json", "LICENSE", "model-00001-of-00001.safetensors"):
        (left / name).write_text("half")
    merge("linear", *sources, out, **ATTN)
    assert everything_under(out.parent) == {
        out.name,
        *(f"{out.name}/{name}" for name in everything_under(out)),
    }


def test_an_interruption_leaves_nothing(sources: tuple[Path, Path], out: Path) -> None:
    def stop(progress: Progress) -> None:
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        merge("linear", *sources, out, **ATTN, on_progress=stop)
    assert everything_under(out.parent) == set()


def test_a_process_that_is_killed_leaves_no_model_and_the_next_one_cleans_up(
    tmp_path: Path, out: Path
) -> None:
    reasoning, multimodal = write_sources(tmp_path / "sources", hidden=64)
    program = (
        "import os, signal, sys\n"
        "from drift_fast.merging.merge import merge\n"
        "def die(progress):\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "merge('linear', sys.argv[1], sys.argv[2], sys.argv[3], weight=0.5, modules='attn', "
        "on_progress=die)\n"
    )
    result = python(program, reasoning, multimodal, out, check=False)
    assert result.returncode == -signal.SIGKILL
    assert not out.exists()
    assert any(".incomplete" in name for name in everything_under(out.parent))
    merge("linear", reasoning, multimodal, out, **ATTN)
    assert {name.split("/")[0] for name in everything_under(out.parent)} == {out.name}


def test_a_source_that_changes_meanwhile_is_an_error(sources: tuple[Path, Path], out: Path) -> None:
    victim = next(sources[1].glob("*.safetensors"))

    def touch(progress: Progress) -> None:
        stat = victim.stat()
        os.utime(victim, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1000))

    with refused(CheckpointError, victim.name, "changed while it was being read"):
        merge("linear", *sources, out, **ATTN, on_progress=touch)
    assert everything_under(out.parent) == set()


def test_a_model_that_does_not_fit_is_refused_before_anything_is_read(
    small_disk: Path,
    tmp_path: Path,
) -> None:
    reasoning, multimodal = write_sources(tmp_path / "sources", layers=10, hidden=300)
    seen: list[Progress] = []
    with pytest.raises(OSError, match=r"the merged model needs \d+ bytes but") as caught:
        merge("linear", reasoning, multimodal, small_disk / "out", **ATTN, on_progress=seen.append)
    assert caught.value.errno == errno.ENOSPC
    assert seen == []
    assert everything_under(small_disk) == set()


def test_a_write_that_fails_in_the_middle_leaves_nothing(
    limit_files: Callable[[int], None],
    tmp_path: Path,
    out: Path,
) -> None:
    reasoning, multimodal = write_sources(tmp_path / "sources", layers=10, hidden=300)
    limit_files(3 * MEGABYTE)
    with pytest.raises(OSError, match="max_shard_size") as caught:
        merge("linear", reasoning, multimodal, out, **ATTN)
    assert caught.value.errno == errno.EFBIG
    assert everything_under(out.parent) == set()
    merge("linear", reasoning, multimodal, out, **ATTN, max_shard_size=MEGABYTE)


def test_a_refusal_at_the_end_leaves_nothing(tmp_path: Path, out: Path) -> None:
    reasoning, multimodal = write_sources(tmp_path / "sources")
    name = "model.layers.0.self_attn.q_proj.weight"
    text = language_model(np.random.default_rng(1))
    write_checkpoint(reasoning, {**text, name: stored(np.full((8, 8), np.nan))}, shards=2)
    with pytest.raises(NonFiniteError):
        merge("linear", reasoning, multimodal, out, **ATTN, check_weights=False)
    assert everything_under(out.parent) == set()


# ------------------------------------------------------------------ the command


def test_the_command_merges_as_the_function_does(
    sources: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [str(path) for path in sources]
    base = str(shutil.copytree(sources[0], tmp_path / "base"))
    arguments = ["--weight", "attn=0.7,mlp=1.25", "--base", base, "--multimodal-weight", "0.5"]
    assert main(["merge", "task_arithmetic", *paths, "-o", str(tmp_path / "a"), *arguments]) == 0
    printed = capsys.readouterr().out
    assert "attn=0.7,mlp=1.25" in printed
    assert "8 attn, 6 mlp" in printed
    assert str(tmp_path / "a") in printed
    merge(
        "task_arithmetic",
        *sources,
        tmp_path / "b",
        base=base,
        weight={"attn": 0.7, "mlp": 1.25},
        multimodal_weight=0.5,
    )
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_the_command_prints_json_and_refuses_with_the_remedy(
    sources: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [str(path) for path in sources]
    out = str(tmp_path / "a")
    assert main(["merge", "layer_swap", *paths, "-o", out, "--keep-layers", "1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["method"] == "layer_swap"
    assert found["path"] == out
    assert sum(bool(tensor["sources"]) for tensor in found["tensors"]) == 9
    assert main(["merge", "ties", *paths, "-o", str(tmp_path / "b")]) == 1
    assert "density" in capsys.readouterr().err
    with pytest.raises(SystemExit) as caught:
        main(["merge", "ties", *paths, "-o", out, "--weight", "attn=much"])
    assert caught.value.code == 2


# ------------------------------------------------------------------ it loads


def test_a_merged_model_loads_and_generates(tmp_path: Path, out: Path) -> None:
    """A tiny Qwen2.5-VL with its tokenizer, and an expert of its backbone."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
    try:
        import tiny
    finally:
        sys.path.pop(0)
    base = tiny.text_model()
    model: Any = tiny.vision_language_model()
    model.model.language_model.load_state_dict(base.model.state_dict())
    expert = tiny.text_model()
    with torch.no_grad():
        for parameter in expert.parameters():
            parameter.add_(0.3 * parameter.std(correction=0) * torch.randn_like(parameter))
    for one, name in ((base, "base"), (expert, "expert"), (model, "vlm")):
        one.to(torch.bfloat16).save_pretrained(tmp_path / name)
        tiny.tokenizer().save_pretrained(tmp_path / name)
    merged = merge(
        "ties", tmp_path / "expert", tmp_path / "vlm", out, base=tmp_path / "base", density=0.5
    )
    assert {"embed", "attn", "mlp", "norm"} <= {
        tensor.kind for tensor in merged.tensors if tensor.sources
    }
    again = transformers.AutoModelForImageTextToText.from_pretrained(out)
    assert type(again) is type(model)
    assert again.dtype == torch.bfloat16
    before, after = model.state_dict(), again.state_dict()
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert not any("visual" in name for name in changed)
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    assert tokenizer.chat_template == tiny.tokenizer().chat_template
    inputs = tokenizer("12 + 30 =", return_tensors="pt")
    generated = again.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert generated.shape[1] > inputs["input_ids"].shape[1]
