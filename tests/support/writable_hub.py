"""The Hub for those who upload, as huggingface_hub sees it: repositories, branches, commits, LFS.

Owns what a commit may hold: large files as pointers to content that arrived whole before, the rest
inside of it. Invariant: a commit is made as a whole or refused.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Callable, Mapping
from typing import Any

import yaml

from support.range_server import Content, HubServer, RangeServer, Reply, Request

_REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"


class WritableHub(HubServer):
    """A Hub where `writers`, the tokens that may write, create repositories and commit.

    `heads` holds the commit of each branch that was written, by id and branch; `private` ids are
    those created so. Files of at least `large_nbytes` are uploaded to `cdn`.
    """

    def __init__(
        self, repos: Mapping[str, Mapping[str, Mapping[str, Content]]], cdn: RangeServer
    ) -> None:
        super().__init__({}, cdn)
        self.repos = self.written = {repo: dict(kept) for repo, kept in repos.items()}
        self.heads: dict[tuple[str, str], str] = {}
        self.private: set[str] = set()
        self.writers: set[str] = set()
        self.messages: list[str] = []
        cdn.accepts = True

    def commit_of(self, repo: str, revision: str) -> str:
        return self.heads.get((repo, revision)) or super().commit_of(repo, revision)

    def files_of(self, repo: str, revision: str = "main") -> dict[str, Content]:
        """Return the files of a commit or branch."""
        return dict(self.written[repo][self.commit_of(repo, revision)])

    def reply(self, request: Request) -> Reply:
        for method, pattern, answer in _ANSWERS:
            found = re.fullmatch(pattern, request.path)
            if found is not None and method == request.method:
                token = request.headers.get("authorization", "").removeprefix("Bearer ")
                if method != "GET" and token not in self.writers:
                    return _refusal(403 if token else 401, "Invalid username or password.")
                sent = {} if answer is _commit or not request.body else json.loads(request.body)
                return answer(self, request, sent, **found.groupdict())
        return super().reply(request)


def _told(value: Any, status: int = 200) -> Reply:
    return Reply(status, {"Content-Type": "application/json"}, json.dumps(value).encode())


def _refusal(status: int, why: str, code: str | None = None) -> Reply:
    reply = _told({"error": why}, status)
    if code is not None:
        reply.headers["X-Error-Code"] = code
    return reply


def _create(hub: WritableHub, request: Request, sent: Any) -> Reply:
    repo = f"{sent['organization']}/{sent['name']}"
    url = f"{hub.url}/{repo}"
    if repo in hub.written:
        return _told({"error": "You already created this model repo", "url": url}, 409)
    # Versions differ in how they say it.
    if sent.get("private") or sent.get("visibility") == "private":
        hub.private.add(repo)
    _add_commit(hub, repo, "main", {".gitattributes": b""})
    return _told({"url": url, "name": repo})


def _about(
    hub: WritableHub, request: Request, sent: Any, repo: str, revision: str | None = None
) -> Reply:
    if repo not in hub.written:
        return _refusal(404, "Repository not found", "RepoNotFound")
    commit = hub.commit_of(repo, revision or "main")
    return _told({"id": repo, "sha": commit, "private": repo in hub.private, "xetEnabled": False})


def _create_branch(
    hub: WritableHub, request: Request, sent: Any, repo: str, revision: str
) -> Reply:
    if (repo, revision) in hub.heads:
        return _refusal(409, "Reference already exists")
    hub.heads[repo, revision] = hub.commit_of(repo, "main")
    return _told({})


def _validate(hub: WritableHub, request: Request, sent: Any) -> Reply:
    """Check what the Hub checks of the metadata of a card that this package writes."""
    front = re.match(r"---\n(.*?)\n---\n", sent["content"], re.DOTALL)
    stated = yaml.safe_load(front[1]) if front else {}
    errors = [
        f'"{key}" is not valid'
        for key, is_valid in _VALID.items()
        if key in stated and not is_valid(stated[key])
    ]
    told = {"errors": [{"message": error} for error in errors], "warnings": []}
    return _told(told, 400 if errors else 200)


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, str) for one in value)


_VALID: dict[str, Callable[[Any], bool]] = {
    "base_model": lambda v: _is_texts(v) and all(re.fullmatch(r"[\w.-]+/[\w.-]+", n) for n in v),
    "base_model_relation": lambda v: v in {"adapter", "merge", "quantized", "finetune"},
    "tags": _is_texts,
    "library_name": lambda v: isinstance(v, str),
    "license": lambda v: v in {"mit", "apache-2.0", "other"},
}


def _preupload(hub: WritableHub, request: Request, sent: Any, repo: str, revision: str) -> Reply:
    if repo not in hub.written:
        return _refusal(404, "Repository not found", "RepoNotFound")
    modes = [
        {
            "path": file["path"],
            "uploadMode": "lfs" if file["size"] >= hub.large_nbytes else "regular",
            "shouldIgnore": False,
        }
        for file in sent["files"]
    ]
    return _told({"files": modes})


def _batch(hub: WritableHub, request: Request, sent: Any, repo: str) -> Reply:
    def actions(oid: str) -> dict[str, Any]:
        if f"/upload/{oid}" in hub.cdn.files:
            return {}
        # By another host name, as large files are read.
        upload = f"http://localhost:{hub.cdn.port}/upload/{oid}?Signature={hub.signature}"
        verify = {"href": f"{hub.url}/api/lfs/verify"}
        return {"actions": {"upload": {"href": upload}, "verify": verify}}

    objects = [one | actions(one["oid"]) for one in sent["objects"]]
    return _told({"transfer": "basic", "objects": objects})


def _verify(hub: WritableHub, request: Request, sent: Any) -> Reply:
    arrived = _arrived(hub, sent["oid"], sent["size"])
    return _refusal(404, "not uploaded") if arrived is None else _told({})


def _commit(hub: WritableHub, request: Request, sent: Any, repo: str, revision: str) -> Reply:
    files = hub.files_of(repo, revision)
    for line in request.body.splitlines():
        entry = json.loads(line)
        value = entry["value"]
        if entry["key"] == "header":
            hub.messages.append(value["summary"])
        elif entry["key"] == "file":
            content = base64.b64decode(value["content"])
            assert len(content) < hub.large_nbytes, "what is large goes by LFS"
            files[value["path"]] = content
        elif entry["key"] == "lfsFile":
            arrived = _arrived(hub, value["oid"], value["size"])
            if arrived is None:
                return _refusal(400, f"{value['path']} was not uploaded")
            files[value["path"]] = arrived
        else:
            assert entry["key"] == "deletedFile", entry["key"]
            del files[value["path"]]
    commit = _add_commit(hub, repo, revision, files)
    url = f"{hub.url}/{repo}/commit/{commit}"
    return _told({"success": True, "commitOid": commit, "commitUrl": url})


def _arrived(hub: WritableHub, oid: str, nbytes: int) -> bytes | None:
    content = hub.cdn.files.get(f"/upload/{oid}", b"")
    assert isinstance(content, bytes)
    is_whole = len(content) == nbytes and hashlib.sha256(content).hexdigest() == oid
    return content if is_whole else None


def _add_commit(hub: WritableHub, repo: str, revision: str, files: dict[str, Content]) -> str:
    commits = hub.written.setdefault(repo, {})
    commit = hashlib.sha1(f"{repo} {len(commits)}".encode()).hexdigest()
    commits[commit] = files
    hub.heads[repo, revision] = commit
    return commit


_ANSWERS: list[tuple[str, str, Callable[..., Reply]]] = [
    ("POST", "/api/repos/create", _create),
    ("POST", "/api/validate-yaml", _validate),
    ("POST", "/api/lfs/verify", _verify),
    ("GET", rf"/api/models/{_REPO}", _about),
    ("GET", rf"/api/models/{_REPO}/revision/(?P<revision>[^/]+)", _about),
    ("POST", rf"/api/models/{_REPO}/branch/(?P<revision>[^/]+)", _create_branch),
    ("POST", rf"/api/models/{_REPO}/preupload/(?P<revision>[^/]+)", _preupload),
    ("POST", rf"/api/models/{_REPO}/commit/(?P<revision>[^/]+)", _commit),
    ("POST", rf"/{_REPO}\.git/info/lfs/objects/batch", _batch),
]
