"""The Hopper kernel: packed weights stream through shared memory and become tensor core operands in registers.

`y^T = W x^T`: rows of weights are rows of the tensor core's operand A, tokens the columns of B. A is made in registers
by the warpgroup that uses it, so weights cross shared memory once and packed. Each group of inputs is summed exactly as
integers times activations, then scaled in float32: scales and zero points cost nothing in accuracy.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ..device import Device
from ..linear.epilogue import activation, combine, reduce_splits
from ..linear.form import LinearForm
from ..mosaic import ACC, not_hopper, send_rows, store_transposed, tiled
from ..operator import Config
from .tiling import CHUNK, MAX_TOKENS, ROWS, Shape, Tiling, best
from .unpack import across, bit_pattern, operand
from .weight import BLOCK, QuantizedWeight, WeightFormat

_ROW = plgpu.Layout.WGMMA.reduce(1)
# Registers for sums in flight beside those carried from step to step.
_PARTIAL_REGISTERS = 32


def why_not(
    x: jax.Array,
    weight: QuantizedWeight,
    bias: jax.Array | None,
    residual: jax.Array | None,
    *,
    device: Device,
    form: LinearForm,
) -> str | None:
    if reason := not_hopper(device):
        return reason
    if x.dtype not in (jnp.bfloat16, jnp.float16):
        return f"activations are bfloat16 or float16, not {x.dtype}"
    if form.result_dtype(x.dtype) not in (jnp.bfloat16, jnp.float16, jnp.float32):
        return f"results are bfloat16, float16 or float32, not {form.result_dtype(x.dtype)}"
    if residual is not None and residual.dtype not in (jnp.bfloat16, jnp.float16):
        return f"residuals are bfloat16 or float16, not {residual.dtype}"
    if form.norm is not None:
        return "it fuses no norm"
    shape = Shape.of(x, weight, form)
    if not 1 <= shape.tokens <= MAX_TOKENS:
        return f"it takes 1 to {MAX_TOKENS} rows of activations, not {shape.tokens}"
    if shape.inputs % CHUNK or shape.out % 16:
        return f"inputs must be a multiple of {CHUNK} and outputs of 16, not {shape.inputs} and {shape.out}"
    if weight.format.blocks and form.gated and shape.out % BLOCK:
        return f"{shape.out} rows of the gate are not a multiple of the {BLOCK} that share a scale"
    if not best(shape, device):
        return f"two stages of its pipeline do not fit {device.shared_memory} bytes of shared memory"
    return None


def candidates(
    x: jax.Array,
    weight: QuantizedWeight,
    bias: jax.Array | None,
    residual: jax.Array | None,
    *,
    device: Device,
    form: LinearForm,
) -> Sequence[Config]:
    return [dataclasses.asdict(tiling) for tiling in best(Shape.of(x, weight, form), device, count=8)]


def run(
    x: jax.Array,
    weight: QuantizedWeight,
    bias: jax.Array | None,
    residual: jax.Array | None,
    *,
    device: Device,
    config: Config | None,
    form: LinearForm,
) -> jax.Array:
    shape = Shape.of(x, weight, form)
    [tiling] = best(shape, device)
    tiling = dataclasses.replace(tiling, **(config or {})).fit(shape, device)
    parts, out, tokens = shape.parts, shape.out, shape.tokens
    if tokens > 8 and tokens % 8:  # a tile in shared memory is of eight rows: fewer are filled up, more must be whole
        x = jnp.pad(x, ((0, -tokens % 8), (0, 0)))
    per_row = weight.format.columns is None
    scales = weight.scales.reshape(-1, parts, weight.scales.shape[1] // parts)
    streamed = {
        "x": x,
        "values": weight.values.reshape(parts, out, -1),
        "scales": None if per_row else scales,
        "zeros": None if weight.zeros is None else weight.zeros.reshape(-1, parts, out),
        "pattern": _pattern(shape, x.dtype),
    }
    last = {
        "scales": scales[0] if per_row else None,
        "bias": None if bias is None else bias.reshape(parts, out),
        "residual": residual,
    }
    if tiling.splits == 1:
        result = jax.ShapeDtypeStruct((tokens, out), form.result_dtype(x.dtype))
        return _call(streamed, last, result, shape, tiling, weight, form)
    result = jax.ShapeDtypeStruct((tiling.splits, parts, tokens, out), jnp.float32)
    sums = _call(streamed, {}, result, shape, tiling, weight, form)
    if per_row:
        sums *= scales[0][:, None].astype(jnp.float32)
    return reduce_splits(sums, bias, residual, form, out, form.result_dtype(x.dtype))


def _call(
    streamed: dict[str, jax.Array | None],
    last: dict[str, jax.Array | None],
    result: jax.ShapeDtypeStruct,
    shape: Shape,
    tiling: Tiling,
    weight: QuantizedWeight,
    form: LinearForm,
) -> jax.Array:
    streamed = {name: array for name, array in streamed.items() if array is not None}
    last = {name: array for name, array in last.items() if array is not None}
    block = partial(_Block, shape=shape, tiling=tiling, stored=weight.format, form=form)

    def body(streamed: dict[str, Any], last: dict[str, Any], out: Any, **scratch: Any) -> None:
        # Here, for the compiler asks for the index anew at every place in a loop that it is named in.
        warpgroup = lax.axis_index("warpgroup")
        place = lax.div(warpgroup, tiling.inputs), lax.rem(warpgroup, tiling.inputs)
        block(streamed, last, out, scratch, *place).run()

    return plgpu.kernel(
        body,
        out_type=result,
        grid=(-(-shape.out // tiling.height), tiling.splits),
        grid_names=("tile", "split"),
        num_threads=tiling.warpgroups,
        thread_name="warpgroup",
        scratch_types=_scratch(streamed, last, result, shape, tiling, weight.format),
    )(streamed, last)


def _scratch(
    streamed: Mapping[str, Any],
    last: Mapping[str, Any],
    result: jax.ShapeDtypeStruct,
    shape: Shape,
    tiling: Tiling,
    stored: WeightFormat,
) -> dict[str, Any]:
    """Shared memory and barriers of a thread block."""
    parts, columns, height, stages = shape.parts, shape.columns, tiling.height, tiling.stages
    groups = tiling.inputs * groups_of(stored)

    def operand_memory(*dims: int, dtype: Any, inner: int) -> Any:
        return plgpu.SMEM(dims, dtype, transforms=tiled(inner, dtype.itemsize))

    width = CHUNK // stored.words
    scratch: dict[str, Any] = {
        # Tiles no wider than what one instruction, or one warpgroup, takes of them.
        "x": operand_memory(
            stages, columns, tiling.inputs * CHUNK, dtype=streamed["x"].dtype, inner=min(64, CHUNK // groups_of(stored))
        ),
        "values": operand_memory(
            stages, parts, height, tiling.inputs * width, dtype=jnp.dtype(streamed["values"].dtype), inner=width
        ),
        "out_tile": plgpu.SMEM((parts if tiling.splits > 1 else 1, columns, height), result.dtype),
        "arrived": plgpu.Barrier(num_arrivals=len(_fetched(streamed, stored)), num_barriers=stages),
        "consumed": plgpu.Barrier(num_arrivals=tiling.warpgroups, num_barriers=stages),
    }
    for name in ("scales", "zeros"):
        if name in _fetched(streamed, stored):
            scratch[name] = plgpu.SMEM((stages, groups, parts, height), streamed[name].dtype)
    for name, array in last.items():
        dims = (columns, height) if name == "residual" else (parts, height)
        scratch[f"last_{name}"] = plgpu.SMEM(dims, array.dtype)
    if last:
        copies = sum(shape.tokens if name == "residual" else 1 for name in last)
        scratch["last_arrived"] = plgpu.Barrier(num_arrivals=copies)
    if tiling.inputs > 1:
        scratch["sums"] = plgpu.SMEM((tiling.inputs - 1, parts, height, columns), jnp.float32)
        scratch["summed"] = plgpu.Barrier(num_arrivals=tiling.warpgroups)
    return scratch


def _pattern(shape: Shape, dtype: jnp.dtype) -> jax.Array | None:
    """What `operand` wants in memory; a constant does where there is no register left to keep it in."""
    stored = shape.weight.format
    bits = bit_pattern(stored, dtype)
    there = bits is not None and (stored.group != 32 or shape.columns <= 32)
    return jnp.array([bits], jnp.int16) if there else None


def groups_of(stored: WeightFormat) -> int:
    """Groups with a scale of their own in one chunk of inputs."""
    return 1 if stored.group is None else CHUNK // stored.group


def _fetched(streamed: Mapping[str, Any], stored: WeightFormat) -> list[str]:
    """What each step copies to shared memory; scales of blocks are single numbers, read where they are needed."""
    names = ("x", "values", "zeros") if stored.group is None else ("x", "values", "scales", "zeros")
    return [name for name in names if name in streamed]


@dataclasses.dataclass(frozen=True)
class _Block:
    """One thread block, while it is traced.

    Attributes:
        over_rows, over_inputs: which rows and which inputs of the block are this warpgroup's.
    """

    streamed: Mapping[str, Any]
    last: Mapping[str, Any]
    out: Any
    scratch: Mapping[str, Any]
    over_rows: jax.Array
    over_inputs: jax.Array
    shape: Shape
    tiling: Tiling
    stored: WeightFormat
    form: LinearForm

    @property
    def sections(self) -> list[tuple[int, int]]:
        """Part and block of each 64 rows that a warpgroup sums."""
        return [(part, block) for part in range(self.shape.parts) for block in range(self.tiling.blocks)]

    def run(self) -> None:
        tiling, stages = self.tiling, self.tiling.stages
        split, first = lax.axis_index("split"), (self.over_rows == 0) & (self.over_inputs == 0)
        steps = tiling.steps(self.shape)
        whole = -(-self.shape.inputs // (tiling.inputs * CHUNK))
        mine = lax.min(steps, whole - split * steps)
        pattern, bits = None, bit_pattern(self.stored, self.streamed["x"].dtype)
        if bits is not None:
            pattern = self.streamed["pattern"][0] if "pattern" in self.streamed else jnp.int16(bits)

        @pl.when(first)
        def _() -> None:
            for step in range(stages):
                pl.when(step < mine)(partial(self.fetch, jnp.int32(step), split * steps + step))
            self.fetch_last()

        def step(index: jax.Array, carry: tuple[jax.Array, tuple[jax.Array, ...]]) -> Any:
            slot, totals = carry
            plgpu.barrier_wait(self.scratch["arrived"].at[slot])
            totals = self.add_products(slot, split * steps + index, totals, pattern)
            plgpu.commit_smem()  # this thread's reads of the slot come before the copies that overwrite it
            plgpu.barrier_arrive(self.scratch["consumed"].at[slot])
            ahead = index - 1 + stages

            @pl.when(first & (index > 0) & (ahead < mine))
            def _() -> None:
                before = jnp.where(slot == 0, stages, slot) - 1
                plgpu.barrier_wait(self.scratch["consumed"].at[before])
                self.fetch(before, split * steps + ahead)

            return jnp.where(slot == stages - 1, 0, slot + 1), totals

        zero = plgpu.layout_cast(jnp.zeros((ROWS, self.shape.columns), jnp.float32), plgpu.Layout.WGMMA)
        _, totals = lax.fori_loop(0, mine, step, (jnp.int32(0), (zero,) * len(self.sections)))
        if tiling.inputs > 1:
            totals = self.gather(totals)
        pl.when(self.over_inputs == 0)(partial(self.store, totals))

    def own_rows(self, block: int) -> Any:
        """Rows of the thread block's tile."""
        return pl.ds(pl.multiple_of((self.over_rows * self.tiling.blocks + block) * ROWS, ROWS), ROWS)

    def fetch(self, slot: jax.Array, step: jax.Array) -> None:
        """Starts the copies of one step."""
        tiling, stored = self.tiling, self.stored
        first = slot * 0  # traced, for a constant index may not reach past an array
        rows = pl.ds(lax.axis_index("tile") * tiling.height, tiling.height)

        def of_step(width: int) -> Any:
            return pl.ds(step * tiling.inputs * width, tiling.inputs * width)

        parts = pl.ds(first, self.shape.parts)
        where = {
            "x": (pl.ds(first, self.shape.columns), of_step(CHUNK)),
            "values": (parts, rows, of_step(CHUNK // stored.words)),
            "scales": (of_step(groups_of(stored)), parts, rows),
            "zeros": (of_step(groups_of(stored)), parts, rows),
        }
        for name in _fetched(self.streamed, stored):
            plgpu.copy_gmem_to_smem(
                self.streamed[name].at[where[name]], self.scratch[name].at[slot], self.scratch["arrived"].at[slot]
            )

    def fetch_last(self) -> None:
        """Starts the copies of what follows the sums; the residual by rows, so that it stops at the last token."""
        rows = pl.ds(lax.axis_index("tile") * self.tiling.height, self.tiling.height)
        for name, source in self.last.items():
            target, barrier = self.scratch[f"last_{name}"], self.scratch["last_arrived"]
            if name != "residual":
                parts = pl.ds(lax.axis_index("tile") * 0, self.shape.parts)
                plgpu.copy_gmem_to_smem(source.at[parts, rows], target, barrier)
                continue
            for token in range(self.shape.tokens):
                plgpu.copy_gmem_to_smem(source.at[token, rows], target.at[token], barrier)

    def add_products(
        self, slot: jax.Array, step: jax.Array, totals: Sequence[jax.Array], pattern: jax.Array | None
    ) -> tuple[jax.Array, ...]:
        """Adds the products over the chunk of inputs that this warpgroup takes of a step."""
        groups, columns, totals = groups_of(self.stored), self.shape.columns, list(totals)
        size = CHUNK // groups
        work = [(n, *section, group) for n, section in enumerate(self.sections) for group in range(groups)]
        at_once = max(1, 2 * _PARTIAL_REGISTERS // columns)
        for some in (work[start : start + at_once] for start in range(0, len(work), at_once)):

            def products(*sums: Any, some: Sequence[Any] = some) -> list[jax.Array]:
                for sum, (_, part, block, group) in zip(sums, some, strict=True):
                    inputs = pl.ds(pl.multiple_of(self.over_inputs * CHUNK + group * size, size), size)
                    a = self.numbers(pattern, slot, part, block, group)
                    plgpu.wgmma(sum, a, self.scratch["x"].at[slot, :, inputs].T)
                plgpu.wgmma_wait(0)
                return [sum[...] for sum in sums]

            found = pl.run_scoped(products, *[ACC((ROWS, columns), jnp.float32)] * len(some))
            for product, (n, part, block, group) in zip(found, some, strict=True):
                scale = self.scale(slot, step, part, block, group)
                totals[n] += product if scale is None else product * scale
        return tuple(totals)

    def numbers(self, pattern: jax.Array | None, slot: jax.Array, part: int, block: int, group: int) -> jax.Array:
        """Operand A of one group: the integers (or narrow floats) less their zero point."""
        groups, dtype, width = groups_of(self.stored), self.streamed["x"].dtype, CHUNK // self.stored.words
        own = pl.ds(pl.multiple_of(self.over_inputs * width, width), width)
        # Loaded anew for every group, of which the compiler keeps what the group needs: loads stay where they are
        # among the products, while unpacking would move ahead of them all and take too many registers.
        stored = self.scratch["values"][slot, part, self.own_rows(block), own]
        if groups > 1:
            stored = stored[:, group * width // groups : (group + 1) * width // groups]
        zeros = None
        if self.stored.zero_points:
            row = self.scratch["zeros"].at[slot, self.over_inputs * groups + group, part, self.own_rows(block)]
            zeros = plgpu.load(row, layout=_ROW, optimized=False)
        return operand(stored, self.stored, dtype, pattern, zeros)

    def scale(self, slot: jax.Array, step: jax.Array, part: int, block: int, group: int) -> jax.Array | None:
        """What the sum over one group is multiplied with, unless that waits for the end."""
        if self.stored.group is not None:
            where = self.over_inputs * groups_of(self.stored) + group
            return self.row(self.scratch["scales"].at[slot, where, part, self.own_rows(block)])
        if not self.stored.blocks:
            return None
        scales = self.streamed["scales"]
        # Past the end products are zero, but their scale must be a number.
        chunk = lax.min(step * self.tiling.inputs + self.over_inputs, scales.shape[0] - 1)
        first = lax.axis_index("tile") * self.tiling.height + (self.over_rows * self.tiling.blocks + block) * ROWS
        return scales[chunk, part, lax.min(first // BLOCK, scales.shape[2] - 1)].astype(jnp.float32)

    def gather(self, totals: Sequence[jax.Array]) -> tuple[jax.Array, ...]:
        """Adds the sums of the warpgroups over inputs, always in the same order."""
        sums = self.scratch["sums"]

        @pl.when(self.over_inputs > 0)
        def _() -> None:
            for (part, block), total in zip(self.sections, totals, strict=True):
                sums[self.over_inputs - 1, part, self.own_rows(block)] = total

        plgpu.barrier_arrive(self.scratch["summed"])
        plgpu.barrier_wait(self.scratch["summed"])
        for other in range(self.tiling.inputs - 1):
            totals = [
                total + plgpu.load(sums.at[other, part, self.own_rows(block)], layout=plgpu.Layout.WGMMA)
                for (part, block), total in zip(self.sections, totals, strict=True)
            ]
        return tuple(totals)

    def store(self, totals: Sequence[jax.Array]) -> None:
        """The epilogue and the copy of the results, or the copy of the sums for a second pass.

        The last tile may have blocks of rows that are partly or wholly past the end.
        """
        out_tile, direct = self.scratch["out_tile"], self.tiling.splits == 1
        if self.last:
            plgpu.barrier_wait(self.scratch["last_arrived"])
        results = dict(zip(self.sections, totals, strict=True))
        if direct:
            parts = range(self.shape.parts)
            results = {
                (0, block): self.finish([results[part, block] for part in parts], block)
                for block in range(self.tiling.blocks)
            }
        for (part, block), y in results.items():
            store_transposed(out_tile.at[part, :, self.own_rows(block)].T, y.astype(self.out.dtype))
        plgpu.commit_smem()
        blocks = self.tiling.height // ROWS
        for part, block in results:
            target = self.out if direct else self.out.at[lax.axis_index("split"), part]
            index = lax.axis_index("tile") * blocks + self.over_rows * self.tiling.blocks + block
            source = out_tile.at[part, :, self.own_rows(block)]
            send_rows(source, target, index, -(-self.shape.out // self.tiling.height) * blocks)
        plgpu.wait_smem_to_gmem(0)

    def finish(self, products: Sequence[jax.Array], block: int) -> jax.Array:
        """Everything after the sums, as `reduce_splits` does it for split ones."""
        rows = self.own_rows(block)
        if "scales" in self.last:
            scales = self.scratch["last_scales"]
            products = [product * self.row(scales.at[part, rows]) for part, product in enumerate(products)]
        biases = [
            self.row(self.scratch["last_bias"].at[p, rows]) if "bias" in self.last else None
            for p in range(len(products))
        ]
        y = combine(products, biases, self.form, activation(self.form.activation)).astype(self.out.dtype)
        if "residual" in self.last:
            y += plgpu.load(self.scratch["last_residual"].at[:, rows].T, layout=plgpu.Layout.WGMMA, optimized=False)
        return y

    def row(self, ref: Any) -> jax.Array:
        """A number per row, in every column."""
        return across(plgpu.load(ref, layout=_ROW, optimized=False).astype(jnp.float32), self.shape.columns)
