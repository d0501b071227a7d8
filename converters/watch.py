"""One look at every block that is read: counts it for the progress and notes tensors with NaN or infinity."""

import warnings

import numpy as np

from jdsi.errors import JdsiWarning

from .buffers import all_finite
from .progress import Progress


class NonFiniteWarning(JdsiWarning):
    """A checkpoint holds NaN or infinite weights, or has weights too large for the type it is read as."""


class Watcher:
    """Passes as a `Watch`."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._bad: dict[str, None] = {}

    def __call__(self, name: str, block: np.ndarray) -> None:
        if name not in self._bad and not all_finite(block):
            self._bad[name] = None
        self._progress.advance(block.nbytes)

    def warn(self, where: str) -> None:
        """Warn, once, of all tensors with NaN or infinity seen so far."""
        if self._bad:
            names = list(self._bad)
            more = f" and {len(names) - 20} more" if len(names) > 20 else ""
            warnings.warn(
                f"{where}: NaN or infinite values in {len(names)} tensors: {', '.join(names[:20])}{more}",
                NonFiniteWarning,
                stacklevel=3,
            )
