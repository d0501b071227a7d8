"""What one block of the decode attention kernel does: one part of the keys of one key/value head of one row.

The tiles of keys are the left operand of both products, the queries the right one: `scores.T = k @ q.T`, then
`sums.T = v.T @ weights.T`. A tensor core takes 64 rows at a time but as few as 8 columns, so the few queries of a
decoding step need not be padded to 64: what the tensor cores and the softmax do for a key grows with the queries, and
keys of one byte become that left operand in registers.

Counted for heads of 128 dims in bfloat16 and up to 8 queries: a multiprocessor's share of the H200's bandwidth brings a
tile of 64 keys and values, 32 KB, in about 1800 cycles. Its 16 tensor core operations each read 2 KB of shared memory,
in 16 cycles: 256. The rest of a step is latency of one thing waiting for the other, which a second block on the
multiprocessor hides. For keys of one byte the tile takes 900 cycles, and each of 128 threads converts 128 numbers and
stores half of them: a step is then longer than its copies, so two blocks are needed.

Latents of 128 heads are another matter: with 242 operations for each byte they are limited by the tensor cores. Both
warpgroups compute all scores there, half again as many operations as needed, since exchanging them costs more
registers than there are.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ..attention.form import AttentionForm
from ..attention.tile import Softmax, finish, start, tile_scores
from ..mosaic import block_indices, store, store_transposed
from .plan import ROWS, Inputs, Plan
from .tiles import Memory, visible_tiles

_BY_COLUMN, _BY_ROW = plgpu.Layout.WGMMA.reduce(0), plgpu.Layout.WGMMA.reduce(1)


def body(plan: Plan, inputs: Inputs, results: Sequence[Any], memory: dict[str, Any]) -> None:
    """Writes one part's result and logarithm; one without visible keys writes zeros and -inf.

    Args:
        results: `[split, row, column, value dim]` and `[split, row, column]`, or, where nothing is left to be combined,
            what `decode_attention` returns alone.
    """
    row, split, column_tile = block_indices(inputs.q.shape[0], plan.tiling.splits, plan.column_tiles)
    first_column = column_tile * plan.tiling.columns
    columns = pl.ds(first_column, plan.tiling.columns)
    group = lax.axis_index("warpgroup") if plan.warpgroups > 1 else None

    @_on_leader(group)
    def _() -> None:
        plgpu.copy_gmem_to_smem(inputs.q.at[row, columns], memory["q"], memory["q_ready"])

    sequence, head = lax.div(row, plan.kv_heads), lax.rem(row, plan.kv_heads)
    q_start, k_length = inputs.q_start[sequence], jnp.minimum(inputs.k_lengths[sequence], plan.capacity)
    tiles = visible_tiles(plan, q_start, k_length)
    share = lax.div(tiles.count + (plan.tiling.splits - 1), plan.tiling.splits)
    begin = jnp.minimum(split * share, tiles.count)
    stop = jnp.minimum(begin + share, tiles.count)
    source = Memory(plan, inputs, sequence, head, tiles)
    block = _Block(plan, source, memory, group, begin, stop, first_column, q_start, k_length)
    block.fill()
    if inputs.slopes is not None:
        block.slopes = plgpu.load(inputs.slopes.at[head, columns], layout=_BY_COLUMN, optimized=False)
    plgpu.barrier_wait(memory["q_ready"])
    sums, state = block.attend()
    scale, logarithm = finish(state)
    sums *= lax.broadcast_in_dim(scale, sums.shape, [1])
    if plan.direct:
        block.send(sums, results[0].at[sequence], head)
        return
    out, lse = results
    # Transposed, each thread has numbers that are neighbours in `out`.
    store_transposed(out.at[split, row, columns, block.values].T, sums)

    @_on_leader(group)
    def _() -> None:
        store(lse.at[split, row, columns], logarithm)


@dataclasses.dataclass
class _Block:
    """The loop over the tiles of one part.

    Attributes:
        plan: of the call.
        source: the keys and values.
        memory: shared memory and barriers, by name.
        group: index of this warpgroup; `None` if there is one only.
        begin, stop: the part's tiles.
        first_column: the block's first query.
        q_start, k_length: of the row.
        slopes: ALiBi's, of each query.
    """

    plan: Plan
    source: Memory
    memory: dict[str, Any]
    group: jax.Array | None
    begin: jax.Array
    stop: jax.Array
    first_column: jax.Array
    q_start: jax.Array
    k_length: jax.Array
    slopes: jax.Array | None = None

    @property
    def values(self) -> Any:
        """The value dims that this warpgroup sums."""
        mine = self.plan.value_rows // self.plan.warpgroups
        return pl.ds(0 if self.group is None else self.group * mine, mine)

    @property
    def spread(self) -> bool:
        """Whether each thread keeps sums of its own weights; else they go through shared memory at every tile."""
        return self.plan.tiling.keys * self.plan.tiling.columns <= 16 * 128  # registers, by threads

    def slot(self, number: jax.Array) -> jax.Array:
        """Where in shared memory a tile goes."""
        return lax.rem(number - self.begin, self.plan.tiling.stages)

    def copy(self, number: jax.Array, *which: str, places: Any = None) -> None:
        """Starts a tile's copies; those of tiles behind the part's last are left out."""

        @pl.when(number < self.stop)
        def _() -> None:
            found = self.source.find(number) if places is None else places
            for name in which:
                self.source.copy(found, name, self.memory, self.slot(number))

    @property
    def _all(self) -> tuple[str, ...]:
        return ("k",) if self.plan.shared else ("k", "v")

    def fill(self) -> None:
        """Starts the copies of the first tiles."""

        @_on_leader(self.group)
        def _() -> None:
            for stage in range(self.plan.tiling.stages):
                self.copy(self.begin + stage, *self._all)

    def meet(self) -> None:
        """Waits for the other warpgroup."""
        if self.group is not None:
            plgpu.barrier_arrive(self.memory["meeting"])
            plgpu.barrier_wait(self.memory["meeting"])

    def attend(self) -> tuple[jax.Array, Softmax]:
        """The weighted sums of the values, value dims by queries, and the softmax's state."""
        keys, columns = self.plan.tiling.keys, self.plan.tiling.columns
        zeros = jnp.zeros((self.plan.value_rows // self.plan.warpgroups, columns), jnp.float32)
        sums = plgpu.layout_cast(zeros, plgpu.Layout.WGMMA)
        state = Softmax(*(plgpu.layout_cast(x, _BY_COLUMN) for x in start(columns)))
        if self.spread:
            total = plgpu.layout_cast(jnp.zeros((keys, columns), jnp.float32), plgpu.Layout.WGMMA)
            state = state._replace(total=total)
        sums, state = lax.fori_loop(self.begin, self.stop, self.step, (sums, state))
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
        scores, factor = self.scores(number, slot)
        early = plan.warpgroups == 1 and not plan.shared and not plan.narrow
        if early:
            self.copy(refill, "k", places=places)
        if self.group is not None:
            # Reductions of both warpgroups use the same scratch memory. That is well as long as they do the same one
            # at the same time, in a single step, and write the same bits there: they have the same products of the same
            # operands, summed in the same order. Nothing that makes a difference between them may come before.
            self.meet()

            @pl.when((self.group == 0) & (number > self.begin))
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

    def scores(self, number: jax.Array, slot: jax.Array) -> tuple[jax.Array, float]:
        """Masked scores of a tile, keys by queries, and their factor: see `tile_scores`."""
        plan, memory = self.plan, self.memory

        def product(accumulator: Any) -> jax.Array:
            k, q = memory["k"].at[slot], memory["q"]
            part = next(n for n in (plan.dim, 256, 192, 128, 64) if n <= 256 and plan.dim % n == 0)
            if plan.narrow:
                plgpu.wgmma(accumulator, _widen(k[...], plan.dtype), q.T)
            elif part == plan.dim:
                plgpu.wgmma(accumulator, k, q.T)
            else:
                # Unrolled, the addresses of all the operands would take the registers that the sums need.
                @pl.loop(0, plan.dim // part)
                def _(i: jax.Array) -> None:
                    dims = pl.ds(i * part, part)
                    plgpu.wgmma(accumulator, k.at[:, dims], q.at[:, dims].T)

            return accumulator[...]

        shape = (plan.tiling.keys, plan.tiling.columns)
        raw = pl.run_scoped(product, plgpu.WGMMAAccumulatorRef(shape, jnp.float32))
        if plan.narrow:
            raw *= _by_row(memory["k_scales"].at[slot], shape)
        place, column = (plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=plgpu.Layout.WGMMA) for axis in (0, 1))
        key = place + self.source.tiles.position(number) * plan.tiling.keys
        token = lax.div(column + self.first_column, plan.group) if plan.length > 1 else 0
        distance = key - (self.q_start + token)
        visible = key < self.k_length
        if plan.page:
            visible &= self.source.is_there(number, place)
        form, visible = _with_sinks(plan, key, distance, visible)
        slope = None if self.slopes is None else lax.broadcast_in_dim(self.slopes, shape, [1])
        return tile_scores(raw, form, distance, slope=slope, visible=visible)

    def tile_values(self, number: jax.Array, slot: jax.Array) -> Any:
        """A tile's values in shared memory. Those behind the last key, where anything may stand, become zeros.

        Their weights are zero, but a NaN would outlive that.
        """
        plan, memory = self.plan, self.memory
        values = memory["k" if plan.shared else "v"].at[slot, :, self.values]
        rest = self.k_length - self.source.tiles.position(number) * plan.tiling.keys
        if plan.narrow:
            wide = _widen(values[...], plan.dtype)
            if values.dtype != jnp.int8:
                wide = _first_rows(wide, rest)
            values = memory["wide"].at[:, self.values]
            values[...] = wide
            return values

        # Where values are part of the keys, the product with the queries may read these rows before and after: it needs
        # no fence, for it finds the same numbers in those that count, and what it makes of the others is masked. The
        # product with the weights comes after `commit_smem`.
        @pl.when(rest < plan.tiling.keys)
        def _() -> None:
            @pl.loop(0, values.shape[1] // ROWS)
            def _(i: jax.Array) -> None:
                part = values.at[:, pl.ds(i * ROWS, ROWS)]
                part[...] = _first_rows(part[...], rest)

        return values

    def send(self, sums: jax.Array, out: Any, head: jax.Array) -> None:
        """Copies each query's result to `out[token, head, value dim]`; what is behind the last query has no place."""
        plan, staged = self.plan, self.memory["result"]
        store_transposed(staged.T, sums.astype(staged.dtype))
        plgpu.commit_smem()

        @pl.loop(0, jnp.minimum(plan.tiling.columns, plan.length * plan.group - self.first_column))
        def _(column: jax.Array) -> None:
            query = self.first_column + column
            place = out.at[lax.div(query, plan.group), head * plan.group + lax.rem(query, plan.group)]
            plgpu.copy_smem_to_gmem(staged.at[column, pl.ds(0, plan.value_dim)], place, commit_group=False)

        plgpu.commit_smem_to_gmem_group()
        plgpu.wait_smem_to_gmem(0)

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


def _on_leader(group: jax.Array | None) -> Callable[[Callable[[], None]], Any]:
    """What one warpgroup does for all."""
    return (lambda f: f()) if group is None else pl.when(group == 0)


def _with_sinks(plan: Plan, key: jax.Array, distance: jax.Array, visible: jax.Array) -> tuple[AttentionForm, jax.Array]:
    """What is left of the form to mask, and the mask with the sinks that the form's window would hide."""
    form = plan.form
    if form.window is None or not plan.sinks:
        return form, visible
    near = distance > -form.window
    if not form.causal:
        near &= distance < form.window
    return dataclasses.replace(form, window=None), visible & (near | (key < plan.sinks))


def _widen(x: jax.Array, dtype: Any) -> jax.Array:
    if x.dtype == jnp.float8_e4m3fn:  # Hopper converts it to float16 only, which holds all its numbers
        x = x.astype(jnp.float16).astype(jnp.float32)
    return x.astype(dtype)


def _by_row(scales: Any, shape: tuple[int, ...]) -> jax.Array:
    return lax.broadcast_in_dim(plgpu.load(scales, layout=_BY_ROW, optimized=False), shape, [0])


def _first_rows(x: jax.Array, count: jax.Array) -> jax.Array:
    row = plgpu.broadcasted_iota(jnp.int32, x.shape, 0, layout=plgpu.Layout.WGMMA)
    return jnp.where(row < count, x, jnp.zeros((), x.dtype))
