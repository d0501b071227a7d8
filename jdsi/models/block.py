"""One layer: attention, feed-forward, and the four ways families wire them to the residual stream."""

from collections.abc import Callable, Mapping
from types import MappingProxyType

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jdsi.kv_cache import AttentionContext
from jdsi.layers import Linear, Norm
from jdsi.pallas_kernels import AttentionForm, NormForm

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


def make_norm(spec: NormSpec, width: int, dtype: DTypeLike) -> Norm:
    """The norm layer that `spec` describes."""
    if isinstance(spec, RmsNormSpec):
        return Norm(width, NormForm(centred=False, eps=spec.eps, weight_offset=spec.weight_offset), dtype=dtype)
    return Norm(width, NormForm(centred=True, eps=spec.eps), weight=spec.weight, bias=spec.bias, dtype=dtype)


class Attention(nnx.Module):
    """Fused q/k/v projection, attention through the context, output projection."""

    def __init__(self, spec: AttentionSpec, width: int, layer: int, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.spec, self.layer = spec, layer
        self.qkv = Linear(width, sum(spec.qkv_rows), bias=spec.qkv_bias, dtype=dtype, rngs=rngs)
        self.out = Linear(spec.qkv_rows[0], width, bias=spec.out_bias, dtype=dtype, rngs=rngs)
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
        self, x: Hidden, context: AttentionContext, *, norm: Norm | None = None, residual: Hidden | None = None
    ) -> tuple[Hidden, AttentionContext]:
        """`residual + attention(norm(x))`, and the context that remembers the tokens."""
        tokens, heads, kv_heads = x.shape[0], self.spec.num_heads, self.spec.num_kv_heads
        qkv = self.qkv(x, norm=norm).reshape(tokens, -1, self.spec.head_dim)
        if self.q_norm is None or self.k_norm is None:
            out, context = context.attend_fused(self.layer, qkv, heads, self.form)
        else:
            q, k, v = jnp.split(qkv, (heads, heads + kv_heads), axis=1)
            out, context = context.attend(self.layer, self.q_norm(q), self.k_norm(k), v, self.form)
        return self.out(out.reshape(tokens, -1), residual=residual), context


class Mlp(nnx.Module):
    """The feed-forward network of `MlpSpec`."""

    def __init__(self, spec: MlpSpec, width: int, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.spec = spec
        self.up = Linear(width, spec.width * (2 if spec.gated else 1), bias=spec.bias, dtype=dtype, rngs=rngs)
        self.down = Linear(spec.width, width, bias=spec.bias, dtype=dtype, rngs=rngs)

    def __call__(self, x: Hidden, *, norm: Norm | None = None, residual: Hidden | None = None) -> Hidden:
        """`residual + feed_forward(norm(x))`."""
        up = self.up.gated if self.spec.gated else self.up
        return self.down(up(x, norm=norm, activation=self.spec.activation), residual=residual)


class _Block(nnx.Module):
    def __init__(self, spec: LayerSpec, width: int, layer: int, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.attention = Attention(spec.attention, width, layer, dtype=dtype, rngs=rngs)
        self.feed_forward = Mlp(spec.feed_forward, width, dtype=dtype, rngs=rngs)
        self.attention_norm = make_norm(spec.residual.norm, width, dtype)


class PreNormBlock(_Block):
    """See `PreNorm`."""

    def __init__(self, spec: LayerSpec, width: int, layer: int, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        super().__init__(spec, width, layer, dtype=dtype, rngs=rngs)
        self.from_norm = isinstance(spec.residual, PreNorm) and spec.residual.from_norm
        self.feed_forward_norm = make_norm(spec.residual.norm, width, dtype)

    def __call__(self, x: Hidden, context: AttentionContext) -> tuple[Hidden, AttentionContext]:
        if self.from_norm:
            h = self.attention_norm(x)
            x, context = self.attention(h, context, residual=h)
            h = self.feed_forward_norm(x)
            return self.feed_forward(h, residual=h), context
        x, context = self.attention(x, context, norm=self.attention_norm, residual=x)
        return self.feed_forward(x, norm=self.feed_forward_norm, residual=x), context


class PostNormBlock(_Block):
    """See `PostNorm`."""

    def __init__(self, spec: LayerSpec, width: int, layer: int, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        super().__init__(spec, width, layer, dtype=dtype, rngs=rngs)
        self.feed_forward_norm = make_norm(spec.residual.norm, width, dtype)

    def __call__(self, x: Hidden, context: AttentionContext) -> tuple[Hidden, AttentionContext]:
        x, context = self.attention(x, context, residual=x)
        x = self.attention_norm(x)
        return self.feed_forward_norm(self.feed_forward(x, residual=x)), context


class SandwichNormBlock(_Block):
    """See `SandwichNorm`."""

    def __init__(self, spec: LayerSpec, width: int, layer: int, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        super().__init__(spec, width, layer, dtype=dtype, rngs=rngs)
        self.attention_out_norm = make_norm(spec.residual.norm, width, dtype)
        self.feed_forward_norm = make_norm(spec.residual.norm, width, dtype)
        self.feed_forward_out_norm = make_norm(spec.residual.norm, width, dtype)

    def __call__(self, x: Hidden, context: AttentionContext) -> tuple[Hidden, AttentionContext]:
        out, context = self.attention(x, context, norm=self.attention_norm)
        x = x + self.attention_out_norm(out)
        return x + self.feed_forward_out_norm(self.feed_forward(x, norm=self.feed_forward_norm)), context


class ParallelResidualBlock(_Block):
    """See `ParallelResidual`."""

    def __init__(self, spec: LayerSpec, width: int, layer: int, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        super().__init__(spec, width, layer, dtype=dtype, rngs=rngs)
        shared = isinstance(spec.residual, ParallelResidual) and spec.residual.shared_norm
        self.feed_forward_norm = None if shared else make_norm(spec.residual.norm, width, dtype)

    def __call__(self, x: Hidden, context: AttentionContext) -> tuple[Hidden, AttentionContext]:
        norm = self.attention_norm if self.feed_forward_norm is None else self.feed_forward_norm
        attended, context = self.attention(x, context, norm=self.attention_norm, residual=x)
        return self.feed_forward(x, norm=norm, residual=attended), context


BLOCKS: Mapping[type, Callable[..., _Block]] = MappingProxyType(
    {
        PreNorm: PreNormBlock,
        PostNorm: PostNormBlock,
        SandwichNorm: SandwichNormBlock,
        ParallelResidual: ParallelResidualBlock,
    }
)
