"""Contiguous KV memory for dense batches: one row of fixed capacity per sequence."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jdsi.pallas_kernels import (
    AttentionForm,
    decode_attention,
    prefill_attention,
    rotary_kv_write,
    rotary_kv_write_fused,
)
from jdsi.sharding import DATA, TENSOR

from .cache import KVShape, OneForAll, token_bytes
from .rows import join_rows, select_rows

_FEW = 16  # new tokens per row up to which the memory is read once for all of them
_SLOTS = 128  # rows have room for a multiple of so many tokens, so that few programs are compiled


@dataclasses.dataclass(frozen=True)
class Contiguous:
    """The `CacheSpec` of one row of fixed room per sequence."""

    def slots(self, tokens: int) -> int:
        """Room of a row that has to have room for so many tokens."""
        return -(-tokens // _SLOTS) * _SLOTS

    def bytes(self, layers: Sequence[KVShape], rows: int, tokens: int, dtype: DTypeLike) -> int:
        """See `CacheSpec.bytes`."""
        return rows * self.slots(tokens) * token_bytes(layers, jnp.dtype(dtype).itemsize)

    def create(
        self, layers: Sequence[KVShape], rows: int, tokens: int, dtype: DTypeLike, mesh: Mesh | None = None
    ) -> "ContiguousContext":
        """See `CacheSpec.create`; every device's share is made where it lies."""
        if mesh is None:
            return ContiguousContext.create(layers, rows, self.slots(tokens), dtype)
        return _creator(tuple(layers), jnp.dtype(dtype), mesh)(rows, self.slots(tokens))

    def report(self) -> None:
        """See `CacheSpec.report`."""

    def close(self) -> None:
        """See `CacheSpec.close`; there is nothing shared."""


