"""The kernel for Hopper: persistent, warp-specialised, keys and values by TMA one page at a time.

The query heads that share a key/value head are packed with the tokens of a query block into the 64 rows of one
warpgroup's matrix product (row `token * heads + head`), so that a decode, too, reads each key once. Each
multiprocessor goes through its share of the schedule: one warpgroup keeps loads of pages in flight, across the borders
of work items, the others compute. Keys of long sequences are split; a second small kernel adds up the parts.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from ..attention.form import AttentionForm
from ..attention.tile import Softmax, finish, start, tile_scores, update, why_not_form, within_form
from ..device import Device
from ..operator import Config
from .combine import combine_parts, part_weights, whole_blocks
from .schedule import BEGIN, END, POSITION, SEQUENCE, SPLIT, SPLITS, TOKEN, TOKENS, Schedule, make_schedule, most_splits
from .tiling import ROWS, Tiling, default_tiling, head_blocks, padded, shared_memory, tilings

# Of the registers of a multiprocessor, what each thread of the loading warpgroup keeps and each computing one gets.
_LOAD_REGISTERS, _COMPUTE_REGISTERS = 40, 232
_WGMMA = plgpu.Layout.WGMMA


def run(
    q: Float[Array, "T H D"],
    k_pages: Float[Array, "P K page D"],
    v_pages: Float[Array, "P K page Dv"],
    block_tables: Int[Array, "B N"],
    q_offsets: Int[Array, " B+1"],
    k_lengths: Int[Array, " B"],
    *,
    form: AttentionForm,
    return_lse: bool = False,
    device: Device,
    config: Config | None,
) -> Any:
    """See `reference.ragged_paged_attention`."""
    (tokens, heads, _), (_, kv_heads, page, _), v_dim = q.shape, k_pages.shape, v_pages.shape[3]
    tiling = dataclasses.replace(default_tiling(q, k_pages, v_pages, device), **(config or {}))
    room = block_tables.shape[1] * page
    splits = most_splits(room, tiling.chunk, tiling.splits)
    schedule = make_schedule(
        q_offsets,
        k_lengths,
        form=form,
        tokens=tokens,
        keys=room,
        block=tiling.block,
        tile=tiling.keys,
        chunk=tiling.chunk,
        splits=tiling.splits,
        units=kv_heads * head_blocks(heads // kv_heads, tiling),
        cores=device.cores,
    )
    arrays = _Arrays(schedule.items, schedule.shares, block_tables, _row_slopes(form, heads, kv_heads, tiling), q, k_pages, v_pages)
    out, lse, parts = _call(arrays, form, tiling, device, splits=splits, lse=return_lse or splits > 1)
    if lse is not None:
        lse = _by_token(lse, schedule, heads // kv_heads, tiling, splits)
        weights, lse = part_weights(lse)
        if parts is not None:
            extra = out.shape[0] - tokens
            weights = jnp.pad(weights, ((0, 0), (0, extra), (0, 0)))
            out = combine_parts(out, parts, weights, jnp.pad(schedule.splits, (0, extra)))
    out = out[:tokens, :, :v_dim]
    return (out, lse) if return_lse else out


class _Arrays(NamedTuple):
    """What the kernel reads; `slopes` is `None` for a form without ALiBi."""

    items: Any
    shares: Any
    tables: Any
    slopes: Any
    q: Any
    k: Any
    v: Any


class _Results(NamedTuple):
    """What the kernel writes: results of blocks whose keys are in one part, logarithms by item, parts of the others."""

    out: Any
    lse: Any
    parts: Any


class _Scratch(NamedTuple):
    """Shared memory and barriers of one block.

    Attributes:
        q: an item's queries.
        out: its results; `None` if they take the place of the queries.
        part: its results in float32, where there are splits.
        k, v: one tile per stage.
        present: for each stage which of the tile's pages are there, a bit each.
        q_ready: one for each computing warpgroup.
        ready, free, clean: one for each stage: the tile is loaded, is used up, has zeros where no key is.
    """

    q: Any
    out: Any
    part: Any
    k: Any
    v: Any
    present: Any
    q_ready: Any
    ready: Any
    free: Any
    clean: Any


def _call(
    arrays: _Arrays, form: AttentionForm, tiling: Tiling, device: Device, *, splits: int, lse: bool
) -> tuple[Array, Array | None, Array | None]:
    """Results, logarithms `[item, unit, warpgroup, row]` and parts `[split, T, H, Dv]`."""
    (tokens, heads, dim), (_, kv_heads, page, _), v_dim = arrays.q.shape, arrays.k.shape, arrays.v.shape[3]
    dtype, width = arrays.q.dtype, padded(v_dim)
    pieces = max(1, tiling.keys // page)
    if padded(dim) > dim:
        arrays = arrays._replace(q=jnp.pad(arrays.q, ((0, 0), (0, 0), (0, padded(dim) - dim))))
    present = [i for i, x in enumerate(arrays) if x is not None]
    units = kv_heads * head_blocks(heads // kv_heads, tiling)
    tokens = whole_blocks(tokens, heads) if splits > 1 else tokens
    out_type = _Results(
        jax.ShapeDtypeStruct((tokens, heads, width), dtype),
        jax.ShapeDtypeStruct((len(arrays.items), units, tiling.warpgroups, ROWS), jnp.float32) if lse else None,
        jax.ShapeDtypeStruct((splits, tokens, heads, width), jnp.float32) if splits > 1 else None,
    )
    written = [i for i, x in enumerate(out_type) if x is not None]

    def entry(*refs: Any) -> None:
        inputs = _Arrays(*(refs[present.index(i)] if i in present else None for i in range(len(_Arrays._fields))))
        rest = refs[len(present) :]
        results = _Results(*(rest[written.index(i)] if i in written else None for i in range(len(_Results._fields))))

        def rows(columns: int, dtype: Any) -> Any:
            return plgpu.SMEM((tiling.warpgroups, ROWS, columns), dtype)

        def tiles(columns: int) -> Any:
            return plgpu.SMEM((tiling.stages, tiling.keys, columns), dtype, transforms=_transforms(columns))

        def barriers(arrivals: int, count: int) -> Any:
            return plgpu.Barrier(num_arrivals=arrivals, num_barriers=count)

        def block(*scratch: Any) -> None:
            _block(inputs, results, _Scratch(*scratch), form, tiling, dim)

        pl.run_scoped(
            block,
            rows(padded(dim), dtype),
            rows(width, dtype) if width != padded(dim) else None,
            rows(width, jnp.float32) if splits > 1 else None,
            tiles(dim),
            tiles(v_dim),
            plgpu.SMEM((tiling.stages,), jnp.int32),
            barriers(tiling.tokens, tiling.warpgroups),
            barriers(2 * pieces, tiling.stages),
            barriers(tiling.warpgroups, tiling.stages),
            barriers(1, tiling.stages),
            collective_axes="warpgroup",
        )

    written_arrays = plgpu.kernel(
        entry,
        out_type=[x for x in out_type if x is not None],
        grid=(device.cores,),
        grid_names=("core",),
        num_threads=tiling.warpgroups + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=0),
    )(*(arrays[i] for i in present))
    results = [written_arrays[written.index(i)] if i in written else None for i in range(len(_Results._fields))]
    return results[0], results[1], results[2]


def _transforms(columns: int) -> tuple[Any, ...]:
    """The layout that matrix products read, with the widest swizzle whose rows divide `columns` two-byte numbers."""
    width = next(w for w in (64, 32, 16) if columns % w == 0)
    return plgpu.TilingTransform((8, width)), plgpu.SwizzleTransform(2 * width)


def _block(
    inputs: _Arrays, results: _Results, scratch: _Scratch, form: AttentionForm, tiling: Tiling, dim: int
) -> None:
    """What each warpgroup of one multiprocessor does."""
    core, warpgroup = lax.axis_index("core"), lax.axis_index("warpgroup")
    begin, end = inputs.shares[core], inputs.shares[core + 1]

    @pl.when(warpgroup == tiling.warpgroups)
    def _() -> None:
        plgpu.set_max_registers(_LOAD_REGISTERS, action="decrease")
        lax.fori_loop(begin, end, lambda i, done: _load_item(i, done, inputs, scratch, tiling), jnp.int32(0))

    @pl.when(warpgroup < tiling.warpgroups)
    def _() -> None:
        plgpu.set_max_registers(_COMPUTE_REGISTERS, action="increase")

        def step(i: Array, done: Array) -> Array:
            return _compute_item(i, done, inputs, results, scratch, form, tiling, dim)

        lax.fori_loop(begin, end, step, jnp.int32(0))
        plgpu.wait_smem_to_gmem(0)


def _load_item(i: Array, done: Array, inputs: _Arrays, scratch: _Scratch, tiling: Tiling) -> Array:
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

    def each(self, copy: Callable[[Any, int], None]) -> None:
        """Runs `copy(heads, how many)`, a number that must be static."""
        blocks, most = head_blocks(self.group, self.tiling), self.tiling.heads
        block = lax.rem(self.unit, blocks)
        first, rest = lax.div(self.unit, blocks) * self.group + block * most, self.group - (blocks - 1) * most
        if rest == most:
            copy(pl.ds(first, most), most)
            return
        pl.when(block < blocks - 1)(lambda: copy(pl.ds(first, most), most))
        pl.when(block == blocks - 1)(lambda: copy(pl.ds(first, rest), rest))


def _compute_item(
    i: Array,
    done: Array,
    inputs: _Arrays,
    results: _Results,
    scratch: _Scratch,
    form: AttentionForm,
    tiling: Tiling,
    dim: int,
) -> Array:
    """Attention of one warpgroup's rows of one item; returns how many tiles were used since the start."""
    (tokens, heads, _), kv_heads, page = inputs.q.shape, inputs.k.shape[1], inputs.k.shape[2]
    group, v_dim = heads // kv_heads, inputs.v.shape[3]
    blocks = head_blocks(group, tiling)
    warpgroup = lax.axis_index("warpgroup")
    item, unit = lax.div(i, kv_heads * blocks), lax.rem(i, kv_heads * blocks)
    first, stop = inputs.items[item, BEGIN], inputs.items[item, END]
    own = _Heads(unit, group, tiling)
    before = warpgroup * tiling.tokens
    token, position = inputs.items[item, TOKEN] + before, inputs.items[item, POSITION] + before
    count = jnp.clip(inputs.items[item, TOKENS] - before, 0, tiling.tokens)
    queries = _load_queries(inputs.q, scratch, token, own, tiling, dim)
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
            def products(accumulator: Any) -> Array:
                plgpu.wgmma(accumulator, queries, scratch.k.at[slot].T)
                return accumulator[...]

            raw = pl.run_scoped(products, plgpu.ACC((ROWS, tiling.keys), jnp.float32))
            row_slope = None if slope is None else lax.broadcast_in_dim(slope, raw.shape, [0])
            distance = _distance(key - position, tiling) if slope is not None else None
            scores, factor = tile_scores(raw, form, distance, slope=row_slope, masked=False)
            open_ = there.all & _inside(form, key, position, tiling)

            def hide(scores: Array) -> Array:
                visible = there.of(plgpu.broadcasted_iota(jnp.int32, scores.shape, 1, layout=_WGMMA))
                within = within_form(form, _distance(key - position, tiling))
                return jnp.where(visible if within is None else visible & within, scores, -jnp.inf)

            scores = lax.cond(open_, lambda scores: scores, hide, scores)
            weights, rescale, softmax = update(softmax, scores, factor)
            values = values * lax.broadcast_in_dim(rescale, values.shape, [0])
            weights = weights.astype(inputs.v.dtype)

            def weigh(accumulator: Any) -> None:
                plgpu.wgmma(accumulator, weights, scratch.v.at[slot])

            return pl.run_state(weigh)(plgpu.ACC.init(values)), softmax

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
        plgpu.store(results.lse.at[item, unit, warpgroup], lse, optimized=False)
    at = token, count, own, tiling
    rows = scratch.q if scratch.out is None else scratch.out
    if results.parts is None:
        _store(values, rows, results.out, *at)
    else:
        whole = inputs.items[item, SPLITS] == 1
        pl.when(whole)(lambda: _store(values, rows, results.out, *at))
        split = results.parts.at[inputs.items[item, SPLIT]]
        pl.when(jnp.logical_not(whole))(lambda: _store(values, scratch.part, split, *at))
    return done + tiles


