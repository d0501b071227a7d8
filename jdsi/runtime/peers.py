"""Notices that another process of the same run died or hangs, and ends this one with a named error.

Inside XLA a process waits for another for ever, and cannot be interrupted. So all processes of a run take their turns
together, a turn being a call that each of them makes: a step, logits, a comparison of requests. Two threads tell the
others every two seconds, through `jdsi.sharding.processes`, that this process lives and how many turns it has taken,
and judge what the others tell (see `peer_judge`). For the caller a turn sets a few attributes.

- Who has not been heard of for 20 s has died or is suspended.
- Who is a turn behind for 45 s while this process waits in one, hangs; unless it compiles or loads. Before its first
  turn it has seven times as long, for what programs do then is not known.
- Who has ended and is a turn behind will not come any more.

All that is in proportion to JDSI_PEER_PATIENCE, the 45 s, which must be longer than a process may leave others waiting.
"""

import atexit
import contextlib
import ctypes
import dataclasses
import hashlib
import json
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
from jax.errors import JaxRuntimeError

from jdsi.errors import ConfigError, JdsiError, PeerError
from jdsi.sharding import processes

from .peer_judge import Judge, Status

PATIENCE_VARIABLE = "JDSI_PEER_PATIENCE"
_FOLDER = "jdsi/peers"
_GRACE = 1  # seconds in which the caller may raise an error itself, if it is not stuck
_LOST = re.compile(r"gloo|nccl|unavailable|connection (closed|reset)|remote process", re.IGNORECASE)
_BUSY = ("jax._src.compiler", "jax._src.interpreters.mlir", "jax._src.interpreters.partial_eval", "jdsi.converters")


def patience() -> float:
    """Seconds that a process may leave the others waiting.

    Raises:
        ConfigError: `JDSI_PEER_PATIENCE` does not say a number above 0.
    """
    text = os.environ.get(PATIENCE_VARIABLE, "45")
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise ConfigError(f"{PATIENCE_VARIABLE}={text!r} must be a number of seconds above 0")
    return seconds


class Watch:
    """The threads that keep `Judge` informed and do what it says; use `turn`, `waiting` and `agree` of this module."""

    def __init__(self) -> None:
        self._judge = Judge(*processes.place(), patience())
        self._interval = min(2.0, self._judge.patience / 22)
        self._board = processes.KeyValues()
        self._turn, self._depth, self._since = 0, 0, 0.0
        self._thread = threading.get_ident()
        self._asking, self._suspicious = 0.0, False
        self._ended = ""
        self._problem: str | None = None
        self._found, self._taken, self._alone, self._over, self._hurry = (threading.Event() for _ in range(5))
        _abort_slowly()
        atexit.register(self._leave)
        for run in (self._exchange, self._watch):
            threading.Thread(target=run, name="jdsi peers", daemon=True).start()

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """Around a call that every process makes."""
        self._turn += 1
        with self.waiting():
            yield

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Around code that waits for the others."""
        self._thread, self._since = threading.get_ident(), self._judge.now
        self._depth += 1
        try:
            yield
        except (JaxRuntimeError, ValueError) as error:  # XLA's status UNKNOWN becomes a ValueError
            if isinstance(error, JdsiError) or not _LOST.search(str(error)):
                raise
            self._suspicious = True
            self._found.wait(self._judge.silence)  # a moment later it is known who is gone
            lost = f"process {self._judge.own} of {self._judge.count} lost another: {_first_line(error)}"
            raise self._error(self._problem or lost) from error
        finally:
            self._depth -= 1

    def check(self) -> None:
        """Raises `PeerError` if something is wrong; for waits that can be left."""
        if self._problem is not None:
            raise self._error(self._problem)

    def _error(self, problem: str) -> PeerError:
        self._taken.set()
        self._say_end(f"with PeerError ({problem})")
        atexit.register(processes.end_abruptly)
        return PeerError(problem)

    def _say_end(self, how: str) -> None:
        self._ended = how
        self._hurry.set()

    def _exchange(self) -> None:
        key, tick = f"{_FOLDER}/{self._judge.own}", 0
        while not self._over.is_set():
            tick += 1
            self._asking = time.monotonic()
            try:
                self._board.put(key, json.dumps(dataclasses.asdict(self._status(tick))))
                told = self._board.under(_FOLDER)
            except JaxRuntimeError:
                self._over.wait(_GRACE)
                continue
            self._asking = 0.0
            self._judge.hear({process: Status(**json.loads(text)) for process, text in told.items()})
            if self._ended and self._judge.all_ended:
                self._alone.set()
                return
            time.sleep(0.1) if self._ended else self._hurry.wait(self._interval)

    def _status(self, tick: int) -> Status:
        frame = sys._current_frames().get(self._thread)
        return Status(tick, self._turn, any(map(_is_busy, _frames(frame))), _place(frame), self._ended)

    def _watch(self) -> None:
        last = time.monotonic()
        while not self._over.wait(self._interval / 4):
            if not self._board.open:  # the program has called `jax.distributed.shutdown`
                self._over.set()
                return
            now = time.monotonic()
            self._judge.now += min(now - last, 2 * self._interval)  # more is time in which this process was suspended
            last = now
            self._problem = self._find()
            if self._problem is None:
                continue
            self._found.set()
            self._say_end(f"with PeerError ({self._problem})")
            if not self._taken.wait(_GRACE):
                # The caller is inside XLA, or sleeps: no exception would reach it.
                processes.end_abruptly(f"jdsi.errors.PeerError: {self._problem}")
            return

    def _find(self) -> str | None:
        if self._asking and time.monotonic() - self._asking > 1 and self._board.refused:
            return f"process 0 of {self._judge.count}, which keeps the run together, has died"
        since = self._since if self._depth else None
        return self._judge.problem(self._turn, since, suspicious=self._suspicious)

    def _leave(self) -> None:
        """Waits at the end of the program for the others', for results of ours may still be on their way to them."""
        if self._over.is_set():
            return
        error = getattr(sys, "last_exc", None)
        self._say_end("normally" if error is None else f"with {type(error).__name__} ({_first_line(error)[:300]})")
        self._alone.wait(None if error is None else self._judge.patience)
        self._over.set()
        if self._judge.deserted or not self._alone.is_set():
            processes.end_abruptly()


