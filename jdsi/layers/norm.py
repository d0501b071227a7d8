"""Normalisation layer."""

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jdsi.pallas_kernels import NormForm, norm

from .parameter import parameter


class Norm(nnx.Module):
    """RMSNorm or LayerNorm over the last axis, as `form` says, with or without weight and bias."""

    def __init__(
        self, width: int, form: NormForm, *, weight: bool = True, bias: bool = False, dtype: DTypeLike
    ) -> None:
        self.form = form
        self.weight = parameter(jnp.full(width, 1.0 - form.weight_offset, dtype)) if weight else None
        self.bias = parameter(jnp.zeros(width, dtype)) if bias else None

    @property
    def arrays(self) -> tuple[Float[Array, " E"] | None, Float[Array, " E"] | None]:
        """Weight and bias, `None` for what the norm does not have."""
        return (
            None if self.weight is None else self.weight[...],
            None if self.bias is None else self.bias[...],
        )

    def __call__(self, x: Float[Array, "... E"]) -> Float[Array, "... E"]:
        return norm(x.reshape(-1, x.shape[-1]), *self.arrays, self.form).reshape(x.shape)
