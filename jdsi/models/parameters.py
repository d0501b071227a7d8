"""What a model's parameters are, by the names that the whole model gives them, and a model without its arrays."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array

from jdsi.layers import Axis, declaration_of
from jdsi.sharding import MESH_AXES, TENSOR, LogicalAxes, Split

from .part import Part


def layer_group(index: int) -> str:
    """The group of a layer's parameters."""
    return f"layers.{index}"


@dataclasses.dataclass(frozen=True)
class ParameterInfo:
    """All that is known of a parameter without its values; said once, by the layer that makes it.

    Attributes:
        shape: its own.
        dtype: its own; `None` where it has the one that the model runs in.
        group: what is stored, streamed and planned together: "embedding", "layers.0", ..., "norm", "head".
        layer: index of the layer, `None` outside of the layers.
        inner: its name in the group, the same in all layers of a kind; outside of the layers the whole name.
        axes: what its dimensions mean.
        quantizable: see `jdsi.layers.parameter.Declaration`.
    """

    shape: tuple[int, ...]
    dtype: np.dtype | None
    group: str
    layer: int | None
    inner: str
    axes: tuple[Axis | None, ...]
    quantizable: bool

    @property
    def logical_axes(self) -> LogicalAxes:
        """What each dimension means, for `AxisRules`."""
        return tuple(None if axis is None else axis.name for axis in self.axes)

    def dtype_in(self, dtype: DTypeLike) -> np.dtype:
        """Its type in a model that runs in `dtype`."""
        return jnp.dtype(dtype) if self.dtype is None else self.dtype

    def split(self, ranks: int, mesh_axis: str = TENSOR) -> Split | None:
        """How it is divided among the ranks of a mesh axis; `None` where each holds all of it."""
        if ranks == 1:
            return None
        for dim, axis in enumerate(self.axes):
            if axis is not None and axis.division is not None and MESH_AXES.get(axis.name) == mesh_axis:
                return axis.division.among(ranks, dim)
        return None

    @property
    def name(self) -> str:
        """Its name in the whole model."""
        return self.inner if self.layer is None else f"{self.group}.{self.inner}"

    def in_layer(self, index: int) -> "ParameterInfo":
        """The same parameter of another layer of the kind."""
        return dataclasses.replace(self, group=layer_group(index), layer=index)


class Parted(Protocol):
    """A module tree that says which part of a model it is."""

    part: Part


@dataclasses.dataclass(frozen=True)
class Skeleton[Model: Parted]:
    """A model, or a part of one, without its arrays.

    Attributes:
        abstract: shape and dtype of each array in the order in which `build` takes them, by the name that the whole
            model gives it.
        infos: what each of them is.
        build: the model with the given arrays.
    """

    abstract: Mapping[str, jax.ShapeDtypeStruct]
    infos: Mapping[str, ParameterInfo]
    build: Callable[[Sequence[Array]], Model]

    @classmethod
    def around(cls, model: Model) -> "Skeleton[Model]":
        """Of a model that is there; `parameters` gives its arrays, in the same order."""
        graph, state = nnx.split(model)
        # Without the arrays, or whoever keeps the skeleton would keep them.
        flat = nnx.to_flat_state(jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), state))

        def build(arrays: Sequence[Array]) -> Model:
            filled = [(path, leaf.replace(array)) for (path, leaf), array in zip(flat, arrays, strict=True)]
            return nnx.merge(graph, nnx.from_flat_state(filled))

        infos = [_info(model, path, leaf) for path, leaf in flat]
        abstract = {
            info.name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for info, (_, leaf) in zip(infos, flat, strict=True)
        }
        return cls(abstract, {info.name: info for info in infos}, build)


def parameters(model: Parted) -> dict[str, jax.Array]:
    """The model's arrays, in a fixed order, by dotted path; those of a part are called as in the whole model."""
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return {_info(model, path, leaf).name: leaf.get_value() for path, leaf in flat}


def _info(model: Parted, path: Sequence[Any], leaf: nnx.Variable) -> ParameterInfo:
    said, layer = declaration_of(leaf), None
    group, inner = str(path[0]), path
    match path:
        case ("layers", int(index), *rest):
            layer = model.part.layers.start + index
            group, inner = layer_group(layer), rest
    dtype = np.dtype(leaf.dtype) if said.own_dtype else None
    name = ".".join(map(str, inner))
    return ParameterInfo(tuple(leaf.shape), dtype, group, layer, name, said.axes, said.quantizable)
