"""What the warpgroups of one multiprocessor do: one loads, the others compute."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from ..attention.form import AttentionForm
from ..attention.tile import Softmax, finish, start, tile_scores, update, within_form
from ..mosaic import ACC, store
from .schedule import BEGIN, END, POSITION, SEQUENCE, SLOT, SPLITS, TOKEN, TOKENS
from .tiling import PART_COLUMNS, ROWS, Tiling, head_blocks, operand_width

# Registers a thread of the loading warpgroup keeps and each of two computing ones gets, where the assembler heeds it; a
# single one has as many as there can be anyway.
_LOAD_REGISTERS, _COMPUTE_REGISTERS = 40, 232
_WGMMA = plgpu.Layout.WGMMA
_STORED = 64  # columns of results converted at a time


class Inputs(NamedTuple):
    """What the kernel reads; `slopes` is `None` for a form without ALiBi."""

    items: Any
    shares: Any
    tables: Any
    slopes: Any
    q: Any
    k: Any
    v: Any


class Results(NamedTuple):
    """What the kernel writes: results of blocks whose keys are in one part, logarithms by item, parts of the others."""

    out: Any
    lse: Any
    parts: Any


class Scratch(NamedTuple):
    """Shared memory and barriers of one block.

    Attributes:
        q: an item's queries, for each computing warpgroup.
        rows: a place where queries arrive token by token, and from which results leave.
        out: a place for results; `None` if `rows` serves.
        part: one for some columns of results in float32, where there are splits.
        k, v: one tile per stage.
        present: for each stage which of the tile's pages are there, a bit each.
        q_ready: one for each computing warpgroup.
        ready, free, clean: one for each stage: the tile is loaded, is used up, has zeros where no key is.
    """

    q: Any
    rows: Any
    out: Any
    part: Any
    k: Any
    v: Any
    present: Any
    q_ready: Any
    ready: Any
    free: Any
    clean: Any


def run_block(
    inputs: Inputs, results: Results, scratch: Scratch, form: AttentionForm, tiling: Tiling, dim: int
) -> None:
    """What each warpgroup of one multiprocessor does."""
    core, warpgroup = lax.axis_index("core"), lax.axis_index("warpgroup")
    begin, end = inputs.shares[core], inputs.shares[core + 1]

    @pl.when(warpgroup == tiling.warpgroups)
    def _() -> None:
        if tiling.warpgroups > 1:
            plgpu.set_max_registers(_LOAD_REGISTERS, action="decrease")
        done = lax.fori_loop(begin, end, lambda i, done: _load_item(i, done, inputs, scratch, tiling), jnp.int32(0))

        def wait(j: Array, _: None) -> None:
            plgpu.barrier_wait(scratch.free.at[lax.rem(j, tiling.stages)])

        # Barriers are left as they were found, all their phases waited for.
        lax.fori_loop(jnp.maximum(done - tiling.stages, 0), done, wait, None)

    @pl.when(warpgroup < tiling.warpgroups)
    def _() -> None:
        if tiling.warpgroups > 1:
            plgpu.set_max_registers(_COMPUTE_REGISTERS, action="increase")

        def step(i: Array, done: Array) -> Array:
            return _compute_item(i, done, inputs, results, scratch, form, tiling, dim)

        lax.fori_loop(begin, end, step, jnp.int32(0))
        plgpu.wait_smem_to_gmem(0)


def _load_item(i: Array, done: Array, inputs: Inputs, scratch: Scratch, tiling: Tiling) -> Array:
    """Brings the pages of one item into shared memory; returns how many tiles were loaded since the start."""
    (pages, kv_heads, page, _), columns, heads = inputs.k.shape, inputs.tables.shape[1], inputs.q.shape[1]
    blocks = head_blocks(heads // kv_heads, tiling)
    item, unit = lax.div(i, kv_heads * blocks), lax.rem(i, kv_heads * blocks)
    sequence, first, stop = inputs.items[item, SEQUENCE], inputs.items[item, BEGIN], inputs.items[item, END]
    head, size = lax.div(unit, blocks), min(tiling.keys, page)
    tiles = lax.div(stop - first + (tiling.keys - 1), tiling.keys)

    def load_tile(j: Array, _: None) -> None:
        slot = lax.rem(done + j, tiling.stages)
        # All entries of the table are asked for before the stage is free: their latency passes while waiting.
        pieces = []
        present = jnp.int32(0)
        for p in range(tiling.keys // size):
            key = first + j * tiling.keys + p * size
            place = inputs.tables[sequence, jnp.minimum(lax.div(key, page), columns - 1)]
            there = (place >= 0) & (place < pages) & (key < stop)
            offset = pl.multiple_of(lax.rem(key, page), size) if page > size else 0
            pieces.append((place, offset, there))
            present += there.astype(jnp.int32) << p

        @pl.when(done + j >= tiling.stages)
        def _() -> None:
            plgpu.barrier_wait(scratch.free.at[slot])

        scratch.present[slot] = present
        for source, target in ((inputs.k, scratch.k), (inputs.v, scratch.v)):
            for p, (place, offset, there) in enumerate(pieces):
                _load_piece(
                    source.at[place, head, pl.ds(offset, size)],
                    target.at[slot, pl.ds(p * size, size)],
                    scratch.ready.at[slot],
                    there,
                )

    lax.fori_loop(0, tiles, load_tile, None)
    return done + tiles


def _load_piece(source: Any, target: Any, ready: Any, there: Array) -> None:
    @pl.when(there)
    def _() -> None:
        plgpu.copy_gmem_to_smem(source, target, ready)

    @pl.when(jnp.logical_not(there))
    def _() -> None:
        plgpu.barrier_arrive(ready)


class _Heads(NamedTuple):
    """The query heads of a unit: a block of those that share a key/value head, the last block may have fewer."""

    unit: Array
    group: int
    tiling: Tiling

    @property
    def first(self) -> Array:
        blocks = head_blocks(self.group, self.tiling)
        return lax.div(self.unit, blocks) * self.group + lax.rem(self.unit, blocks) * self.tiling.heads

    def each(self, copy: Callable[[Any, int], None]) -> None:
        """Runs `copy(heads, how many)`, a number that must be static."""
        blocks, most, first = head_blocks(self.group, self.tiling), self.tiling.heads, self.first
        block, rest = lax.rem(self.unit, blocks), self.group - (blocks - 1) * most
        if rest == most:
            copy(pl.ds(first, most), most)
            return
        pl.when(block < blocks - 1)(lambda: copy(pl.ds(first, most), most))
        pl.when(block == blocks - 1)(lambda: copy(pl.ds(first, rest), rest))


def _compute_item(
    i: Array,
    done: Array,
    inputs: Inputs,
    results: Results,
    scratch: Scratch,
    form: AttentionForm,
    tiling: Tiling,
    dim: int,
) -> Array:
    """Attention of one warpgroup's rows of one item; returns how many tiles were used since the start."""
    (_tokens, heads, _), kv_heads, page = inputs.q.shape, inputs.k.shape[1], inputs.k.shape[2]
    group, v_dim = heads // kv_heads, inputs.v.shape[3]
    blocks = head_blocks(group, tiling)
    warpgroup = lax.axis_index("warpgroup")
    item, unit = lax.div(i, kv_heads * blocks), lax.rem(i, kv_heads * blocks)
    first, stop = inputs.items[item, BEGIN], inputs.items[item, END]
    own = _Heads(unit, group, tiling)
    before = warpgroup * tiling.tokens
    token, position = inputs.items[item, TOKEN] + before, inputs.items[item, POSITION] + before
    count = jnp.clip(inputs.items[item, TOKENS] - before, 0, tiling.tokens)
    _load_queries(inputs.q, scratch, token, own, tiling, dim)
    queries = scratch.q.at[warpgroup]
    slope = None
    if inputs.slopes is not None:
        slope = plgpu.load(inputs.slopes.at[unit], layout=_WGMMA.reduce(1), optimized=False)

    def step(j: Array, carry: tuple[Array, Softmax]) -> tuple[Array, Softmax]:
        slot = lax.rem(done + j, tiling.stages)
        key = first + j * tiling.keys
        plgpu.barrier_wait(scratch.ready.at[slot])
        there = _Presence(scratch.present[slot], stop - key, min(tiling.keys, page), tiling.keys)
        _clean(scratch, slot, there, tiling, v_dim)

        def attend(values: Array, softmax: Softmax) -> tuple[Array, Softmax]:
            for offset in range(0, tiling.keys, tiling.step):
                values, softmax = attend_some(values, softmax, offset)
            return values, softmax

        def attend_some(values: Array, softmax: Softmax, offset: int) -> tuple[Array, Softmax]:
            some = pl.ds(offset, tiling.step)

            def products(accumulator: Any) -> Array:
                plgpu.wgmma(accumulator, queries, scratch.k.at[slot, some].T)
                return accumulator[...]

            raw = pl.run_scoped(products, ACC((ROWS, tiling.step), jnp.float32))
            row_slope = None if slope is None else lax.broadcast_in_dim(slope, raw.shape, [0])
            distance = _distance(key + offset - position, tiling) if slope is not None else None
            scores, factor = tile_scores(raw, form, distance, slope=row_slope, masked=False)
            open_ = there.all & _inside(form, key + offset, position, tiling)

            def hide(scores: Array) -> Array:
                visible = lax.broadcast_in_dim(there.of(_index(tiling.step, 1) + offset), scores.shape, [1])
                distance = _distance(key + offset - position, tiling)
                within = within_form(form, distance)
                if within is None:
                    # Always true: without a mask of both axes the compiler's search for layouts is endless.
                    within = distance > jnp.iinfo(jnp.int32).min
                return jnp.where(visible & within, scores, -jnp.inf)

            scores = lax.cond(open_, lambda scores: scores, hide, scores)
            weights, rescale, softmax = update(softmax, scores, factor)
            values = values * lax.broadcast_in_dim(rescale, values.shape, [0])
            weights = weights.astype(inputs.v.dtype)

            def weigh(accumulator: Any) -> None:
                plgpu.wgmma(accumulator, weights, scratch.v.at[slot, some])

            summed: Any = pl.run_state(weigh)(ACC.init(values))
            return summed, softmax

        active = count > 0
        if form.causal:
            active &= key < position + count
        carry = lax.cond(active, attend, lambda *carry: carry, *carry)
        plgpu.barrier_arrive(scratch.free.at[slot])
        return carry

    values = plgpu.layout_cast(jnp.zeros((ROWS, v_dim), jnp.float32), _WGMMA)
    softmax = Softmax(*(plgpu.layout_cast(x, _WGMMA.reduce(1)) for x in start(ROWS)))
    tiles = lax.div(stop - first + (tiling.keys - 1), tiling.keys)
    values, softmax = lax.fori_loop(0, tiles, step, (values, softmax))

    reciprocal, lse = finish(softmax)
    values = values * lax.broadcast_in_dim(reciprocal, values.shape, [0])
    if results.lse is not None:
        store(results.lse.at[item, unit, warpgroup], lse)
    out = scratch.rows if scratch.out is None else scratch.out
    splits = inputs.items[item, SPLITS]

    @pl.when(splits == 1)
    def _() -> None:
        every = results.out.at[pl.ds(token, tiling.tokens), own.first] if tiling.heads == 1 else None
        _store(values, out, lambda t: results.out.at[token + t], count, own, tiling, every)

    if results.parts is not None:

        @pl.when(splits > 1)
        def _() -> None:
            slot = inputs.items[item, SLOT] + before * splits
            for column in range(0, v_dim, PART_COLUMNS):
                some = values[:, column : column + PART_COLUMNS]
                columns = results.parts.at[:, :, pl.ds(column, PART_COLUMNS)]
                _store(some, scratch.part, lambda t, c=columns: c.at[slot + t * splits], count, own, tiling)

    return done + tiles


