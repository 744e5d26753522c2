"""A model of the Hub is pinned to a commit, read by ranges, and its errors are explained."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from drift_fast._core import Checkpoint
from support.processes import python
from support.range_server import Content, Fault, HubServer, RangeServer
from support.remote import (
    CHANGED,
    FILE,
    INDEX,
    SHARDED,
    SHARDS,
    SINGLE,
    START_NBYTES,
    asking_hub,
    assert_unseen,
    check_held,
    has,
    index_of,
)

FIRST, SECOND = "1" * 40, "2" * 40
TOKEN = "hf_hush_hush"

# Opens and fetches in a process of its own: huggingface_hub reads its environment when imported.
AT_HUB = """
import json, logging, pathlib, sys
from drift_fast.checkpoints.remote import open_hub, attempts
logging.basicConfig(level=logging.DEBUG, stream=sys.stderr)
waits = []
attempts.sleep = lambda seconds, stop: waits.append(seconds)
results = []
for asked in json.load(sys.stdin):
    del waits[:]
    result = {}
    try:
        opened = open_hub(asked["repo"], asked.get("revision"), cache=pathlib.Path(sys.argv[1]))
        result |= {"directory": str(opened.directory), "url": opened.url, "repo": opened.repo}
        result |= {"revision": opened.revision, "etags": opened.etags}
        for wanted in asked.get("fetch", []):
            result["saved"] = opened.fetch(wanted).saved_nbytes
        result["small"] = {name: str(opened.optional_file(name)) for name in asked.get("small", [])}
    except Exception as error:
        result["error"], result["message"] = type(error).__name__, str(error)
        while error is not None:
            result.setdefault("chain", []).append(f"{error!r}")
            error = error.__cause__
    results.append(result | {"waits": list(waits)})