def _load_queries(q: Any, scratch: _Scratch, token: Array, heads: _Heads, tiling: Tiling, dim: int) -> Array:
    """The rows of one warpgroup; those of tokens past the block's end are other tokens' and never stored."""
    warpgroup, tokens = lax.axis_index("warpgroup"), q.shape[0]

    def load(t: Array, _: None) -> None:
        def copy(at: Any, count: int) -> None:
            plgpu.copy_gmem_to_smem(
                q.at[jnp.minimum(token + t, tokens - 1), at],
                scratch.q.at[warpgroup, pl.ds(t * tiling.heads, count)],
                scratch.q_ready.at[warpgroup],
            )

        heads.each(copy)

    lax.fori_loop(0, tiling.tokens, load, None)
    plgpu.barrier_wait(scratch.q_ready.at[warpgroup])
    return plgpu.load(scratch.q.at[warpgroup, :, pl.ds(0, dim)], layout=_WGMMA, optimized=False)


def _store(values: Array, rows: Any, target: Any, token: Array, count: Array, heads: _Heads, tiling: Tiling) -> None:
    """Writes the block's own tokens, one copy each: the rows behind them are another sequence's."""
    warpgroup = lax.axis_index("warpgroup")
    plgpu.store(rows.at[warpgroup, :, pl.ds(0, values.shape[1])], values.astype(rows.dtype), optimized=False)
    plgpu.commit_smem()

    def store(t: Array, _: None) -> None:
        def copy(at: Any, count: int) -> None:
            plgpu.copy_smem_to_gmem(rows.at[warpgroup, pl.ds(t * tiling.heads, count)], target.at[token + t, at])

        heads.each(copy)

    lax.fori_loop(0, count, store, None)
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
        bit = self.pages if self.page == self.tile else lax.shift_right_logical(
            jnp.broadcast_to(self.pages, index.shape), lax.div(index, self.page)
        )
        return (index < self.keys) & (bit & 1 == 1)


