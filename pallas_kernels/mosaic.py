"""What the Mosaic GPU kernels share; some of it is said differently from one version of JAX to the next."""

from typing import Any

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from .device import Device

ACC = plgpu.WGMMAAccumulatorRef


def not_hopper(device: Device) -> str | None:
    """Why a kernel with Hopper's instructions cannot run on `device`, or `None`."""
    if device.capability[0] == 9:
        return None
    capability = ".".join(map(str, device.capability))
    return f"it is written for Hopper GPUs, not {device.kind} of compute capability {capability}"


def store(ref: Any, value: Array) -> None:
    """`ref[...] = value`, also where the threads' pattern of writes is less than perfect.

    From JAX 0.12 on plain assignment refuses such patterns; JAX 0.11 has no word for accepting them.
    """
    if hasattr(plgpu, "store"):
        plgpu.store(ref, value, optimized=False)
    else:
        ref[...] = value


def store_transposed(ref: Any, values: jax.Array) -> None:
    """Writes `values` [M, N], products or their like, to shared memory [N, M], whose transposed view is `ref`."""
    values = plgpu.layout_cast(values, transposed_layout(values.dtype))
    store(ref, values)


def transposed_layout(dtype: Any) -> Any:
    """The registers from which a matrix of products gets to the transposed place in shared memory, or from there.

    A thread holds pairs of neighbours along N, which lie in different rows there. The hardware transposes 16-bit
    matrices on the way; of wider ones the threads exchange pairs first.
    """
    return plgpu.Layout.WGMMA if dtype.itemsize == 2 else plgpu.Layout.WGMMA_TRANSPOSED


def block_indices(*sizes: int) -> list[jax.Array]:
    """Where a block is in a grid of these sizes that is launched as one axis, "block"; the last index runs fastest.

    Only along one axis does the hardware count past 65,535, which sequences times heads may well be.
    """
    rest, indices = lax.axis_index("block"), []
    for size in reversed(sizes[1:]):
        indices.append(lax.rem(rest, size))
        rest = lax.div(rest, size)
    return [rest, *reversed(indices)]


def send_rows(source: Any, target: Any, index: jax.Array, blocks: int) -> None:
    """Starts the copies of a block of columns, row by row, from shared to global memory.

    A copy of contiguous numbers without a swizzle is one of so many bytes: neither an array's last column nor its last
    row stops it, only the end of the whole array. So none may be longer than what is left of its row, and none empty.

    Args:
        source: `[rows or more, n]` in shared memory, not swizzled.
        target: `[rows, columns]` in global memory.
        index: where the block goes: to columns `index * n` and on, of which those past the end are left out.
        blocks: `index` is below.
    """
    (rows, columns), size = target.shape, source.shape[1]
    whole, rest = divmod(columns, size)

    def copy(number: int) -> None:
        for row in range(rows):
            place = target.at[row, pl.ds(index * size, number)]
            plgpu.copy_smem_to_gmem(source.at[row, pl.ds(0, number)], place, commit_group=False)

    if blocks <= whole:
        copy(size)
    else:
        pl.when(index < whole)(lambda: copy(size))
        if rest:
            pl.when(index == whole)(lambda: copy(rest))
    plgpu.commit_smem_to_gmem_group()


def tiled(columns: int, itemsize: int = 2) -> tuple[Any, Any]:
    """The layout in shared memory that tensor cores read: tiles of 8 rows of `columns` numbers, and their swizzle.

    Args:
        columns: of a tile; `columns * itemsize` is 32, 64 or 128 bytes, the width of the swizzle.
        itemsize: bytes of a number.
    """
    tiles: Any = plgpu.TilingTransform((8, columns))  # pyright: ignore[reportAbstractUsage]
    swizzle: Any = plgpu.SwizzleTransform(columns * itemsize)  # pyright: ignore[reportAbstractUsage]
    return tiles, swizzle
