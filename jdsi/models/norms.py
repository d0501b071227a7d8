"""Norms as data, and the layers they describe."""

import dataclasses

from jax.typing import DTypeLike

from jdsi.layers import Norm
from jdsi.pallas_kernels import NormForm


@dataclasses.dataclass(frozen=True)
class RmsNormSpec:
    """RMSNorm; the effective weight is `weight + weight_offset`."""

    eps: float
    weight_offset: float = 0.0


@dataclasses.dataclass(frozen=True)
class LayerNormSpec:
    """LayerNorm with or without weight and bias."""

    eps: float
    bias: bool = True
    weight: bool = True


NormSpec = RmsNormSpec | LayerNormSpec


def make_norm(spec: NormSpec, width: int, dtype: DTypeLike) -> Norm:
    """The norm layer that `spec` describes."""
    if isinstance(spec, RmsNormSpec):
        return Norm(width, NormForm(centred=False, eps=spec.eps, weight_offset=spec.weight_offset), dtype=dtype)
    return Norm(width, NormForm(centred=True, eps=spec.eps), weight=spec.weight, bias=spec.bias, dtype=dtype)
