"""A weight that is kept as int8 numbers and a scale for each row, and multiplied with as such."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from jdsi.layers import ArrayWeight, declaration_of, fused_product, parameter
from jdsi.pallas_kernels import QuantizedWeight, WeightFormat, quantize
from seams import LAYER, PlainModel, Toy, small_spec

FORMAT = WeightFormat("int8")


@dataclasses.dataclass(frozen=True)
class Int8:
    """The form."""

    def of(self, weight: ArrayWeight) -> "Int8Weight":
        return Int8Weight(weight)


class Int8Weight(nnx.Module):
    def __init__(self, weight: ArrayWeight) -> None:
        axes, quantized = declaration_of(weight).axes, quantize(weight[...], FORMAT)
        self.values = parameter(quantized.values, axes, own_dtype=True)
        self.scales = parameter(quantized.scales, (None, axes[0]), own_dtype=True)

    def product(self, x: Any, bias: Any = None, **around: Any) -> jnp.ndarray:
        weight = QuantizedWeight(self.values[...], self.scales[...], None, FORMAT)
        return fused_product(x, weight, bias, **around)


class Plain(PlainModel):
    def matrix(self, name: str) -> np.ndarray:
        assert name not in self.arrays
        return self.arrays[f"{name}.values"] * self.arrays[f"{name}.scales"].T


NAMES = ("attention.qkv", "attention.out", "feed_forward.up", "feed_forward.down")
FORMS = tuple((f"{name}.weight", Int8()) for name in NAMES)
TOY = Toy(small_spec(dataclasses.replace(LAYER, forms=FORMS), form=Int8()), Plain)