def _clean(scratch: _Scratch, slot: Array, there: _Presence, tiling: Tiling, v_dim: int) -> None:
    """Puts zeros where a tile has no values: what lies there may be NaN, which a weight of zero would not remove."""
    warpgroup = lax.axis_index("warpgroup")

    def clean() -> None:
        for start in range(0, tiling.keys, ROWS):
            rows = scratch.v.at[slot, pl.ds(start, ROWS)]
            values = plgpu.load(rows, layout=_WGMMA)
            index = plgpu.broadcasted_iota(jnp.int32, (ROWS, v_dim), 0, layout=_WGMMA) + start
            plgpu.store(rows, jnp.where(there.of(index), values, jnp.zeros_like(values)))
        plgpu.commit_smem()
        plgpu.barrier_arrive(scratch.clean.at[slot])

    @pl.when(jnp.logical_not(there.all))
    def _() -> None:
        pl.when(warpgroup == 0)(clean)
        plgpu.barrier_wait(scratch.clean.at[slot])


def _distance(offset: Array, tiling: Tiling) -> Array:
    """Index of each column's key minus that of each row's query; `offset` is that of the first of both."""
    shape = ROWS, tiling.keys
    row, column = (plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=_WGMMA) for axis in (0, 1))
    return column - lax.div(row, tiling.heads) + offset


