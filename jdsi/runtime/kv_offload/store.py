"""What the batches of an executor share to have their keys and values elsewhere: a home, two threads, and bounds."""

import collections
import dataclasses
import queue
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from typing import Any

import numpy as np

from jdsi.errors import CapacityError, JdsiError

from .slabs import Slab, SlabHome


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

    Saving waits for devices only, loading for devices and for what is being saved, so neither can stop for good.

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
        self.loads, self.saves = Worker("jdsi-kv-load"), Worker("jdsi-kv-save")
        self.ahead: set[Future] = set()
        self._behind: collections.deque[Future] = collections.deque()
        self._most_ahead, self._most_behind = ahead, behind
        self._close = weakref.finalize(self, _stop, self.loads, self.saves, home)

    def allocate(self, shapes: Sequence[tuple[int, int, int, int]], dtype: np.dtype) -> list[Slab]:
        """See `SlabHome.allocate`; where room is short, waits for that of the batches that were dropped.

        Raises:
            CapacityError: there is no room, or none yet and this is the thread that frees it.
            JdsiError: the store is closed.
        """
        try:
            return self.home.allocate(shapes, dtype)
        except CapacityError:
            if self.loads.is_current:
                raise
        self.loads.submit(lambda: None).result()  # it frees what was dropped, in its turn
        return self.home.allocate(shapes, dtype)

    @property
    def has_room_ahead(self) -> bool:
        """Whether one more load may begin before it is needed."""
        return len(self.ahead) < self._most_ahead

    def wait_for_room_behind(self) -> None:
        """Waits until one more layer may be given to `save`."""
        began = time.perf_counter()
        while self._behind and (len(self._behind) >= self._most_behind or self._behind[0].done()):
            wait([self._behind[0]])
            self._behind.popleft()
        self.wait_seconds += time.perf_counter() - began

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
        """Frees all slabs, when what is under way is done; the second time does nothing."""
        self._close()


def _stop(loads: "Worker", saves: "Worker", home: SlabHome) -> None:
    loads.close()
    saves.close()
    home.close()


class Failure:
    """What went wrong first in the background, for the next call to raise.

    Attributes:
        error: it, or `None`.
    """

    def __init__(self) -> None:
        self.error: JdsiError | None = None

    def check(self) -> None:
        """Raises the error if there is one."""
        if self.error is not None:
            # Without the old traceback, which would keep a layer's arrays alive.
            raise type(self.error)(*self.error.args) from self.error.__cause__

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
    """A thread that runs one task after another."""

    def __init__(self, name: str) -> None:
        self._tasks: queue.SimpleQueue[tuple[Future, Callable[[], Any]] | None] = queue.SimpleQueue()
        self._closed = False
        self._lock = threading.Lock()
        # It must not keep the worker alive, else what owns the worker would never be closed.
        self._thread = threading.Thread(target=_work, args=(self._tasks,), daemon=True, name=name)
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
            if self._closed:
                raise JdsiError("this store of keys and values is closed")
            future = self._put(task)
        return future

    def submit_if_open(self, task: Callable[[], Any]) -> None:
        """As `submit`; without a lock, for finalizers, which may run in the middle of `submit`."""
        self._put(task)

    def _put(self, task: Callable[[], Any]) -> Future:
        future: Future = Future()
        self._tasks.put((future, task))
        return future

    def close(self) -> None:
        """Runs what was submitted and stops."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._tasks.put(None)
        if not self.is_current:
            self._thread.join(timeout=60)


def _work(tasks: "queue.SimpleQueue[tuple[Future, Callable[[], Any]] | None]") -> None:
    while (item := tasks.get()) is not None:
        future, task = item
        try:
            future.set_result(task())
        except BaseException as error:  # whatever it is, whoever waits must hear of it
            future.set_exception(error)
        del item, future, task  # which would keep a layer alive until the next comes
