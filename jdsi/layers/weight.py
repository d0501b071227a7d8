"""The form of a weight matrix: what a product with it is, whoever asks."""

import abc
from typing import Any, Protocol

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jdsi.pallas_kernels import ACTIVATIONS, gated_linear, linear

from .norm import Norm


class Weight(Protocol):
    """A matrix `[out, in]` in some form, as checkpoints lay it out."""

    def product(
        self,
        x: Float[Array, "T in"],
        bias: Float[Array, " out"] | None = None,
        *,
        norm: Norm | None = None,
        activation: str | None = None,
        gated: bool = False,
        residual: Float[Array, "T out"] | None = None,
        out_dtype: DTypeLike | None = None,
    ) -> Float[Array, "T out"]:
        """`residual + activation(norm(x) W^T + bias)`, accumulated in float32; what is `None` is left out.

        Where it is `gated`, `activation(gate) * up` of the halves of `norm(x) W^T + bias`, without a residual.
        """
        ...


class ArrayWeight(nnx.Param):
    """See `Weight`: the matrix itself, all of whose product is one operator."""

    def product(
        self,
        x: Float[Array, "T in"],
        bias: Float[Array, " out"] | None = None,
        *,
        norm: Norm | None = None,
        activation: str | None = None,
        gated: bool = False,
        residual: Float[Array, "T out"] | None = None,
        out_dtype: DTypeLike | None = None,
    ) -> Float[Array, "T out"]:
        """See `Weight.product`."""
        return fused_product(
            x,
            self[...],
            bias,
            norm=norm,
            activation=activation,
            gated=gated,
            residual=residual,
            out_dtype=out_dtype,
        )


def fused_product(
    x: Float[Array, "T in"],
    weight: Any,
    bias: Float[Array, " out"] | None = None,
    *,
    norm: Norm | None = None,
    activation: str | None = None,
    gated: bool = False,
    residual: Float[Array, "T out"] | None = None,
    out_dtype: DTypeLike | None = None,
) -> Float[Array, "T out"]:
    """`Weight.product` as one operator, with an array or a `QuantizedWeight`."""
    around: dict[str, Any] = {"activation": activation, "out_dtype": out_dtype}
    if norm is not None:
        around["norm"] = norm.form
        around["norm_weight"], around["norm_bias"] = norm.arrays
    if gated:
        assert residual is None
        return gated_linear(x, weight, bias, **around)
    return linear(x, weight, bias, residual=residual, **around)


class UnfusedWeight(nnx.Module):
    """See `Weight`: of a form that no operator knows the product of, so that around `times` nothing is fused."""

    @abc.abstractmethod
    def times(self, x: Float[Array, "T in"]) -> Float[Array, "T out"]:
        """`x W^T`, in float32."""

    def product(
        self,
        x: Float[Array, "T in"],
        bias: Float[Array, " out"] | None = None,
        *,
        norm: Norm | None = None,
        activation: str | None = None,
        gated: bool = False,
        residual: Float[Array, "T out"] | None = None,
        out_dtype: DTypeLike | None = None,
    ) -> Float[Array, "T out"]:
        """See `Weight.product`."""
        out_dtype = x.dtype if out_dtype is None else out_dtype
        y = self.times(x if norm is None else norm(x))
        y = y if bias is None else y + bias.astype(y.dtype)
        gate, up = jnp.split(y, 2, axis=1) if gated else (y, None)
        gate = gate if activation is None else ACTIVATIONS[activation](gate)
        y = (gate if up is None else gate * up).astype(out_dtype)
        return y if residual is None else residual + y


class WeightForm(Protocol):
    """A form as data: a frozen dataclass, which a spec names for a weight."""

    def of(self, weight: ArrayWeight) -> nnx.Module:
        """The `Weight` in that form of the matrix that `weight` holds, or where it holds none describes.

        Its parameters are declared anew: `declaration_of(weight)` says what the matrix's rows and columns are.
        """
        ...
