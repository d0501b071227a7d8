"""How the kernel cuts its work: rows, tiles, splits."""

import dataclasses

from jaxtyping import Array, Float

from ..device import Device

ROWS = 64  # of one warpgroup's matrix product
_RESERVED = 1024  # bytes of shared memory for barriers and the like


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How the kernel cuts its work.

    Attributes:
        warpgroups: that compute, each its own rows against the same keys.
        heads: query heads of one key/value head among a warpgroup's rows.
        keys: in a tile, a multiple of 64.
        stages: tiles of keys and values in flight or in use.
        chunk: keys of one split at least, a multiple of `keys`.
        splits: parts of one sequence's keys at most.
    """

    warpgroups: int
    heads: int
    keys: int
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
    rows = tiling.warpgroups * ROWS * (padded(dim) * 2 + results + padded(v_dim) * 4)
    return rows + tiling.stages * tiling.keys * (dim + v_dim) * 2 + _RESERVED


def default_tiling(
    q: Float[Array, "T H D"], k_pages: Float[Array, "P K page D"], v_pages: Float[Array, "P K page Dv"], device: Device
) -> Tiling:
    """The kernel's own choice."""
    return tilings(q, k_pages, v_pages, device)[0]


def tilings(
    q: Float[Array, "T H D"], k_pages: Float[Array, "P K page D"], v_pages: Float[Array, "P K page Dv"], device: Device
) -> list[Tiling]:
    """The default and its neighbours. All depend on the model and the device, not on the batch."""
    heads, kv_heads = q.shape[1], k_pages.shape[1]
    dim, v_dim = q.shape[2], v_pages.shape[3]
    group = heads // kv_heads
    blocks = -(-group // ROWS)
    # One long sequence alone is to fill the device, so that its last part does not keep all others waiting.
    splits = max(1, min(64, device.cores // (kv_heads * blocks)))
    found = []
    # Two warpgroups halve the reads of keys by prompts. Above 128 dims one needs all registers for its values.
    for warpgroups in (2, 1) if max(dim, v_dim) <= 128 else (1,):
        for keys in (64, 128):
            tiling = Tiling(warpgroups, -(-group // blocks), keys, 2, 512, splits)
            while tiling.stages < 6:
                more = dataclasses.replace(tiling, stages=tiling.stages + 1)
                if shared_memory(more, dim, v_dim) > device.shared_memory:
                    break
                tiling = more
            if shared_memory(tiling, dim, v_dim) <= device.shared_memory:
                found.append(tiling)
    return found or [Tiling(1, -(-group // blocks), 64, 2, 512, splits)]
