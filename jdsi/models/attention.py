"""Multi-head attention, as data and as a module."""

import dataclasses
from collections.abc import Iterator
from functools import partial
from typing import ClassVar, Self

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from jdsi.kv_cache import AttentionContext
from jdsi.layers import WIDTH, Axis, Linear, Norm, Product
from jdsi.pallas_kernels import Alibi, AttentionForm, Rotary
from jdsi.sharding import TENSOR, ByHeads, split_heads

from .checks import check_sizes
from .norms import RmsNormSpec, make_norm
from .sublayer import Hidden, SublayerSpec
from .work import Operation, Work


@dataclasses.dataclass(frozen=True)
class AttentionSpec(SublayerSpec):
    """Multi-head attention with grouped key/value heads.

    Attributes:
        num_heads, num_kv_heads, head_dim: H, K, D.
        scale: multiplies the scores, usually `head_dim ** -0.5`.
        causal, window, softcap, alibi, rotary: see `jdsi.pallas_kernels.AttentionForm`.
        qkv_bias, out_bias: whether the projections have a bias.
        qk_norm: norm of every query and key head (over D) before the rotary embedding.
    """

    name: ClassVar[str] = "attention"

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    causal: bool = True
    window: int | None = None
    softcap: float | None = None
    alibi: Alibi | None = None
    rotary: Rotary | None = None
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: RmsNormSpec | None = None

    def __post_init__(self) -> None:
        check_sizes(num_heads=self.num_heads, num_kv_heads=self.num_kv_heads, head_dim=self.head_dim)
        if self.window is not None:
            check_sizes(sliding_window=self.window)

    @property
    def qkv_rows(self) -> tuple[int, int, int]:
        """Rows of q, k and v inside the fused projection."""
        kv = self.num_kv_heads * self.head_dim
        return self.num_heads * self.head_dim, kv, kv

    @property
    def kv_heads(self) -> tuple[int, int, int]:
        """See `SublayerSpec.kv_heads`."""
        return self.num_kv_heads, self.head_dim, self.head_dim

    @property
    def most_ranks(self) -> int:
        """See `SublayerSpec.most_ranks`."""
        return self.num_heads

    def build(self, width: int, layer: int, *, dtype: DTypeLike, rngs: nnx.Rngs) -> "Attention":
        """See `SublayerSpec.build`."""
        return Attention(self, width, layer, dtype=dtype, rngs=rngs)

    def share(self, ranks: int) -> Self:
        """See `SublayerSpec.share`."""
        heads, alibi = split_heads(self.num_heads, self.num_kv_heads, ranks), self.alibi
        if alibi is not None:
            shares = [alibi.slopes[start:stop] for start, stop in heads.heads]
            padded = tuple(slope for share in shares for slope in (*share, *(0.0,) * (heads.num_heads - len(share))))
            alibi = dataclasses.replace(alibi, slopes=padded, split=(TENSOR, ranks))
        return dataclasses.replace(self, num_heads=heads.num_heads, num_kv_heads=heads.num_kv_heads, alibi=alibi)

    def work(self, width: int, work: Work) -> Iterator[Operation]:
        """See `SublayerSpec.work`."""
        load, (q, k, v) = work.load, self.qkv_rows
        tokens, seen = load.tokens, {"causal": self.causal, "window": self.window}
        yield work.product("qkv", q + k + v, width, bias=self.qkv_bias, tokens=tokens)
        if self.qk_norm is not None:
            yield work.elementwise("qk_norm", 2 * tokens * (q + k))
        written = tokens * (k + v) if self.causal else 0
        yield Operation(
            "attention",
            flops=4 * load.pairs(**seen) * q,
            kv_bytes=(written + load.slots(**seen) * (k + v)) * work.item,
            activation_bytes=tokens * (q + k + v + q) * work.item,
            kernels=2,
        )
        yield work.product("out", width, q, bias=self.out_bias, tokens=tokens, residual=work.residual)

    def live(self, width: int) -> int:
        """See `SublayerSpec.live`."""
        return sum(self.qkv_rows) + self.qkv_rows[0]


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
    ) -> tuple[Product, AttentionContext]:
        """See `Sublayer`."""
        tokens, heads, kv_heads = x.shape[0], self.spec.num_heads, self.spec.num_kv_heads
        with jax.named_scope("qkv"):
            qkv = self.qkv(x, norm=norm).reshape(tokens, -1, self.spec.head_dim)
        with jax.named_scope("attend"):
            if self.q_norm is None or self.k_norm is None:
                out, context = context.attend_fused(self.layer, qkv, heads, self.form)
            else:
                q, k, v = jnp.split(qkv, (heads, heads + kv_heads), axis=1)
                out, context = context.attend(self.layer, self.q_norm(q), self.k_norm(k), v, self.form)
        return Product(self.out, out.reshape(tokens, -1), f"{self.spec.name}/out"), context
