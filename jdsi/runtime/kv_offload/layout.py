"""How keys and values of a batch are divided over a mesh, and over the devices of a link."""

import dataclasses
from typing import Any

import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from jdsi.errors import CapacityError, ConfigError
from jdsi.kv_cache import KVShape
from jdsi.sharding import DATA, TENSOR

SLOTS = 128
"""Capacities are multiples of this."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """See `OffloadedKV`, which has the same arguments.

    Raises:
        ConfigError: heads cannot be divided over the mesh, or an argument is out of range.
    """

    heads: tuple[KVShape, ...]
    capacity: int
    dtype: np.dtype
    mesh: Mesh
    devices_per_link: int

    def __post_init__(self) -> None:
        ranks = self.mesh.shape[TENSOR]
        for kv_heads, _, _ in self.heads:
            if kv_heads % ranks:
                raise ConfigError(f"{kv_heads} kv heads cannot be divided over {ranks} devices on the axis {TENSOR!r}")
        if self.capacity < SLOTS or self.capacity % SLOTS:
            raise ConfigError(f"capacity={self.capacity} must be a multiple of {SLOTS}")
        if self.devices_per_link < 1:
            raise ConfigError(f"devices_per_link={self.devices_per_link} must be at least 1")

    @property
    def sharding(self) -> NamedSharding:
        """Of keys, and of values, `[B, K, L, D]`."""
        return NamedSharding(self.mesh, PartitionSpec(DATA, TENSOR))

    def offloading(self, layer: int) -> list[Any]:
        """The devices of this process whose shares of a layer lie elsewhere."""
        link = self.devices_per_link
        return [device for i, device in enumerate(self.mesh.local_devices) if layer % link == i % link]

    def keeping(self, layer: int) -> list[Any]:
        """The other devices of this process."""
        offloading = self.offloading(layer)
        return [device for device in self.mesh.local_devices if device not in offloading]

    def shapes(self, layer: int, rows: int) -> list[tuple[int, int, int, int]]:
        """`[B, K, L, D]` of a layer's keys and of its values."""
        kv_heads, *dims = self.heads[layer]
        return [(rows, kv_heads, self.capacity, dim) for dim in dims]

    def share_shapes(self, layer: int, rows: int) -> list[tuple[int, ...]]:
        """The same of what a device has of them."""
        return [self.sharding.shard_shape(shape) for shape in self.shapes(layer, rows)]

    def row_ranges(self, rows: int) -> dict[Any, slice]:
        """Those of `rows` rows that each device of this process has.

        Raises:
            ConfigError: they cannot be divided over the axis "data".
        """
        groups = self.mesh.shape[DATA]
        if rows < 1 or rows % groups:
            raise ConfigError(f"{rows} rows cannot be divided over {groups} devices on the axis {DATA!r}")
        indices = NamedSharding(self.mesh, PartitionSpec(DATA)).addressable_devices_indices_map((rows,))
        return {device: slice(*index[0].indices(rows)) for device, index in indices.items() if index is not None}

    def sources(self, rows: Int[np.ndarray, " N"], held: int) -> dict[Any, Int[np.ndarray, " n"]]:
        """Of rows that become copies of some of `held` rows: each device's, counted from the first that it holds.

        Raises:
            ConfigError: the rows cannot be divided over the axis "data".
            ValueError: a row comes from another group of that axis.
        """
        after, before = self.row_ranges(len(rows)), self.row_ranges(held)
        found = {device: rows[after[device]] - before[device].start for device in after}
        for device, own in found.items():
            if ((own < 0) | (own >= before[device].stop - before[device].start)).any():
                raise ValueError(
                    f"rows {rows.tolist()} are not all copies of rows in their own group of the axis {DATA!r}"
                )
        return found

    def check_given(
        self,
        layer: int,
        memory: tuple[Float[Array, "B K L D"], Float[Array, "B K L Dv"]],
        held: Int[np.ndarray, " B"],
        lengths: Int[np.ndarray, " B"],
        new_lengths: Int[np.ndarray, " B"],
        new_tokens: int,
    ) -> None:
        """Whether a layer's keys and values fit, and their new tokens continue the `held` ones of each row.

        Raises:
            CapacityError: a row has more tokens than slots.
            ValueError: they do not.
        """
        for array, shape in zip(memory, self.shapes(layer, len(held)), strict=True):
            if array.shape != shape or array.dtype != self.dtype:
                raise ValueError(f"layer {layer} is {self.dtype}{list(shape)}, given {array.dtype}{list(array.shape)}")
            if not array.sharding.is_equivalent_to(self.sharding, array.ndim):
                raise ValueError(f"layer {layer} must be divided as {self.sharding}, given {array.sharding}")
        if lengths.shape != held.shape or new_lengths.shape != held.shape:
            raise ValueError(f"lengths must be of {len(held)} rows")
        if ((lengths < 0) | (lengths > held)).any():
            raise ValueError(f"rows hold {held.tolist()} tokens, and cannot continue behind {lengths.tolist()}")
        if ((new_lengths < 0) | (new_lengths > new_tokens)).any():
            raise ValueError(f"of {new_tokens} new tokens a row cannot have {new_lengths.tolist()}")
        if (longest := int((lengths + new_lengths).max())) > self.capacity:
            raise CapacityError(f"a row would have {longest} tokens, and its KV memory has {self.capacity} slots")
