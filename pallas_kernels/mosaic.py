"""What the Mosaic GPU kernels share; some of it is said differently from one version of JAX to the next."""

from typing import Any

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


def tiled(columns: int, itemsize: int = 2) -> tuple[Any, Any]:
    """The layout in shared memory that tensor cores read: tiles of 8 rows of `columns` numbers, and their swizzle.

    Args:
        columns: of a tile; `columns * itemsize` is 32, 64 or 128 bytes, the width of the swizzle.
        itemsize: bytes of a number.
    """
    tiles: Any = plgpu.TilingTransform((8, columns))  # pyright: ignore[reportAbstractUsage]
    swizzle: Any = plgpu.SwizzleTransform(columns * itemsize)  # pyright: ignore[reportAbstractUsage]
    return tiles, swizzle
