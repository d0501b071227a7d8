"""Attention without a cache over packed sequences: encoders, training, scoring."""

import dataclasses
from typing import Any, Self

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from jdsi.pallas_kernels import (
    AttentionForm,
    RoundedAlibi,
    apply_rotary,
    attention,
    attention_weights,
    prefill_attention,
)
from jdsi.sharding import DATA, axis_size

from .cache import OneForAll


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PackedContext(OneForAll):
    """Tokens of several sequences on one axis; each attends within its own sequence.

    Attributes:
        positions: position of each token in its sequence; the tokens of a sequence stand one behind another, in order.
        segments: which sequence a token belongs to; negative marks padding, which nothing attends to.
        lengths: length of the sequence each token belongs to.
        rows: the packed axis consists of `rows` equal parts that no sequence crosses, so attention costs
            `rows * (T / rows)^2` instead of `T^2`.
    """

    positions: Int[Array, " T"]
    segments: Int[Array, " T"]
    lengths: Int[Array, " T"]
    rows: int = dataclasses.field(default=1, metadata={"static": True})

    @classmethod
    def from_lengths(cls, lengths: Int[Array, " B"], total: int) -> Self:
        """Sequences of the given lengths laid end to end on an axis of `total` tokens; the rest is padding."""
        stops = jnp.cumsum(jnp.asarray(lengths, jnp.int32))
        index = jnp.arange(total, dtype=jnp.int32)
        segments = jnp.searchsorted(stops, index, side="right").astype(jnp.int32)
        inside = segments < stops.shape[0]
        owner = jnp.where(inside, segments, 0)
        starts = stops - jnp.asarray(lengths, jnp.int32)
        return cls(
            positions=jnp.where(inside, index - starts[owner], 0),
            segments=jnp.where(inside, segments, -1),
            lengths=jnp.where(inside, jnp.asarray(lengths, jnp.int32)[owner], 1),
        )

    @classmethod
    def from_dense(cls, batch: int, length: int, lengths: Int[Array, " B"] | None = None) -> Self:
        """A dense batch `[B, S]`, right-padded where `lengths` is given, flattened row by row."""
        positions = jnp.tile(jnp.arange(length, dtype=jnp.int32), batch)
        owner = jnp.repeat(jnp.arange(batch, dtype=jnp.int32), length)
        per_row = jnp.full(batch, length, jnp.int32) if lengths is None else jnp.asarray(lengths, jnp.int32)
        if per_row.shape != (batch,):
            raise ValueError(f"lengths has shape {per_row.shape}; a batch of {batch} rows needs ({batch},)")
        per_token = per_row[owner]
        return cls(positions, jnp.where(positions < per_token, owner, -1), per_token, rows=batch)

    def _in_rows(self, x: Array) -> Array:
        rows, ranks = self.rows, axis_size(DATA)
        if rows % ranks:
            raise ValueError(f"{rows} rows cannot be divided among {ranks} ranks of the axis {DATA!r}")
        return x.reshape(rows // ranks, -1, *x.shape[1:])

    def _rows(self, q: Array, k: Array, v: Array, form: AttentionForm) -> tuple[Array, Array, Array]:
        """Rotated q, k and v of each row, as the operators take them."""
        if form.rotary is not None:
            q = apply_rotary(q, self.positions, self.lengths, form.rotary)
            k = apply_rotary(k, self.positions, self.lengths, form.rotary)
        # A hidden key has weight zero, but zero times an infinite or NaN value of padding would still be NaN.
        v = jnp.where((self.segments >= 0)[:, None, None], v, jnp.zeros((), v.dtype))
        return self._in_rows(q), self._in_rows(k).swapaxes(1, 2), self._in_rows(v).swapaxes(1, 2)

    def _masks(self) -> dict[str, Array]:
        segments, positions = self._in_rows(self.segments), self._in_rows(self.positions)
        visible = (segments[:, :, None] == segments[:, None, :]) & (segments[:, None, :] >= 0)
        return {"q_positions": positions, "k_positions": positions, "visible": visible}

    def attend(
        self,
        layer: int,
        q: Float[Array, "T H D"],
        k: Float[Array, "T K D"],
        v: Float[Array, "T K Dv"],
        form: AttentionForm,
    ) -> tuple[Float[Array, "T H Dv"], Self]:
        """See `AttentionContext.attend`; remembers nothing."""
        rows = self._rows(q, k, v, form)
        if isinstance(form.alibi, RoundedAlibi):  # depends on the position itself, not on distances
            out = attention(*rows, form, **self._masks(), aligned=True)
        else:
            segments = self._in_rows(self.segments)
            out: Any = prefill_attention(*rows, form, q_segments=segments, k_segments=segments)
        return out.reshape(q.shape[0], *out.shape[2:]), self

    def attend_fused(
        self, layer: int, qkv: Float[Array, "T H+2*K D"], num_heads: int, form: AttentionForm
    ) -> tuple[Float[Array, "T H D"], Self]:
        """See `AttentionContext.attend_fused`."""
        q, k, v = jnp.split(qkv, (num_heads, (num_heads + qkv.shape[1]) // 2), axis=1)
        return self.attend(layer, q, k, v, form)

    def commit(self) -> Self:
        """See `AttentionContext.commit`; there is nothing to remember."""
        return self

    def partition(self) -> Self:
        """See `AttentionContext.partition`: tokens over "data", which must divide `rows`."""
        return jax.tree.map(lambda _: PartitionSpec(DATA), self)

    def memory(self, layer: int) -> tuple:
        """See `AttentionContext.memory`."""
        return ()

    def only(self, memory: tuple) -> Self:
        """See `AttentionContext.only`."""
        return self

    def with_memory(self, layer: int, memory: tuple) -> Self:
        """See `AttentionContext.with_memory`."""
        return self


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RecordingContext(PackedContext):
    """A packed context that also keeps every layer's attention weights, for looking inside a model.

    Attributes:
        weights: per layer seen so far, `[rows, H, S, S]` float32.
    """

    weights: tuple[Float[Array, "rows H S S"], ...] = ()

    def attend(
        self,
        layer: int,
        q: Float[Array, "T H D"],
        k: Float[Array, "T K D"],
        v: Float[Array, "T K Dv"],
        form: AttentionForm,
    ) -> tuple[Float[Array, "T H Dv"], Self]:
        """See `AttentionContext.attend`; remembers the attention weights."""
        rows_q, rows_k, rows_v = self._rows(q, k, v, form)
        weights = attention_weights(rows_q, rows_k, form, **self._masks())
        out = jnp.einsum("bkgsl,bkld->bskgd", weights, rows_v.astype(jnp.float32)).astype(q.dtype)
        by_head = weights.reshape(weights.shape[0], -1, *weights.shape[3:])
        return out.reshape(*q.shape[:2], -1), dataclasses.replace(self, weights=(*self.weights, by_head))

    def memory(self, layer: int) -> tuple[Float[Array, "rows H S S"], ...]:
        """See `AttentionContext.memory`; layers come in order, so a layer that was not seen yet has none."""
        return self.weights[layer : layer + 1]

    def only(self, memory: tuple[Array, ...]) -> Self:
        """See `AttentionContext.only`."""
        return dataclasses.replace(self, weights=memory)

    def with_memory(self, layer: int, memory: tuple[Array, ...]) -> Self:
        """See `AttentionContext.with_memory`."""
        return dataclasses.replace(self, weights=(*self.weights[:layer], *memory, *self.weights[layer + 1 :]))
