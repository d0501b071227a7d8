"""The feed-forward network, as data and as a module."""

import dataclasses
from collections.abc import Iterator
from functools import partial
from typing import ClassVar, Self

import jax
from flax import nnx
from jax.typing import DTypeLike

from jdsi.kv_cache import AttentionContext
from jdsi.layers import WIDTH, Axis, Linear, Norm, Product
from jdsi.pallas_kernels.activations import known_activation
from jdsi.sharding import Evenly

from .checks import check_sizes
from .sublayer import Hidden, SublayerSpec
from .work import Operation, Work


@dataclasses.dataclass(frozen=True)
class MlpSpec(SublayerSpec):
    """Feed-forward network: `down(act(up(x)))`, or `down(act(gate(x)) * up(x))` when gated.

    When gated, our `up` weight holds the rows of gate, then those of up.
    """

    name: ClassVar[str] = "feed_forward"

    width: int
    activation: str
    gated: bool = False
    bias: bool = False

    def __post_init__(self) -> None:
        known_activation(self.activation)
        check_sizes(width=self.width)

    @property
    def up_rows(self) -> int:
        """Rows of the projection up."""
        return self.width * (2 if self.gated else 1)

    def build(self, width: int, layer: int, *, dtype: DTypeLike, rngs: nnx.Rngs) -> "Mlp":
        """See `SublayerSpec.build`."""
        return Mlp(self, width, dtype=dtype, rngs=rngs)

    def share(self, ranks: int) -> Self:
        """See `SublayerSpec.share`."""
        return dataclasses.replace(self, width=Evenly(self.width).among(ranks, 0).size)

    def work(self, width: int, work: Work) -> Iterator[Operation]:
        """See `SublayerSpec.work`."""
        make = partial(work.product, bias=self.bias, tokens=work.load.tokens)
        yield make("up", self.up_rows, width, gated=self.gated)
        yield make("down", width, self.width, residual=work.residual)

    def live(self, width: int) -> int:
        """See `SublayerSpec.live`."""
        return self.up_rows + self.width


class Mlp(nnx.Module):
    """The feed-forward network of `MlpSpec`."""

    def __init__(self, spec: MlpSpec, width: int, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.spec = spec
        up, down = (Axis("feed_forward", Evenly(spec.width, n)) for n in (spec.up_rows // spec.width, 1))
        make = partial(Linear, quantizable=True, bias=spec.bias, dtype=dtype, rngs=rngs)
        self.up = make(width, spec.up_rows, axes=(up, WIDTH))
        self.down = make(spec.width, width, axes=(WIDTH, down))

    def __call__(
        self, x: Hidden, context: AttentionContext, *, norm: Norm | None = None
    ) -> tuple[Product, AttentionContext]:
        """See `Sublayer`."""
        up = self.up.gated if self.spec.gated else self.up
        with jax.named_scope("up"):
            hidden = up(x, norm=norm, activation=self.spec.activation)
        return Product(self.down, hidden, f"{self.spec.name}/down"), context
