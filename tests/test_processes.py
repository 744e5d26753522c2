"""The harness for child processes ends what it started, and shows why something failed."""

from __future__ import annotations

import signal
import sys
import time
from pathlib import Path

import pytest

from support.processes import TESTS, Child, environment, finish, python, run, wait

SLEEPS = "import time; print('ready', flush=True); time.sleep(60)"
# Starts a child of its own and prints its number.
PARENT = f"""
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", {SLEEPS!r}], stdout=subprocess.DEVNULL)
print(child.pid, flush=True)
child.wait()
"""
# The same, of a child that does not end when it is asked to, which it has from its parent.
STUBBORN = f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n{PARENT}".replace(
    "print(child.pid", "signal.signal(signal.SIGTERM, signal.SIG_DFL); print(child.pid"
)
INTERRUPTS = f"""
import signal, sys
from support.processes import Child
child = Child(sys.executable, "-c", {SLEEPS!r})
child.wait_until(lambda: "ready" in child.stdout)
child.send(signal.SIGINT)
print("KeyboardInterrupt" in child.finish(20).stderr)
"""


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def test_a_child_can_be_interrupted_where_its_parent_cannot() -> None:
    # What a shell does for `nohup` and `&`.
    background = ["bash", "-c", 'trap "" INT; exec "$@"', "bash"]
    found = run(*background, sys.executable, "-c", INTERRUPTS, env=environment(PYTHONPATH=TESTS))
    assert found.stdout == "True\n"


both = pytest.mark.parametrize("forked", [False, True], ids=["started", "forked"])


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs Linux's list of processes")
@both
@pytest.mark.parametrize("program", [PARENT, STUBBORN], ids=["willing", "stubborn"])
def test_a_time_limit_ends_a_process_with_all_that_it_started(program: str, forked: bool) -> None:
    parent = Child(sys.executable, "-c", program, forked=forked)
    parent.wait_until(lambda: parent.stdout.endswith("\n"))
    started = int(parent.stdout)
    assert is_running(started)
    with pytest.raises(AssertionError, match=r"still running after 0\.1 s") as caught:
        parent.finish(0.1)
    assert str(started) in str(caught.value), "what it printed is not shown"
    # It is not the test's own child, so nobody has waited for it.
    end = time.monotonic() + 30
    while is_running(started) and time.monotonic() < end:
        time.sleep(0.01)
    assert not is_running(started)


@both
def test_others_are_ended_once_one_has_failed(forked: bool) -> None:
    fails = Child(sys.executable, "-c", "import sys; sys.exit(3)", forked=forked)
    others = [Child(sys.executable, "-c", SLEEPS, forked=forked) for _ in range(2)]
    assert wait([fails, *others], 60, grace=0.1) == "exit codes [3, None, None]"
    assert [other.returncode for other in others] == [-signal.SIGTERM] * 2


@both
def test_a_failure_shows_what_was_written(forked: bool) -> None:
    code = "import sys; print('out'); sys.exit('the reason')"
    with pytest.raises(AssertionError, match=r"(?s)exit status 1.*out.*the reason"):
        python(code, forked=forked)
    assert finish([Child(sys.executable, "-c", code, forked=forked)])[0].returncode == 1


def test_a_forked_process_is_one_of_its_own_that_has_torch_loaded(tmp_path: Path) -> None:
    (tmp_path / "beside.py").write_text("VALUE = 7\n")
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\n"
        "print('torch' in sys.modules, __name__)\n"
        "import atexit, beside, os\n"
        "atexit.register(print, 'at exit')\n"
        "print(beside.VALUE, sys.argv[1:], sys.stdin.read(), os.environ['ONLY'], os.getcwd())\n"
        "print(os.environ.get('HOME'), file=sys.stderr)\n"
    )
    found = run(
        *(sys.executable, script, "a b"), env={"ONLY": "here"}, cwd=TESTS, stdin="in", forked=True
    )
    assert found.stdout == f"True __main__\n7 ['a b'] in here {TESTS}\nat exit\n"
    assert found.stderr == "None\n"
