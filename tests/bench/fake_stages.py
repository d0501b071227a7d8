"""Stages that measure nothing: each goes well, or wrong in its own way. They need no JAX and start at once."""

import os
import signal
import subprocess
import sys
import time
from typing import Any

SLEEP = [sys.executable, "-c", "import time; time.sleep(600)"]


def works(task: Any, count: int = 2, **settings: Any) -> None:
    """Finds something."""
    for i in range(count):
        task.emit(f"case {i}", seconds=float("nan"), facts={"left out": dict(task.left_out), **settings})


def raises(task: Any) -> None:
    """Fails after a finding."""
    task.emit("before")
    task.doing("the fatal thing")
    raise ValueError("no good\nand more")


def aborts(task: Any) -> None:
    """As a runtime does that will not go on."""
    task.emit("before")
    task.doing("pallas, some case", kernel="pallas")
    os.abort()


def leaves(task: Any) -> None:
    """Ends its process without a word."""
    task.emit("before")
    os._exit(0)


def hangs(task: Any) -> None:
    """Does not come back, and will not be asked to."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    task.emit("before")
    task.doing("triton, some case", kernel="triton")
    print("now it hangs", flush=True)
    time.sleep(600)


def is_late(task: Any) -> None:
    """Begins with a kernel when its time is nearly over."""
    task.doing("the first case", kernel="pallas")
    time.sleep(0.8 * task.seconds)
    task.doing("the last case", kernel="pallas")
    time.sleep(600)


def breeds(task: Any, hang: bool) -> None:
    """Leaves processes behind: a child, one in a session of its own, and one whose parent is gone."""
    children = [subprocess.Popen(SLEEP).pid, subprocess.Popen(SLEEP, start_new_session=True).pid]
    start = "subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL, start_new_session=True)"
    code = f"import subprocess, sys; print({start}.pid)"
    orphan = subprocess.run([sys.executable, "-c", code, *SLEEP], stdout=subprocess.PIPE, text=True, check=True)
    task.emit("children", facts={"pids": [*children, int(orphan.stdout)]})
    if hang:
        time.sleep(600)


def forks(task: Any) -> None:
    """Ends, while a child of it holds on to what it spoke through."""
    child = os.fork()
    if child == 0:
        time.sleep(600)
        os._exit(0)
    task.emit("children", facts={"pids": [child]})


def judges(task: Any) -> None:
    """Two kernels, one of them wrong."""
    task.emit("first", "pallas", error=0.0)
    task.emit("first", "triton", wrong="by far")


def trickles(task: Any) -> None:
    """One finding after another, until it is stopped."""
    task.emit("self", facts={"pids": [os.getpid(), subprocess.Popen(SLEEP).pid]})
    for i in range(100_000):
        task.emit(f"case {i}", facts={"text": "x" * 200})
        time.sleep(0.002)


def has_many_cases(task: Any, clock: list[float]) -> None:
    """Cases that take as long as `clock` says, by a clock of its own."""
    now = [0.0]
    task._started = 0.0
    time.monotonic = lambda: now[0]
    for case in task.cases(list(range(len(clock)))):
        now[0] += clock[case]
        task.emit(f"case {case}")
