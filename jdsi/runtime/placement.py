"""How weights get onto the devices of a mesh and become each device's parameters there.

A block that is streamed to several devices is cut into equal stretches of bytes: every device fetches one over its own
link, the mesh gathers them, and each device takes its share of the parameters (ZeRO-Inference, arXiv:2207.00032).
"""

import dataclasses
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from jdsi.converters.block_form import FIELD_ALIGNMENT, BlockForm, Field
from jdsi.converters.block_store import Block
from jdsi.converters.direct_io import round_up
from jdsi.models import TransformerSpec, groups_of
from jdsi.sharding import DATA, TENSOR, Split, all_gather, own_share

MemoryKind = str
"""Of a device: "device" is its own, "pinned_host" the host's as its link reaches it fastest."""


class Weights(Protocol):
    """What a program gets of a block, and what it makes of that."""

    @property
    def specs(self) -> Any:
        """How the arrays lie on the mesh: their pytree, a `PartitionSpec` for each."""
        ...

    def parameters(self, arrays: Any, dtype: Any) -> dict[str, Array]:
        """Each device's parameters by name; called inside `jax.shard_map`."""
        ...


@dataclasses.dataclass(frozen=True)
class Kept:
    """See `Weights`: parameters that stay on the device, by name, each with the dimension divided over "tensor"."""

    dims: tuple[tuple[str, int | None], ...]

    @property
    def specs(self) -> dict[str, PartitionSpec]:
        """See `Weights.specs`."""
        return {n: PartitionSpec() if dim is None else PartitionSpec(*[None] * dim, TENSOR) for n, dim in self.dims}

    def parameters(self, arrays: Mapping[str, Array], dtype: Any) -> dict[str, Array]:
        """See `Weights.parameters`."""
        return dict(arrays)


