"""What a block of stored arrays looks like in memory, and how a model's parameters are made of them on the device."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Protocol

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jdsi.models.weight_map import Identity, Op, Shape
from jdsi.pallas_kernels.quantized_linear import WeightFormat

from .quantization import dequantized

FIELD_ALIGNMENT = 128
"""Bytes; more than JAX needs to use host memory in place on the CPU, and a cache line of a GPU."""


@dataclasses.dataclass(frozen=True)
class Field:
    """An array inside a block's memory: `offset` is a multiple of `FIELD_ALIGNMENT`."""

    dtype: np.dtype
    shape: Shape
    offset: int

    @property
    def nbytes(self) -> int:
        """Bytes it takes."""
        return math.prod(self.shape) * self.dtype.itemsize

    def view(self, memory: np.ndarray) -> np.ndarray:
        """The array."""
        return memory[self.offset : self.offset + self.nbytes].view(self.dtype).reshape(self.shape)


class Recipe(Protocol):
    """How a parameter is made of stored arrays; hashable, and traced into the program that uses the parameter."""

    def make(self, stored: Mapping[str, Array], dtype: Any) -> Array:
        """The parameter, out of a block's arrays by name."""
        ...

    def is_stored_as(self, fields: Mapping[str, Field], dtype: Any) -> bool:
        """Whether a stored array is the parameter as it is, so that making it takes no memory."""
        ...

    def largest(self, stored: Mapping[str, float]) -> float:
        """The parameter's largest magnitude, from those of a block's arrays by name; NaN if there is any."""
        ...


@dataclasses.dataclass(frozen=True)
class Joined:
    """Stored arrays, each first through an `Op`, one behind another along axis 0.

    Attributes:
        pieces: names of the arrays and what is done to each.
    """

    pieces: tuple[tuple[str, Op], ...]

    def make(self, stored: Mapping[str, Array], dtype: Any) -> Array:
        """See `Recipe.make`."""
        parts = []
        for name, op in self.pieces:
            array: Any = stored[name]  # a JAX array will do where an `Op` names NumPy's
            parts.append(jnp.asarray(op.forward(array)).astype(dtype))
        return parts[0] if len(parts) == 1 else jnp.concatenate(parts)

    def is_stored_as(self, fields: Mapping[str, Field], dtype: Any) -> bool:
        """See `Recipe.is_stored_as`."""
        name, op = self.pieces[0]
        return len(self.pieces) == 1 and isinstance(op, Identity) and fields[name].dtype == dtype

    def largest(self, stored: Mapping[str, float]) -> float:
        """See `Recipe.largest`."""
        return float(np.max([stored[name] for name, _ in self.pieces]))  # unlike Python's, of NaN too


@dataclasses.dataclass(frozen=True)
class Dequantized:
    """A quantised matrix.

    Attributes:
        format: its own.
        arrays: what `dequantized` calls each of its arrays, and the name that it is stored under.
    """

    format: WeightFormat
    arrays: tuple[tuple[str, str], ...]

    def make(self, stored: Mapping[str, Array], dtype: Any) -> Array:
        """See `Recipe.make`."""
        return dequantized({part: stored[name] for part, name in self.arrays}, self.format, dtype)

    def is_stored_as(self, fields: Mapping[str, Field], dtype: Any) -> bool:
        """See `Recipe.is_stored_as`."""
        return False

    def largest(self, stored: Mapping[str, float]) -> float:
        """See `Recipe.largest`; a scale is made for the largest number that it is for."""
        return stored[dict(self.arrays)["scales"]] * self.format.largest


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One parameter of a block.

    Attributes:
        shape: its own.
        dtype: that the checkpoint had it in.
        recipe: how it is made of what is stored.
        own_dtype: its type whatever the model runs in, see `ParameterInfo.dtype`.
    """

    shape: Shape
    dtype: np.dtype
    recipe: Recipe
    own_dtype: np.dtype | None = None

    def used_in(self, dtype: Any) -> np.dtype:
        """Its type where the model runs in `dtype`."""
        return jnp.dtype(dtype) if self.own_dtype is None else self.own_dtype

    def nbytes_as(self, dtype: np.dtype) -> int:
        """Bytes in a model that runs in `dtype`."""
        return math.prod(self.shape) * self.used_in(dtype).itemsize


@dataclasses.dataclass(frozen=True)
class BlockForm:
    """The form of a block, which layers of a kind share. Hashable.

    Attributes:
        fields: the stored arrays, in the order of their offsets.
        parameters: those of a layer by their names inside it, others by their full names.
    """

    fields: tuple[tuple[str, Field], ...]
    parameters: tuple[tuple[str, Parameter], ...]

    @property
    def shapes(self) -> tuple[tuple[str, Shape], ...]:
        """Of the parameters, by name."""
        return tuple((name, parameter.shape) for name, parameter in self.parameters)

    def views(self, memory: np.ndarray) -> dict[str, np.ndarray]:
        """The stored arrays in a block's memory."""
        return {name: field.view(memory) for name, field in self.fields}

    def make(self, stored: Mapping[str, Array], dtype: Any) -> dict[str, Array]:
        """All parameters of a model that runs in `dtype`, out of the stored arrays."""
        return {name: one.recipe.make(stored, one.used_in(dtype)) for name, one in self.parameters}

    def nbytes_as(self, dtype: np.dtype) -> int:
        """Bytes of the parameters in a model that runs in `dtype`."""
        return sum(parameter.nbytes_as(dtype) for _, parameter in self.parameters)

    def made_bytes(self, dtype: np.dtype) -> int:
        """Bytes of those parameters that are not used where they are stored."""
        fields = dict(self.fields)
        made = [one for _, one in self.parameters if not one.recipe.is_stored_as(fields, one.used_in(dtype))]
        return sum(one.nbytes_as(dtype) for one in made)
