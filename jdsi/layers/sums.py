"""What a sublayer adds to the residual stream, and how shares of it on several ranks become the sum."""

import dataclasses
from collections.abc import Sequence
from typing import Protocol

import jax
from jaxtyping import Array, Float

from jdsi.sharding import TENSOR, all_gather, all_reduce, is_split, reduce_scatter

from .linear import Linear
from .norm import Norm


class Sum(Protocol):
    """A sum that is still to be added to something, so that the addition can be part of what computes it.

    Inside `jax.shard_map` it is a rank's share, without what every rank would add anew: the bias.
    """

    @property
    def bias(self) -> Float[Array, " out"] | None:
        """What is added once, however many ranks there are."""
        ...

    def added_to(self, total: Float[Array, "T out"] | None, *, biased: bool) -> Float[Array, "T out"]:
        """`total` and this, of all tokens; with the bias or without."""
        ...


@dataclasses.dataclass(frozen=True)
class Product:
    """See `Sum`: `x W^T + b`, whose addition is fused; `scope` names it in programs."""

    layer: Linear
    x: Float[Array, "T in"]
    scope: str

    @property
    def bias(self) -> Float[Array, " out"] | None:
        """See `Sum.bias`."""
        return None if self.layer.bias is None else self.layer.bias[...]

    def added_to(self, total: Float[Array, "T out"] | None, *, biased: bool) -> Float[Array, "T out"]:
        """See `Sum.added_to`."""
        with jax.named_scope(self.scope):
            return self.layer.weight.product(self.x, self.bias if biased else None, residual=total)


@dataclasses.dataclass(frozen=True)
class Combined:
    """See `Sum`: an array that is there, of something that no single product gives."""

    array: Float[Array, "T out"]
    bias: Float[Array, " out"] | None = None

    def added_to(self, total: Float[Array, "T out"] | None, *, biased: bool) -> Float[Array, "T out"]:
        """See `Sum.added_to`."""
        own = self.array + self.bias if biased and self.bias is not None else self.array
        return own if total is None else total + own


def row_parallel(
    sums: Sequence[Sum], rows: int, residual: Float[Array, "rows out"] | None = None
) -> Float[Array, "rows out"]:
    """`residual` and the sums, each rank's share of which lies on it.

    One all-reduce for all, or one reduce-scatter where `rows`, those of the residual stream, are a rank's own part of
    the tokens. Where the axis "tensor" is not bound, residual and biases are added inside the products.
    """
    whole_here = not is_split(TENSOR)
    total = residual if whole_here else None
    for one in sums:
        total = one.added_to(total, biased=whole_here)
    assert total is not None
    if whole_here:
        return total
    out = all_reduce(total, TENSOR) if total.shape[0] == rows else reduce_scatter(total, TENSOR)
    for one in sums:
        if one.bias is not None:
            out = out + one.bias
    return out if residual is None else residual + out


def whole(x: Float[Array, "rows E"], norm: Norm | None, tokens: int) -> tuple[Float[Array, "T E"], Norm | None]:
    """All tokens of the residual stream, and the norm that is still to be applied to them.

    Where each rank holds its own part of the tokens, the norm is applied to that part and the parts are gathered.
    """
    if x.shape[0] == tokens:
        return x, norm
    return all_gather(x if norm is None else norm(x), TENSOR), None
