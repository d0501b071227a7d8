"""The kernel of the skinny product: what one block does.

It computes `y^T = W x^T`: a tile of weights comes straight from global memory as wgmma's A operand, the few tokens are
the columns of its B operand, rounded up to 8. No path of its own serves a single token: the product is memory-bound, a
wgmma of 8 columns takes its A operand from shared memory at 128 bytes a cycle, and global memory brings each
multiprocessor under 20, so vector instructions could not be faster, only busier.

Blocks are persistent: one per multiprocessor walks over tiles of output rows, and the pipeline of loads runs on from
one tile to the next.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from ..mosaic import send_rows, store_transposed, tiled, transposed_layout
from . import prologue
from .epilogue import activation, combine
from .form import LinearForm
from .partition import TILE, Problem, Tiling, direct, steps_per_split, units

_WGMMA = plgpu.Layout.WGMMA


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything static about one call.

    Attributes:
        blocks: of the grid: at most one per multiprocessor.
        result: dtype.
        pipeline_bytes: shared memory for the pipeline and the staging of results.
    """

    problem: Problem
    tiling: Tiling
    form: LinearForm
    blocks: int
    result: np.dtype
    pipeline_bytes: int

    @property
    def direct(self) -> bool:
        return direct(self.problem, self.tiling)

    @property
    def x_step(self) -> int:
        """Inputs of one copy of `x`."""
        return TILE if self.problem.ragged else self.tiling.step

    @property
    def x_copies(self) -> int:
        """Copies of `x` in a pipeline step."""
        return self.tiling.step // self.x_step


