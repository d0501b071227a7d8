"""What the batches of an executor share to have their keys and values elsewhere: a home, two threads, and bounds."""

import collections
import dataclasses
import queue
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import Future, wait
from functools import partial
from typing import Any

from jdsi.errors import JdsiError

from .slabs import SlabHome


@dataclasses.dataclass(frozen=True)
class SlabReport:
    """What a store has done so far.

    Attributes:
        bytes_read: taken from host memory or from the spill file.
        bytes_written: put there.
        wait_seconds: that layers waited for either.
    """

    bytes_read: int = 0
    bytes_written: int = 0
    wait_seconds: float = 0.0


class SlabStore:
    """A home of slabs with a thread that loads them and one that saves them.

    Those threads alone touch slabs and their home, for Ctrl-C stops the main thread only: they finish what they began,
    and free behind it. Saving waits for devices only, loading for devices and for what is being saved, so neither can
    stop for good.

    The bounds are kept by counting what is there, not by permits: those would be lost where a caller is interrupted.

    Args:
        home: where slabs lie; closed with the store.
        ahead: layers loaded at most before they are taken.
        behind: layers given back at most before they are saved.

    Attributes:
        home: as above.
        loads, saves: the threads.
        ahead: loads begun before they were needed, whose layers have not been taken yet.
        wait_seconds: that callers waited for the threads.
    """

    def __init__(self, home: SlabHome, *, ahead: int = 2, behind: int = 2) -> None:
        self.home, self.wait_seconds = home, 0.0
        self.saves = Worker("jdsi-kv-save", lambda: None)
        self.loads = Worker("jdsi-kv-load", partial(_end, self.saves, home))
        self.ahead: set[Future] = set()
        self._behind: collections.deque[Future] = collections.deque()
        self._most_ahead, self._most_behind = ahead, behind
        # Not what `close` calls, for it would do nothing the second time where the first was interrupted.
        weakref.finalize(self, _stop, self.loads, self.saves)

    @property
    def has_room_ahead(self) -> bool:
        """Whether one more load may begin before it is needed."""
        return len(self.ahead) < self._most_ahead

    def wait(self, future: Future) -> None:
        """Waits until what one of the threads was given is done, or has failed."""
        began = time.perf_counter()
        wait([future])
        self.wait_seconds += time.perf_counter() - began

    def wait_for_room_behind(self) -> None:
        """Waits until one more layer may be given to `save`."""
        while self._behind and (len(self._behind) >= self._most_behind or self._behind[0].done()):
            self.wait(self._behind[0])
            self._behind.popleft()

    def save(self, task: Callable[[], Any]) -> Future:
        """Has the saving thread run `task`, which counts as a layer behind until it is done.

        Raises:
            JdsiError: the store is closed.
        """
        future = self.saves.submit(task)
        self._behind.append(future)
        return future

    def report(self) -> SlabReport:
        """What it has done so far."""
        return SlabReport(self.home.bytes_read, self.home.bytes_written, self.wait_seconds)

    def close(self) -> None:
        """Frees all slabs, when what is under way is done; the second time does nothing.

        Waits for that, but a minute at most.
        """
        _stop(self.loads, self.saves)


def _stop(loads: "Worker", saves: "Worker") -> None:
    loads.close()
    if not loads.is_current and not saves.is_current:  # where garbage is collected too: they would wait for themselves
        loads.join(60)


def _end(saves: "Worker", home: SlabHome) -> None:
    saves.close()
    saves.join()
    home.close()


class Failure:
    """What went wrong first in the background, for the next call to raise.

    Attributes:
        error: it, or `None`.
        unfinished: what must not be left half done, while it is.
    """

    def __init__(self) -> None:
        self.error: JdsiError | None = None
        self.unfinished: str | None = None

    def check(self) -> None:
        """Raises the error if there is one."""
        if self.error is not None:
            # Without the old traceback, which would keep a layer's arrays alive.
            raise type(self.error)(*self.error.args) from self.error.__cause__
        if self.unfinished is not None:
            raise JdsiError(f"{self.unfinished} was interrupted, and these keys and values cannot be used any more")

    def watch(self, task: Callable[[], Any]) -> Any:
        """Runs `task` and remembers what goes wrong."""
        try:
            return task()
        except JdsiError as error:
            self.error = self.error or error
            raise
        except Exception as error:
            wrapped = JdsiError(f"moving keys and values failed: {error}")
            wrapped.__cause__ = error
            self.error = self.error or wrapped
            raise wrapped from error


class Worker:
    """A thread that runs one task after another.

    Args:
        name: of the thread.
        last: what it runs in the end, behind all tasks.
    """

    def __init__(self, name: str, last: Callable[[], None]) -> None:
        self._tasks: _Tasks | None = queue.SimpleQueue()
        self._closed, self._lock = False, threading.Lock()
        self._ended = threading.Event()  # to wait for, which threads themselves can only once: Ctrl-C would spoil it
        # It must not keep the worker alive, else what owns the worker would never be closed.
        self._thread = threading.Thread(target=_work, args=(self._tasks, last, self._ended), daemon=True, name=name)
        self._thread.start()

    @property
    def is_current(self) -> bool:
        """Whether the caller is one of its tasks."""
        return self._thread is threading.current_thread()

    def submit(self, task: Callable[[], Any]) -> Future:
        """Runs `task` behind all others; the future has its result.

        Raises:
            JdsiError: the worker is closed.
        """
        with self._lock:  # so that no task comes behind the end, where nothing would run it
            future: Future = Future()
            self._open().put((future, task))
        return future

    def submitter(self, task: Callable[[], Any]) -> Callable[[], None]:
        """What has `task` run if the worker is open then.

        For finalizers, which come in the middle of anything, `submit` included, and must not be interrupted themselves:
        calling it takes no lock and no line of Python.

        Raises:
            JdsiError: the worker is closed.
        """
        return partial(self._open().put, (Future(), task))

    def _open(self) -> "_Tasks":
        if self._closed or self._tasks is None:
            raise JdsiError("this store of keys and values is closed")
        return self._tasks

    def close(self) -> None:
        """Has it end behind what was submitted, without waiting; may be called again, as where it was interrupted."""
        with self._lock:
            self._closed = True
            if self._tasks is not None:
                self._tasks.put(None)
            self._tasks = None  # what finalizers put there from now on goes with them

    def join(self, timeout: float | None = None) -> None:
        """Waits for its end, so many seconds at most."""
        self._ended.wait(timeout)


_Tasks = queue.SimpleQueue[tuple[Future, Callable[[], Any]] | None]


def _work(tasks: _Tasks, last: Callable[[], None], ended: threading.Event) -> None:
    while (item := tasks.get()) is not None:
        future, task = item
        try:
            future.set_result(task())
        except BaseException as error:  # whatever it is, whoever waits must hear of it
            future.set_exception(error)
        del item, future, task  # which would keep a layer alive until the next comes
    try:
        last()
    finally:
        ended.set()
