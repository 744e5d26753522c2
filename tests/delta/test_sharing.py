"""A delta on a server is read in part where it lies, and one on the Hub is put there whole.

What is read needs no Hub and is tested with URLs in this process. huggingface_hub reads its
environment when it is imported, so whatever asks a Hub runs in a process of its own.
"""

from __future__ import annotations

import json
import re
import shutil
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from drift_fast import CheckpointError, Delta, Injection, combine, compute_delta, merge
from drift_fast.integrations.settings import Settings
from drift_fast.merging.written import open_merged
from drift_fast.report.write import write_report
from support import commands
from support.deltas import assert_same_delta
from support.processes import python
from support.range_server import Content, Fault, RangeServer
from support.remote import SINGLE, asking_hub, assert_unseen, shard_of
from support.synthetic import Pair, contents, refused, write_pair
from support.writable_hub import WritableHub

FIRST = "1" * 40
TOKEN, READER = "hf_" + "w" * 34, "hf_" + "r" * 34
LAYERS = "model.language_model.layers"
UP, DOWN = f"{LAYERS}.0.mlp.up_proj.weight", f"{LAYERS}.1.mlp.down_proj.weight"
START_NBYTES = 256 << 10
REPO = "org/delta"


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """A pair whose tensors, of 1.2 MB, are far longer than what is read of a header."""
    return write_pair(tmp_path_factory.mktemp("large"), layers=3, hidden=384, inner=1536, vocab=32)


