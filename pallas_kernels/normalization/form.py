"""Which norm, apart from its arrays: what operators that fuse a norm take."""

import dataclasses

from jaxtyping import Array, Float

from .reference import layer_norm, rms_norm


@dataclasses.dataclass(frozen=True)
class NormForm:
    """The static part of a norm over the last axis. Hashable.

    Attributes:
        centred: LayerNorm, which subtracts the mean; otherwise RMSNorm.
        eps: added to the variance or the mean square before the root.
        weight_offset: added to the weight of an RMSNorm (Gemma stores it minus 1).

    Raises:
        ValueError: a LayerNorm with a weight offset, which no model has.
    """

    centred: bool
    eps: float
    weight_offset: float = 0.0

    def __post_init__(self) -> None:
        if self.centred and self.weight_offset != 0.0:
            raise ValueError(f"a LayerNorm has no weight offset, not {self.weight_offset}")

    def check(self, width: int, weight: Array | None, bias: Array | None) -> None:
        """Raises ValueError unless `weight` and `bias` are those of such a norm over `width` numbers."""
        if not self.centred and weight is None:
            raise ValueError("an RMSNorm needs a weight")
        if not self.centred and bias is not None:
            raise ValueError("an RMSNorm has no bias")
        for name, array in (("weight", weight), ("bias", bias)):
            if array is not None and array.shape != (width,):
                raise ValueError(f"the norm's {name} has shape {array.shape}, not ({width},)")


def normalise(
    x: Float[Array, "... E"], weight: Float[Array, " E"] | None, bias: Float[Array, " E"] | None, form: NormForm
) -> Float[Array, "... E"]:
    """The norm that `form` names: statistics in float32, result in the dtype of `x`.

    Args:
        weight: an RMSNorm needs it, a LayerNorm may go without.
        bias: of a LayerNorm, or `None`.

    Raises:
        ValueError: arrays that such a norm does not have, or of the wrong shape.
    """
    form.check(x.shape[-1], weight, bias)
    if form.centred:
        return layer_norm(x, weight, bias, form.eps)
    assert weight is not None  # checked above
    return rms_norm(x, weight, form.eps, weight_offset=form.weight_offset)