def call(plan: Plan, x: Array, weight: Array, **extras: Array | None) -> Array:
    """The kernel: the result `[T, out]`, or float32 `[splits, operands, T, out rounded up]` for a second pass."""
    problem, tiling = plan.problem, plan.tiling
    present = {name: array for name, array in extras.items() if array is not None}
    # Of the dimensions they have in shared memory, so that one copy brings all.
    norm = {name: array.reshape(-1, tiling.step) for name, array in present.items() if name.startswith("norm_")}
    present |= norm
    if plan.direct:
        out = jax.ShapeDtypeStruct((plan.problem.tokens, problem.outputs), plan.result)
    else:
        padded = -(-problem.outputs // 4) * 4
        out = jax.ShapeDtypeStruct((tiling.splits, problem.operands, plan.problem.tokens, padded), jnp.float32)

    def body(x_g: Any, weight_g: Any, *rest: Any, **scratch: Any) -> None:
        *refs, out_g = rest
        Block(plan, x_g, weight_g, out_g, dict(zip(present, refs, strict=True)), scratch).run()

    return plgpu.kernel(
        body,
        out_type=out,
        grid=(plan.blocks,),
        grid_names=("block",),
        scratch_types=_scratch(plan, x.dtype, present),
    )(x, weight, *present.values())


def _scratch(plan: Plan, dtype: Any, present: Mapping[str, Array]) -> dict[str, Any]:
    """Shared memory and barriers of a block."""
    problem, tiling = plan.problem, plan.tiling
    columns, padded = problem.columns, tiling.padded_rows
    tiles, swizzle = tiled(TILE)

    def operand(flat: bool, *shape: int) -> Any:
        tiled = plgpu.SMEM(shape, dtype, transforms=(tiles, swizzle))
        # TMA refuses tiles that do not divide the array. One column of tiles is stored as if there were none, and
        # without tiles TMA takes any array.
        return plgpu.RefUnion(plgpu.SMEM(shape, dtype, transforms=(swizzle,)), tiled) if flat else tiled

    slots = tiling.stages * plan.x_copies
    scratch: dict[str, Any] = {
        "weights_s": operand(problem.flat, tiling.stages, problem.operands, padded, tiling.step),
        "x_s": operand(False, columns, problem.inputs)
        if problem.resident
        else operand(problem.flat or problem.ragged, slots, columns, plan.x_step),
        "staged_s": [plgpu.SMEM((columns, padded), plan.result if plan.direct else jnp.float32)]
        * (1 if plan.direct else problem.operands),
        "arrived": plgpu.Barrier(
            num_arrivals=problem.operands + (0 if problem.resident else plan.x_copies), num_barriers=tiling.stages
        ),
    }
    if "bias" in present:
        scratch["bias_s"] = plgpu.SMEM((problem.operands, padded), present["bias"].dtype)
    if arrivals := problem.operands * ("bias" in present) + ("residual" in present):
        scratch["extras_arrived"] = plgpu.Barrier(num_arrivals=arrivals)
    if problem.resident:
        norm = {f"{name}_s": array for name, array in present.items() if name.startswith("norm_")}
        scratch |= {name: plgpu.SMEM(array.shape, array.dtype) for name, array in norm.items()}
        scratch["x_arrived"] = plgpu.Barrier(num_arrivals=1 + len(norm))
    return scratch


@dataclasses.dataclass(frozen=True)
class Block:
    """One block of the kernel, while it is traced."""

    plan: Plan
    x: Any
    weight: Any
    out: Any
    extras: Mapping[str, Any]
    scratch: Mapping[str, Any]

    def run(self) -> None:
        plan, problem, tiling = self.plan, self.plan.problem, self.plan.tiling
        block = lax.axis_index("block")
        total, steps = units(problem, tiling), steps_per_split(problem, tiling)
        mine = (total - block + plan.blocks - 1) // plan.blocks

        def fetch(step: jax.Array) -> None:
            """Starts the loads of one step of this block, counted over all its units."""
            tile, split = self.place(block + step // steps * plan.blocks)
            self.fetch(lax.rem(step, tiling.stages), tile, split * steps + lax.rem(step, steps))

        if problem.resident:
            # Before the weights: the copy engine works in order, and this is little.
            self.fetch_x()
        for step in range(tiling.stages):
            pl.when(step < mine * steps)(lambda step=step: fetch(jnp.int32(step)))
        if problem.resident:
            plgpu.barrier_wait(self.scratch["x_arrived"])
            assert plan.form.norm is not None
            norm = self.scratch.get("norm_weight_s"), self.scratch.get("norm_bias_s")
            prologue.normalise(self.scratch["x_s"], *norm, plan.form.norm, tiling.step)

        @pl.loop(0, mine)
        def _(turn: jax.Array) -> None:
            tile, split = self.place(block + turn * plan.blocks)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the last tile has left its buffer
            self.fetch_extras(tile)

            def products(*sums: Any) -> tuple[jax.Array, ...]:
                @pl.loop(0, steps)
                def _(index: jax.Array) -> None:
                    step = turn * steps + index
                    self.multiply(sums, lax.rem(step, tiling.stages), split * steps + index)
                    ahead = step - 1 + tiling.stages

                    # Into the slot of the step before, whose products are done: this thread's, as it has waited for
                    # them, and those of the other three warps, because Mosaic has all threads meet before each copy.
                    # Whoever turns that off (`unsafe_no_auto_barriers`) has to have them meet once a step.
                    pl.when((step > 0) & (ahead < mine * steps))(lambda: fetch(ahead))

                return tuple(ref[...] for ref in sums)

            accumulator = plgpu.WGMMAAccumulatorRef((tiling.padded_rows, problem.columns), jnp.float32)
            sums = pl.run_scoped(products, *[accumulator] * problem.operands)
            if plan.direct:
                self.write_result(sums, tile)
            else:
                self.write_parts(sums, tile, split)

        plgpu.wait_smem_to_gmem(0)

    def place(self, unit: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Tile of rows and split of a unit of work."""
        splits = self.plan.tiling.splits
        return unit // splits, lax.rem(unit, splits)

    def weights(self) -> tuple[Any, Any]:
        return _views(self.scratch["weights_s"], self.plan.problem.flat)

    def xs(self) -> tuple[Any, Any]:
        return _views(self.scratch["x_s"], self.plan.problem.flat or self.plan.problem.ragged)

    def fetch(self, slot: jax.Array, tile: jax.Array, step: jax.Array) -> None:
        problem, tiling = self.plan.problem, self.plan.tiling
        barrier = self.scratch["arrived"].at[slot]
        inputs = pl.ds(step * tiling.step, tiling.step)
        for operand in range(problem.operands):
            plgpu.copy_gmem_to_smem(
                self.weight.at[pl.ds(operand * problem.outputs + tile * tiling.rows, tiling.rows), inputs],
                self.weights()[0].at[slot, operand, pl.ds(0, tiling.rows)],
                barrier,
            )
        if not problem.resident:
            # A traced zero: where the columns reach past the tokens, TMA fills in zeros.
            columns = pl.ds(slot * 0, problem.columns)
            for copy in range(self.plan.x_copies):
                inputs = pl.ds(step * tiling.step + copy * self.plan.x_step, self.plan.x_step)
                plgpu.copy_gmem_to_smem(
                    self.x.at[columns, inputs], self.xs()[0].at[slot * self.plan.x_copies + copy], barrier
                )

    def fetch_x(self) -> None:
        prologue.fetch(
            self.x,
            self.scratch["x_s"],
            [(ref, self.scratch[f"{name}_s"]) for name, ref in self.extras.items() if name.startswith("norm_")],
            self.scratch["x_arrived"],
        )

    def fetch_extras(self, tile: jax.Array) -> None:
        """Starts the loads of what the epilogue adds; of the residual as much as the buffer is wide, in one copy."""
        problem, tiling = self.plan.problem, self.plan.tiling
        if "bias" in self.extras:
            for operand in range(problem.operands):
                plgpu.copy_gmem_to_smem(
                    self.extras["bias"].at[pl.ds(operand * problem.outputs + tile * tiling.rows, tiling.rows)],
                    self.scratch["bias_s"].at[operand, pl.ds(0, tiling.rows)],
                    self.scratch["extras_arrived"],
                )
        if "residual" in self.extras:
            [staged] = self.scratch["staged_s"]
            place = pl.ds(tile * 0, staged.shape[0]), pl.ds(tile * tiling.rows, staged.shape[1])
            plgpu.copy_gmem_to_smem(self.extras["residual"].at[place], staged, self.scratch["extras_arrived"])

    def multiply(self, sums: Sequence[Any], slot: jax.Array, step: jax.Array) -> None:
        """Waits for a step's operands and starts its products; those of the step before are done on return."""
        plan, weights, x = self.plan, self.weights()[1], self.xs()[1]
        plgpu.barrier_wait(self.scratch["arrived"].at[slot])
        for copy in range(plan.x_copies):
            inputs = pl.ds(copy * plan.x_step, plan.x_step)
            if plan.problem.resident:
                columns = x.at[:, pl.ds(step * plan.x_step, plan.x_step)].T
            else:
                columns = x.at[slot * plan.x_copies + copy].T
            for operand, ref in enumerate(sums):
                plgpu.wgmma(ref, weights.at[slot, operand, :, inputs], columns)
        plgpu.wgmma_wait(len(sums) * plan.x_copies)

    def write_result(self, sums: Sequence[jax.Array], tile: jax.Array) -> None:
        """The epilogue on the transposed products in registers, and the tile on its way to the result."""
        [staged], shape = self.scratch["staged_s"], sums[0].shape
        if "extras_arrived" in self.scratch:
            plgpu.barrier_wait(self.scratch["extras_arrived"])
        biases: list[jax.Array | None] = [None] * len(sums)
        if "bias" in self.extras:
            for operand in range(len(sums)):
                bias = plgpu.load(self.scratch["bias_s"].at[operand], layout=_WGMMA.reduce(1), optimized=False)
                biases[operand] = lax.broadcast_in_dim(bias.astype(jnp.float32), shape, (0,))
        form = self.plan.form
        y = combine(sums, biases, form, activation(form.activation)).astype(self.plan.result)
        if "residual" in self.extras:
            layout = transposed_layout(y.dtype)
            y = plgpu.layout_cast(y, layout) + plgpu.load(staged.T, layout=layout, optimized=False)
        store_transposed(staged.T, y)
        plgpu.commit_smem()
        self.send(staged, self.out, tile)

    def write_parts(self, sums: Sequence[jax.Array], tile: jax.Array, split: jax.Array) -> None:
        staged = self.scratch["staged_s"]
        for ref, values in zip(staged, sums, strict=True):
            store_transposed(ref.T, values)
        plgpu.commit_smem()
        for operand in range(len(sums)):
            self.send(staged[operand], self.out.at[split, operand], tile)

    def send(self, staged: Any, out: Any, tile: jax.Array) -> None:
        """Copies a tile to the result row by row: only so can it stop at `rows`, at a row's end, at the last token."""
        rows = self.plan.tiling.rows
        send_rows(staged.at[:, pl.ds(0, rows)], out, tile, pl.cdiv(out.shape[1], rows))


def _views(ref: Any, flat: bool) -> tuple[Any, Any]:
    """An operand in shared memory as TMA and as wgmma see it."""
    by_tma, by_wgmma = ref if flat else (ref, ref)
    return by_tma, by_wgmma
