"""A Hub id is resolved in the local cache; offline, or without the package, it says so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from support import commands
from support.commands import PROGRAM, without
from support.processes import Ended, environment
from support.synthetic import Pair, language_model, moved, write_checkpoint, write_file

FIRST, SECOND = "1" * 40, "2" * 40


def run(cache: Path, *arguments: str, program: list[str] = PROGRAM, **options: Any) -> Ended:
    variables = environment(
        *("HF_", "HUGGINGFACE"),
        HF_HUB_CACHE=cache,
        HF_HUB_OFFLINE=1,
        HF_HOME=cache.parent / "home",
    )
    return commands.run(*arguments, program=program, env=variables, **options)


def cache_snapshot(cache: Path, repository: str, revision: str, source: Path, *refs: str) -> Path:
    """Copy a checkpoint into the cache's layout: blobs, links from the snapshot, refs by name."""
    root = cache / f"models--{repository.replace('/', '--')}"
    snapshot = root / "snapshots" / revision
    snapshot.mkdir(parents=True)
    (root / "blobs").mkdir(exist_ok=True)
    for number, path in enumerate(sorted(source.iterdir())):
        blob = f"{revision[:8]}{number:056x}"
        (root / "blobs" / blob).write_bytes(path.read_bytes())
        (snapshot / path.name).symlink_to(f"../../blobs/{blob}")
    for ref in refs:
        target = root / "refs" / ref
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(revision)
    return snapshot


@pytest.fixture
def cache(tmp_path: Path, pair: Pair) -> Path:
    """A cache with the sharded text model in two revisions and the multimodal one in one."""
    cache = tmp_path / "hub"
    rng = np.random.default_rng(21)
    text = write_checkpoint(tmp_path / "plain", pair.text, shards=2)
    (text / "config.json").write_text("{}")
    later = write_checkpoint(tmp_path / "later", moved(rng, pair.text, to="model."))
    cache_snapshot(cache, "org/text", FIRST, text, "main")
    cache_snapshot(cache, "org/text", SECOND, later, "later")
    cache_snapshot(cache, "org/vlm", FIRST, pair.multimodal, "main")
    return cache


def norms(result: Ended) -> dict[str, float]:
    assert result.returncode == 0, result.stderr
    rows = json.loads(result.stdout)["tensors"]
    return {row["name"]: row["reasoning_norm"] for row in rows}


def test_a_hub_id_gives_what_its_path_gives(cache: Path, pair: Pair) -> None:
    by_id = norms(run(cache, "inspect", "org/text", "org/vlm", "--json"))
    by_path = norms(run(cache, "inspect", str(pair.reasoning), str(pair.multimodal), "--json"))
    assert by_id == by_path
    assert len(by_id) == 14


def test_a_revision_is_a_branch_or_a_commit(cache: Path) -> None:
    main = norms(run(cache, "inspect", "org/text", "org/vlm", "--json"))
    branch = norms(run(cache, "inspect", "org/text@later", "org/vlm", "--json"))
    commit = norms(run(cache, "inspect", f"org/text@{SECOND}", "org/vlm", "--json"))
    assert branch == commit != main
    assert norms(run(cache, "inspect", f"org/text@{FIRST}", "org/vlm@main", "--json")) == main


def test_a_delta_records_the_id_and_the_commit_it_was_resolved_to(
    cache: Path, tmp_path: Path
) -> None:
    out = tmp_path / "delta"
    result = run(cache, "delta", "org/text@later", "org/vlm", "--out", str(out))
    assert result.returncode == 0, result.stderr
    sources = json.dumps(json.loads((out / "drift.json").read_text())["sources"])
    assert "org/text" in sources
    assert SECOND in sources
    assert "org/vlm" in sources
    assert FIRST in sources


@pytest.mark.parametrize("identifier", ["org/unknown", "org/text@nowhere", f"org/text@{'3' * 40}"])
def test_an_id_that_is_not_in_the_cache_is_a_clear_error_offline(
    cache: Path, identifier: str
) -> None:
    result = run(cache, "inspect", identifier, "org/vlm")
    assert result.returncode == 1
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    assert identifier.split("@")[0] in result.stderr
    assert "offline" in result.stderr.lower()


def test_an_id_whose_snapshot_holds_only_a_pickle_says_convert(cache: Path, tmp_path: Path) -> None:
    source = tmp_path / "pickled"
    source.mkdir()
    (source / "pytorch_model.bin").write_bytes(
        b"cbuiltins\nopen\n(S'" + str(tmp_path / "executed").encode() + b"'\nS'w'\ntR."
    )
    cache_snapshot(cache, "org/pickled", FIRST, source, "main")
    result = run(cache, "inspect", "org/pickled", "org/vlm")
    assert result.returncode == 1
    assert "safetensors" in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "executed").exists()


def test_without_huggingface_hub_an_id_says_what_to_install(cache: Path) -> None:
    result = run(cache, "inspect", "org/text", "org/vlm", program=without("huggingface_hub"))
    assert result.returncode == 1
    assert "pip install 'drift-fast[hub]'" in result.stderr
    assert "Traceback" not in result.stderr


def test_without_huggingface_hub_paths_work(cache: Path, pair: Pair) -> None:
    result = run(
        cache,
        "inspect",
        str(pair.reasoning),
        str(pair.multimodal),
        "--json",
        program=without("huggingface_hub"),
    )
    assert len(norms(result)) == 14


def test_a_directory_of_that_name_is_preferred_to_the_hub(
    cache: Path, pair: Pair, tmp_path: Path
) -> None:
    here = tmp_path / "here"
    text = dict(language_model(np.random.default_rng(5)).items())
    write_file(here / "org" / "text" / "model.safetensors", text)
    local = norms(run(cache, "inspect", "org/text", str(pair.multimodal), "--json", cwd=here))
    assert local != norms(run(cache, "inspect", "org/text", str(pair.multimodal), "--json"))


@pytest.mark.parametrize("name", ["./org/text", "/org/text", "org/text/deeper", "text.safetensors"])
def test_what_can_only_be_a_path_is_not_looked_up_on_the_hub(
    cache: Path, tmp_path: Path, name: str
) -> None:
    result = run(
        cache, "inspect", name, "org/vlm", cwd=tmp_path, program=without("huggingface_hub")
    )
    assert result.returncode == 1
    assert name in result.stderr
    assert "pip install" not in result.stderr
