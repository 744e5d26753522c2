"""One verb run over and over, each time with another system call failing, or killed before it.

Run as a process of its own, which forks one for every run: it has no threads, and has imported what
the verb needs. The argument is JSON: `library` (faults.c, compiled), `directory` (with sources),
`verb`, `errors` (numbers; 0 kills), and `calls`, the most calls to try, spread over all of them.
Prints JSON: how many calls there are, how many runs were made, and what was wrong with any.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from drift_fast import Delta, DriftError, compute_delta
from drift_fast.merging.merge import merge

Content = dict[str, bytes]
# What the verb writes into, and all that the faults concern, is below this.
FIELD = "field"
# What no failing call is.
NOT_FAULTS = ("foreign", "signal", "FileNotFoundError", "FileExistsError")


class Verb:
    """What is done, with what was there before; every output is `field/made/out`."""

    def __init__(self, directory: Path, name: str) -> None:
        self.field = directory / FIELD
        self.out = self.field / "made" / "out"
        self.sources = self.field / "sources"
        self.kind, _, self.place = name.partition(" ")
        self.description = "merge.json" if self.kind == "merge" else "drift.json"
        self.old: Content = {}
        self.expected: Content = {}

    def prepare(self, whole: Path) -> None:
        """Bring back what is there before a run; `whole` is another output of this kind."""
        shutil.rmtree(self.out.parent, ignore_errors=True)
        if self.place == "over":
            shutil.copytree(whole, self.out)
            self.old = content(whole)
        elif self.place == "within":
            self.out.mkdir(parents=True)

    def act(self, *, overwrite: bool, other: bool = False) -> None:
        reasoning, multimodal = self.sources / "text", self.sources / "vlm"
        options: dict[str, Any] = {"overwrite": overwrite, "threads": 2, "max_shard_size": 700}
        options |= {"modules": "attn" if other else ("attn", "mlp")}
        if self.kind == "merge":
            options |= {"weight": 0.25 if other else 0.75, "modules": ("attn", "mlp")}
            merge("linear", reasoning, multimodal, self.out, **options)
        elif self.kind == "save":
            del options["threads"], options["modules"]
            Delta.open(self.sources / ("other" if other else "delta")).save(self.out, **options)
        else:
            dtype = "int8" if self.kind == "int8" else "bfloat16"
            compute_delta(reasoning, multimodal, self.out, dtype=dtype, **options)

    def found(self) -> str:
        """Say what the output is now: nothing, empty, old, new, or broken in some way."""
        if not self.out.exists():
            return "nothing"
        # What is hidden in it is not part of it.
        now = {name: data for name, data in content(self.out).items() if name[0] != "."}
        if now == self.expected:
            return "new"
        if now and now == self.old:
            return "old"
        if self.description in now:
            return f"opens but is not whole: {sorted(now)}"
        return "nothing" if not now else f"left {sorted(now)}"


def content(directory: Path) -> Content:
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def forked(action: Callable[[], dict[str, Any]]) -> dict[str, Any] | None:
    """Return what an action returns in a process of its own; None where that was killed."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(reading)
            answer = json.dumps(action())
            os.write(writing, answer.encode())
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        text = pipe.read()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        if os.WTERMSIG(status) != signal.SIGKILL:
            return {"error": f"signal {os.WTERMSIG(status)}", "kind": "signal"}
        return None
    return dict(json.loads(text))


def attempt(verb: Verb, library: str, at: int, error: int) -> dict[str, Any]:
    shim = ctypes.CDLL(library)
    started = shim.faults_start(os.fsencode(verb.field), at, error)
    if started:
        return {"unavailable": os.strerror(started)}
    told: dict[str, Any] = {}
    try:
        verb.act(overwrite=verb.place == "over")
    except (OSError, DriftError) as raised:
        told = {"kind": type(raised).__name__, "error": str(raised)}
        told |= {"errno": raised.errno if isinstance(raised, OSError) else None}
    except BaseException:
        told = {"kind": "foreign", "error": traceback.format_exc()}
    return told | {"seen": shim.faults_seen(), "call": shim.faults_failed()}


def wrong_with(verb: Verb, told: dict[str, Any] | None, error: int) -> list[str]:
    """Return what is wrong after a run, and after the next one, which nothing disturbs."""
    found, wrong = verb.found(), []
    if told is not None and told.get("kind") is None and found != "new":
        wrong.append(f"no error, but {found}")
    if told is not None and told.get("kind") is not None:
        # What opens is whole, also where it could not be read back.
        if found not in ("nothing", "old", "new"):
            wrong.append(f"an error, but {found}: {told['error']}")
        if told["kind"] in NOT_FAULTS or str(verb.field) not in told["error"]:
            wrong.append(f"not an error of the project: {told['kind']}: {told['error']}")
        if told.get("errno") not in (None, error):
            wrong.append(f"errno {told['errno']} in place of {error}: {told['error']}")
    if told is None and found.startswith("opens"):
        wrong.append(found)
    parent = verb.out.parent
    hidden = [str(p.relative_to(parent)) for p in parent.rglob(".*")] if parent.exists() else []
    if told is not None and hidden:
        wrong.append(f"left {hidden}")
    overwrite = (verb.out / verb.description).exists()
    after = forked(lambda: undisturbed(verb, overwrite=overwrite))
    if after is None or after.get("error"):
        wrong.append(f"the next run: {after and after['error']}")
    elif verb.found() != "new" or [p.name for p in parent.rglob(".*")]:
        wrong.append(f"the next run: {verb.found()}, beside it {os.listdir(parent)}")
    return wrong


def undisturbed(verb: Verb, *, overwrite: bool, other: bool = False) -> dict[str, Any]:
    try:
        verb.act(overwrite=overwrite, other=other)
    except BaseException:
        return {"error": traceback.format_exc()}
    return {}


def main(given: dict[str, Any]) -> dict[str, Any]:
    directory = Path(given["directory"])
    verb = Verb(directory, given["verb"])
    whole = directory / "whole"
    for other in (True, False):
        done = forked(lambda other=other: undisturbed(verb, overwrite=False, other=other))
        assert done == {}, done
        if other:
            verb.out.rename(whole)
    verb.expected = content(verb.out)
    verb.prepare(whole)
    counted = forked(lambda: attempt(verb, given["library"], 0, 0))
    assert counted is not None
    if "unavailable" in counted:
        return counted
    calls, runs, wrong = counted["seen"], 0, []
    before = content(verb.sources)
    step = max(1, -(-calls // given["calls"]))
    for error in given["errors"]:
        for at in range(1 + given.get("first", 0) % step, calls + 1, step):
            verb.prepare(whole)
            told = forked(lambda at=at, error=error: attempt(verb, given["library"], at, error))
            runs += 1
            call = "killed" if told is None else told.get("call")
            label = f"{given['verb']}, {errno.errorcode.get(error, 'SIGKILL')} at {at} ({call})"
            wrong += [f"{label}: {one}" for one in wrong_with(verb, told, error)]
    if content(verb.sources) != before:
        wrong.append("the sources were changed")
    return {"calls": calls, "runs": runs, "wrong": wrong, "ended": counted.get("error")}


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
