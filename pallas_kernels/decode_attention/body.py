"""What one block of the decode attention kernel does: one part of the keys of one key/value head of one row.

The tiles of keys are the left operand of both products, the queries the right one: `scores.T = k @ q.T`, then
`out.T = v.T @ weights.T`. A tensor core takes 64 rows at a time but as few as 8 columns, so the few queries of a
decoding step need not be padded to 64, and keys of one byte become that left operand in registers.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ..attention.form import AttentionForm
from ..attention.tile import Softmax, finish, start, tile_scores

ROWS = 64  # of one tensor core operation
_BY_COLUMN = plgpu.Layout.WGMMA.reduce(0)
_BY_ROW = plgpu.Layout.WGMMA.reduce(1)


class Inputs(NamedTuple):
    """Operands in the GPU's memory, as the kernel sees them.

    Attributes:
        q: `[B * K, columns, D]`, the queries of every head that shares a key/value head.
        k, v: `[B * K, L, D]`, or `[P * K, page, D]` if paged; v is `None` where the values are part of the keys.
        k_scales, v_scales: `[B * K, L]` or `[P * K, page]`, `None` if not quantised.
        block_tables: `[B, N]`, `None` if not paged.
        slopes: ALiBi's, `[K, columns]`, or `None`.
        q_start, k_lengths: `[B]`.
    """

    q: Any
    k: Any
    v: Any
    k_scales: Any
    v_scales: Any
    block_tables: Any
    slopes: Any
    q_start: Any
    k_lengths: Any


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything about a call that is fixed when the kernel is compiled.

    Attributes:
        form, sinks: see `decode_attention`.
        dtype: of queries and products.
        length: S, queries per row and head.
        group: query heads per key/value head.
        kv_heads: K.
        dim, value_dim: of keys and values.
        capacity: keys a row can have, L or N * page.
        page: keys per page, 0 if not paged.
        pages: P.
        keys: of one tile.
        columns: queries of one block, a multiple of 8.
        stages: tiles that are in shared memory or on their way.
        splits: parts into which a row's keys are divided.
        warpgroups: the value dims are divided among them; each computes all weights.
    """

    form: AttentionForm
    sinks: int
    dtype: Any
    length: int
    group: int
    kv_heads: int
    dim: int
    value_dim: int
    capacity: int
    page: int
    pages: int
    keys: int
    columns: int
    stages: int
    splits: int
    warpgroups: int

    @property
    def value_rows(self) -> int:
        """Value dims rounded up to what a tensor core takes."""
        return -(-self.value_dim // ROWS) * ROWS

    @property
    def pages_per_tile(self) -> int:
        """Copies that bring one tile of keys."""
        return max(1, self.keys // self.page) if self.page else 1


def scratch(plan: Plan, inputs: Inputs) -> dict[str, Any]:
    """Shared memory and barriers of one block; `inputs` need only have dtypes."""
    keys, stages = plan.keys, plan.stages
    memory: dict[str, Any] = {
        "q_s": _tiled((plan.columns, plan.dim), plan.dtype, plan.dim),
        "k_s": _tiled((stages, keys, plan.dim), inputs.k.dtype, plan.dim),
        "q_ready": plgpu.Barrier(),
        "k_ready": plgpu.Barrier(
            num_arrivals=plan.pages_per_tile * (1 + (inputs.k_scales is not None)), num_barriers=stages
        ),
    }
    value_line = plan.dim if inputs.v is None else plan.value_dim
    if inputs.v is not None:
        memory["v_s"] = _tiled((stages, keys, plan.value_rows), inputs.v.dtype, plan.value_dim)
        copies = plan.pages_per_tile * (1 + (inputs.v_scales is not None))
        memory["v_ready"] = plgpu.Barrier(num_arrivals=copies, num_barriers=stages)
        if inputs.v.dtype != plan.dtype:
            value_line = plan.value_rows
            memory["converted_s"] = _tiled((keys, plan.value_rows), plan.dtype, value_line)
    # Both operands of a product have the same swizzle, so the weights follow the values.
    line = plgpu.find_swizzle(value_line * 16)
    memory["weights_s"] = plgpu.SMEM(
        (plan.columns, keys),
        plan.dtype,
        transforms=(plgpu.TilingTransform((8, line // 2)), plgpu.SwizzleTransform(line)),
    )
    if inputs.k_scales is not None:
        memory["k_scales_s"] = plgpu.SMEM((stages, keys), jnp.float32)
    if inputs.v_scales is not None:
        memory["v_scales_s"] = plgpu.SMEM((stages, keys), jnp.float32)
    if plan.warpgroups > 1:
        memory["meeting"] = plgpu.Barrier(num_arrivals=plan.warpgroups)
    return memory


def _tiled(shape: tuple[int, ...], dtype: Any, line: int) -> Any:
    bits = jnp.dtype(dtype).itemsize * 8
    swizzle = plgpu.find_swizzle(line * bits)
    transforms = (plgpu.TilingTransform((8, swizzle * 8 // bits)), plgpu.SwizzleTransform(swizzle))
    return plgpu.SMEM(shape, dtype, transforms=transforms)


class _Tiles(NamedTuple):
    """The tiles of keys that some query of a row can see, numbered without gaps.

    Attributes:
        sinks: tiles in front of the window's first that hold sinks.
        skipped: tiles between those and the window's first.
        count: tiles in all.
    """

    sinks: jax.Array
    skipped: jax.Array
    count: jax.Array

    def position(self, number: jax.Array) -> jax.Array:
        """Which tile of the row is the `number`-th visible one."""
        return number + jnp.where(number < self.sinks, 0, self.skipped)


def _visible_tiles(plan: Plan, q_start: jax.Array, k_length: jax.Array) -> _Tiles:
    form, keys = plan.form, plan.keys
    end = jnp.minimum(k_length, plan.capacity)
    if form.causal:
        end = jnp.minimum(end, q_start + plan.length)
    elif form.window is not None:
        end = jnp.minimum(end, q_start + (plan.length - 1 + form.window))
    end = lax.div(jnp.maximum(end, 0) + (keys - 1), keys)
    if form.window is None:
        return _Tiles(end * 0, end * 0, end)
    first = jnp.minimum(lax.div(jnp.maximum(q_start - (form.window - 1), 0), keys), end)
    sinks = jnp.minimum(-(-plan.sinks // keys), first)
    return _Tiles(sinks, first - sinks, sinks + end - first)


def _visible(plan: Plan, key: jax.Array, distance: jax.Array, k_length: jax.Array) -> tuple[AttentionForm, jax.Array]:
    """The mask that the form does not know of, and the form with what is left to it."""
    form = plan.form
    visible = key < k_length
    if form.window is None or not plan.sinks:
        return form, visible
    near = distance > -form.window
    if not form.causal:
        near &= distance < form.window
    return dataclasses.replace(form, window=None), visible & (near | (key < plan.sinks))


def body(plan: Plan, inputs: Inputs, out: Any, lse: Any, memory: dict[str, Any]) -> None:
    """Writes one part's result to `out[split, row, value dim, column]` and its logarithm to `lse[split, row, column]`.

    Parts without visible keys write zeros and -inf.
    """
    row, split, column_tile = lax.axis_index("row"), lax.axis_index("split"), lax.axis_index("column_tile")
    sequence, head = lax.div(row, plan.kv_heads), lax.rem(row, plan.kv_heads)
    group = lax.axis_index("warpgroup") if plan.warpgroups > 1 else None
    keys, columns, stages = plan.keys, plan.columns, plan.stages
    first_column = column_tile * columns
    q_s, k_s, weights_s = memory["q_s"], memory["k_s"], memory["weights_s"]

    def leader(condition: Any = None) -> Callable[[Callable[[], None]], Any]:
        """Copies are started by one warpgroup."""
        mine = None if group is None else group == 0
        if condition is None:
            return (lambda f: f()) if mine is None else pl.when(mine)
        return pl.when(condition if mine is None else condition & mine)

    def meet() -> None:
        plgpu.barrier_arrive(memory["meeting"])
        plgpu.barrier_wait(memory["meeting"])

    @leader()
    def _() -> None:
        plgpu.copy_gmem_to_smem(inputs.q.at[row, pl.ds(first_column, columns)], q_s, memory["q_ready"])

    q_start, k_length = inputs.q_start[sequence], inputs.k_lengths[sequence]
    k_length = jnp.minimum(k_length, plan.capacity)
    tiles = _visible_tiles(plan, q_start, k_length)
    share = lax.div(tiles.count + (plan.splits - 1), plan.splits)
    begin = jnp.minimum(split * share, tiles.count)
    stop = jnp.minimum(begin + share, tiles.count)

    def find(number: jax.Array) -> list[tuple[jax.Array, jax.Array]]:
        """Where the copies of a tile begin: index along the first axis of k and v, and key there."""
        position = tiles.position(number) * keys
        if not plan.page:
            return [(row, position)]
        width = inputs.block_tables.shape[1]
        places = []
        for page in range(plan.pages_per_tile):
            entry = lax.div(position, plan.page) + page
            index = inputs.block_tables[sequence, jnp.clip(entry, 0, width - 1)]
            there = (entry < width) & (index >= 0) & (index < plan.pages)
            # Copies from beyond the array's end read nothing and fill with zeros.
            index = jnp.where(there, index, plan.pages)
            places.append((index * plan.kv_heads + jnp.where(there, head, 0), lax.rem(position, plan.page)))
        return places

    def copy(places: list[tuple[jax.Array, jax.Array]], slot: jax.Array, which: str) -> None:
        source, scales = (inputs.k, inputs.k_scales) if which == "k" else (inputs.v, inputs.v_scales)
        target, ready = memory[f"{which}_s"], memory[f"{which}_ready"].at[slot]
        size = keys // len(places)
        for i, (index, key) in enumerate(places):
            # The width may reach beyond the array's, and is filled with zeros there.
            block = source.at[index, pl.ds(key, size), pl.ds(row * 0, target.shape[-1])]
            plgpu.copy_gmem_to_smem(block, target.at[slot, pl.ds(i * size, size)], ready)
            if scales is not None:
                part = memory[f"{which}_scales_s"].at[slot, pl.ds(i * size, size)]
                plgpu.copy_gmem_to_smem(scales.at[index, pl.ds(key, size)], part, ready)

    shared, narrow = inputs.v is None, inputs.k_scales is not None
    for i in range(stages):
        number = begin + i

        @leader(number < stop)
        def _(number: jax.Array = number, slot: jax.Array = row * 0 + i) -> None:
            places = find(number)
            copy(places, slot, "k")
            if not shared:
                copy(places, slot, "v")

    slopes = None
    if inputs.slopes is not None:
        slopes = plgpu.load(inputs.slopes.at[head, pl.ds(first_column, columns)], layout=_BY_COLUMN, optimized=False)
    plgpu.barrier_wait(memory["q_ready"])

    def scores_of(slot: jax.Array, number: jax.Array) -> tuple[jax.Array, float]:
        def product(accumulator: Any) -> jax.Array:
            k = _widen(k_s[slot], plan.dtype) if narrow else k_s.at[slot]
            part = next(n for n in (plan.dim, 256, 192, 128, 64) if n <= 256 and plan.dim % n == 0)
            if part == plan.dim:
                plgpu.wgmma(accumulator, k, q_s.T)
            else:
                # Unrolled, the addresses of all the operands would take the registers that the sums need.
                @pl.loop(0, plan.dim // part)
                def _(i: jax.Array) -> None:
                    dims = pl.ds(i * part, part)
                    plgpu.wgmma(accumulator, k.at[:, dims], q_s.at[:, dims].T)

            return accumulator[...]

        raw = pl.run_scoped(product, plgpu.ACC((keys, columns), jnp.float32))
        if narrow:
            raw *= _by_row(memory["k_scales_s"].at[slot], raw.shape)
        iota = [plgpu.broadcasted_iota(jnp.int32, raw.shape, axis, layout=plgpu.Layout.WGMMA) for axis in (0, 1)]
        key = iota[0] + tiles.position(number) * keys
        token = lax.div(iota[1] + first_column, plan.group) if plan.length > 1 else 0
        distance = key - (q_start + token)
        form, visible = _visible(plan, key, distance, k_length)
        if plan.page:
            holes = jnp.int32(0)
            for i, (index, _) in enumerate(find(number)):
                holes |= jnp.where(index >= plan.pages * plan.kv_heads, 1 << i, 0)
            page = lax.div(iota[0], keys // plan.pages_per_tile)
            visible &= lax.shift_right_logical(jnp.broadcast_to(holes, page.shape), page) & 1 == 0
        slope = None if slopes is None else lax.broadcast_in_dim(slopes, raw.shape, [1])
        return tile_scores(raw, form, distance, slope=slope, visible=visible)

    value_rows = plan.value_rows // plan.warpgroups
    first_value = 0 if group is None else group * value_rows
    # A sum over the keys goes through shared memory. One at the end will do, where the registers allow.
    spread = keys * columns <= 16 * 128

    def step(number: jax.Array, carry: tuple[jax.Array, Softmax]) -> tuple[jax.Array, Softmax]:
        sums, state = carry
        slot = lax.rem(number - begin, stages)
        refill = number + stages - (plan.warpgroups > 1)
        # The table is read long before the copies need it.
        places = find(refill)
        plgpu.barrier_wait(memory["k_ready"].at[slot])
        scores, factor = scores_of(slot, number)
        if plan.warpgroups > 1:
            # The other group is done with the last tile: its slot and the weights may be overwritten. And the groups
            # reduce at the same time: the compiler gives them the same scratch memory, and they write the same there.
            meet()

            @leader((number > begin) & (refill < stop))
            def _() -> None:
                previous = lax.rem(number - 1 - begin, stages)
                copy(places, previous, "k")
                if not shared:
                    copy(places, previous, "v")

        elif not shared and not narrow:

            @pl.when(refill < stop)
            def _() -> None:
                copy(places, slot, "k")

        top = jnp.maximum(state.top, jnp.max(scores, axis=0) * factor)
        rescale = jnp.exp2(state.top - top)
        weights = jnp.exp2(scores * factor - lax.broadcast_in_dim(top, scores.shape, [1]))
        if not shared:
            plgpu.barrier_wait(memory["v_ready"].at[slot])
        # Behind the last key anything may stand in memory, and a NaN would outlive a weight of zero.
        rest = k_length - tiles.position(number) * keys
        mine = pl.ds(first_value, value_rows)
        values = (k_s if shared else memory["v_s"]).at[slot, :, mine]
        scaled = weights
        if narrow:
            scaled = jnp.where(weights > 0, weights * _by_row(memory["v_scales_s"].at[slot], weights.shape), 0.0)
            wide = _widen(values[...], plan.dtype)
            if values.dtype != jnp.int8:
                wide = _first_rows(wide, rest)
            values = memory["converted_s"].at[:, mine]
            values[...] = wide
        else:

            @pl.when(rest < keys)
            def _() -> None:
                for i in range(0, value_rows, ROWS):
                    part = values.at[:, pl.ds(i, ROWS)]
                    part[...] = _first_rows(part[...], rest)

        _store_weights(weights_s, scaled.astype(plan.dtype), group, plan)
        plgpu.commit_smem()
        if narrow and plan.warpgroups == 1:
            # Not before: its keys and both scales are read by threads, whose reads are complete only now.
            @pl.when(refill < stop)
            def _() -> None:
                copy(places, slot, "k")

        if plan.warpgroups > 1:
            meet()
        if spread:
            total = state.total * lax.broadcast_in_dim(rescale, weights.shape, [1]) + weights
        else:
            total = state.total * rescale + jnp.sum(weights, axis=0)

        sums *= lax.broadcast_in_dim(rescale, sums.shape, [1])
        sums = pl.run_state(lambda sums: plgpu.wgmma(sums, values.T, weights_s.T))(plgpu.ACC.init(sums))
        if plan.warpgroups == 1:

            @pl.when(refill < stop)
            def _() -> None:
                copy(places, slot, "k" if shared else "v")

        return sums, Softmax(top, total)

    sums = plgpu.layout_cast(jnp.zeros((value_rows, columns), jnp.float32), plgpu.Layout.WGMMA)
    state = Softmax(*(plgpu.layout_cast(x, _BY_COLUMN) for x in start(columns)))
    if spread:
        state = state._replace(total=plgpu.layout_cast(jnp.zeros((keys, columns), jnp.float32), plgpu.Layout.WGMMA))
    sums, state = lax.fori_loop(begin, stop, step, (sums, state))
    if spread:
        state = state._replace(total=jnp.sum(state.total, axis=0))
    scale, logarithm = finish(state)
    at = pl.ds(first_column, columns)
    sums *= lax.broadcast_in_dim(scale, sums.shape, [1])
    _store(out.at[split, row, pl.ds(first_value, value_rows), at], sums)

    @leader()
    def _() -> None:
        _store(lse.at[split, row, at], logarithm)


def _widen(x: jax.Array, dtype: Any) -> jax.Array:
    if x.dtype == jnp.float8_e4m3fn:  # Hopper converts it to float16 only, which holds all its numbers
        x = x.astype(jnp.float16).astype(jnp.float32)
    return x.astype(dtype)


def _by_row(scales: Any, shape: tuple[int, int]) -> jax.Array:
    return lax.broadcast_in_dim(plgpu.load(scales, layout=_BY_ROW, optimized=False), shape, [0])


def _first_rows(x: jax.Array, count: jax.Array) -> jax.Array:
    row = plgpu.broadcasted_iota(jnp.int32, x.shape, 0, layout=plgpu.Layout.WGMMA)
    return jnp.where(row < count, x, jnp.zeros((), x.dtype))


def _store_weights(target: Any, weights: jax.Array, group: Any, plan: Plan) -> None:
    """Each warpgroup, all of which hold the same weights, stores its part of the columns."""
    if group is None:
        target.T[...] = weights
        return
    part = plan.columns // plan.warpgroups
    for i in range(plan.warpgroups):

        @pl.when(group == i)
        def _(i: int = i) -> None:
            target.at[pl.ds(i * part, part)].T[...] = weights[:, i * part : (i + 1) * part]


def _store(ref: Any, value: jax.Array) -> None:
    if hasattr(plgpu, "store"):  # from jax 0.12 on, plain assignment refuses what is not perfectly coalesced
        plgpu.store(ref, value, optimized=False)
    else:
        ref[...] = value