json.dump(results, sys.stdout)
"""

REPOS: dict[str, dict[str, dict[str, Content]]] = {
    "org/one": {
        FIRST: {SINGLE: FILE, "config.json": b"{}", "tokenizer.json": b"x" * 9000},
        SECOND: {SINGLE: CHANGED},
    },
    "org/many": {
        FIRST: {**SHARDS, INDEX: SHARDED[f"/m/{INDEX}"]},
        SECOND: {**SHARDS, INDEX: SHARDED[f"/m/{INDEX}"]},
    },
    "org/both": {FIRST: {**SHARDS, INDEX: SHARDED[f"/m/{INDEX}"], SINGLE: FILE}},
    "org/odd": {"..%2Fno-commit": {SINGLE: FILE}},
    "org/pickled": {FIRST: {"pytorch_model.bin": b"x"}},
    "org/empty": {FIRST: {"README.md": b"x"}},
    "org/wrong": {FIRST: {INDEX: index_of(layer="../x.safetensors")}},
}
# Repositories without a model at their root: their files, and what must be said.
OTHER_KINDS: dict[str, tuple[list[str], list[str]]] = {
    "org/adapter": (["adapter_config.json", "adapter_model.safetensors"], ["merge_and_unload"]),
    "org/gguf": (["model-Q4_K_M.gguf"], ["GGUF", "not read"]),
    "org/trained": (
        ["README.md", "checkpoint-9/model.safetensors", "checkpoint-10/model.safetensors"],
        ["hf download org/trained --include 'checkpoint-10/*' --local-dir .", "give checkpoint-10"],
    ),
    "org/native": (["consolidated.safetensors", "params.json"], ["give the file itself"]),
    "org/pipeline": (
        ["model_index.json", "text_encoder/model.safetensors", "unet/config.json"],
        ["diffusers", "text_encoder"],
    ),
    "org/pickles": (["pytorch_model-00001-of-00002.bin"], ["convert it to safetensors"]),
    "org/unindexed": ([*SHARDS], ["index is missing", "download"]),
}
REPOS |= {repo: {FIRST: dict.fromkeys(names, b"x")} for repo, (names, _) in OTHER_KINDS.items()}


class Hub:
    """A Hub and its CDN, and calls of `open_hub` in a child process."""

    def __init__(self, server: HubServer, directory: Path) -> None:
        self.server = server
        self.directory = directory
        self.log = ""

    def run(self, *asked: dict[str, Any], **environment: str) -> list[dict[str, Any]]:
        env = asking_hub(self.server.url, self.directory, TOKEN, **environment)
        done = python(AT_HUB, self.directory / "cache", env=env, stdin=json.dumps(asked))
        self.log += done.stderr
        results: list[dict[str, Any]] = json.loads(done.stdout)
        return results


@pytest.fixture
def hub(tmp_path: Path, cdn: RangeServer) -> Iterator[Hub]:
    with HubServer(REPOS, cdn) as started:
        started.branches = {"main": FIRST, "next": SECOND}
        yield Hub(started, tmp_path)


def test_a_hub_model_is_read_in_part_at_its_commit_and_the_token_stays_with_the_hub(
    hub: Hub, cdn: RangeServer
) -> None:
    wanted = [(1_000_000, 1_100_000), (3_000_000, 3_100_000)]
    one, many = hub.run(
        {
            "repo": "org/one",
            "fetch": [{SINGLE: wanted}, {SINGLE: [(4_000_000, 4_000_100)]}],
            "small": ["config.json", "tokenizer.json", "merges.txt"],
        },
        {
            "repo": "org/many",
            "revision": "main",
            "fetch": [{name: [(300_000, 400_000)] for name in SHARDS}],
        },
    )
    assert "error" not in one, one
    assert one["repo"] == "org/one"
    assert one["revision"] == many["revision"] == FIRST
    assert one["url"] == f"{hub.server.url}/org/one/resolve/{FIRST}/"
    assert one["saved"] == len(FILE) - 100
    directory = Path(one["directory"])
    assert re.fullmatch(rf"org-one-{FIRST}-[0-9a-f]{{16}}", directory.name)
    assert one["etags"][SINGLE].startswith("linked-")
    stored = json.loads((directory / f"{SINGLE}.ranges.json").read_text())
    assert stored["etag"] == one["etags"][SINGLE]
    for start, end in wanted:
        assert has(directory, start, end)
    check_held(directory, {SINGLE: FILE})
    assert one["small"] == {
        "config.json": str(directory / "config.json"),
        "tokenizer.json": str(directory / "tokenizer.json"),
        "merges.txt": "None",
    }
    assert (directory / "tokenizer.json").read_bytes() == b"x" * 9000
    assert len(Checkpoint(Path(many["directory"])).tensors()) == 3
    check_held(Path(many["directory"]), SHARDS)

    sizes = START_NBYTES + 200_000 + 100 + 3 * (START_NBYTES + 100_000) + 9000
    assert cdn.nbytes == sizes
    # After the first answers, which name the commit, no request names a branch.
    assert {request.path.split("/")[4] for request in hub.server.asked()} == {FIRST}
    assert all(f"Bearer {TOKEN}" == r.headers.get("authorization") for r in hub.server.requests)
    assert len(hub.server.requests) > 10
    assert cdn.requests
    assert not any("authorization" in request.headers for request in cdn.requests)
    assert_unseen(TOKEN, hub.directory, hub.log)
    # What the connections of huggingface_hub itself log at DEBUG is not ours to alter.
    lines = [line for line in hub.log.splitlines() if ":httpcore" not in line]
    assert any("/blob/" in line for line in lines)
    assert not any(hub.server.signature in line for line in lines)


def test_a_single_file_beside_an_index_is_read_with_a_warning(hub: Hub) -> None:
    (both,) = hub.run({"repo": "org/both"})
    assert list(both["etags"]) == [SINGLE]
    place = f"{hub.server.url}/org/both/resolve/{FIRST}/{INDEX}"
    assert f"{place} is beside {SINGLE}: the single file is read" in hub.log


def test_a_hub_model_is_gone_on_with_and_another_commit_is_another_directory(
    hub: Hub, cdn: RangeServer
) -> None:
    wanted = {SINGLE: [(1_000_000, 1_100_000)]}
    (first,) = hub.run({"repo": "org/one", "fetch": [wanted]})
    cdn.requests.clear()
    again, other = hub.run(
        {"repo": "org/one", "revision": FIRST, "fetch": [wanted]},
        {"repo": "org/one", "revision": "next", "fetch": [wanted]},
        HF_HUB_DISABLE_IMPLICIT_TOKEN="1",
    )
    assert again["directory"] == first["directory"]
    assert other["revision"] == SECOND
    assert other["directory"] != first["directory"]
    check_held(Path(other["directory"]), {SINGLE: CHANGED})
    assert cdn.nbytes == START_NBYTES + 100_000
    assert "authorization" not in hub.server.requests[-1].headers


def test_what_the_hub_refuses_says_what_to_do(hub: Hub) -> None:
    hub.server.gated.add("org/gated")
    gated, unknown, revision, pickled, empty, wrong, malformed = hub.run(
        {"repo": "org/gated"},
        {"repo": "org/unknown"},
        {"repo": "org/one", "revision": "nowhere"},
        {"repo": "org/pickled"},
        {"repo": "org/empty"},
        {"repo": "org/wrong"},
        {"repo": "org/../one"},
    )
    expected = [
        (gated, ["org/gated", "restricted", f"{hub.server.url}/org/gated", "hf auth login"]),
        (unknown, ["org/unknown", "no such model", "hf auth login"]),
        (revision, ["org/one@nowhere", "no such branch"]),
        (pickled, ["org/pickled", "pytorch_model.bin", "convert it to safetensors"]),
        (wrong, ["org/wrong", "layer", "../x.safetensors"]),
        (malformed, ["org/../one", "org/name"]),
    ]
    for result, words in expected:
        assert result["error"] == "CheckpointError", result
        assert not result["waits"], result
        for word in words:
            assert word in result["message"]
    assert empty["error"] == "FileNotFoundError"
    assert SINGLE in empty["message"]
    assert not any(name.endswith("x.safetensors") for name in os.listdir(hub.directory))
    assert_unseen(TOKEN, hub.directory, hub.log)


def test_a_repository_that_is_not_a_model_says_what_it_is(hub: Hub) -> None:
    results = hub.run(*({"repo": repo} for repo in OTHER_KINDS))
    for (repo, (_, words)), result in zip(OTHER_KINDS.items(), results, strict=True):
        assert result["error"] == "CheckpointError", result
        for word in (repo, *words):
            assert word in result["message"], result["message"]


def test_a_hub_that_cannot_be_asked_says_why(hub: Hub) -> None:
    (offline,) = hub.run({"repo": "org/one"}, HF_HUB_OFFLINE="1")
    assert offline["error"] == "CheckpointError"
    assert "HF_HUB_OFFLINE" in offline["message"]
    assert not hub.server.requests
    with RangeServer({}) as other:
        pass
    (gone,) = hub.run({"repo": "org/one"}, HF_ENDPOINT=other.url)
    assert gone["error"] == "CheckpointError"
    assert len(gone["waits"]) == 5


def test_a_server_that_is_no_hub_is_told_by_the_commit_it_does_not_name(hub: Hub) -> None:
    with RangeServer({f"/org/one/resolve/main/{SINGLE}": FILE}) as plain:
        (result,) = hub.run({"repo": "org/one"}, HF_ENDPOINT=plain.url)
    assert result["error"] == "CheckpointError"
    assert "HF_ENDPOINT" in result["message"]
    hub.server.branches["main"] = "..%2Fno-commit"
    (result,) = hub.run({"repo": "org/odd"})
    assert result["error"] == "CheckpointError"
    assert "HF_ENDPOINT" in result["message"]


def test_a_commit_that_the_hub_answers_with_another_is_an_error(hub: Hub) -> None:
    hub.server.branches[FIRST] = SECOND
    (result,) = hub.run({"repo": "org/many"})
    assert result["error"] == "CheckpointError"
    assert "at this commit" in result["message"]


def test_trouble_of_the_hub_and_its_cdn_is_waited_out_and_signatures_stay_unseen(
    hub: Hub, cdn: RangeServer
) -> None:
    # Not 429, which some versions of huggingface_hub wait out themselves.
    hub.server.head_faults.append(Fault(status=503, headers={"Retry-After": "7"}))
    hub.server.head_faults.append(Fault(status=503))
    cdn.faults.append(Fault(status=503, headers={"Retry-After": "9"}))
    cdn.faults.append(Fault(drop_after=1000))
    (result,) = hub.run({"repo": "org/one", "fetch": [{SINGLE: [(1_000_000, 1_100_000)]}]})
    assert "error" not in result, result
    assert result["waits"][0] == 7
    assert result["waits"][2] == 9
    assert len(result["waits"]) == 4
    check_held(Path(result["directory"]), {SINGLE: FILE})

    cdn.always = Fault(status=403)
    (result,) = hub.run(
        {"repo": "org/one", "fetch": [{SINGLE: [(2_000_000, 2_100_000)]}]},
    )
    assert result["error"] == "Forbidden"
    assert "hf auth login" in result["message"]
    assert hub.server.signature not in str(result)
    assert hub.server.asked()
    assert all(f"Bearer {TOKEN}" == r.headers.get("authorization") for r in hub.server.requests)


def test_content_that_changes_behind_the_hub_is_an_error(hub: Hub, cdn: RangeServer) -> None:
    etag = {"ETag": '"another"'}
    cdn.faults.extend([None, Fault(headers=etag)])
    (result,) = hub.run({"repo": "org/one", "fetch": [{SINGLE: [(1_000_000, 1_100_000)]}]})
    assert result["error"] == "CheckpointError"
    assert "the file changed on the server" in result["message"]
    # The first is for the index.
    hub.server.faults.extend([None, Fault(headers={"X-Linked-Etag": '"another"'})])
    (result,) = hub.run({"repo": "org/many"})
    assert result["error"] == "CheckpointError"
    assert "the file changed on the server" in result["message"]
