"""A delta of checkpoints on a server is that of local ones, and reads no more than it needs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from drift_fast import CheckpointError, Delta, compute_delta, inspect
from drift_fast.cli.main import main
from drift_fast.merging.merge import merge
from support import commands
from support.processes import Ended
from support.range_server import HubServer, RangeServer
from support.remote import asking_hub
from support.synthetic import Pair, contents, language_model, moved, vision_tower, write_checkpoint

FIRST, SECOND = "1" * 40, "2" * 40
TOKEN = "hf_" + "t" * 34


def write_large_pair(directory: Path) -> Pair:
    """Write a pair whose tensors are long enough that reading between them would show."""
    rng = np.random.default_rng(41)
    text = language_model(rng, layers=3, hidden=128, inner=1536, vocab=2048)
    vlm = {**vision_tower(rng, layers=3, hidden=128, inner=1536), **moved(rng, text)}
    return Pair(
        write_checkpoint(directory / "text", text, shards=2),
        write_checkpoint(directory / "vlm", vlm),
        text,
        vlm,
    )


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return write_large_pair(tmp_path_factory.mktemp("local"))


@pytest.fixture
def server(local: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RangeServer]:
    monkeypatch.setenv("DRIFT_FAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    with RangeServer(local.reasoning.parent) as started:
        yield started


def size_of(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.glob("*.safetensors"))


def test_a_delta_of_urls_is_that_of_the_files_and_reads_only_what_it_needs(
    server: RangeServer, local: Pair, tmp_path: Path
) -> None:
    expected = compute_delta(local.reasoning, local.multimodal, tmp_path / "a", modules="attn")
    found = compute_delta(
        f"{server.url}/text/", f"{server.url}/vlm", tmp_path / "b", modules="attn"
    )
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert list(found.stats) == list(expected.stats)
    assert found.coverage == expected.coverage
    total = size_of(local.reasoning) + size_of(local.multimodal)
    needed = 2 * sum(row.numel for row in found.stats) * 2
    transfers = [found.sources[side]["transfer"] for side in ("reasoning", "multimodal")]
    assert sum(transfer["needed_nbytes"] for transfer in transfers) == needed
    assert sum(transfer["total_nbytes"] for transfer in transfers) == total
    # Headers come with the first 256 KiB of each of three files.
    assert needed <= server.nbytes < needed + 3 * (256 << 10) + (64 << 10)
    assert server.nbytes < total / 2
    before = server.nbytes
    again = compute_delta(f"{server.url}/text/", f"{server.url}/vlm", modules="attn")
    assert again.sources["reasoning"]["transfer"]["downloaded_nbytes"] == 0
    assert server.nbytes - before < 32 << 10


def test_what_identifies_a_remote_source_does_not_depend_on_what_was_downloaded(
    server: RangeServer, tmp_path: Path
) -> None:
    def shards(modules: str) -> Any:
        sources = compute_delta(f"{server.url}/text", f"{server.url}/vlm", modules=modules).sources
        return [sources[side]["shards"] for side in ("reasoning", "multimodal")]

    first = shards("attn")
    assert first == shards("mlp") == shards("attn,mlp")
    assert all(shard["etag"] for side in first for shard in side)
    delta = compute_delta(f"{server.url}/text", f"{server.url}/vlm", tmp_path / "delta")
    written = json.loads((tmp_path / "delta" / "drift.json").read_text())["sources"]
    assert written["reasoning"]["url"] == f"{server.url}/text"
    assert Delta.open(tmp_path / "delta").sources == delta.sources


def test_progress_tells_a_download_from_the_reading_after_it(server: RangeServer) -> None:
    seen = []
    inspect(f"{server.url}/text", f"{server.url}/vlm", modules="attn", on_progress=seen.append)
    stages = [progress.stage for progress in seen]
    assert list(dict.fromkeys(stages)) == ["downloading", "reading"]
    last = [progress for progress in seen if progress.stage == "downloading"][-1]
    assert last.nbytes == last.total_nbytes > 0


def test_one_side_may_be_local_and_the_other_remote(server: RangeServer, local: Pair) -> None:
    expected = inspect(local.reasoning, local.multimodal)
    for left, right in (
        (str(local.reasoning), f"{server.url}/vlm/model.safetensors"),
        (f"{server.url}/text/model.safetensors.index.json", local.multimodal),
    ):
        assert list(inspect(left, right).stats) == list(expected.stats)


def test_what_was_not_downloaded_cannot_be_read_from_the_cache(server: RangeServer) -> None:
    delta = compute_delta(f"{server.url}/text", f"{server.url}/vlm", modules="attn")
    paths = [delta.sources[side]["path"] for side in ("reasoning", "multimodal")]
    with pytest.raises(CheckpointError, match="were not downloaded"):
        compute_delta(*paths, modules="mlp").stats  # noqa: B018
    assert list(inspect(*paths, modules="attn").stats) == list(delta.stats)


def test_a_pair_that_does_not_fit_is_refused_before_any_weight_is_downloaded(
    server: RangeServer, local: Pair, tmp_path: Path
) -> None:
    other = language_model(np.random.default_rng(2), layers=4, hidden=128, inner=1536)
    write_checkpoint(tmp_path / "other", other)
    for path in (tmp_path / "other").iterdir():
        server.files[f"/other/{path.name}"] = path
    with pytest.raises(Exception, match="layer counts differ"):
        compute_delta(f"{server.url}/other", f"{server.url}/vlm")
    assert server.nbytes <= 2 * (256 << 10) + (64 << 10)


def test_rows_need_the_tokenizer_which_is_downloaded_when_they_are_asked_for(
    server: RangeServer,
) -> None:
    vocab = {f"t{n}": n for n in range(2048)}
    model = {"type": "BPE", "vocab": vocab, "merges": []}
    text = json.dumps({"model": model, "pre_tokenizer": {"type": "ByteLevel"}}).encode()
    server.files |= {"/text/tokenizer.json": text, "/vlm/tokenizer.json": text}
    compute_delta(f"{server.url}/text", f"{server.url}/vlm", modules="attn")
    assert not server.asked("/text/tokenizer.json")
    delta = compute_delta(f"{server.url}/text", f"{server.url}/vlm", modules="embed")
    assert server.asked("/text/tokenizer.json")
    assert delta.coverage.fraction == 1.0


def test_the_command_reports_what_was_saved(
    server: RangeServer, capsys: pytest.CaptureFixture[str]
) -> None:
    urls = f"{server.url}/text", f"{server.url}/vlm"
    assert main(["inspect", *urls, "--modules", "attn", "--json"]) == 0
    captured = capsys.readouterr()
    assert "MB needed" in captured.err
    assert "%" in captured.err
    sources = json.loads(captured.out)["sources"]
    assert sources["multimodal"]["transfer"]["total_nbytes"] > 0
    assert main(["inspect", f"{server.url}/nowhere", urls[1]]) == 1
    assert "404" in capsys.readouterr().err


# ------------------------------------------------------------------ the Hub


@pytest.fixture
def hub(local: Pair) -> Iterator[HubServer]:
    def files(directory: Path) -> dict[str, Any]:
        return {path.name: path for path in directory.iterdir()}

    with RangeServer({}) as cdn:
        repos = {
            "org/text": {FIRST: files(local.reasoning)},
            "org/vlm": {FIRST: files(local.multimodal)},
        }
        with HubServer(repos, cdn) as started:
            started.branches = {"main": FIRST}
            yield started


def run(hub: HubServer, directory: Path, *arguments: str, **variables: str) -> Ended:
    cache = directory / "cache"
    env = asking_hub(hub.url, directory, TOKEN, DRIFT_FAST_CACHE=cache, **variables)
    return commands.run(*arguments, env=env)


def test_a_delta_of_hub_ids_is_that_of_the_files_and_the_token_stays_with_the_hub(
    hub: HubServer, local: Pair, tmp_path: Path
) -> None:
    expected = compute_delta(local.reasoning, local.multimodal, tmp_path / "a", modules="attn")
    done = run(
        hub, tmp_path, "delta", "org/text", "org/vlm@main", "--modules", "attn",
        "--out", str(tmp_path / "b"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    sources = Delta.open(tmp_path / "b").sources
    assert (sources["reasoning"]["repo"], sources["reasoning"]["revision"]) == ("org/text", FIRST)
    needed = 4 * sum(row.numel for row in expected.stats)
    assert hub.cdn.nbytes < needed + 3 * (256 << 10)
    assert any(TOKEN in str(request.headers) for request in hub.requests)
    assert not any(TOKEN in str(request.headers) for request in hub.cdn.requests)
    for path in [*tmp_path.rglob("*.json"), *tmp_path.rglob("*.txt")]:
        assert TOKEN not in path.read_text()
        assert hub.signature not in path.read_text()
    assert TOKEN not in done.stdout + done.stderr


def cache_snapshot(home: Path, repo: str, source: Path, ref: str, names: set[str]) -> None:
    root = home / "hub" / f"models--{repo.replace('/', '--')}"
    snapshot = root / "snapshots" / FIRST
    snapshot.mkdir(parents=True)
    (root / "refs").mkdir()
    (root / "refs" / ref).write_text(FIRST)
    for name in names:
        (snapshot / name).write_bytes((source / name).read_bytes())


def test_a_whole_snapshot_in_the_hubs_cache_is_used_and_a_partial_one_is_not(
    hub: HubServer, local: Pair, tmp_path: Path
) -> None:
    names = {path.name for path in local.reasoning.iterdir()}
    shard = next(name for name in names if "00002" in name)
    cache_snapshot(tmp_path / "home", "org/text", local.reasoning, "main", names)
    cache_snapshot(tmp_path / "home", "org/vlm", local.multimodal, "main", {"model.safetensors"})
    done = run(hub, tmp_path, "inspect", "org/text", "org/vlm", "--json")
    assert done.returncode == 0, done.stderr
    sources = json.loads(done.stdout)["sources"]
    assert all(str(tmp_path / "home") in source["path"] for source in sources.values())

    (tmp_path / "other").mkdir()
    cache_snapshot(
        tmp_path / "other" / "home", "org/text", local.reasoning, "main", names - {shard}
    )
    done = run(hub, tmp_path / "other", "inspect", "org/text", "org/vlm", "--json")
    assert done.returncode == 0, done.stderr
    sources = json.loads(done.stdout)["sources"]
    assert all("transfer" in source for source in sources.values())


def test_a_cached_snapshot_does_where_the_hub_does_not_answer(
    hub: HubServer, local: Pair, tmp_path: Path
) -> None:
    names = {path.name for path in local.reasoning.iterdir()}
    cache_snapshot(tmp_path / "home", "org/text", local.reasoning, "main", names)
    hub.gated.add("org/text")
    done = run(hub, tmp_path, "inspect", "org/text", str(local.multimodal), "--json")
    assert done.returncode == 0, done.stderr
    assert "using the snapshot in the Hub's cache" in done.stderr
    hub.gated.add("org/vlm")
    done = run(hub, tmp_path, "inspect", str(local.reasoning), "org/vlm")
    assert done.returncode == 1
    assert "restricted" in done.stderr
    assert "Traceback" not in done.stderr


def test_offline_nothing_is_asked_of_the_hub(hub: HubServer, tmp_path: Path) -> None:
    done = run(hub, tmp_path, "inspect", "org/text", "org/vlm", HF_HUB_OFFLINE="1")
    assert done.returncode == 1
    assert "HF_HUB_OFFLINE" in done.stderr
    assert not hub.requests


def test_a_merge_of_urls_is_that_of_the_files(
    server: RangeServer, local: Pair, tmp_path: Path
) -> None:
    """Everything of the multimodal model is downloaded, with the settings that go along."""
    for name in ("config.json", "chat_template.jinja"):
        (local.multimodal / name).write_text("{}")
        server.files[f"/vlm/{name}"] = b"{}"
    options: dict[str, Any] = {"weight": 0.5, "modules": "attn"}
    expected = merge("linear", local.reasoning, local.multimodal, tmp_path / "a", **options)
    found = merge("linear", f"{server.url}/text/", f"{server.url}/vlm", tmp_path / "b", **options)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert found.merged == expected.merged
    assert found.files == expected.files == ("chat_template.jinja", "config.json")
    transfer = found.sources["reasoning"]["transfer"]
    assert transfer["downloaded_nbytes"] < size_of(local.reasoning) / 4
    assert found.sources["multimodal"]["url"] == f"{server.url}/vlm"
