"""The residual sum and the norm after it as one Mosaic GPU kernel.

A row is read once: its numbers wait in registers, rounded, between the statistics and the scaling. Loads and stores go
straight between global memory and registers, 16 bytes a thread where the width allows, and many small blocks on each
multiprocessor overlap one another's latencies.
"""

import dataclasses
import functools
import operator
from collections.abc import Sequence
from typing import Any, Self

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from ..device import Device
from ..mosaic import not_hopper, store
from ..operator import Config
from .form import NormForm

_WARPS, _LANES = 4, 32  # of a warpgroup, of a warp
_MAX_WARPGROUPS = 8  # 1024 threads, the most a block may have
_FEW = 64  # rows, which leave half of a Hopper GPU's multiprocessors idle
_NARROW = 512  # a row that a single warp holds in 16 registers a thread


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How rows are dealt out.

    Attributes:
        warpgroups: warpgroups of a block.
        vector: numbers a thread reads at once.
        narrow: every warp of the one warpgroup has a row of its own; otherwise all warps of a block share one row.
    """

    warpgroups: int
    vector: int
    narrow: bool = False

    @property
    def chunk(self) -> int:
        """Numbers that a warp reads at once."""
        return _LANES * self.vector

    def piece(self, width: int) -> int:
        """Numbers of a row that one warp has."""
        return width if self.narrow else width // (_WARPS * self.warpgroups)

    def chunks(self, width: int) -> int:
        """How many reads make a piece."""
        return -(-self.piece(width) // self.chunk)

    def held(self, width: int) -> int:
        """Numbers of a row that one thread holds."""
        return self.chunks(width) * self.vector

    @property
    def registers(self) -> int:
        """The most registers a thread may have."""
        return min(255, 64 * 1024 // (self.warpgroups * _WARPS * _LANES))

    def fits(self, width: int) -> bool:
        """Whether rows split into pieces of whole, aligned vectors, at least one chunk long, that registers hold.

        Two registers for each number are what the compiler was seen to need: its value and its share of the rest.
        """
        whole = self.narrow or width % (_WARPS * self.warpgroups) == 0
        aligned = self.piece(width) % self.vector == 0 and self.piece(width) >= self.chunk
        return whole and aligned and 2 * self.held(width) <= self.registers

    @classmethod
    def all(cls, width: int, itemsize: int) -> list[Self]:
        """Every tiling that fits, the likeliest first.

        That is the one with the fewest reads in all, none spent on overlaps and all as wide as can be, and among
        those the one that spreads them over most threads: one row alone then takes the least time, and of many rows
        more are in flight. The number of rows has no say: it must not change the order of any sum.
        """
        vectors = [1 << i for i in range((16 // itemsize).bit_length())]
        shared = [cls(w, v) for w in range(1, _MAX_WARPGROUPS + 1) for v in vectors]
        narrow = [cls(1, v, narrow=True) for v in vectors] if width <= _NARROW else []
        found = [tiling for tiling in narrow + shared if tiling.fits(width)]
        return sorted(found, key=lambda t: (not t.narrow, t.warpgroups * t.chunks(width), t.chunks(width)))


def why_not(
    x: Float[Array, "T E"],
    residual: Float[Array, "T E"] | None,
    bias: Float[Array, " E"] | None,
    weight: Float[Array, " E"] | None,
    norm_bias: Float[Array, " E"] | None,
    *,
    device: Device,
    form: NormForm,
) -> str | None:
    """See `KernelModule.why_not`."""
    if reason := not_hopper(device):
        return reason
    for name, array in (("x", x), ("bias", bias), ("weight", weight), ("norm_bias", norm_bias)):
        if array is not None and array.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
            return f"{name} is {array.dtype}, not bfloat16, float16 or float32"
    rows, width = x.shape
    if rows == 0:
        return "there are no rows"
    if not Tiling.all(width, x.dtype.itemsize):
        return f"the width must be 32 to {_NARROW}, or a multiple of 4 up to about 32768, not {width}"
    return None


def rather_xla(x: Float[Array, "T E"], *_: Any, device: Device, form: NormForm) -> str | None:
    """Why XLA is expected to be as fast, or `None`: few rows take the time of one, whoever does it. Predicted."""
    if len(x) > _FEW:
        return None
    return f"{len(x)} rows are too few to fill the device: latency is all there is"


def candidates(x: Float[Array, "T E"], *_: Any, device: Device, form: NormForm) -> Sequence[Config]:
    """See `KernelModule.candidates`."""
    tilings = Tiling.all(x.shape[1], x.dtype.itemsize)
    widest = max(tiling.vector for tiling in tilings)
    return [dataclasses.asdict(tiling) for tiling in tilings if 2 * tiling.vector >= widest]


def run(
    x: Float[Array, "T E"],
    residual: Float[Array, "T E"] | None,
    bias: Float[Array, " E"] | None,
    weight: Float[Array, " E"] | None,
    norm_bias: Float[Array, " E"] | None,
    *,
    device: Device,
    config: Config | None,
    form: NormForm,
) -> tuple[Float[Array, "T E"], Float[Array, "T E"]]:
    """See `KernelModule.run`."""
    rows, width = x.shape
    tiling = Tiling(**config) if config else Tiling.all(width, x.dtype.itemsize)[0]
    named = {"x": x, "residual": residual, "bias": bias, "weight": weight, "norm_bias": norm_bias}
    arrays = {name: array for name, array in named.items() if array is not None}
    adds = residual is not None or bias is not None
    warps = _WARPS * tiling.warpgroups
    if not tiling.narrow:
        arrays = {name: array.reshape(*array.shape[:-1], warps, -1) for name, array in arrays.items()}
    elif rows % warps == 0:
        arrays |= {name: array.reshape(-1, warps, width) for name, array in arrays.items() if array.ndim == 2}
    # Each block has `out[block]`: a row as the pieces of the warps, a row for each warp, or one row for all of them.
    out = jax.ShapeDtypeStruct(arrays["x"].shape, x.dtype)

    def norm_kernel(*refs: Any) -> None:
        *arguments, partial_sums, barrier = refs
        inputs, outputs = dict(zip(arrays, arguments, strict=False)), arguments[len(arrays) :]
        _Block(tiling, width, len(out.shape) - 1, partial_sums, barrier).sum_and_norm(inputs, outputs, form)

    results = plgpu.kernel(
        norm_kernel,
        out_type=[out, out] if adds else [out],
        grid=out.shape[:1],
        grid_names=("block",),
        num_threads=tiling.warpgroups,
        thread_name="warpgroup",
        scratch_types=[
            plgpu.SMEM((2, tiling.warpgroups, _WARPS), jnp.float32),
            plgpu.Barrier(num_arrivals=tiling.warpgroups),
        ],
        # No thread reads what another wrote except the partial sums, and those wait for the barrier.
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
    )(*arrays.values())
    normed = results[0].reshape(x.shape)
    return normed, results[1].reshape(x.shape) if adds else x


class _Block:
    """The work of one block, on arrays `[4, chunk]`, a chunk for each warp of a warpgroup, or `[chunk]`, one for all.

    Either way a thread meets the same numbers in the same order, so a narrow row's norm does not depend on how many
    rows there are.
    """

    def __init__(self, tiling: Tiling, width: int, ndim: int, partial_sums: Any, barrier: Any) -> None:
        self.tiling, self.width, self.partial_sums, self.barrier = tiling, width, partial_sums, barrier
        self.exchanges = 0
        self.warpgroup = lax.axis_index("warpgroup")
        self.pieces = (pl.ds(self.warpgroup * _WARPS, _WARPS),) if ndim == 2 else ()
        piece = tiling.piece(width)
        # The last chunk ends where the piece does, so it may overlap the one before it.
        self.starts = [min(i * tiling.chunk, piece - tiling.chunk) for i in range(tiling.chunks(width))]
        self.overlap = len(self.starts) * tiling.chunk - piece
        self.shape = (_WARPS, tiling.chunk)[-ndim:]
        self.layout = self.layout_of(self.shape, tiling.vector)

    @staticmethod
    def layout_of(shape: tuple[int, ...], vector: int) -> Any:
        """Which thread has what: the last axis goes over a warp's lanes, the one before it, if any, over the warps."""
        lanes = shape[-1] // vector
        return plgpu.Layout.TILED(
            plgpu.Tiling((shape, (vector,))),
            warp_dims=(-3 if len(shape) == 2 else plgpu.Replicated(_WARPS),),
            lane_dims=(-2,) if lanes == _LANES else (plgpu.Replicated(_LANES // lanes), -2),
            vector_dim=-1,
        )

    def sum_and_norm(self, inputs: dict[str, Any], outputs: Sequence[Any], form: NormForm) -> None:
        """Reads `inputs`; writes the norm and, where there is a second output, the sum."""
        mine = (lax.axis_index("block"), *self.pieces)
        normed, *summed = (ref.at[mine] for ref in outputs)
        addends = [self.read(inputs["x"].at[mine])]
        if "bias" in inputs:
            addends.append(self.read_vector(inputs["bias"]))
        if "residual" in inputs:
            addends.append(self.read(inputs["residual"].at[mine]))
        # Asked for before anything waits, unless that would take too many registers.
        early = 3 * self.tiling.held(self.width) + 16 <= self.tiling.registers
        after = {name: ref for name, ref in inputs.items() if name in ("weight", "norm_bias")}
        parameters = {name: self.read_vector(ref) for name, ref in after.items() if early}
        # Rounded here: it is both what is stored and what the statistics are of.
        rounded = [_add(chunks).astype(normed.dtype) for chunks in zip(*addends, strict=True)]
        for ref in summed:
            self.write(ref, rounded)
        mean = self.total(rounded) * (1 / self.width) if form.centred else None

        def centred() -> list[Array]:  # computed twice, for it takes twice the registers of the rounded sum
            wide = [chunk.astype(jnp.float32) for chunk in rounded]
            return wide if mean is None else [chunk - self.spread(mean) for chunk in wide]

        variance = self.total([chunk * chunk for chunk in centred()]) * (1 / self.width)
        inverse = self.spread(lax.rsqrt(variance + form.eps))
        parameters |= {name: self.read_vector(ref) for name, ref in after.items() if not early}
        results = [chunk * inverse for chunk in centred()]
        if "weight" in parameters:
            scales = [chunk.astype(jnp.float32) + form.weight_offset for chunk in parameters["weight"]]
            results = [y * scale for y, scale in zip(results, scales, strict=True)]
        if "norm_bias" in parameters:
            results = [y + b.astype(jnp.float32) for y, b in zip(results, parameters["norm_bias"], strict=True)]
        self.write(normed, [y.astype(normed.dtype) for y in results])

    def columns(self, start: int) -> Any:
        """The index of a chunk."""
        return (..., pl.ds(start, self.tiling.chunk))

    def read(self, piece: Any, layout: Any = None) -> list[Array]:
        """A piece's chunks."""
        layout = layout or self.layout
        return [plgpu.load(piece.at[self.columns(start)], layout=layout, optimized=False) for start in self.starts]

    def read_vector(self, ref: Any) -> list[Array]:
        """Chunks of an array that is the same for all rows."""
        if not self.tiling.narrow:
            return self.read(ref.at[self.pieces])
        chunks = self.read(ref, self.layout_of(self.shape[-1:], self.tiling.vector))
        return [lax.broadcast_in_dim(chunk, self.shape, (len(self.shape) - 1,)) for chunk in chunks]

    def write(self, piece: Any, chunks: list[Array]) -> None:
        """The opposite of `read`."""
        for start, chunk in zip(self.starts, chunks, strict=True):
            store(piece.at[self.columns(start)], chunk)

    def total(self, chunks: list[Array]) -> Array:
        """The sum over a row: a scalar, or one for each warp where each has a row."""
        if self.overlap:
            column = lax.broadcasted_iota(jnp.int32, self.shape, len(self.shape) - 1)
            fresh = plgpu.layout_cast(column, self.layout) >= self.overlap
            chunks = [*chunks[:-1], jnp.where(fresh, chunks[-1], jnp.zeros_like(chunks[-1]))]
        of_warps = jnp.sum(_add(chunks), axis=-1)
        if self.tiling.narrow:
            return of_warps
        # Each exchange has slots of its own, so that none overwrites what a slower warp has yet to read.
        slots = self.partial_sums.at[self.exchanges]
        self.exchanges += 1
        slots[self.warpgroup] = of_warps
        plgpu.barrier_arrive(self.barrier)
        plgpu.barrier_wait(self.barrier)
        everywhere = self.layout_of((_WARPS,), 1)
        sums = [plgpu.load(slots.at[g], layout=everywhere, optimized=False) for g in range(self.tiling.warpgroups)]
        return jnp.sum(_add(sums))

    def spread(self, per_row: Array) -> Array:
        """A row's number for every element of its chunks."""
        return lax.broadcast_in_dim(per_row, self.shape, tuple(range(per_row.ndim)))


def _add(arrays: Sequence[Array]) -> Array:
    """The sum in float32, from the first to the last."""
    return functools.reduce(operator.add, (array.astype(jnp.float32) for array in arrays))
