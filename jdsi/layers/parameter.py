"""What a layer says of a parameter where it makes it; everybody else looks it up."""

import dataclasses
from collections.abc import Sequence

from flax import nnx
from jaxtyping import Array

from jdsi.sharding import Division, Evenly


@dataclasses.dataclass(frozen=True)
class Axis:
    """What a dimension of a parameter means.

    Attributes:
        name: its logical axis, for which a rule may name a mesh axis, see `jdsi.sharding.AxisRules`.
        division: how its entries are divided among the ranks of that mesh axis; `None` where each rank has all.
    """

    name: str
    division: Division | None = None


WIDTH = Axis("width")
"""The features of the residual stream."""


def vocabulary_axis(size: int) -> Axis:
    """The tokens of a vocabulary."""
    return Axis("vocabulary", Evenly(size))


@dataclasses.dataclass(frozen=True)
class Declaration:
    """What a parameter is besides its shape and its type.

    Attributes:
        axes: one for each dimension; `None` for what nobody divides.
        quantizable: whether it is the matrix of a product that may be kept quantised on disk.
        own_dtype: whether its type is its own, whatever type the model runs in.
    """

    axes: tuple[Axis | None, ...]
    quantizable: bool = False
    own_dtype: bool = False


def parameter[Kind: nnx.Param](
    array: Array,
    axes: Sequence[Axis | None] = (),
    *,
    quantizable: bool = False,
    own_dtype: bool = False,
    kind: type[Kind] = nnx.Param,
) -> Kind:
    """A declared parameter; see `Declaration`, where no axes mean that no dimension is ever divided."""
    return kind(array, declaration=Declaration(tuple(axes) or (None,) * array.ndim, quantizable, own_dtype))


def declaration_of(param: nnx.Variable) -> Declaration:
    """What was declared of a parameter; of one that was made without a word, that nobody divides it."""
    return param.get_metadata().get("declaration") or Declaration((None,) * len(param.shape))
