"""What a linear operator computes, apart from its arrays."""

import dataclasses

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from ..activations import known_activation
from ..normalization import NormForm


@dataclasses.dataclass(frozen=True)
class LinearForm:
    """The static part: `residual + act(norm(x) W^T + b)`, or with gate `act(gate) * up`. Hashable.

    Attributes:
        activation: one of `ACTIVATIONS`, `None` for none.
        gated: the weight holds two blocks of rows, gate then up; the result is `act(gate) * up`.
        norm: applied to `x` first.
        out_dtype: of the result, by default that of `x`.
    """

    activation: str | None = None
    gated: bool = False
    norm: NormForm | None = None
    out_dtype: np.dtype | None = None

    def __post_init__(self) -> None:
        if self.activation is not None:
            known_activation(self.activation)

    @property
    def operands(self) -> int:
        """Blocks of weight rows that one output needs."""
        return 2 if self.gated else 1

    def result_dtype(self, x_dtype: DTypeLike) -> np.dtype:
        """The dtype of the result for `x` of `x_dtype`."""
        return np.dtype(x_dtype) if self.out_dtype is None else self.out_dtype


PLAIN = LinearForm()


def dtype_or_none(dtype: DTypeLike | None) -> np.dtype | None:
    """A hashable dtype."""
    return None if dtype is None else jnp.dtype(dtype)