def _load_queries(q: Any, scratch: Scratch, token: Array, heads: _Heads, tiling: Tiling, dim: int) -> None:
    """Brings the rows of one warpgroup into shared memory; those past the block's end are other tokens', never stored.

    They arrive token by token (only one head makes a box of all tokens), which the layout of a matrix product's operand
    would not allow; hence the detour.
    """
    warpgroup, tokens = lax.axis_index("warpgroup"), q.shape[0]

    def copy(source: Any, row: Any, rows: int) -> None:
        target = scratch.rows.at[warpgroup, pl.ds(row, rows)]
        plgpu.copy_gmem_to_smem(source, target, scratch.q_ready.at[warpgroup])

    def load(t: Array, _: None) -> None:
        source = q.at[jnp.minimum(token + t, tokens - 1)]
        heads.each(lambda at, count: copy(source.at[at], t * tiling.heads, count))

    if tiling.heads == 1:
        copy(q.at[pl.ds(token, tiling.tokens), heads.first], 0, tiling.tokens)
    else:
        lax.fori_loop(0, tiling.tokens, load, None)
    plgpu.barrier_wait(scratch.q_ready.at[warpgroup])
    queries = plgpu.load(scratch.rows.at[warpgroup, :, pl.ds(0, dim)], layout=_WGMMA, optimized=False)
    scratch.q[warpgroup] = queries
    plgpu.commit_smem()