@functools.lru_cache(maxsize=64)
def _creator(layers: tuple[KVShape, ...], dtype: Any, mesh: Mesh) -> Callable[[int, int], "ContiguousContext"]:
    create = partial(ContiguousContext.create, layers, dtype=dtype)
    places = jax.tree.map(partial(NamedSharding, mesh), jax.eval_shape(partial(create, 1, 1)).partition())
    return jax.jit(create, static_argnums=(0, 1), out_shardings=places)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ContiguousContext(OneForAll):
    """Keys and values of `B` sequences, slot = position: see `Cache`, and `AttentionContext`.

    A call brings the same number S of new tokens for every row, flattened `[B * S]`. Rows with fewer are right-padded;
    padding is not remembered.

    Attributes:
        keys, values: per layer `[B, K, L, D]`.
        lengths: tokens each row held before this call.
        new_lengths: real tokens among each row's S new ones.
        new_tokens: S, static.
        empty: no row held a token before this call, static; a prompt then attends to itself alone.
    """

    keys: tuple[Float[Array, "B K L D"], ...]
    values: tuple[Float[Array, "B K L Dv"], ...]
    lengths: Int[Array, " B"]
    new_lengths: Int[Array | np.ndarray, " B"]
    new_tokens: int = dataclasses.field(default=1, metadata={"static": True})
    empty: bool = dataclasses.field(default=False, metadata={"static": True})

    @classmethod
    def create(cls, layers: Sequence[KVShape], batch: int, capacity: int, dtype: DTypeLike = jnp.float32) -> Self:
        """Empty memory.

        Args:
            layers: what each remembers of a token.
            batch: rows.
            capacity: slots per row; the largest position that can be written is `capacity - 1`.
            dtype: of keys and values.
        """
        keys = tuple(jnp.zeros((batch, kv_heads, capacity, dim), dtype) for kv_heads, dim, _ in layers)
        values = tuple(jnp.zeros((batch, kv_heads, capacity, dim), dtype) for kv_heads, _, dim in layers)
        return cls(keys, values, jnp.zeros(batch, jnp.int32), jnp.zeros(batch, jnp.int32), empty=True)

    @property
    def rows(self) -> int:
        """See `Cache.rows`."""
        return self.lengths.shape[0]

    @property
    def capacity(self) -> int:
        """Slots per row."""
        return self.keys[0].shape[2]

    def begin(self, new_lengths: Int[Array | np.ndarray, " B"], new_tokens: int) -> Self:
        """See `Cache.begin`."""
        if isinstance(new_lengths, np.ndarray) and not isinstance(self.lengths, Tracer):
            new_lengths = _beside(self.lengths, new_lengths)
        return dataclasses.replace(self, new_lengths=new_lengths, new_tokens=new_tokens)

    def rollback(self, tokens: Int[Array | np.ndarray, " B"]) -> Self:
        """See `Cache.rollback`; what stands behind a row's last token is not read, and written over."""
        return dataclasses.replace(self, lengths=_less(self.lengths, tokens), empty=False)

    def release(self, rows: Sequence[int]) -> Self:
        """See `Cache.release`."""
        tokens = np.zeros(self.rows, np.int32)
        tokens[np.asarray(rows)] = self.capacity
        return self.rollback(tokens)

    def commit(self) -> Self:
        """See `AttentionContext.commit`; the next call continues behind this call's real tokens."""
        return dataclasses.replace(self, lengths=self.lengths + self.new_lengths, empty=False)

    @classmethod
    def join(cls, caches: Sequence[Self]) -> Self:
        """See `Cache.join`."""
        empty = all(one.empty for one in caches)
        frames = join_rows([dataclasses.replace(one, keys=(), values=(), new_tokens=1, empty=empty) for one in caches])

        def joined(layers: tuple[tuple[Array, ...], ...]) -> tuple[Array, ...]:
            memory = []
            for parts in zip(*layers, strict=True):
                memory.append(join_rows(parts))
                for part in parts:  # layer by layer, so that no more than one layer is there twice
                    part.delete()
            return tuple(memory)

        keys, values = joined(tuple(one.keys for one in caches)), joined(tuple(one.values for one in caches))
        return dataclasses.replace(frames, keys=keys, values=values)

    def select(self, rows: Int[Array | np.ndarray, " N"]) -> Self:
        """See `Cache.select`."""
        return select_rows(self, rows)

    @property
    def positions(self) -> Int[Array, " T"]:
        """Position of each packed token within its sequence."""
        return (self.lengths[:, None] + jnp.arange(self.new_tokens, dtype=jnp.int32)).reshape(-1)

    def attend(
        self,
        layer: int,
        q: Float[Array, "T H D"],
        k: Float[Array, "T K D"],
        v: Float[Array, "T K Dv"],
        form: AttentionForm,
    ) -> tuple[Float[Array, "T H Dv"], Self]:
        """See `AttentionContext.attend`; writes the new keys and values, then attends to all so far."""
        return self._attend(layer, partial(rotary_kv_write, q, k, v), form)

    def attend_fused(
        self, layer: int, qkv: Float[Array, "T H+2*K D"], num_heads: int, form: AttentionForm
    ) -> tuple[Float[Array, "T H D"], Self]:
        """See `AttentionContext.attend_fused`."""
        return self._attend(layer, partial(rotary_kv_write_fused, qkv, num_heads), form)

    def _attend(self, layer: int, write: Callable[..., tuple[Array, ...]], form: AttentionForm) -> tuple[Array, Self]:
        """`write` is the operator, given the new q, k and v."""
        if not form.causal:
            raise ValueError("a KV cache needs causal attention; encoders use PackedContext")
        # Padding is written nowhere: its slots lie past the capacity, each on its own, so that slots still ascend.
        real = (jnp.arange(self.new_tokens) < self.new_lengths[:, None]).reshape(-1)
        slots = jnp.where(real, self.positions, self.capacity + self.positions)
        q, keys, values = write(
            self.keys[layer],
            self.values[layer],
            rows=jnp.repeat(jnp.arange(self.rows, dtype=jnp.int32), self.new_tokens),
            slots=slots,
            positions=self.positions,
            rotary=form.rotary,
            lengths=jnp.repeat(self.lengths + self.new_lengths, self.new_tokens),
            ascending=True,
        )
        q = q.reshape(self.rows, self.new_tokens, *q.shape[1:])
        out: Any  # a pair only where logarithms are asked for
        if self.empty and self.new_tokens > 1:
            out = prefill_attention(q, keys, values, form)  # of the whole memory: a slice would be a copy of it
        elif self.new_tokens <= _FEW:
            out = decode_attention(q, keys, values, form, q_start=self.lengths)
        else:
            out = prefill_attention(q, keys, values, form, q_start=self.lengths)
        return out.reshape(-1, *out.shape[2:]), self.with_memory(layer, (keys, values))

    def partition(self) -> Self:
        """See `AttentionContext.partition`: rows over "data", heads over "tensor"."""
        rows, memory = PartitionSpec(DATA), PartitionSpec(DATA, TENSOR)
        return jax.tree.map(lambda leaf: rows if leaf.ndim == 1 else memory, self)

    def memory(self, layer: int) -> tuple[Float[Array, "B K L D"], Float[Array, "B K L Dv"]]:
        """See `AttentionContext.memory`."""
        return self.keys[layer], self.values[layer]

    def only(self, memory: tuple[Array, Array]) -> Self:
        """See `AttentionContext.only`."""
        return dataclasses.replace(self, keys=memory[:1], values=memory[1:])

    def with_memory(self, layer: int, memory: tuple[Array, Array]) -> Self:
        """See `AttentionContext.with_memory`."""
        return dataclasses.replace(
            self,
            keys=(*self.keys[:layer], memory[0], *self.keys[layer + 1 :]),
            values=(*self.values[:layer], memory[1], *self.values[layer + 1 :]),
        )


@jax.jit
def _less(lengths: Int[Array, " B"], tokens: Int[Array, " B"]) -> Int[Array, " B"]:
    return jnp.maximum(lengths - tokens, 0)


def _beside(lengths: Int[Array, " B"], new: Int[np.ndarray, " B"]) -> Int[Array | np.ndarray, " B"]:
    """On a mesh, where the lengths lie.

    So lies what a step returns; else the first step behind a prompt would be a program of its own to compile.
    """
    if not isinstance(lengths.sharding, NamedSharding):
        return new
    return jax.make_array_from_callback(new.shape, lengths.sharding, lambda rows: new[rows])
