"""How the kernel cuts its work: rows, tiles, splits."""

import dataclasses

from jaxtyping import Array, Float

from ..attention.form import AttentionForm
from ..device import Device

ROWS = 64  # of one warpgroup's matrix product
PART_COLUMNS = 32  # of results that leave in float32 at a time: rows of 128 bytes
_RESERVED = 1024  # bytes of shared memory for barriers and the like


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How the kernel cuts its work.

    Attributes:
        warpgroups: that compute, each its own rows against the same keys.
        heads: query heads of one key/value head among a warpgroup's rows.
        keys: in a tile, a multiple of 64.
        step: keys of one matrix product, a divisor of `keys`: their scores share the registers with the values.
        stages: tiles of keys and values in flight or in use.
        chunk: keys of one split at least, a multiple of `keys`.
        splits: parts of one sequence's keys at most.
    """

    warpgroups: int
    heads: int
    keys: int
    step: int
    stages: int
    chunk: int
    splits: int

    @property
    def tokens(self) -> int:
        """Tokens among one warpgroup's rows."""
        return ROWS // self.heads

    @property
    def block(self) -> int:
        """Tokens of a query block."""
        return self.warpgroups * self.tokens


def head_blocks(group: int, tiling: Tiling) -> int:
    """Blocks of heads that read the same keys."""
    return -(-group // tiling.heads)


def padded(columns: int) -> int:
    """Columns of queries and results in memory: TMA wants a token's rows to start at a multiple of 128 bytes."""
    return -(-columns // 64) * 64


def shared_memory(tiling: Tiling, dim: int, v_dim: int) -> int:
    """Bytes of shared memory."""
    results = 0 if padded(dim) == padded(v_dim) else padded(v_dim) * 2
    rows = tiling.warpgroups * ROWS * (dim * 2 + padded(dim) * 2 + results + PART_COLUMNS * 4)
    return rows + tiling.stages * tiling.keys * (dim + v_dim) * 2 + _RESERVED


def operand_width(columns: int, most: int = 64) -> int:
    """Two-byte numbers in the widest swizzle, up to `most`, whose rows divide `columns`."""
    return next(width for width in (64, 32, 16) if columns % width == 0 and width <= most)


def default_tiling(
    q: Float[Array, "T H D"],
    k_pages: Float[Array, "P K page D"],
    v_pages: Float[Array, "P K page Dv"],
    form: AttentionForm,
    device: Device,
) -> Tiling:
    """The kernel's own choice."""
    return tilings(q, k_pages, v_pages, form, device)[0]


def tilings(
    q: Float[Array, "T H D"],
    k_pages: Float[Array, "P K page D"],
    v_pages: Float[Array, "P K page Dv"],
    form: AttentionForm,
    device: Device,
) -> list[Tiling]:
    """The default and its neighbours. They depend on the model and the device, never on the batch."""
    (_, heads, dim), kv_heads, v_dim = q.shape, k_pages.shape[1], v_pages.shape[3]
    group = heads // kv_heads
    blocks = -(-group // ROWS)
    # One long sequence alone is to fill the device, so that its last part does not keep all others waiting.
    splits = max(1, min(64, device.cores // (kv_heads * blocks)))
    # A bias needs registers beside those of scores and values: without spills there is room for half as many scores.
    narrow = v_dim > 128 or (form.alibi is not None and v_dim > 64)
    smallest = Tiling(1, -(-group // blocks), 64, 32 if narrow else 64, 2, 512, splits)
    found = []
    # Two warpgroups halve the reads of keys by prompts. Above 128 dims one needs all registers for its values.
    for warpgroups in (2, 1) if max(dim, v_dim) <= 128 else (1,):
        for keys in (64, 128):
            tiling = dataclasses.replace(smallest, warpgroups=warpgroups, keys=keys)
            while tiling.stages < 6:
                more = dataclasses.replace(tiling, stages=tiling.stages + 1)
                if shared_memory(more, dim, v_dim) > device.shared_memory:
                    break
                tiling = more
            if shared_memory(tiling, dim, v_dim) <= device.shared_memory:
                found.append(tiling)
    return found or [smallest]
