"""What the Triton kernels share: the GPUs and dtypes they take, and how JAX launches them.

The kernels themselves stand in modules named `triton_kernels`, the only ones that import `triton`; an operator's
`triton` module imports its own where it runs, so that all else works without Triton.
"""

import functools
import importlib.util
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from .device import Device
from .varying import vary_like

# The oldest PTX that knows all GPUs from sm_80 to sm_90a. Triton's own choice is the newest that its assembler takes,
# which the assembler that JAX finds may not know yet.
_PTX = 84


def why_not_device(device: Device) -> str | None:
    """Why no Triton kernel runs on `device`, or `None`."""
    if device.capability < (8, 0):
        return f"Triton kernels need compute capability 8.0, not {'.'.join(map(str, device.capability))}"
    if not _installed():
        return "jax-triton is not installed: pip install 'jdsi[cuda]'"
    return None


def why_not_dtype(**arrays: Any) -> str | None:
    """Why kernels for bfloat16 and float16 cannot take `arrays`, all of which must be of one of them, or `None`."""
    (first, *_) = arrays
    for name, array in arrays.items():
        if array is None:
            continue
        if array.dtype not in (jnp.bfloat16, jnp.float16):
            return f"{name} must be bfloat16 or float16, not {array.dtype}"
        if array.dtype != arrays[first].dtype:
            return f"{first} is {arrays[first].dtype} but {name} is {array.dtype}"
    return None


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("jax_triton") is not None


def launch(
    kernel: Any,
    *operands: Any,
    out: Sequence[jax.ShapeDtypeStruct],
    grid: tuple[int, ...],
    device: Device,
    warps: int,
    stages: int,
    **constants: Any,
) -> Sequence[jax.Array]:
    """Calls a Triton kernel from JAX.

    Works under `jax.vmap`, which launches it once for each member, and in `jax.shard_map`.

    Args:
        kernel: decorated with `triton.jit`; takes pointers to `operands`, pointers to the results, `constants`.
        operands: arrays, numbers, or `None`, which the kernel sees as such.
        out: shapes and dtypes of the results.
        grid: blocks along up to three axes.
        device: what to compile for.
        warps, stages: of each block, and loads in flight in its loops.
        constants: the kernel's compile-time arguments.
    """
    # Triton knows this type on newer GPUs only; the kernels take its bits.
    operands = tuple(
        jax.lax.bitcast_convert_type(x, jnp.uint8) if getattr(x, "dtype", None) == jnp.float8_e4m3fn else x
        for x in operands
    )
    present = [x for x in operands if isinstance(x, jax.Array)]

    @jax.custom_batching.sequential_vmap
    def call(*present: jax.Array) -> Sequence[jax.Array]:
        arrays = iter(present)
        given = [next(arrays) if isinstance(x, jax.Array) else x for x in operands]
        return _call(kernel, given, tuple(out), grid, device, warps, stages, constants)

    return vary_like(call(*present), present)


def _call(
    kernel: Any,
    operands: Sequence[Any],
    out: tuple[jax.ShapeDtypeStruct, ...],
    grid: tuple[int, ...],
    device: Device,
    warps: int,
    stages: int,
    constants: dict[str, Any],
) -> Sequence[jax.Array]:
    return _jax_triton().triton_call(
        *operands,
        kernel=kernel,
        out_type=out,
        grid=grid,
        num_warps=warps,
        num_stages=stages,
        compute_capability=10 * device.capability[0] + device.capability[1],
        backend_options={"ptx_version": _PTX, "enable_fp_fusion": True},
        **constants,
    )


@functools.cache
def _jax_triton() -> Any:
    import jax_triton
    from jax.interpreters import partial_eval
    from jax_triton import triton_lib

    # Version 0.4.1 keeps unused calls by a rule in the form that JAX had before 0.12; the default rule drops them.
    partial_eval.dce_rules.pop(triton_lib.triton_kernel_call_p, None)
    return jax_triton