def _store(
    values: Array,
    rows: Any,
    target: Callable[[Array], Any],
    count: Array,
    heads: _Heads,
    tiling: Tiling,
    every: Any = None,
) -> None:
    """Writes the block's own tokens, one copy each: the rows behind them are another sequence's.

    No copy relies on an array's end to stop it: it is of as many heads of a token as there are, all with their columns.

    Args:
        target: where a token goes, `[heads, columns]`.
        every: where all go at once if there are as many as can be, `[tokens, columns]`, where a block has one head.
    """
    rows = rows.at[lax.axis_index("warpgroup")]
    for column in range(0, values.shape[1], _STORED):  # converting all at once would take registers from the values
        some = values[:, column : column + _STORED]
        rows[:, pl.ds(column, some.shape[1])] = some.astype(rows.dtype)
    plgpu.commit_smem()

    def store(t: Array, _: None) -> None:
        def copy(at: Any, number: int) -> None:
            plgpu.copy_smem_to_gmem(rows.at[pl.ds(t * tiling.heads, number)], target(t).at[at])

        heads.each(copy)

    if every is None:
        lax.fori_loop(0, count, store, None)
    else:
        pl.when(count == tiling.tokens)(lambda: plgpu.copy_smem_to_gmem(rows, every))
        pl.when(count < tiling.tokens)(lambda: lax.fori_loop(0, count, store, None))
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)


