"""One layer: attention, feed-forward, and the four ways families wire them to the residual stream."""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jdsi.kv_cache import AttentionContext
from jdsi.layers import WIDTH, Axis, Linear, Norm, row_parallel, whole
from jdsi.pallas_kernels import AttentionForm, NormForm
from jdsi.sharding import ByHeads, Evenly

from .spec import (
    AttentionSpec,
    LayerSpec,
    MlpSpec,
    NormSpec,
    ParallelResidual,
    PostNorm,
    PreNorm,
    RmsNormSpec,
    SandwichNorm,
)

Hidden = Float[Array, "T E"]
Heads = Float[Array, "T H*D"]


def make_norm(spec: NormSpec, width: int, dtype: DTypeLike) -> Norm:
    """The norm layer that `spec` describes."""
    if isinstance(spec, RmsNormSpec):
        return Norm(width, NormForm(centred=False, eps=spec.eps, weight_offset=spec.weight_offset), dtype=dtype)
    return Norm(width, NormForm(centred=True, eps=spec.eps), weight=spec.weight, bias=spec.bias, dtype=dtype)


class Attention(nnx.Module):
    """Fused q/k/v projection, attention through the context, output projection."""

    def __init__(self, spec: AttentionSpec, width: int, layer: int, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.spec, self.layer = spec, layer
        heads = ByHeads(spec.num_heads, spec.num_kv_heads, spec.head_dim)
        fused, out = Axis("heads", dataclasses.replace(heads, fused=True)), Axis("heads", heads)
        make = partial(Linear, quantizable=True, dtype=dtype, rngs=rngs)
        self.qkv = make(width, sum(spec.qkv_rows), axes=(fused, WIDTH), bias=spec.qkv_bias)
        self.out = make(spec.qkv_rows[0], width, axes=(WIDTH, out), bias=spec.out_bias)
        self.q_norm = make_norm(spec.qk_norm, spec.head_dim, dtype) if spec.qk_norm else None
        self.k_norm = make_norm(spec.qk_norm, spec.head_dim, dtype) if spec.qk_norm else None
        self.form = AttentionForm(
            scale=spec.scale,
            causal=spec.causal,
            window=spec.window,
            softcap=spec.softcap,
            alibi=spec.alibi,
            rotary=spec.rotary,
        )

    def __call__(
        self, x: Hidden, context: AttentionContext, *, norm: Norm | None = None
    ) -> tuple[Heads, AttentionContext]:
        """What the heads give for `norm(x)`, the input of `out`, and the context that remembers the tokens."""
        tokens, heads, kv_heads = x.shape[0], self.spec.num_heads, self.spec.num_kv_heads
        qkv = self.qkv(x, norm=norm).reshape(tokens, -1, self.spec.head_dim)
        if self.q_norm is None or self.k_norm is None:
            out, context = context.attend_fused(self.layer, qkv, heads, self.form)
        else:
            q, k, v = jnp.split(qkv, (heads, heads + kv_heads), axis=1)
            out, context = context.attend(self.layer, self.q_norm(q), self.k_norm(k), v, self.form)
        return out.reshape(tokens, -1), context


class Mlp(nnx.Module):
    """The feed-forward network of `MlpSpec`."""

    def __init__(self, spec: MlpSpec, width: int, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.spec = spec
        stretches = 2 if spec.gated else 1
        up, down = (Axis("feed_forward", Evenly(spec.width, n)) for n in (stretches, 1))
        make = partial(Linear, quantizable=True, bias=spec.bias, dtype=dtype, rngs=rngs)
        self.up = make(width, spec.width * stretches, axes=(up, WIDTH))
        self.down = make(spec.width, width, axes=(WIDTH, down))

    def __call__(self, x: Hidden, *, norm: Norm | None = None) -> Float[Array, "T F"]:
        """The hidden units for `norm(x)`, the input of `down`."""
        up = self.up.gated if self.spec.gated else self.up
        return up(x, norm=norm, activation=self.spec.activation)


class _Block(nnx.Module):
    def __init__(self, spec: LayerSpec, width: int, layer: int, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.attention = Attention(spec.attention, width, layer, dtype=dtype, rngs=rngs)
        self.feed_forward = Mlp(spec.feed_forward, width, dtype=dtype, rngs=rngs)
        self.attention_norm = make_norm(spec.residual.norm, width, dtype)

    # Both take the residual stream, of which each rank may hold its own part of the tokens, and give a pair for
    # `row_parallel`.

    def _attend(
        self, x: Hidden, norm: Norm | None, context: AttentionContext
    ) -> tuple[tuple[Linear, Heads], AttentionContext]:
        x, norm = whole(x, norm, context.positions.shape[0])
        heads, context = self.attention(x, context, norm=norm)
        return (self.attention.out, heads), context

    def _feed_forward(self, x: Hidden, norm: Norm | None, context: AttentionContext) -> tuple[Linear, Array]:
        x, norm = whole(x, norm, context.positions.shape[0])
        return self.feed_forward.down, self.feed_forward(x, norm=norm)


class PreNormBlock(_Block):
    """See `PreNorm`."""

    def __init__(self, spec: LayerSpec, width: int, layer: int, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        super().__init__(spec, width, layer, dtype=dtype, rngs=rngs)
        self.from_norm = isinstance(spec.residual, PreNorm) and spec.residual.from_norm
        self.feed_forward_norm = make_norm(spec.residual.norm, width, dtype)

    def __call__(self, x: Hidden, context: AttentionContext) -> tuple[Hidden, AttentionContext]:
        rows = x.shape[0]
        norms: tuple[Norm | None, Norm | None] = (self.attention_norm, self.feed_forward_norm)
        if self.from_norm:
            x, norms = self.attention_norm(x), (None, None)
        attended, context = self._attend(x, norms[0], context)
        x = row_parallel([attended], rows, residual=x)
        if self.from_norm:
            x = self.feed_forward_norm(x)
        return row_parallel([self._feed_forward(x, norms[1], context)], rows, residual=x), context


class PostNormBlock(_Block):
    """See `PostNorm`."""

    def __init__(self, spec: LayerSpec, width: int, layer: int, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        super().__init__(spec, width, layer, dtype=dtype, rngs=rngs)
        self.feed_forward_norm = make_norm(spec.residual.norm, width, dtype)

    def __call__(self, x: Hidden, context: AttentionContext) -> tuple[Hidden, AttentionContext]:
        rows = x.shape[0]
        attended, context = self._attend(x, None, context)
        x = self.attention_norm(row_parallel([attended], rows, residual=x))
        return self.feed_forward_norm(row_parallel([self._feed_forward(x, None, context)], rows, residual=x)), context


class SandwichNormBlock(_Block):
    """See `SandwichNorm`."""

    def __init__(self, spec: LayerSpec, width: int, layer: int, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        super().__init__(spec, width, layer, dtype=dtype, rngs=rngs)
        self.attention_out_norm = make_norm(spec.residual.norm, width, dtype)
        self.feed_forward_norm = make_norm(spec.residual.norm, width, dtype)
        self.feed_forward_out_norm = make_norm(spec.residual.norm, width, dtype)

    def __call__(self, x: Hidden, context: AttentionContext) -> tuple[Hidden, AttentionContext]:
        rows = x.shape[0]
        attended, context = self._attend(x, self.attention_norm, context)
        x = x + self.attention_out_norm(row_parallel([attended], rows))
        fed = row_parallel([self._feed_forward(x, self.feed_forward_norm, context)], rows)
        return x + self.feed_forward_out_norm(fed), context


class ParallelResidualBlock(_Block):
    """See `ParallelResidual`."""

    def __init__(self, spec: LayerSpec, width: int, layer: int, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        super().__init__(spec, width, layer, dtype=dtype, rngs=rngs)
        shared = isinstance(spec.residual, ParallelResidual) and spec.residual.shared_norm
        self.feed_forward_norm = None if shared else make_norm(spec.residual.norm, width, dtype)

    def __call__(self, x: Hidden, context: AttentionContext) -> tuple[Hidden, AttentionContext]:
        tokens = context.positions.shape[0]
        # Gathered once for both: with a norm of their own each, before the norms.
        if self.feed_forward_norm is None:
            h, norm = whole(x, self.attention_norm, tokens)
            attention_norm = feed_forward_norm = norm
        else:
            h, _ = whole(x, None, tokens)
            attention_norm, feed_forward_norm = self.attention_norm, self.feed_forward_norm
        attended, context = self._attend(h, attention_norm, context)
        fed = self._feed_forward(h, feed_forward_norm, context)
        return row_parallel([attended, fed], x.shape[0], residual=x), context


BLOCKS: Mapping[type, Callable[..., _Block]] = MappingProxyType(
    {
        PreNorm: PreNormBlock,
        PostNorm: PostNormBlock,
        SandwichNorm: SandwichNormBlock,
        ParallelResidual: ParallelResidualBlock,
    }
)
