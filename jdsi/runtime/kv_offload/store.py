"""What the batches of an executor share to have their keys and values elsewhere: a home, two threads, and bounds."""

import dataclasses
import queue
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from jdsi.errors import JdsiError

from .slabs import SlabHome


@dataclasses.dataclass(frozen=True)
class SlabReport:
    """What a store has done so far; take the difference of two to see one generation.

    Attributes:
        bytes_read: taken from host memory or from the spill file.
        bytes_written: put there.
        wait_seconds: that layers waited for either.
    """

    bytes_read: int = 0
    bytes_written: int = 0
    wait_seconds: float = 0.0

    def since(self, start: "SlabReport") -> "SlabReport":
        """What came after `start`."""
        return SlabReport(
            self.bytes_read - start.bytes_read,
            self.bytes_written - start.bytes_written,
            self.wait_seconds - start.wait_seconds,
        )


class SlabStore:
    """A home of slabs with a thread that loads them and one that saves them.

    Saving waits for devices only, loading for devices and for what is being saved, so neither can stop for good.

    Args:
        home: where slabs lie; closed with the store.
        ahead: layers loaded at most before they are taken.
        behind: layers given back at most before they are saved.

    Attributes:
        home: as above.
        loads, saves: the threads.
        ahead, behind: what is left of the bounds.
        wait_seconds: that callers waited for the threads.
    """

    def __init__(self, home: SlabHome, *, ahead: int = 2, behind: int = 2) -> None:
        self.home, self.wait_seconds = home, 0.0
        self.loads, self.saves = Worker("jdsi-kv-load"), Worker("jdsi-kv-save")
        self.ahead, self.behind = threading.Semaphore(ahead), threading.Semaphore(behind)
        self._close = weakref.finalize(self, _stop, self.loads, self.saves, home)

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

    def watch(self, task: Callable[[], Any], turn: threading.Semaphore | None = None) -> Any:
        """Runs `task`, remembers what goes wrong, and lets the next one have its turn."""
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
        finally:
            if turn is not None:
                turn.release()


class Worker:
    """A thread that runs one task after another."""

    def __init__(self, name: str) -> None:
        self._tasks: queue.SimpleQueue[tuple[Future, Callable[[], Any]] | None] = queue.SimpleQueue()
        self._closed = False
        self._lock = threading.Lock()
        # It must not keep the worker alive, else what owns the worker would never be closed.
        self._thread = threading.Thread(target=_work, args=(self._tasks,), daemon=True, name=name)
        self._thread.start()

    def submit(self, task: Callable[[], Any]) -> Future:
        """Runs `task` behind all others; the future has its result.

        Raises:
            JdsiError: the worker is closed.
        """
        with self._lock:  # so that no task comes behind the end, where nothing would run it
            if self._closed:
                raise JdsiError("this store of keys and values is closed")
            return self._put(task)

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
        if self._thread is not threading.current_thread():
            self._thread.join(timeout=60)


def _work(tasks: "queue.SimpleQueue[tuple[Future, Callable[[], Any]] | None]") -> None:
    while (item := tasks.get()) is not None:
        future, task = item
        try:
            future.set_result(task())
        except BaseException as error:  # whatever it is, whoever waits must hear of it
            future.set_exception(error)
        del item, future, task  # which would keep a layer alive until the next comes
