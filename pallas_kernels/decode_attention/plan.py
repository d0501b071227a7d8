"""What is decided about a call of the decode attention kernel before it runs."""

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from ..attention.form import AttentionForm
from ..device import Device
from ..mosaic import tiled

ROWS = 64  # of one tensor core operation
_MOST_STAGES = 8
_MOST_SPLITS = 64
_RESULT = 8 * 1024  # bytes of shared memory for results, where those of a block are no more
_RESERVED = 1024  # bytes of shared memory for barriers, and as many that the driver takes from every block


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How a call is cut up.

    Attributes:
        keys: of one tile, a multiple of 64.
        columns: queries of one block, a multiple of 8, or of 16 where two warpgroups share them.
        stages: tiles in shared memory.
        splits: parts of each row's keys.
    """

    keys: int
    columns: int
    stages: int
    splits: int


class Inputs(NamedTuple):
    """Operands in the GPU's memory, or what stands for them.

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
        tiling: how it is cut up.
        form, sinks: see `decode_attention`.
        dtype, kv_dtype: of queries and products, and of keys and values.
        length: S, queries per row and head.
        group: query heads per key/value head.
        kv_heads: K.
        dim, value_dim: of keys and values.
        shared: the values are part of the keys.
        capacity: keys a row can have, L or N * page.
        page: keys per page, 0 if not paged.
        pages: P.
        return_lse: the logarithms are wanted too.
    """

    tiling: Tiling
    form: AttentionForm
    sinks: int
    dtype: Any
    kv_dtype: Any
    length: int
    group: int
    kv_heads: int
    dim: int
    value_dim: int
    shared: bool
    capacity: int
    page: int
    pages: int
    return_lse: bool

    @property
    def direct(self) -> bool:
        """The kernel writes the result itself, for there is nothing to combine; it has one warpgroup then."""
        few = _result_bytes(self.value_rows, self.tiling.columns) > 0
        return self.tiling.splits == 1 and not self.return_lse and few

    @property
    def narrow(self) -> bool:
        """Keys and values are quantised."""
        return self.kv_dtype != self.dtype

    @property
    def dims_at_once(self) -> int:
        """Dims of queries and keys in one turn of a loop of products, whole tiles of shared memory.

        Unrolled, the addresses of all the operands would take the registers that the sums need.
        """
        tile = plgpu.find_swizzle(self.dim * 16) // 2
        return max(dims for dims in range(tile, 257, tile) if self.dim % dims == 0)

    @property
    def value_rows(self) -> int:
        """Value dims rounded up to what a tensor core takes."""
        return -(-self.value_dim // ROWS) * ROWS

    @property
    def column_tiles(self) -> int:
        """Blocks among which the queries of one key/value head are divided."""
        return -(-self.length * self.group // self.tiling.columns)

    @property
    def warpgroups(self) -> int:
        """How many share the value dims, so that the sums fit into their registers: 128 numbers a thread at most."""
        return warpgroups(self.value_rows, self.tiling.columns)

    @property
    def by_query(self) -> bool:
        """Queries lie along the rows of the products, see by_query.py."""
        return _by_query(self.shared, self.value_rows, self.tiling.columns)

    @property
    def copies(self) -> int:
        """Copies that bring the keys, or the values, of one tile."""
        return max(1, self.tiling.keys // self.page) if self.page else 1

    @property
    def reduction_bytes(self) -> int:
        """Scratch memory with which a reduction among warps takes a single step."""
        return 0 if self.by_query else 128 * self.tiling.columns

    @property
    def weights_memory(self) -> Any:
        """Shared memory for one tile's weights, queries by keys."""
        # Both operands of a product need the same swizzle, so the weights follow the values.
        line = self.dim if self.shared else self.value_rows if self.narrow else self.value_dim
        return _tiled((self.tiling.columns, self.tiling.keys), self.dtype, line)

    def memory(self) -> dict[str, Any]:
        """Shared memory and barriers that a block has from beginning to end."""
        keys, stages = self.tiling.keys, self.tiling.stages
        ready = plgpu.Barrier(num_arrivals=self.copies * (1 + self.narrow), num_barriers=stages)
        memory: dict[str, Any] = {
            "q": _tiled((self.tiling.columns, self.dim), self.dtype, self.dim),
            "q_ready": plgpu.Barrier(),
            "k": _tiled((stages, keys, self.dim), self.kv_dtype, self.dim),
            "k_ready": ready,
        }
        if not self.shared:
            memory |= {"v": _tiled((stages, keys, self.value_rows), self.kv_dtype, self.value_dim), "v_ready": ready}
        if self.narrow:
            scales = plgpu.SMEM((stages, keys), jnp.float32)
            wide = _tiled((keys, self.value_rows), self.dtype, self.value_rows)
            memory |= {"k_scales": scales, "v_scales": scales, "wide": wide}
        if self.direct:
            memory["result"] = plgpu.SMEM((self.tiling.columns, self.value_rows), self.dtype)
        if self.warpgroups == 1:
            memory["weights"] = self.weights_memory
        else:
            memory["meeting"] = plgpu.Barrier(num_arrivals=self.warpgroups)
        if self.by_query:
            memory["weights"] = _tiled((ROWS, keys), self.dtype, keys // 2)  # of which each writes half the keys'
            memory["numbers"] = plgpu.SMEM((2, ROWS), jnp.float32)
        return memory


def _tiled(shape: tuple[int, ...], dtype: Any, line: int) -> Any:
    """Memory in the layout that tensor cores read, whose swizzle must divide a line of so many numbers."""
    bits = jnp.dtype(dtype).itemsize * 8
    swizzle = plgpu.find_swizzle(line * bits)
    return plgpu.SMEM(shape, dtype, transforms=tiled(swizzle * 8 // bits, bits // 8))


def _result_bytes(value_rows: int, columns: int) -> int:
    """Shared memory through which a block writes its result, 0 where that would be too much."""
    size = 2 * value_rows * columns
    return size if size <= _RESULT else 0


def _by_query(shared: bool, value_rows: int, columns: int) -> bool:
    return shared and columns == ROWS and warpgroups(value_rows, columns) == 2


def warpgroups(value_rows: int, columns: int) -> int:
    """How many warpgroups the sums of so many value dims and queries need."""
    return 2 if value_rows * columns > 64 * 128 else 1


def width_of_values(v: Array | None, value_dim: int | None) -> int:
    """Dims of a value, whether they are part of the keys or not."""
    width = value_dim if v is None else v.shape[3]
    assert width is not None
    return width


def default_tiling(
    q: Array,
    k: Array,
    v: Array | None,
    block_tables: Array | None,
    form: AttentionForm,
    value_dim: int | None,
    device: Device,
) -> Tiling | None:
    """A tiling by reckoning; `None` if not even two tiles fit into shared memory."""
    batch, length, heads, dim = q.shape
    kv_heads, unit = k.shape[1:3]
    narrow = k.dtype != q.dtype
    value_rows = -(-width_of_values(v, value_dim) // ROWS) * ROWS
    queries = length * (heads // kv_heads)
    # What registers hold. Blocks of other queries then read the same keys again, but from the cache.
    column_tiles = -(-queries // (32 if v is not None and value_rows > 128 else 64))
    columns = -(-queries // (8 * column_tiles)) * 8
    weights = reduction = 0
    if warpgroups(value_rows, columns) > 1:
        columns = -(-columns // 16) * 16
    # Tiles of short lines are longer, so that a copy has 8 KB and the latencies of a step count less.
    key_bytes = (dim + (0 if v is None else value_rows)) * k.dtype.itemsize
    keys = 2 * ROWS if key_bytes <= 256 and not narrow else ROWS
    if block_tables is not None and unit % keys and keys % unit:
        keys = ROWS
    tile = keys * (key_bytes + 8 * narrow)
    weights, reduction = columns * keys * 2, 128 * columns
    fixed = weights + reduction
    if _by_query(v is None, value_rows, columns):
        fixed = weights + 2 * 4 * ROWS
    elif warpgroups(value_rows, columns) > 1:  # weights lie where the reductions were
        fixed = max(weights, reduction)
    fixed += columns * dim * 2 + keys * value_rows * 2 * narrow + _result_bytes(value_rows, columns) + _RESERVED
    # Two blocks share a multiprocessor where each can have three tiles: while one computes, the other's copies go on.
    shares = (device.shared_memory - _RESERVED) // 2, device.shared_memory
    half, whole = (min((share - fixed) // tile, _MOST_STAGES) for share in shares)
    if whole < 2:
        return None
    capacity = unit * (1 if block_tables is None else block_tables.shape[1])
    if form.window is not None:
        capacity = min(capacity, form.window + length + keys)
    blocks = batch * kv_heads * column_tiles
    splits = _splits(
        blocks,
        tiles=-(-capacity // keys),
        cores=device.cores,
        # Numbers of one byte arrive faster than one block can convert them.
        busy=2 if narrow and half >= 3 else 1,
        # About two tiles' time goes by before the first arrives. The result is written, and read once more.
        overhead=2 + 2 * 4 * value_rows * columns / tile,
    )
    alone = half < 3 or blocks * splits <= device.cores
    return Tiling(keys, columns, whole if alone else half, splits)


def _splits(blocks: int, tiles: int, cores: int, busy: int, overhead: float) -> int:
    """Into how many parts to divide the keys, so that the multiprocessor with most to read is done soonest.

    Args:
        blocks: there are without a division.
        tiles: of keys.
        cores: multiprocessors.
        busy: blocks that keep a multiprocessor's memory busy.
        overhead: time that each block takes in any case, in that of a tile.
    """

    def cost(splits: int) -> float:
        return max(-(-blocks * splits // cores), busy) * (-(-tiles // splits) + overhead)

    return min(range(1, max(1, min(tiles // 2, _MOST_SPLITS)) + 1), key=cost)