_watch: Watch | None = None
_lock = threading.Lock()


def start() -> Watch | None:
    """The watch, started if need be; `None` in a run of one process. `jdsi.sharding.initialize` starts it."""
    global _watch
    with _lock:
        if _watch is None and processes.place()[1] > 1:
            _watch = Watch()
    return _watch


processes.when_connected(start)


def turn() -> contextlib.AbstractContextManager[None]:
    """Around a call that every process of the run makes. See `waiting` for what it raises."""
    return contextlib.nullcontext() if _watch is None else _watch.turn()


def waiting() -> contextlib.AbstractContextManager[None]:
    """Around code that waits for results of other processes.

    Raises:
        PeerError: XLA lost a connection. Where it does not notice, the process ends.
    """
    return contextlib.nullcontext() if _watch is None else _watch.waiting()


def agree(settings: Mapping[str, Any], *, offer: str = "") -> str:
    """Takes a turn to compare settings with every other process, before any computation. Alone, it does nothing.

    Args:
        settings: what must be equal everywhere, by name; compared as text, arrays by their bytes.
        offer: something that process 0 tells the others.

    Returns:
        The offer of process 0.

    Raises:
        ConfigError: they differ; every process raises it, naming the settings, the processes and the values.
        PeerError: a process died, hangs or has ended.
    """
    watch = start()
    if watch is None:
        return offer
    texts = {name: _text(value) for name, value in settings.items()}
    with watch.turn():
        return processes.agree(texts, offer=offer, patience=float("inf"), meanwhile=watch.check)


def _text(value: Any) -> str:
    """Short enough to be sent around and shown, and different for different values."""
    if isinstance(value, np.ndarray):
        value = (value.shape, value.dtype.name, value.tobytes())
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:40]}... ({hashlib.sha256(text.encode()).hexdigest()[:16]})"


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0]


def _frames(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def _is_busy(frame: FrameType) -> bool:
    return str(frame.f_globals.get("__name__")).startswith(_BUSY)


def _place(frame: FrameType | None) -> str:
    if frame is None:
        return "outside Python"
    return f"at {Path(frame.f_code.co_filename).name}:{frame.f_lineno} in {frame.f_code.co_name}"


def _abort_slowly() -> None:
    """Makes `abort()` take six seconds, so that there is time to say why.

    When the coordinator dies, jaxlib aborts the process at once, without a word that Python could see. (It has a
    callback for that, which no Python function can be: it raises std::bad_cast in jaxlib 0.12.) SIGABRT is number 6, so
    libc's `sleep`, which signal handlers may call, is a handler that returns after six seconds; then the abort goes on.
    """
    libc = ctypes.CDLL(None)
    libc.signal.argtypes, libc.signal.restype = [ctypes.c_int, ctypes.c_void_p], ctypes.c_void_p
    libc.signal(signal.SIGABRT, ctypes.cast(libc.sleep, ctypes.c_void_p))