class _Presence(NamedTuple):
    """Which keys of a tile there are: pages by a bit each, and no more than `keys`."""

    pages: Array
    keys: Array
    page: int
    tile: int

    @property
    def all(self) -> Array:
        return (self.keys >= self.tile) & (self.pages == (1 << self.tile // self.page) - 1)

    def of(self, index: Array) -> Array:
        """Whether the keys of these indices in the tile are there."""
        bit = (
            self.pages
            if self.page == self.tile
            else lax.shift_right_logical(jnp.broadcast_to(self.pages, index.shape), lax.div(index, self.page))
        )
        return (index < self.keys) & (bit & 1 == 1)


def _clean(scratch: Scratch, slot: Array, there: _Presence, tiling: Tiling, v_dim: int) -> None:
    """Puts zeros where a tile has no values: what lies there may be NaN, which a weight of zero would not remove."""
    warpgroup = lax.axis_index("warpgroup")

    def clean() -> None:
        # In small parts, for the registers are full of accumulated values.
        width = operand_width(v_dim, tiling.step)
        for row in range(0, tiling.keys, ROWS):
            seen = lax.broadcast_in_dim(there.of(_index(ROWS, 0) + row), (ROWS, width), [0])
            for column in range(0, v_dim, width):
                part = scratch.v.at[slot, pl.ds(row, ROWS), pl.ds(column, width)]
                values = plgpu.load(part, layout=_WGMMA)
                part[...] = jnp.where(seen, values, jnp.zeros_like(values))
        plgpu.commit_smem()
        plgpu.barrier_arrive(scratch.clean.at[slot])

    @pl.when(jnp.logical_not(there.all))
    def _() -> None:
        pl.when(warpgroup == 0)(clean)
        plgpu.barrier_wait(scratch.clean.at[slot])


def _distance(offset: Array, tiling: Tiling) -> Array:
    """Index of each column's key minus that of each row's query; `offset` is that of the first of both."""
    shape = ROWS, tiling.step
    token = lax.div(_index(ROWS, 0), tiling.heads)
    column = _index(tiling.step, 1) + offset
    return lax.broadcast_in_dim(column, shape, [1]) - lax.broadcast_in_dim(token, shape, [0])


def _index(size: int, axis: int) -> Array:
    """The indices of a tile along one axis, to be broadcast along the other."""
    return plgpu.broadcasted_iota(jnp.int32, (size,), 0, layout=_WGMMA.reduce(1 - axis))


def _inside(form: AttentionForm, key: Array, position: Array, tiling: Tiling) -> Array:
    """Whether the form's masks hide nothing of a tile from any row."""
    last_key, last_position = key + (tiling.step - 1), position + (tiling.tokens - 1)
    inside = jnp.bool_(True)
    if form.causal:
        inside &= last_key <= position
    if form.window is not None:
        inside &= key > last_position - form.window
        if not form.causal:
            inside &= last_key < position + form.window
    return inside