def _inside(form: AttentionForm, key: Array, position: Array, tiling: Tiling) -> Array:
    """Whether the form's masks hide nothing of a tile from any row."""
    last_key, last_position = key + (tiling.keys - 1), position + (tiling.tokens - 1)
    inside = jnp.bool_(True)
    if form.causal:
        inside &= last_key <= position
    if form.window is not None:
        inside &= key > last_position - form.window
        if not form.causal:
            inside &= last_key < position + form.window
    return inside


def _row_slopes(form: AttentionForm, heads: int, kv_heads: int, tiling: Tiling) -> Array | None:
    """ALiBi's slope of each row, for each unit."""
    if form.alibi is None:
        return None
    group = heads // kv_heads
    head = jnp.arange(head_blocks(group, tiling))[:, None] * tiling.heads + jnp.arange(ROWS) % tiling.heads
    head = jnp.minimum(head, group - 1)
    head = jnp.arange(kv_heads)[:, None, None] * group + head
    return jnp.asarray(form.alibi.slopes, jnp.float32)[head.reshape(-1, ROWS)]


def _by_token(
    lse: Float[Array, "items units warpgroups rows"], schedule: Schedule, group: int, tiling: Tiling, splits: int
) -> Float[Array, "splits T H"]:
    """The logarithms of each token's parts; -inf for parts it does not have."""
    units = lse.shape[1]
    kv_heads = units // head_blocks(group, tiling)
    head = jnp.arange(kv_heads * group)
    unit = head // group * head_blocks(group, tiling) + head % group // tiling.heads
    inside = head % group % tiling.heads
    token = jnp.arange(len(schedule.splits)) - schedule.items[schedule.first_item, TOKEN]
    split = jnp.arange(splits)[:, None]
    item = schedule.first_item + jnp.minimum(split, schedule.splits - 1)
    row = (token % tiling.tokens)[:, None] * tiling.heads + inside
    parts = lse[item[..., None], unit, (token // tiling.tokens)[:, None], row]
    return jnp.where((split < schedule.splits)[..., None], parts, -jnp.inf)


def why_not(
    q: Float[Array, "T H D"],
    k_pages: Float[Array, "P K page D"],
    v_pages: Float[Array, "P K page Dv"],
    block_tables: Int[Array, "B N"],
    q_offsets: Int[Array, " B+1"],
    k_lengths: Int[Array, " B"],
    *,
    form: AttentionForm,
    return_lse: bool = False,
    device: Device,
) -> str | None:
    """See `KernelModule.why_not`."""
    (_, heads, dim), page, v_dim = q.shape, k_pages.shape[2], v_pages.shape[3]
    dtypes = {str(x.dtype) for x in (q, k_pages, v_pages)}
    if device.capability[0] != 9:
        return f"it needs a Hopper GPU (compute capability 9.x), not {device.kind}"
    if len(dtypes) > 1 or not dtypes <= {"bfloat16", "float16"}:
        return f"q and pages must all be bfloat16 or all float16, not {', '.join(sorted(dtypes))}"
    if 0 in (*q.shape, *k_pages.shape, *block_tables.shape):
        return f"there is nothing to compute for q of shape {q.shape} and pages of shape {k_pages.shape}"
    if dim % 16 or v_dim % 16 or max(dim, v_dim) > 256:
        return f"head dims must be multiples of 16 up to 256, not {dim} for keys and {v_dim} for values"
    tiling = default_tiling(q, k_pages, v_pages, device)
    if page % 8 or (page % tiling.keys and tiling.keys % page):
        return f"pages must have 8, 16, 32 or a multiple of {tiling.keys} keys, not {page}"
    if (needed := shared_memory(tiling, dim, v_dim)) > device.shared_memory:
        return f"it needs {needed} bytes of shared memory, there are {device.shared_memory}"
    return why_not_form(form, heads)


def candidates(
    q: Float[Array, "T H D"],
    k_pages: Float[Array, "P K page D"],
    v_pages: Float[Array, "P K page Dv"],
    block_tables: Int[Array, "B N"],
    q_offsets: Int[Array, " B+1"],
    k_lengths: Int[Array, " B"],
    *,
    form: AttentionForm,
    return_lse: bool = False,
    device: Device,
) -> Sequence[Config]:
    """See `KernelModule.candidates`."""
    return [dataclasses.asdict(tiling) for tiling in tilings(q, k_pages, v_pages, device)]
