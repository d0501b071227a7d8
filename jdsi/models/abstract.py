"""What parameters a spec's model has, asked of its modules; nothing is allocated."""

import dataclasses
import functools
from collections.abc import Mapping
from types import MappingProxyType

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jdsi.sharding import AxisRules, Split

from .parameters import ParameterInfo
from .spec import TransformerSpec
from .transformer import Transformer


@functools.lru_cache(maxsize=64)
def parameters_of(spec: TransformerSpec) -> Mapping[str, ParameterInfo]:
    """All parameters of a model by name, in the order in which its modules have them."""
    # Layers are alike: describing one of each kind takes milliseconds where all would take a second.
    kinds = list(dict.fromkeys(spec.layers))
    described = Transformer.skeleton(dataclasses.replace(spec, layers=tuple(kinds))).infos.values()
    of_kind = [[info for info in described if info.layer == kind] for kind in range(len(kinds))]
    found: dict[str, ParameterInfo] = {}
    for info in described:
        if info.layer is None:
            found[info.name] = info
        elif kinds:  # the first one of a layer: all layers stand here
            for index, layer in enumerate(spec.layers):
                found |= {own.name: own for own in (one.in_layer(index) for one in of_kind[kinds.index(layer)])}
            kinds = []
    return MappingProxyType(found)


@functools.lru_cache(maxsize=64)
def groups_of(spec: TransformerSpec, names: tuple[str, ...] | None = None) -> Mapping[str, Mapping[str, ParameterInfo]]:
    """Its parameters by group, and in the group by their names in the whole model.

    Args:
        spec: the model's.
        names: of the parameters, in the order that groups and parameters are to have; by default the modules' own.
    """
    infos, found = parameters_of(spec), dict[str, dict[str, ParameterInfo]]()
    for name in infos if names is None else names:
        found.setdefault(infos[name].group, {})[name] = infos[name]
    return MappingProxyType(found)


def abstract_parameters(
    spec: TransformerSpec, dtype: DTypeLike = jnp.float32, sharding: AxisRules | None = None
) -> dict[str, jax.ShapeDtypeStruct]:
    """Name, shape and dtype of every parameter of `spec`, without allocating any.

    Args:
        spec: the model's.
        dtype: that it runs in.
        sharding: gives each one a sharding.
    """
    return {
        name: jax.ShapeDtypeStruct(
            info.shape,
            info.dtype_in(dtype),
            sharding=None if sharding is None else sharding.sharding(info.logical_axes, info.shape),
        )
        for name, info in parameters_of(spec).items()
    }


def shapes_of(spec: TransformerSpec) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter."""
    return {name: info.shape for name, info in parameters_of(spec).items()}


def splits_of(spec: TransformerSpec, ranks: int) -> dict[str, Split | None]:
    """How every parameter is divided among the ranks of the tensor axis; `None` where each holds all of it."""
    return {name: info.split(ranks) for name, info in parameters_of(spec).items()}
