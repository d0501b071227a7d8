"""Host memory that a GPU copies from and to by itself."""

import threading
import warnings
import weakref
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jdsi.converters.direct_io import PageBuffer
from jdsi.errors import CapacityError

from .memory import available_host_memory


def pin(memory: np.ndarray) -> np.ndarray:
    """The same memory, locked in place for JAX's devices for as long as the result or a view of it lives.

    Copies from and to a GPU are several times as fast as from other memory, and need no thread. On a CPU, and where
    the backend does not offer it, `memory` as it is.

    Args:
        memory: contiguous uint8, page-aligned.

    Warns:
        RuntimeWarning: the system refuses to lock that much; copies will be slower.
    """
    client: Any = jax.local_devices()[0].client
    if client.platform == "cpu" or not hasattr(client, "dma_map"):
        return memory
    try:
        client.dma_map(memory.ctypes.data, memory.nbytes)
    except (jax.errors.JaxRuntimeError, NotImplementedError) as error:
        if isinstance(error, jax.errors.JaxRuntimeError) and not str(error).startswith("UNIMPLEMENTED"):
            warnings.warn(
                f"{memory.nbytes} bytes of host memory cannot be pinned, and copying them will be slower: {error}",
                RuntimeWarning,
                stacklevel=2,
            )
        return memory
    owner = _Owner(memory)
    # At the end of the process the system does it, and the backend may be gone already.
    weakref.finalize(owner, _unpin, client, memory).atexit = False
    return np.frombuffer(owner, np.uint8)


def _unpin(client: Any, memory: np.ndarray) -> None:
    """Takes the memory itself, which must not be unmapped before."""
    client.dma_unmap(memory.ctypes.data)


class _Owner:
    """What arrays over pinned memory refer to: it goes with the last of them, as no NumPy array among them would."""

    def __init__(self, memory: np.ndarray) -> None:
        self._memory = memory

    def __buffer__(self, flags: int) -> memoryview:
        return memoryview(self._memory)


class PinnedPages:
    """Pinned memory that is used again while the same sizes are asked for: fresh pages and pinning cost time.

    Methods may be called from several threads.
    """

    def __init__(self) -> None:
        self._free: dict[int, list[np.ndarray]] = {}
        self._lock = threading.Lock()
        self._closed = False

    def take(self, sizes: Sequence[int]) -> list[np.ndarray]:
        """Memory of these many bytes each, which fill whole pages.

        Raises:
            CapacityError: the machine has not that much.
        """
        with self._lock:
            found = [self._free[size].pop() if self._free.get(size) else None for size in sizes]
            missing = sum(size for size, memory in zip(sizes, found, strict=True) if memory is None)
            if missing:
                self._free.clear()  # of sizes that are not asked for any more
                if missing > (available := available_host_memory()):
                    raise CapacityError(
                        f"keys and values need {missing} bytes of host memory, {available} are free:"
                        " take fewer or shorter sequences at once"
                    )
            return [
                pin(PageBuffer(size).bytes) if memory is None else memory
                for size, memory in zip(sizes, found, strict=True)
            ]

    def give(self, memories: Sequence[np.ndarray]) -> None:
        """Takes memory back."""
        with self._lock:
            for memory in () if self._closed else memories:
                self._free.setdefault(memory.nbytes, []).append(memory)

    def close(self) -> None:
        """Keeps nothing from now on."""
        with self._lock:
            self._closed = True
            self._free.clear()
