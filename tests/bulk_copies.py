"""Teaches Pallas' GPU interpreter how far a copy from shared to global memory reaches on a GPU.

The interpreter drops what lies outside of the array's shape. So does the hardware where it is told that shape, but a
contiguous run of numbers without a swizzle is copied as so many bytes: past the end of a row it goes on in the next.
"""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import jax
from jax._src.pallas.mosaic_gpu import core
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks


@contextlib.contextmanager
def bulk_copies() -> Iterator[None]:
    """Within it a copy that would go on in another row, or has nothing to copy, is an error."""
    with mock.patch.object(gpu_callbacks, "copy_smem_to_gmem", _checked(gpu_callbacks.copy_smem_to_gmem)):
        yield


def _checked(copy: Callable[..., Any]) -> Callable[..., Any]:
    @gpu_callbacks.fail_on_exception
    @functools.wraps(copy)
    def checked(
        *, src_transforms: tuple[Any, ...], dst_allocation_key_as_array: Any, dst_transforms: Any, **rest: Any
    ) -> Any:
        if not any(isinstance(transform, core.UnswizzleRef) for transform in src_transforms):
            memory = gpu_callbacks._get_shared_memory()
            key = gpu_callbacks.HostAllocationKey.from_array(dst_allocation_key_as_array)
            transforms = jax.tree.map(int, gpu_callbacks._remove_noop_transforms(dst_transforms))
            _check(memory.access(key, transforms).range, memory.buffer_shape_and_dtype(key).shape)
        return copy(
            src_transforms=src_transforms,
            dst_allocation_key_as_array=dst_allocation_key_as_array,
            dst_transforms=dst_transforms,
            **rest,
        )

    return checked


def _check(places: tuple[slice | int, ...], shape: tuple[int, ...]) -> None:
    """Raises AssertionError for a run of numbers that leaves its row, or that is empty, in an array of that shape."""
    begins = [place if isinstance(place, int) else place.start for place in places]
    sizes = [1 if isinstance(place, int) else place.stop - place.start for place in places]
    wide = next((axis for axis, size in enumerate(sizes) if size != 1), len(shape))  # the first that is more than one
    if math.prod(shape[wide + 1 :]) != math.prod(sizes[wide + 1 :]):
        return  # several runs: these the hardware copies as a box, which ends where the array does
    for axis, (begin, size, whole) in enumerate(zip(begins, sizes, shape, strict=True)):
        assert size > 0, f"a copy of no numbers to an array {shape}"
        assert begin + size <= whole, (
            f"a copy of {size} numbers from place {begin} of dimension {axis} of an array {shape} would go on where the"
            " next row begins"
        )
