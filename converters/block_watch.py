"""One look at every block that is streamed, when it is first read: whoever reads it again pays nothing."""

import numpy as np

from .block_form import BlockForm
from .buffers import largest, overflow
from .watch import warn_of


class BlockWatch:
    """Notes the largest magnitudes of blocks; which of them are too large depends on the type they are used in."""

    def __init__(self) -> None:
        self._seen: set[str] = set()
        self._largest: dict[str, float] = {}

    def look(self, name: str, form: BlockForm, ranks: int, memory: np.ndarray) -> None:
        """Look at a block that has been read, unless it was looked at before.

        Args:
            name, form, ranks: see `Block`.
            memory: the block's, of its `nbytes`.
        """
        if name in self._seen:
            return
        self._seen.add(name)
        parts = [form.views(part) for part in memory.reshape(ranks, -1)]
        stored = {field: float(np.max([largest(part[field]) for part in parts])) for field, _ in form.fields}
        prefix = f"{name}." if name.startswith("layers.") else ""
        self._largest |= {prefix + own: what.recipe.largest(stored) for own, what in form.parameters}

    def warn(self, where: str, dtype: np.dtype) -> None:
        """Warn of parameters, of blocks looked at since the last call, that are NaN or infinite as `dtype`."""
        found, self._largest = self._largest, {}
        bad = {name: value for name, value in found.items() if not value < overflow(dtype)}
        too_large = [name for name, value in bad.items() if dtype == np.float16 and not np.isnan(value)]
        warn_of(where, [name for name in bad if name not in too_large], too_large)
