"""A low-rank delta on weights (LoRA, Hu et al. 2021), kept beside them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from jdsi.layers import ArrayWeight, UnfusedWeight, declaration_of, parameter
from seams import LAYER, PlainModel, Toy, small_spec


@dataclasses.dataclass(frozen=True)
class LowRank:
    """The form."""

    rank: int

    def of(self, weight: ArrayWeight) -> "AdaptedWeight":
        return AdaptedWeight(weight, self.rank)


class AdaptedWeight(UnfusedWeight):
    def __init__(self, weight: ArrayWeight, rank: int) -> None:
        (rows, columns), (out, inputs) = declaration_of(weight).axes, weight.shape
        down, up = jax.random.split(jax.random.key(out * inputs))
        self.base = weight
        self.down = parameter(0.02 * jax.random.normal(down, (rank, inputs), weight.dtype), (None, columns))
        self.up = parameter(0.02 * jax.random.normal(up, (out, rank), weight.dtype), (rows, None))

    def times(self, x: jax.Array) -> jax.Array:
        delta = jnp.dot(x, self.down[...].T) @ self.up[...].T
        return self.base.product(x, out_dtype=jnp.float32) + delta.astype(jnp.float32)


class Plain(PlainModel):
    def matrix(self, name: str) -> np.ndarray:
        if name in self.arrays:
            return self.arrays[name]
        return self.arrays[f"{name}.base"] + self.arrays[f"{name}.up"] @ self.arrays[f"{name}.down"]


FORMS = tuple((f"{name}.weight", LowRank(3)) for name in ("attention.qkv", "attention.out", "feed_forward.up"))
TOY = Toy(small_spec(dataclasses.replace(LAYER, forms=FORMS)), Plain)
