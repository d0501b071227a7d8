"""One look at every block that is read: counts it for the progress and notes tensors with NaN or infinity."""

import threading
import warnings
from collections.abc import Collection

import numpy as np

from jdsi.errors import JdsiWarning

from .buffers import all_finite
from .matching import some
from .progress import Progress


class NonFiniteWarning(JdsiWarning):
    """A checkpoint holds NaN or infinite weights, or has weights too large for the type it is read as."""


class Watcher:
    """Passes as a `Watch`; several threads may call it, of which the progress sees one at a time."""

    def __init__(self, progress: Progress) -> None:
        self._progress, self._lock = progress, threading.Lock()
        self._bad: dict[str, None] = {}
        self._too_large: dict[str, None] = {}

    def __call__(self, name: str, block: np.ndarray) -> None:
        if name not in self._bad and not all_finite(block):
            # A number that a narrow range has no room for became infinite, never NaN.
            narrow = block.dtype == np.float16 and not np.isnan(block).any()
            (self._too_large if narrow else self._bad)[name] = None
        with self._lock:
            self._progress.advance(block.nbytes)

    def warn(self, where: str) -> None:
        """Warn, once, of all tensors with NaN or infinity seen so far."""
        warn_of(where, self._bad, [name for name in self._too_large if name not in self._bad])


def warn_of(where: str, bad: Collection[str], too_large: Collection[str]) -> None:
    """Warn, if there are any, of tensors with NaN or infinity, and of those that only float16 has no room for."""
    told = []
    if bad:
        told.append(f"NaN or infinite values in {len(bad)} tensors: {some(bad)}")
    if too_large:
        told.append(
            f"values in {len(too_large)} tensors are infinite as float16, which ends at 65504; unless they are stored "
            f"so, bfloat16 or float32 has room for them: {some(too_large)}"
        )
    if told:
        warnings.warn(f"{where}: {'; '.join(told)}", NonFiniteWarning, stacklevel=4)
