"""A line that shows weights being streamed."""

import contextlib
import sys
import threading
from collections.abc import Iterator
from typing import Any

_SECONDS = 0.5


@contextlib.contextmanager
def progress_line(engine: Any) -> Iterator[None]:
    """Shows layers/s, GB/s and how busy the link is while an offloaded engine works, where a person watches."""
    if engine.executor.stream_report() is None or not sys.stderr.isatty():
        yield
        return
    ended = threading.Event()
    thread = threading.Thread(target=_show, args=(engine.executor, ended), daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        sys.stderr.write("\r\033[K")


def _show(executor: Any, ended: threading.Event) -> None:
    before = executor.stream_report()
    while not ended.wait(_SECONDS):
        report = executor.stream_report()
        recent, before = report.since(before), report
        sys.stderr.write(
            f"\r\033[K{recent.blocks / _SECONDS:.1f} layers/s, {recent.bytes_streamed / _SECONDS / 1e9:.2f} GB/s, "
            f"link busy {min(1.0, recent.read_seconds / _SECONDS):.0%}"
        )
        sys.stderr.flush()
