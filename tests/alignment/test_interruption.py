"""Ctrl-C is heard while names are aligned, in every verb that aligns, and leaves nothing behind.

A child process presses Ctrl-C every few milliseconds, and its handler raises only in the aligning
call of the core: Python's profiler says which call the main thread is in, and runs no other code
between its two reports of that call. So what a verb raises comes from the core's own look for
signals. Names that end alike take the time of several such looks, one each 50 ms.
"""

from __future__ import annotations

import json
from pathlib import Path

from support.processes import python
from support.synthetic import everything_under, write_raw

# Of the pairs of prefixes that these names allow, 490,000, each is counted.
NAMES = 700
PRESSES = """
import os, signal, sys, threading, time
import drift_fast
from drift_fast.cli.main import main

inside = False
heard = 0

def watch(frame, event, function):
    global inside
    if event.startswith("c_") and getattr(function, "__module__", "") == "drift_fast._core":
        inside = event == "c_call" and function.__name__ == "align"

def hear(number, frame):
    global heard
    if inside and frame.f_code is not watch.__code__:
        heard += 1
        raise KeyboardInterrupt

def press():
    while True:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)

signal.signal(signal.SIGINT, hear)
threading.Thread(target=press, daemon=True).start()
left, right, out = sys.argv[1:]
VERBS = {
    "align": lambda: drift_fast.align(left, right),
    "check": lambda: drift_fast.check(left, right),
    "inspect": lambda: drift_fast.inspect(left, right),
    "compute_delta": lambda: drift_fast.compute_delta(left, right, out),
    "merge": lambda: drift_fast.merge("linear", left, right, out, weight=0.5),
    "drift-fast align": lambda: main(["align", left, right]),
    "drift-fast delta": lambda: main(["delta", left, right, "--out", out]),
}
for name, verb in VERBS.items():
    before = heard
    sys.setprofile(watch)
    try:
        told = verb()
    except BaseException as error:
        told = type(error).__name__
    sys.setprofile(None)
    inside = False
    print(name, told, heard - before, sep=", ", flush=True)
os._exit(0)
"""


def write_names(directory: Path, letter: str) -> Path:
    """Write a checkpoint of tensors without elements that end alike."""
    entry = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    names = [f"{letter}{number}.x.weight" for number in range(NAMES)]
    write_raw(directory / "model.safetensors", json.dumps(dict.fromkeys(names, entry)))
    (directory / "config.json").write_text("{}")
    return directory


def test_every_verb_hears_ctrl_c_while_names_are_aligned(tmp_path: Path) -> None:
    left = write_names(tmp_path / "left", "p")
    right = write_names(tmp_path / "right", "q")
    before = everything_under(tmp_path)
    ended = python(PRESSES, left, right, tmp_path / "out")
    assert ended.stdout.splitlines() == [
        "align, KeyboardInterrupt, 1",
        "check, KeyboardInterrupt, 1",
        "inspect, KeyboardInterrupt, 1",
        "compute_delta, KeyboardInterrupt, 1",
        "merge, KeyboardInterrupt, 1",
        "drift-fast align, 130, 1",
        "drift-fast delta, 130, 1",
    ]
    assert ended.stderr.count("interrupted; nothing was left behind") == 2
    assert everything_under(tmp_path) == before