@dataclasses.dataclass(frozen=True)
class Section:
    """A stretch of a block's memory with arrays of one type.

    Attributes:
        dtype: of the arrays.
        offset: of its first byte.
        size: in values.
        fields: the arrays in it.
    """

    dtype: np.dtype
    offset: int
    size: int
    fields: tuple[tuple[str, Field], ...]

    def stretch(self, devices: int) -> int:
        """Values that each of several devices fetches; the last one's may reach past the section's end."""
        return round_up(-(-self.size // devices) * self.dtype.itemsize, FIELD_ALIGNMENT) // self.dtype.itemsize

    @classmethod
    def of(cls, form: BlockForm) -> "tuple[Section, ...]":
        """A block's memory as few sections."""
        runs: list[list[tuple[str, Field]]] = []
        for name, field in form.fields:
            if not runs or runs[-1][-1][1].dtype != field.dtype:
                runs.append([])
            runs[-1].append((name, field))
        found = []
        for run in runs:
            first, last = run[0][1], run[-1][1]
            size = (last.offset + last.nbytes - first.offset) // first.dtype.itemsize
            found.append(cls(first.dtype, first.offset, size, tuple(run)))
        return tuple(found)


@dataclasses.dataclass(frozen=True)
class Streamed:
    """See `Weights`: a block's stored arrays, which come anew for every pass.

    To a single device they go one by one, so that on a CPU, where nothing is copied, a program uses them in place.

    Attributes:
        form: of the block.
        mesh: with the axes "data" and "tensor".
        splits: how each parameter is divided over "tensor", by name.
        ranks: as how many shares the block is stored, those of the axis "tensor" or 1; shares need not be gathered
            over that axis.
    """

    form: BlockForm
    mesh: Mesh
    splits: tuple[tuple[str, Split | None], ...]
    ranks: int = 1

    @cached_property
    def sections(self) -> tuple[Section, ...]:
        """What is cut into stretches for several devices."""
        return Section.of(self.form)

    def memory_bytes(self, nbytes: int) -> int:
        """Memory that a block of `nbytes` must be read into, so that every device's stretch lies within."""
        if self.mesh.size == 1:
            return round_up(nbytes)
        together = self._together
        ends = [s.offset + together * s.stretch(together) * s.dtype.itemsize for s in self.sections]
        return round_up(max(nbytes, nbytes - nbytes // self.ranks + max(ends)))

    @property
    def specs(self) -> Any:
        """See `Weights.specs`."""
        if self.mesh.size == 1:
            return {name: PartitionSpec() for name, _ in self.form.fields}
        order = (DATA, TENSOR) if self.ranks == 1 else (TENSOR, DATA)
        return [PartitionSpec(order)] * len(self.sections)

    def shardings(self, kind: MemoryKind) -> Any:
        """As `specs`, a sharding for each."""

        def sharding(spec: PartitionSpec) -> NamedSharding:
            return NamedSharding(self.mesh, spec, memory_kind=kind)

        return jax.tree.map(sharding, self.specs, is_leaf=lambda x: isinstance(x, PartitionSpec))

    @cached_property
    def _together(self) -> int:
        """Devices that share the bytes of a part."""
        return self.mesh.size // self.ranks

    @property
    def shapes(self) -> Any:
        """As `specs`, a `jax.ShapeDtypeStruct` for each."""
        if self.mesh.size == 1:
            return {name: jax.ShapeDtypeStruct(field.shape, field.dtype) for name, field in self.form.fields}
        count = self.mesh.size
        return [jax.ShapeDtypeStruct((count * s.stretch(self._together),), s.dtype) for s in self.sections]

    def starts(self, nbytes: int) -> Any:
        """As `specs`, a list for each: where in the memory of a block of `nbytes` each device's part of it begins.

        In the order of `mesh.devices.flat`.
        """
        if self.mesh.size == 1:
            return {name: [field.offset] for name, field in self.form.fields}
        tensor = self.mesh.shape[TENSOR]
        found = []
        for section in self.sections:
            length = section.stretch(self._together) * section.dtype.itemsize
            places = [(0, i) if self.ranks == 1 else (i % tensor, i // tensor) for i in range(self.mesh.size)]
            found.append([rank * (nbytes // self.ranks) + section.offset + i * length for rank, i in places])
        return found

    def put(self, memory: np.ndarray, nbytes: int, kind: MemoryKind = "device") -> Any:
        """A block's bytes on the devices, the arrays that `parameters` takes; it does not wait for the copies.

        Args:
            memory: the block's, of `memory_bytes`. On a CPU the arrays are views of it.
            nbytes: of the block.
            kind: the memory of each device to put them into.
        """
        shardings = self.shardings(kind)
        if self.mesh.size == 1:
            return jax.device_put(self.form.views(memory), shardings)
        devices, pieces = list(self.mesh.devices.flat), []
        for section, starts in zip(self.sections, self.starts(nbytes), strict=True):
            length = section.stretch(self._together) * section.dtype.itemsize
            pieces += [memory[start : start + length].view(section.dtype) for start in starts]
        places = [jax.sharding.SingleDeviceSharding(device, memory_kind=kind) for device in devices]
        placed = iter(jax.device_put(pieces, places * len(self.sections)))
        return [
            jax.make_array_from_single_device_arrays(array.shape, sharding, [next(placed) for _ in devices])
            for array, sharding in zip(self.shapes, shardings, strict=True)
        ]

    def prepares(self, dtype: Any) -> bool:
        """Whether parameters of a dtype are anything but the stored arrays where they are."""
        return self.mesh.size > 1 or self.form.made_bytes(dtype) > 0

    def parameters(self, arrays: Any, dtype: Any) -> dict[str, Array]:
        """See `Weights.parameters`."""
        stored = dict(arrays) if self.mesh.size == 1 else self._gathered(arrays)
        made, splits = self.form.make(stored, dtype), dict(self.splits)
        return made if self.ranks > 1 else {name: own_share(x, TENSOR, splits[name]) for name, x in made.items()}

    def _gathered(self, stretches: Sequence[Array]) -> dict[str, Array]:
        found = {}
        for section, stretch in zip(self.sections, stretches, strict=True):
            values = all_gather(all_gather(stretch, TENSOR) if self.ranks == 1 else stretch, DATA)
            for name, field in section.fields:
                start = (field.offset - section.offset) // section.dtype.itemsize
                size = field.nbytes // section.dtype.itemsize
                found[name] = values[start : start + size].reshape(field.shape)
        return found


def streamed_weights(spec: TransformerSpec, block: Block, mesh: Mesh) -> Streamed:
    """How a block of a model is streamed to a mesh."""
    ranks = mesh.shape[TENSOR]
    splits = tuple((info.inner, info.split(ranks)) for info in groups_of(spec)[block.name].values())
    return Streamed(block.form, mesh, splits, block.ranks)


def kept_weights(streamed: Streamed) -> Kept:
    """The same block's parameters where they stay."""
    return Kept(tuple((name, None if split is None else split.dim) for name, split in streamed.splits))
