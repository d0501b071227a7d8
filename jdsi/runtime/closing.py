"""Generators that end before the interpreter does."""

import time
import weakref
from collections.abc import Generator
from typing import Any

_PATIENCE = 60.0  # seconds


def closed_at_exit[G: Generator[Any]](generator: G) -> G:
    """The generator, which is closed at exit if it is then neither read to its end nor dropped.

    What it does when it is closed would else run where modules are gone already. A daemon thread that is in the middle
    of a step may finish it first: ended inside XLA, it would take the process down.
    """
    weakref.finalize(generator, _close, weakref.ref(generator))
    return generator


def _close(reference: weakref.ref[Generator[Any]]) -> None:
    generator, end = reference(), time.monotonic() + _PATIENCE
    while generator is not None and time.monotonic() < end:
        try:
            return generator.close()
        except ValueError:  # another thread is in it
            time.sleep(0.01)
