"""A cache of one's own, as anyone could write it: each row keeps its last few tokens and forgets the others."""

import dataclasses
from functools import partial
from typing import Any, Self

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from jdsi.kv_cache import OneForAll, join_rows
from jdsi.kv_cache.rows import select_rows
from jdsi.pallas_kernels import apply_rotary, attention


@dataclasses.dataclass(frozen=True)
class Window:
    size: int

    def bytes(self, layers: Any, rows: int, tokens: int, dtype: Any) -> int:
        return rows * self.size * sum(h * (k + v) for h, k, v in layers) * jnp.dtype(dtype).itemsize

    def create(self, layers: Any, rows: int, tokens: int, dtype: Any, mesh: Any = None) -> "WindowCache":
        memory = [tuple(jnp.zeros((rows, h, self.size, d), dtype) for d in (k, v)) for h, k, v in layers]
        none = jnp.zeros(rows, jnp.int32)
        cache = WindowCache(tuple(memory), none, none)
        return (
            cache
            if mesh is None
            else jax.device_put(cache, jax.tree.map(partial(NamedSharding, mesh), cache.partition()))
        )

    def report(self) -> None: ...

    def close(self) -> None: ...


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class WindowCache(OneForAll):
    layers: tuple[Any, ...]
    lengths: Any
    new_lengths: Any
    new_tokens: int = dataclasses.field(default=1, metadata={"static": True})

    rows = property(lambda self: self.lengths.shape[0])
    positions = property(lambda self: self._positions().reshape(-1))
    select = select_rows
    join = classmethod(lambda cls, caches: join_rows(caches))

    def _positions(self) -> Any:
        return self.lengths[:, None] + jnp.arange(self.new_tokens, dtype=jnp.int32)

    def begin(self, new_lengths: Any, new_tokens: int) -> Self:
        return dataclasses.replace(self, new_lengths=jnp.asarray(new_lengths), new_tokens=new_tokens)

    def attend(self, layer: int, q: Any, k: Any, v: Any, form: Any) -> tuple[Any, Self]:
        q, k = (apply_rotary(x, self.positions, self.positions + 1, form.rotary) for x in (q, k))
        q, *new = (x.reshape(self.rows, self.new_tokens, *x.shape[1:]) for x in (q, k, v))
        memory = [jnp.concatenate([old, x.swapaxes(1, 2)], 2) for old, x in zip(self.layers[layer], new, strict=True)]
        size, mine = self.layers[layer][0].shape[2], self._positions()
        held = self.lengths[:, None] - size + jnp.arange(size, dtype=jnp.int32)
        theirs = jnp.concatenate([held, jnp.where(mine < (self.lengths + self.new_lengths)[:, None], mine, -1)], 1)
        visible = (theirs[:, None] >= 0) & (theirs[:, None] > mine[..., None] - size)
        out = attention(q, *memory, form, q_positions=mine, k_positions=theirs, visible=visible)
        last = self.new_lengths[:, None, None, None] + jnp.arange(size)[:, None]
        kept = tuple(jnp.take_along_axis(x, last, axis=2) for x in memory)
        return out.reshape(-1, *out.shape[2:]), self.with_memory(layer, kept)

    def attend_fused(self, layer: int, qkv: Any, heads: int, form: Any) -> tuple[Any, Self]:
        return self.attend(layer, *jnp.split(qkv, (heads, (heads + qkv.shape[1]) // 2), axis=1), form)

    def commit(self) -> Self:
        return dataclasses.replace(self, lengths=self.lengths + self.new_lengths)

    def partition(self) -> Self:
        rows, memory = PartitionSpec("data"), PartitionSpec("data", "tensor")
        return jax.tree.map(lambda leaf: rows if leaf.ndim == 1 else memory, self)

    def memory(self, layer: int) -> Any:
        return self.layers[layer]

    def only(self, memory: Any) -> Self:
        return dataclasses.replace(self, layers=(memory,))

    def with_memory(self, layer: int, memory: Any) -> Self:
        return dataclasses.replace(self, layers=(*self.layers[:layer], memory, *self.layers[layer + 1 :]))
