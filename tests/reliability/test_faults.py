"""No system call that fails, and no kill, leaves something that opens and is not whole.

Each run is a process of its own in which one call on the files concerned fails, or before which it
is killed (`support/faults.c`); `support/fault_worker.py` says what must hold after it and after the
next. The number of the call stands for the moment, so that nothing depends on timing.
"""

from __future__ import annotations

import errno
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from drift_fast import compute_delta
from support.synthetic import write_pair

SUPPORT = Path(__file__).parents[1] / "support"
KILL = 0
# A delta and a merged model to a place that is new, taken by an earlier one, or an empty directory.
VERBS = [
    f"{kind} {place}" for kind in ("delta", "merge") for place in ("new", "over", "within")
] + ["int8 new", "save over"]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The compiled `faults.c`."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if not sys.platform.startswith("linux") or compiler is None:
        pytest.skip("needs Linux and a C compiler")
    path = tmp_path_factory.mktemp("faults") / "faults.so"
    command = [compiler, "-O1", "-shared", "-fPIC", "-o", str(path), str(SUPPORT / "faults.c")]
    built = subprocess.run(command, capture_output=True, text=True)
    if built.returncode:
        pytest.skip(f"faults.c does not compile here: {built.stderr[-300:]}")
    return path


def runs_of(verb: str, library: Path, directory: Path, **given: Any) -> dict[str, Any]:
    """Run the worker over a small pair; return what it found."""
    sources = directory / "field" / "sources"
    write_pair(sources, shards=2, layers=1)
    (sources / "vlm" / "config.json").write_text('{"model_type": "llava"}')
    if verb.startswith("save"):
        pair = sources / "text", sources / "vlm"
        compute_delta(*pair, sources / "delta", modules=("attn", "mlp"))
        compute_delta(*pair, sources / "other", modules="attn")
    given |= {"library": str(library), "directory": str(directory), "verb": verb}
    command = [sys.executable, str(SUPPORT / "fault_worker.py"), json.dumps(given)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    if "unavailable" in found:
        pytest.skip(f"seccomp is not available here: {found['unavailable']}")
    return found


@pytest.mark.parametrize("error", [errno.EIO, KILL])
@pytest.mark.parametrize("verb", ["delta over", "merge new"])
def test_a_few_calls(verb: str, error: int, library: Path, tmp_path: Path) -> None:
    found = runs_of(verb, library, tmp_path, errors=[error], calls=12)
    assert found["runs"] >= 8
    assert found["wrong"] == []


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("verb", VERBS)
def test_every_call_fails_once(verb: str, library: Path, tmp_path: Path) -> None:
    # One error at every call, and the others at every seventh.
    errors = [errno.EIO, errno.ENOSPC, errno.EINTR, errno.EMFILE]
    often = errors[VERBS.index(verb) % len(errors)]
    found = runs_of(verb, library, tmp_path / "all", errors=[often], calls=10**6)
    assert found["runs"] == found["calls"] > 150
    rest = [error for error in errors if error != often]
    others = runs_of(verb, library, tmp_path / "some", errors=rest, calls=found["calls"] // 7)
    assert found["wrong"] + others["wrong"] == []


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("verb", VERBS)
def test_kills_at_moments_spread_over_a_run(verb: str, library: Path, tmp_path: Path) -> None:
    found = runs_of(verb, library, tmp_path, errors=[KILL], calls=50)
    assert found["runs"] >= 25
    assert found["wrong"] == []
