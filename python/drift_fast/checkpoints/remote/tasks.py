"""Run tasks in a few threads that an interrupt or the first failure ends."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

from drift_fast.checkpoints.remote.attempts import Stopped

CONNECTIONS = 8


def run_together(
    tasks: Sequence[Callable[[], object]],
    stop: threading.Event,
    tick: Callable[[], object] = lambda: None,
) -> None:
    """Run tasks in a few threads, calling `tick` on this one; the first failure ends all.

    Threads that hang in the network are left behind; they check `stop` before they do anything.

    Raises: what the first failing task raised, or what interrupted the caller.
    """
    pending = deque(tasks)
    failures: list[BaseException] = []

    def work() -> None:
        while not stop.is_set():
            try:
                task = pending.popleft()
            except IndexError:
                return
            try:
                task()
            except BaseException as error:
                failures.append(error)
                stop.set()

    # Not a pool of concurrent.futures, since Python would wait for its threads at exit.
    threads = [
        threading.Thread(target=work, name=f"drift_fast-{number}", daemon=True)
        for number in range(min(CONNECTIONS, len(tasks)))
    ]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            while thread.is_alive() and not failures:
                thread.join(0.05)
                tick()
    except BaseException:
        stop.set()
        raise
    finally:
        if stop.is_set():
            deadline = time.monotonic() + 1.0
            for thread in threads:
                if thread.ident is not None:
                    thread.join(max(0.0, deadline - time.monotonic()))
    if failures:
        raise next((error for error in failures if not isinstance(error, Stopped)), failures[0])
