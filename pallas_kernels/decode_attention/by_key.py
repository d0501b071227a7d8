"""A block of decode attention with keys along the rows of its products.

The tiles of keys are the left operand of both products, the queries the right one: `scores.T = k @ q.T`, then
`sums.T = v.T @ weights.T`. A tensor core takes 64 rows at a time but as few as 8 columns, so the few queries of a
decoding step need not be padded to 64: what the tensor cores and the softmax do for a key grows with the queries, and
keys of one byte become that left operand in registers.

Counted for heads of 128 dims in bfloat16 and up to 8 queries: a multiprocessor's share of the H200's bandwidth brings a
tile of 64 keys and values, 32 KB, in about 1800 cycles. Its 16 tensor core operations each read 2 KB of shared memory,
in 16 cycles: 256. The rest of a step is latency of one thing waiting for the other, which a second block on the
multiprocessor hides. For keys of one byte the tile takes 900 cycles, and each of 128 threads converts 128 numbers and
stores half of them: a step is then longer than its copies, so two blocks are needed.

Latents of more than 32 heads are another matter, see `by_query`.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ..attention.tile import Softmax, finish, start
from ..mosaic import store, store_transposed
from .block import BY_COLUMN, BY_ROW, Block, first_rows, on_leader


class ByKey(Block):
    """Sums are value dims by queries; two warpgroups, if there are, divide the value dims and score all keys each."""

    def load_slopes(self, slopes: Any) -> None:
        slopes = plgpu.load(slopes, layout=BY_COLUMN, optimized=False)
        self.slopes = lax.broadcast_in_dim(slopes, (self.plan.tiling.keys, self.plan.tiling.columns), [1])

    @property
    def spread(self) -> bool:
        """Whether each thread keeps sums of its own weights; else they go through shared memory at every tile."""
        return self.plan.tiling.keys * self.plan.tiling.columns <= 16 * 128  # registers, by threads

    def attend(self) -> tuple[jax.Array, Softmax]:
        """The weighted sums of the values, value dims by queries, and the softmax's state."""
        keys, columns = self.plan.tiling.keys, self.plan.tiling.columns
        zeros = jnp.zeros((self.plan.value_rows // self.plan.warpgroups, columns), jnp.float32)
        sums = plgpu.layout_cast(zeros, plgpu.Layout.WGMMA)
        state = Softmax(*(plgpu.layout_cast(x, BY_COLUMN) for x in start(columns)))
        if self.spread:
            total = plgpu.layout_cast(jnp.zeros((keys, columns), jnp.float32), plgpu.Layout.WGMMA)
            state = state._replace(total=total)
        sums, state = lax.fori_loop(self.span.begin, self.span.stop, self.step, (sums, state))
        if self.spread:
            self.meet()
            state = state._replace(total=jnp.sum(state.total, axis=0))
        return sums, state

    def step(self, number: jax.Array, carry: tuple[jax.Array, Softmax]) -> tuple[jax.Array, Softmax]:
        """One tile."""
        plan, memory = self.plan, self.memory
        sums, state = carry
        slot = self.slot(number)
        # With two warpgroups a tile's memory is free only when both are done with it, in the step after.
        refill = number + plan.tiling.stages - (plan.warpgroups - 1)
        places = self.source.find(refill)  # tables are read long before the copies need them
        plgpu.barrier_wait(memory["k_ready"].at[slot])
        values: Any = self.tile_values(number, slot) if plan.shared else None  # where few registers are in use
        scores, factor = self.tile_scores(number, slot)
        early = plan.warpgroups == 1 and not plan.shared and not plan.narrow
        if early:
            self.copy(refill, "k", places=places)
        if self.group is not None:
            # Reductions of both warpgroups use the same scratch memory. That is well as long as they do the same one
            # at the same time, in a single step, and write the same bits there: they have the same products of the same
            # operands, summed in the same order. Nothing that makes a difference between them may come before.
            self.meet()

            @pl.when((self.group == 0) & (number > self.span.begin))
            def _() -> None:
                self.copy(refill, *self._all, places=places)

        top = jnp.maximum(state.top, jnp.max(scores, axis=0) * factor)
        rescale = jnp.exp2(state.top - top)
        weights = jnp.exp2(scores * factor - lax.broadcast_in_dim(top, scores.shape, [1]))
        if self.spread:
            total = state.total * lax.broadcast_in_dim(rescale, weights.shape, [1]) + weights
        else:
            self.meet()
            # The sum of what the values are multiplied with: it is as good, and waits in half the registers.
            weights = weights if plan.narrow else weights.astype(plan.dtype)
            weights, sums, top, rescale = lax.optimization_barrier((weights, sums, top, rescale))
            total = state.total * rescale + jnp.sum(weights.astype(jnp.float32), axis=0)
        sums *= lax.broadcast_in_dim(rescale, sums.shape, [1])
        if not plan.shared:
            plgpu.barrier_wait(memory["v_ready"].at[slot])
            values = self.tile_values(number, slot)
        if plan.narrow:
            weights = jnp.where(weights > 0, weights * _by_row(memory["v_scales"].at[slot], scores.shape), 0.0)

        def weigh(weights_s: Any) -> Any:
            self.store_weights(weights_s, weights.astype(plan.dtype))
            plgpu.commit_smem()
            if plan.narrow and plan.warpgroups == 1:
                # Threads read the keys, and their reads are complete only now.
                self.copy(refill, "k", places=places)
            self.meet()
            return pl.run_state(lambda sums: plgpu.wgmma(sums, values.T, weights_s.T))(
                plgpu.WGMMAAccumulatorRef.init(sums)
            )

        if self.group is None:
            sums = weigh(memory["weights"])
            self.copy(refill, "k" if plan.shared else "v", places=places)
        else:  # in the scratch memory of the reductions; both warpgroups are done with those before they enter
            sums = pl.run_scoped(weigh, plan.weights_memory, collective_axes="warpgroup")
        return sums, Softmax(top, total)

    def tile_scores(self, number: jax.Array, slot: jax.Array) -> tuple[jax.Array, float]:
        """Masked scores of a tile, keys by queries, and their factor."""
        plan, memory = self.plan, self.memory

        def product(accumulator: Any) -> jax.Array:
            k, q = memory["k"].at[slot], memory["q"]
            if plan.narrow:
                plgpu.wgmma(accumulator, _widen(k[...], plan.dtype), q.T)
            elif plan.dims_at_once == plan.dim:
                plgpu.wgmma(accumulator, k, q.T)
            else:

                @pl.loop(0, plan.dim // plan.dims_at_once)
                def _(i: jax.Array) -> None:
                    dims = pl.ds(i * plan.dims_at_once, plan.dims_at_once)
                    plgpu.wgmma(accumulator, k.at[:, dims], q.at[:, dims].T)

            return accumulator[...]

        shape = (plan.tiling.keys, plan.tiling.columns)
        raw = pl.run_scoped(product, plgpu.WGMMAAccumulatorRef(shape, jnp.float32))
        if plan.narrow:
            raw *= _by_row(memory["k_scales"].at[slot], shape)
        place = (plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=plgpu.Layout.WGMMA) for axis in (0, 1))
        return self.scores(raw, number, *place)

    def tile_values(self, number: jax.Array, slot: jax.Array) -> Any:
        """A tile's values in shared memory, clean."""
        plan, memory = self.plan, self.memory
        values = memory["k" if plan.shared else "v"].at[slot, :, self.values]
        if not plan.narrow:
            self.clean(values, number)
            return values
        wide = _widen(values[...], plan.dtype)
        if values.dtype != jnp.int8:
            wide = first_rows(wide, self.span.k_length - self.source.tiles.position(number) * plan.tiling.keys)
        values = memory["wide"].at[:, self.values]
        values[...] = wide
        return values

    def store_weights(self, target: Any, weights: jax.Array) -> None:
        """Each warpgroup, all of which hold the same weights, stores its part of the columns."""
        if self.group is None:
            target.T[...] = weights
            return
        part = self.plan.tiling.columns // self.plan.warpgroups
        for i in range(self.plan.warpgroups):

            @pl.when(self.group == i)
            def _(i: int = i) -> None:
                target.at[pl.ds(i * part, part)].T[...] = weights[:, i * part : (i + 1) * part]

    def write(self, sums: jax.Array, state: Softmax, out: Any, lse: Any) -> None:
        sums, logarithm = self.finished(sums, state)
        # Transposed, each thread has numbers that are neighbours in `out`.
        store_transposed(out.at[:, self.values].T, sums)

        @on_leader(self.group)
        def _() -> None:
            store(lse, logarithm)

    def send(self, sums: jax.Array, state: Softmax, out: Any, head: jax.Array) -> None:
        """Copies each query's result to `out[token, head, value dim]`; what is behind the last query has no place."""
        plan, staged, first_column = self.plan, self.memory["result"], self.span.first_column
        store_transposed(staged.T, self.finished(sums, state)[0].astype(staged.dtype))
        plgpu.commit_smem()

        @pl.loop(0, jnp.minimum(plan.tiling.columns, plan.length * plan.group - first_column))
        def _(column: jax.Array) -> None:
            query = first_column + column
            place = out.at[lax.div(query, plan.group), head * plan.group + lax.rem(query, plan.group)]
            plgpu.copy_smem_to_gmem(staged.at[column, pl.ds(0, plan.value_dim)], place, commit_group=False)

        plgpu.commit_smem_to_gmem_group()
        plgpu.wait_smem_to_gmem(0)

    def finished(self, sums: jax.Array, state: Softmax) -> tuple[jax.Array, jax.Array]:
        """The result, value dims by queries, and its logarithm."""
        scale, logarithm = finish(state)
        return sums * lax.broadcast_in_dim(scale, sums.shape, [1]), logarithm


def _widen(x: jax.Array, dtype: Any) -> jax.Array:
    if x.dtype == jnp.float8_e4m3fn:  # Hopper converts it to float16 only, which holds all its numbers
        x = x.astype(jnp.float16).astype(jnp.float32)
    return x.astype(dtype)


def _by_row(scales: Any, shape: tuple[int, ...]) -> jax.Array:
    return lax.broadcast_in_dim(plgpu.load(scales, layout=BY_ROW, optimized=False), shape, [0])