@pytest.fixture(scope="module")
def written(large: Pair, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Deltas of the pair, of several shards; read only."""
    folder = tmp_path_factory.mktemp("written")
    for dtype in ("bfloat16", "int8"):
        sizes: dict[str, Any] = {"dtype": dtype, "max_shard_size": "5MB"}
        compute_delta(large.reasoning, large.multimodal, folder / dtype, **sizes)
    return folder


@pytest.fixture
def server(written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RangeServer]:
    monkeypatch.setenv("DRIFT_FAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    with RangeServer(written) as started:
        yield started


def model_of(shapes: Mapping[str, tuple[int, ...]]) -> nn.Module:
    """Return a model that has parameters of these names and shapes."""
    model = nn.Module()
    for name, shape in shapes.items():
        *path, leaf = name.split(".")
        module = model
        for part in path:
            if part not in module._modules:
                module.add_module(part, nn.Module())
            found = module._modules[part]
            assert found is not None
            module = found
        module.register_parameter(leaf, nn.Parameter(torch.full(shape, 0.01)))
    return model


def with_config(checkpoint: Path, folder: Path) -> Path:
    """Return a copy of a checkpoint with a configuration, which a merge takes along."""
    shutil.copytree(checkpoint, folder)
    (folder / "config.json").write_text("{}")
    return folder


# ------------------------------------------------------------------ reading


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_a_delta_at_a_url_is_that_of_the_files_and_a_tensor_comes_when_it_is_asked_for(
    server: RangeServer, written: Path, dtype: str
) -> None:
    local = Delta.open(written / dtype)
    files = {path.name: path.stat().st_size for path in (written / dtype).iterdir()}
    small = sum(nbytes for name, nbytes in files.items() if name.endswith(".json"))
    found = Delta.open(f"{server.url}/{dtype}/")
    shards = len(files) - 2
    assert shards > 1
    assert server.nbytes <= small + shards * START_NBYTES
    assert f"at {server.url}/{dtype}" in repr(found)

    before = server.nbytes
    assert torch.equal(found[UP], local[UP])
    stored = {"bfloat16": 2.0, "int8": 1 + 2 / 64}[dtype] * local[UP].numel()
    assert stored - START_NBYTES <= server.nbytes - before <= stored + START_NBYTES
    before = server.nbytes
    assert torch.equal(found[UP], local[UP])
    assert server.nbytes == before

    assert_same_delta(found, local)
    found.check()
    # Opened once more, all of it is in the cache.
    before = server.nbytes
    assert_same_delta(Delta.open(f"{server.url}/{dtype}/"), local)
    # The start of each shard tells whether the file is still the same.
    assert server.nbytes - before == small + 8 * shards
    by_index = Delta.open(f"{server.url}/{dtype}/delta.safetensors.index.json")
    assert torch.equal(by_index[DOWN], local[DOWN])


@pytest.mark.parametrize("residency", ["host", "host-int8", "disk"])
@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_attaching_downloads_what_is_selected_and_a_step_nothing_more(
    server: RangeServer, written: Path, dtype: str, residency: Any
) -> None:
    local = Delta.open(written / dtype)
    gradients = []
    for place in (written / dtype, f"{server.url}/{dtype}"):
        model = model_of(local.shapes)
        injection = Injection(model, place, modules="mlp", layers="0-1", residency=residency)
        before = server.nbytes
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        injection.step()
        assert server.nbytes == before
        gradients.append({name: one.grad for name, one in model.named_parameters()})
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])
    assert not torch.equal(gradients[1][UP], torch.ones(1536, 384))
    # A third of the layers and all of attention stay where they are.
    total = sum(path.stat().st_size for path in (written / dtype).glob("*.safetensors"))
    assert server.nbytes < 0.62 * total


def test_a_byte_that_is_wrong_on_the_server_names_the_tensor_and_can_be_downloaded_again(
    server: RangeServer, written: Path, out: Path
) -> None:
    index = json.loads((written / "bfloat16" / "delta.safetensors.index.json").read_text())
    place = f"/bfloat16/{index['weight_map'][UP]}"
    whole = (written / place[1:]).read_bytes()
    at = whole.index(Delta.open(written / "bfloat16")[UP].view(torch.uint8).numpy().tobytes())
    server.files[place] = whole[: at + 9] + bytes([whole[at + 9] ^ 1]) + whole[at + 10 :]
    delta = Delta.open(f"{server.url}/bfloat16")
    with pytest.raises(CheckpointError, match="checksum") as caught:
        delta[UP]
    assert UP in str(caught.value)
    with pytest.raises(CheckpointError, match=r"remove \S+$"):
        delta.save(out)
    server.files[place] = whole
    folder = re.search(r"remove (\S+)$", str(caught.value))
    assert folder is not None
    shutil.rmtree(folder[1])
    assert_same_delta(Delta.open(f"{server.url}/bfloat16"), Delta.open(written / "bfloat16"))


def test_threads_that_ask_for_tensors_at_once_each_get_theirs(
    server: RangeServer, written: Path
) -> None:
    from concurrent.futures import ThreadPoolExecutor

    local, found = Delta.open(written / "int8"), Delta.open(f"{server.url}/int8")
    with ThreadPoolExecutor(8) as pool:
        tensors = dict(zip(found, pool.map(found.__getitem__, found), strict=True))
    assert all(torch.equal(tensors[name], local[name]) for name in local)


def test_a_copy_and_a_sum_of_a_delta_on_a_server_are_those_of_the_local_one(
    server: RangeServer, written: Path, tmp_path: Path
) -> None:
    found = Delta.open(f"{server.url}/int8")
    found.save(tmp_path / "copy", max_shard_size="5MB")
    assert contents(tmp_path / "copy") == contents(written / "int8")
    url = f"{server.url}/bfloat16"
    total, expected = combine({url: 2.0}), combine({written / "bfloat16": 2.0})
    assert torch.equal(total[UP], expected[UP])
    assert total.to_dict()["combined"][0]["delta"] == url


def test_a_url_without_a_delta_says_so(server: RangeServer, large: Pair) -> None:
    server.files["/model/model.safetensors"] = large.reasoning / "model.safetensors"
    with refused(FileNotFoundError, "model", "404", "no delta"):
        Delta.open(f"{server.url}/model")
    with refused(FileNotFoundError, "not a delta", "directory"):
        Delta.open(f"{server.url}/model/model.safetensors")
    del server.files["/int8/drift.json"]
    with refused(FileNotFoundError, "not a whole delta", "drift.json"):
        Delta.open(f"{server.url}/int8")


def test_a_merge_a_report_take_the_url_of_a_delta(
    server: RangeServer, written: Path, large: Pair, tmp_path: Path
) -> None:
    url = f"{server.url}/bfloat16"
    model = with_config(large.multimodal, tmp_path / "model")
    for given, out in ((url, tmp_path / "a"), (written / "bfloat16", tmp_path / "b")):
        merge("task_arithmetic", given, model, out, weight=0.5)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert open_merged(tmp_path / "a").path == tmp_path / "a"
    page = write_report(tmp_path / "page.html", url).read_text()
    assert url in page
    assert UP in page


def test_a_configuration_names_a_hub_id_a_url_or_a_directory_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def delta_of(named: str) -> str:
        (tmp_path / "drift.json").write_text(json.dumps({"delta": named}))
        return Settings.from_file(tmp_path / "drift.json").delta

    for named in ("org/delta", "org/delta@v1", "https://host/delta"):
        assert delta_of(named) == named
    for named in ("delta", "../delta", "./delta"):
        assert delta_of(named) == str(tmp_path / named)
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "org" / "delta").mkdir(parents=True)
    with monkeypatch.context() as patch:
        patch.chdir(elsewhere)
        assert delta_of("org/delta") == str(tmp_path / "org" / "delta")
    (tmp_path / "org" / "delta").mkdir(parents=True)
    assert delta_of("org/delta") == str(tmp_path / "org" / "delta")


# ------------------------------------------------------------------ the Hub

CARD = b"---\nlicense: %b\n---\n# a model\n"
REPOS: dict[str, dict[str, dict[str, Content]]] = {
    "org/model": {FIRST: {SINGLE: shard_of(1, a=10), "README.md": b"x"}},
    "org/page": {FIRST: {"README.md": b"a page"}},
    "org/gated": {FIRST: {}},
}


# huggingface_hub says on the console what it thinks of a token, a card or a file.
COMMANDS = """
import contextlib, io, json, logging, sys
from drift_fast.checkpoints.remote import attempts
from drift_fast.cli.main import main
attempts.sleep = lambda *given: None
ended = []
for arguments in json.load(sys.stdin):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main(arguments)
    ended.append({"status": status, "out": out.getvalue(), "err": err.getvalue()})
print(json.dumps(ended))
"""
READ = """
import hashlib, json, sys, drift_fast
assert "huggingface_hub" not in sys.modules
found = []
for place in sys.argv[1:]:
    delta = drift_fast.Delta.open(place)
    sums = {n: hashlib.sha256(t.float().numpy().tobytes()).hexdigest() for n, t in delta.items()}
    found.append({"sums": sums, "repr": repr(delta)})
print(json.dumps(found))
"""


class Hub:
    """A Hub that is written to, and processes that ask it."""

    def __init__(self, server: WritableHub, folder: Path) -> None:
        self.server = server
        self.folder = folder
        self.said = ""

    def variables(self, **changes: object) -> dict[str, str]:
        # The protocol of Xet has no stand-in here.
        common = {"HF_HUB_DISABLE_XET": 1, "HF_HUB_DISABLE_PROGRESS_BARS": 1}
        changes = {"DRIFT_FAST_CACHE": self.folder / "cache", **changes}
        return asking_hub(self.server.url, self.folder, TOKEN, **{**common, **changes})

    def run(self, *given: tuple[object, ...], **changes: object) -> list[dict[str, Any]]:
        """Run commands one after the other in one process; return how each ended."""
        texts = [[str(one) for one in arguments] for arguments in given]
        done = python(COMMANDS, env=self.variables(**changes), stdin=json.dumps(texts))
        self.said += done.stdout + done.stderr
        ended: list[dict[str, Any]] = json.loads(done.stdout)
        return ended

    def succeed(self, *given: tuple[object, ...], **changes: object) -> str:
        """Return what commands print."""
        ended = self.run(*given, **changes)
        assert [one["status"] for one in ended] == [0] * len(given), ended
        return "".join(one["out"] for one in ended)

    def refuse(self, *given: tuple[object, ...], **changes: object) -> list[str]:
        """Return the one line that each of these commands says when it refuses."""
        lines = []
        for one in self.run(*given, **changes):
            assert (one["status"], one["out"]) == (1, ""), one
            said = [line for line in one["err"].splitlines() if " failed, " not in line]
            assert len(said) == 1, one["err"]
            lines += said
        return lines

    def read(self, *given: object, **changes: object) -> list[dict[str, Any]]:
        """Return what is read of each of these deltas."""
        done = python(READ, *given, env=self.variables(**changes))
        found: list[dict[str, Any]] = json.loads(done.stdout)
        return found


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    with RangeServer({}) as cdn, WritableHub(REPOS, cdn) as started:
        started.branches = {"main": FIRST}
        started.writers = {TOKEN}
        yield Hub(started, tmp_path)


@pytest.fixture
def delta(pair: Pair, out: Path) -> Path:
    """A small delta on disk."""
    compute_delta(pair.reasoning, pair.multimodal, out)
    return out


def front_of(card: Content) -> dict[str, Any]:
    """Return the metadata of a card as huggingface_hub reads it."""
    from huggingface_hub import ModelCard

    assert isinstance(card, bytes)
    read: dict[str, Any] = ModelCard(card.decode()).data.to_dict()
    return read


def test_what_is_pushed_is_the_delta_and_opens_by_its_id(hub: Hub, written: Path) -> None:
    local = written / "bfloat16"
    said = hub.succeed(("push", local, REPO, "--message", "first"))
    assert f"pushed to {hub.server.url}/{REPO}/commit/" in said
    assert f'drift_fast.attach(trainer, "{REPO}")' in said
    assert hub.server.messages == ["first"]
    files = hub.server.files_of(REPO)
    names = {path.name for path in local.iterdir()}
    assert len(names) > 4
    assert files.keys() == names | {".gitattributes", "README.md"}
    assert all(files[name] == (local / name).read_bytes() for name in names - {"drift.json"})

    found, here = hub.read(REPO, local)
    assert found["sums"] == here["sums"]
    commit = hub.server.commit_of(REPO, "main")
    assert f"at {REPO}@{commit}" in found["repr"]
    shards = [name for name in names if name.endswith(".safetensors")]
    total = sum((local / name).stat().st_size for name in shards)
    assert hub.server.cdn.nbytes < 1.01 * total + len(shards) * START_NBYTES
    assert not any("authorization" in request.headers for request in hub.server.cdn.requests)
    assert_unseen(TOKEN, hub.folder / "cache", hub.said)


def test_what_is_pushed_names_no_directory_of_this_machine(
    hub: Hub, delta: Path, tmp_path: Path, pair: Pair
) -> None:
    local = Delta.open(delta)
    total = Delta.combine([(local, 0.5), (local, 0.25)]).save(tmp_path / "sum")
    hub.succeed(("push", delta, REPO), ("push", total.path, "org/sum"))
    for repo in (REPO, "org/sum"):
        files = hub.server.files_of(repo)
        for name, content in files.items():
            assert isinstance(content, bytes)
            for secret in (str(tmp_path), str(pair.reasoning.parent), "/tmp", "/home"):
                assert secret.encode() not in content, name
    card = files["README.md"]
    assert isinstance(card, bytes)
    assert "0.25 × the delta `delta`" in card.decode()
    sent = json.loads(files["drift.json"])  # type: ignore[arg-type]
    here = json.loads((tmp_path / "sum" / "drift.json").read_text())
    assert {**here, "sources": None} == {**sent, "sources": None}


def test_a_card_has_the_sources_their_licenses_and_how_delta_came_about(
    hub: Hub, delta: Path, pair: Pair, tmp_path: Path
) -> None:
    text = (delta / "drift.json").read_text()
    described = json.loads(text)
    hub.server.repos = hub.server.written = {
        **hub.server.written,
        "org/r1": {FIRST: {"README.md": CARD % b"mit"}},
    }
    described["sources"]["reasoning"] |= {"repo": "org/r1", "revision": FIRST}
    folder = tmp_path / "vlm | `model`"
    folder.mkdir()
    (folder / "README.md").write_bytes(
        CARD % b"other\nlicense_name: research-only\nlicense_link: https://host/terms"
    )
    described["sources"]["multimodal"]["path"] = str(folder)
    (delta / "drift.json").write_text(json.dumps(described))
    hub.succeed(("push", delta, REPO))
    raw = hub.server.files_of(REPO)["README.md"]
    assert isinstance(raw, bytes)
    card = raw.decode()
    front = front_of(raw)
    assert front["base_model"] == ["org/r1"]
    assert front["base_model_relation"] == "merge"
    assert front["library_name"] == "drift_fast"
    assert "license" not in front
    assert f"| reasoning | [`org/r1`](https://huggingface.co/org/r1) | `{FIRST}` | `mit` |" in card
    terms = "[`research-only`](https://host/terms)"
    assert f"| multimodal | `vlm / 'model'` | unknown | {terms} |" in card
    assert f"drift_fast `{described['drift_fast_version']}`" in card
    assert "stored as `bfloat16`" in card
    assert "selected: `modules=attn,mlp`" in card
    for row in Delta.open(delta).stats.by_module():
        assert re.search(rf"^{row.name} .* {row.delta_norm:.4g} ", card, re.MULTILINE)
    snippet = re.search(r"```python\n(.*?)```", card, re.DOTALL)
    assert snippet is not None
    code = snippet[1].replace("drift_fast.attach", "print")
    done = python(f"trainer = None\n{code}", env=hub.variables())
    assert "mlp.up_proj" in done.stdout


def test_a_source_whose_card_cannot_be_read_has_an_unknown_license(
    hub: Hub, delta: Path, tmp_path: Path
) -> None:
    hub.server.gated.add("org/gated")
    described = json.loads((delta / "drift.json").read_text())
    described["sources"]["reasoning"] |= {"repo": "org/gated", "revision": FIRST}
    folder = tmp_path / "odd"
    folder.mkdir()
    (folder / "README.md").write_bytes(b"---\nlicense: [\n---\n\xff")
    described["sources"]["multimodal"]["path"] = str(folder)
    (delta / "drift.json").write_text(json.dumps(described))
    hub.succeed(("push", delta, REPO))
    card = hub.server.files_of(REPO)["README.md"]
    assert isinstance(card, bytes)
    assert card.decode().count("| unknown |\n") == 2
    assert "check it before you use" in card.decode()


def test_a_second_push_replaces_the_first_and_keeps_what_a_person_added_to_the_metadata(
    hub: Hub, written: Path, delta: Path
) -> None:
    hub.succeed(("push", written / "bfloat16", REPO))
    first = hub.server.commit_of(REPO, "main")
    files = hub.server.written[REPO][first]
    card = files["README.md"]
    assert isinstance(card, bytes)
    files["README.md"] = card.replace(b"---\n", b"---\nlicense: mit\n", 1)
    files["notes.txt"] = b"mine"
    hub.succeed(("push", delta, REPO))
    after = hub.server.files_of(REPO)
    assert sorted(name for name in after if name.startswith("delta-")) == [
        "delta-00001-of-00001.safetensors"
    ]
    assert after["notes.txt"] == b"mine"
    assert front_of(after["README.md"])["license"] == "mit"
    # What was pushed first is still there, at its commit.
    (found,) = hub.read(f"{REPO}@{first}")
    assert found["sums"].keys() == set(Delta.open(written / "bfloat16"))


def test_a_branch_is_created_and_read_by_its_name(hub: Hub, delta: Path) -> None:
    command = "push", delta, REPO, "--private", "--revision", "v1"
    hub.succeed(command, command)
    assert hub.server.private == {REPO}
    assert hub.server.files_of(REPO).keys() == {".gitattributes"}
    card = hub.server.files_of(REPO, "v1")["README.md"]
    assert isinstance(card, bytes)
    assert f'Delta.open("{REPO}@v1")' in card.decode()
    hub.read(f"{REPO}@v1")


def test_a_delta_of_the_hub_is_pushed_on_with_all_of_its_bytes(hub: Hub, delta: Path) -> None:
    hub.succeed(("push", delta, REPO), ("push", REPO, "org/second"))
    first, second = hub.server.files_of(REPO), hub.server.files_of("org/second")
    assert first.keys() == second.keys()
    assert all(first[name] == second[name] for name in first if name != "README.md")


def test_commands_take_the_hub_id_of_a_delta_where_they_take_a_directory(
    hub: Hub, delta: Path, pair: Pair, tmp_path: Path
) -> None:
    model = with_config(pair.multimodal, tmp_path / "model")
    merge_of = "merge", "task_arithmetic", "--weight", "0.5"
    hub.succeed(
        ("push", delta, REPO),
        (*merge_of, REPO, model, "-o", tmp_path / "a"),
        (*merge_of, delta, model, "-o", tmp_path / "b"),
        ("report", tmp_path / "page.html", REPO),
    )
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    commit = hub.server.commit_of(REPO, "main")
    source = json.loads((tmp_path / "a" / "merge.json").read_text())["sources"]["reasoning"]
    assert (source["repo"], source["revision"]) == (REPO, commit)
    assert UP in (tmp_path / "page.html").read_text()
    (said,) = hub.refuse(("report", tmp_path / "other.html", "org/page"))
    assert "expected a delta" in said


# ------------------------------------------------------------------ refusals


def test_an_id_that_is_not_a_delta_says_what_it_is(hub: Hub, tmp_path: Path) -> None:
    hub.server.gated.add("org/gated")
    expected = {
        "org/model": ["a model, not a delta", "compute_delta"],
        "org/page": ["expected a directory with drift.json", "README.md"],
        "org/unknown": ["no such model", "hf auth login"],
        "org/gated": ["restricted", f"{hub.server.url}/org/gated"],
        "org/model@nowhere": ["no such branch"],
    }
    refusals = hub.refuse(*(("push", named, REPO) for named in expected))
    for (named, words), said in zip(expected.items(), refusals, strict=True):
        for word in (named, *words):
            assert word in said
    assert REPO not in hub.server.written


def test_offline_or_without_a_network_a_delta_says_what_to_do(hub: Hub, delta: Path) -> None:
    both = ("push", REPO, "org/other"), ("push", delta, REPO)
    assert all("HF_HUB_OFFLINE" in said for said in hub.refuse(*both, HF_HUB_OFFLINE=1))
    assert not hub.server.requests
    with RangeServer({}) as gone:
        pass
    assert all("check the network" in said for said in hub.refuse(*both, HF_ENDPOINT=gone.url))


def test_a_delta_of_the_hub_that_was_downloaded_whole_opens_offline(hub: Hub, delta: Path) -> None:
    hub.succeed(("push", delta, REPO))
    whole = "import sys, huggingface_hub\nhuggingface_hub.snapshot_download(sys.argv[1])"
    python(whole, REPO, env=hub.variables())
    hub.server.requests.clear()
    hub.read(REPO, HF_HUB_OFFLINE=1)
    assert not hub.server.requests


def test_a_snapshot_without_its_description_is_completed_from_the_hub(
    hub: Hub, delta: Path
) -> None:
    hub.succeed(("push", delta, REPO))
    names = [path.name for path in delta.iterdir() if path.name != "drift.json"]
    some = (
        "import sys, huggingface_hub\n"
        "for name in sys.argv[2:]: huggingface_hub.hf_hub_download(sys.argv[1], name)"
    )
    python(some, REPO, *names, env=hub.variables())
    hub.read(REPO)


def test_a_configuration_names_a_delta_of_the_hub_and_takes_another_name_for_a_directory(
    hub: Hub, delta: Path, pair: Pair
) -> None:
    setup = ("setup", "trl", pair.reasoning, pair.multimodal, "--delta")
    pushed, config, other = hub.run(("push", delta, REPO), (*setup, REPO), (*setup, "runs/delta"))
    assert pushed["status"] == config["status"] == other["status"] == 0
    assert f'"{REPO}"' in config["out"]
    assert "drift-fast delta" not in config["out"]
    assert "--out runs/delta" in other["out"]
    assert "runs/delta is taken for a directory" in other["err"]


def test_a_path_of_python_is_never_taken_for_a_hub_id() -> None:
    with pytest.raises(FileNotFoundError, match="no such file or directory"):
        Delta.open(Path(REPO))


def test_a_push_without_the_right_to_write_sends_nothing(hub: Hub, delta: Path) -> None:
    (said,) = hub.refuse(("push", delta, REPO), HF_TOKEN="")
    assert "there is no token" in said
    assert "hf auth login" in said
    assert not hub.server.requests
    (said,) = hub.refuse(("push", delta, REPO), HF_TOKEN=READER)
    assert "403" in said
    assert "a token that may write there" in said
    assert REPO not in hub.server.written
    assert not hub.server.cdn.files


def test_a_repository_of_something_else_is_never_written_to(hub: Hub, delta: Path) -> None:
    before = hub.server.files_of("org/model")
    command = "push", delta
    other, public = hub.refuse((*command, "org/model"), (*command, "org/page", "--private"))
    assert "not a delta" in other
    assert "push to another name" in other
    assert hub.server.files_of("org/model") == before
    assert "public" in public
    assert hub.server.files_of("org/page").keys() == {"README.md"}


def test_an_upload_that_breaks_off_commits_nothing_and_goes_on(hub: Hub, delta: Path) -> None:
    hub.server.large_nbytes = 1024
    # Answers of a store of files that no client tries again.
    hub.server.cdn.write_faults.extend([Fault(status=403)] * 3)
    (said,) = hub.refuse(("push", delta, REPO))
    assert "broke off" in said
    assert "push again" in said
    assert hub.server.files_of(REPO).keys() == {".gitattributes"}
    # Files that had not begun when the first one failed have taken none.
    hub.server.cdn.write_faults.clear()
    hub.succeed(("push", delta, REPO))
    assert "drift.json" in hub.server.files_of(REPO)


def test_a_damaged_delta_is_not_pushed(hub: Hub, delta: Path) -> None:
    shard = next(delta.glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    assert zlib.crc32(data) != zlib.crc32(shard.read_bytes())
    shard.write_bytes(data)
    (said,) = hub.refuse(("push", delta, REPO))
    assert "checksum" in said
    assert hub.server.files_of(REPO).keys() == {".gitattributes"}


@pytest.mark.parametrize(
    "sources", [{"combined": "abc"}, {"combined": None}, {"combined": [1]}, {"protected": "x"}]
)
def test_sources_of_any_other_form_are_refused_before_anything_is_created(
    hub: Hub, delta: Path, sources: dict[str, Any]
) -> None:
    described = json.loads((delta / "drift.json").read_text())
    (delta / "drift.json").write_text(json.dumps({**described, "sources": sources}))
    (said,) = hub.refuse(("push", delta, REPO))
    assert "the sources are not what drift_fast writes" in said
    assert not hub.server.requests


def test_what_is_no_hub_id_or_not_on_disk_is_not_pushed(pair: Pair, delta: Path) -> None:
    for name in ("delta", "a/b/c", "../delta", "org/name@main", "https://host/org/name"):
        with refused(ValueError, name, "org/name"):
            Delta.open(delta).push_to_hub(name)
    with refused(ValueError, "not on disk", "save"):
        compute_delta(pair.reasoning, pair.multimodal).push_to_hub(REPO)


def test_without_huggingface_hub_a_push_says_what_to_install(hub: Hub, delta: Path) -> None:
    program = commands.without("huggingface_hub")
    done = commands.run("push", delta, REPO, program=program, env=hub.variables())
    assert done.returncode == 1
    assert "pip install 'drift-fast[hub]'" in done.stderr
    assert "Traceback" not in done.stderr
