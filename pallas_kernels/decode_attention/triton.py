"""Attention of few queries to a long KV memory, in Triton: for NVIDIA GPUs that the Pallas kernel leaves out.

A row's keys are cut into chunks of a size that depends only on how many keys there can be, so that neither the batch
nor the GPU decides in which order the weights are added.
"""

import dataclasses
import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array

from ..attention.form import AttentionForm
from ..attention.triton_form import Blocks, blocks, constants, power, slopes, split, why_not_form
from ..device import Device
from ..operator import Config
from ..triton_support import launch, why_not_device, why_not_dtype

_NARROW = (jnp.int8, jnp.float8_e4m3fn)


@dataclasses.dataclass(frozen=True)
class Tiling(Blocks):
    """How the work is cut.

    Attributes:
        chunk: keys that one block goes through, a multiple of `block_n`.
    """

    chunk: int


def why_not(
    q: Array,
    k: Array,
    v: Array | None,
    k_scales: Array | None,
    v_scales: Array | None,
    block_tables: Array | None,
    q_start: Array,
    k_lengths: Array | None,
    *,
    device: Device,
    form: AttentionForm,
    sinks: int = 0,
    value_dim: int | None = None,
    return_lse: bool = False,
) -> str | None:
    """See `KernelModule`."""
    if reason := why_not_device(device) or why_not_form(form, q.shape[2]):
        return reason
    narrow = k.dtype in _NARROW
    if reason := why_not_dtype(q=q) if narrow else why_not_dtype(q=q, k=k, v=v):
        return reason
    if 0 in (*q.shape, *k.shape, *(() if block_tables is None else block_tables.shape)):
        return "nothing to compute"
    if v is None and value_dim is not None and value_dim > split(q.shape[3])[0]:
        return f"value_dim must be at most {split(q.shape[3])[0]} of {q.shape[3]} dimensions, not {value_dim}"
    if _default(q, k, v, block_tables, value_dim, device) is None:
        return f"heads of {q.shape[3]} dimensions do not fit {device.shared_memory} bytes of shared memory"
    return None


def candidates(
    q: Array,
    k: Array,
    v: Array | None,
    k_scales: Array | None,
    v_scales: Array | None,
    block_tables: Array | None,
    q_start: Array,
    k_lengths: Array | None,
    *,
    device: Device,
    form: AttentionForm,
    sinks: int = 0,
    value_dim: int | None = None,
    return_lse: bool = False,
) -> Sequence[Config]:
    """See `KernelModule`."""
    default = _default(q, k, v, block_tables, value_dim, device)
    found = []
    for block_n, warps, stages, chunk in itertools.product((32, 64, 128), (4, 8), (2, 3, 4), (256, 512, 1024, 2048)):
        assert default is not None  # checked by `why_not`
        option = dataclasses.replace(default, block_n=block_n, warps=warps, stages=stages, chunk=chunk)
        if _shared_memory(option, q, k, v, value_dim) <= device.shared_memory:
            found.append(dataclasses.asdict(option))
    return found


def run(
    q: Array,
    k: Array,
    v: Array | None,
    k_scales: Array | None,
    v_scales: Array | None,
    block_tables: Array | None,
    q_start: Array,
    k_lengths: Array | None,
    *,
    device: Device,
    config: Config | None,
    form: AttentionForm,
    sinks: int = 0,
    value_dim: int | None = None,
    return_lse: bool = False,
) -> Array | tuple[Array, Array]:
    """See `KernelModule`."""
    from . import triton_kernels as kernels

    batch, length, heads, dim = q.shape
    values = _value_dim(v, value_dim)
    tiling = _default(q, k, v, block_tables, value_dim, device)
    assert tiling is not None  # checked by `why_not`
    tiling = dataclasses.replace(tiling, **config or {})
    capacity = _capacity(k, block_tables)
    chunks = -(-capacity // tiling.chunk)
    whole = (batch, length, heads)
    lead, dtype = ((), q.dtype) if chunks == 1 else ((chunks,), jnp.float32)
    out, lse = launch(
        kernels.decode,
        q,
        k,
        v,
        None if block_tables is None else block_tables.astype(jnp.int32),
        q_start.astype(jnp.int32),
        None if k_lengths is None else k_lengths.astype(jnp.int32),
        k_scales,
        v_scales,
        slopes(form),
        length,
        capacity,
        k.shape[0],
        out=[
            jax.ShapeDtypeStruct((*lead, *whole, values), dtype),
            jax.ShapeDtypeStruct((*lead, *whole), jnp.float32),
        ],
        grid=(batch * k.shape[1], -(-length * (heads // k.shape[1]) // tiling.block_m), chunks),
        device=device,
        warps=tiling.warps,
        stages=tiling.stages if block_tables is None else tiling.paged_stages(),
        HEADS=heads,
        KV_HEADS=k.shape[1],
        PAGE=k.shape[2],
        SINKS=sinks,
        CHUNKS=chunks,
        CHUNK=tiling.chunk,
        BLOCK_M=tiling.block_m,
        BLOCK_N=tiling.block_n,
        **constants(form, dim, values),
    )
    if chunks > 1:
        out, lse = launch(
            kernels.combine,
            out,
            lse,
            batch * length * heads,
            out=[jax.ShapeDtypeStruct((*whole, values), q.dtype), jax.ShapeDtypeStruct(whole, jnp.float32)],
            grid=(batch * length * heads,),
            device=device,
            warps=4,
            stages=2,
            DV=values,
            DV_MAIN=power(values),
            CHUNKS=chunks,
            BLOCK=16,
        )
    return (out, lse) if return_lse else out


def _default(
    q: Array, k: Array, v: Array | None, block_tables: Array | None, value_dim: int | None, device: Device
) -> Tiling | None:
    rows = min(64, q.shape[1] * (q.shape[2] // k.shape[1]))
    found = blocks(rows, q.shape[3], _value_dim(v, value_dim), k.dtype.itemsize, device, shared_values=v is None)
    if found is None:
        return None
    # 256 keys keep the partial results small beside the keys; 64 chunks of few rows fill any GPU.
    chunk = max(256, power(-(-_capacity(k, block_tables) // 64)))
    return Tiling(**dataclasses.asdict(found), chunk=chunk)


def _shared_memory(tiling: Tiling, q: Array, k: Array, v: Array | None, value_dim: int | None) -> int:
    return tiling.shared_memory(q.shape[3], _value_dim(v, value_dim), k.dtype.itemsize, shared_values=v is None)


def _value_dim(v: Array | None, value_dim: int | None) -> int:
    found = value_dim if v is None else v.shape[3]
    assert found is not None  # checked by the operator
    return found


def _capacity(k: Array, block_tables: Array | None) -> int:
    """Keys a row can have."""
    return k.shape[2] if block_tables is None else k.shape[2] * block_tables.shape[1]
