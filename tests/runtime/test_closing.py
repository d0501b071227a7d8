"""Generators that are closed at exit."""

import gc
import threading
import weakref
from collections.abc import Generator

from jdsi.runtime import closing


def test_a_generator_is_closed_when_it_is_idle_and_not_kept_alive(monkeypatch):
    entered, go_on, closed = threading.Event(), threading.Event(), []

    def steps() -> Generator[int]:
        try:
            yield 1
            entered.set()
            go_on.wait()
            yield 2
        finally:
            closed.append(True)

    generator = closing.closed_at_exit(steps())
    found: list[int] = []
    reader = threading.Thread(target=lambda: found.extend(generator))
    reader.start()
    entered.wait()
    exiting = threading.Thread(target=closing._close, args=(weakref.ref(generator),))
    exiting.start()
    exiting.join(timeout=0.1)
    assert exiting.is_alive()
    assert not closed
    go_on.set()
    exiting.join()
    reader.join()
    assert closed
    assert found in ([1], [1, 2])

    monkeypatch.setattr(closing, "_PATIENCE", 0.05)
    entered.clear(), go_on.clear()
    generator = closing.closed_at_exit(steps())
    reader = threading.Thread(target=lambda: list(generator))
    reader.start()
    entered.wait()
    closing._close(weakref.ref(generator))  # gives up
    go_on.set()
    reader.join()

    dropped = weakref.ref(closing.closed_at_exit(steps()))
    gc.collect()
    assert dropped() is None
