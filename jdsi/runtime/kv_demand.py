"""What keys and values of an offloaded model take, and where."""

import dataclasses
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Self

import numpy as np

from jdsi.errors import ConfigError
from jdsi.kv_cache import CacheSpec, Contiguous
from jdsi.models.tensor_parallel import kv_shapes

from .kv_offload import FileSlabs, HostSlabs, Offloaded, SlabStore
from .memory import available_host_memory
from .residency import Footprint
from .shapes import token_bucket

_LAYERS_ON_THEIR_WAY = 5
"""Layers of offloaded keys and values that a device holds: coming, in use, and being cut for their way back."""

_SAFE = 0.8
"""Of host memory, or of a disk, that is free: others use it too."""


_MANY = 16
"""Batches of a pass where nothing of them needs room: what more would share is little."""


@dataclasses.dataclass(frozen=True)
class KVPlace:
    """Where keys and values live between the turns of their layers.

    Attributes:
        where: "device", "host" or "nvme".
        folder: where the spill file lies.
        devices_per_link: see `OffloadedKV`.
        on_device: the kind of KV memory there.
    """

    where: str = "device"
    folder: Path = Path(tempfile.gettempdir())
    devices_per_link: int = 1
    on_device: CacheSpec = dataclasses.field(default_factory=Contiguous)

    def cache(self) -> CacheSpec:
        """The kind of KV memory that it makes.

        Raises:
            ConfigError: no file can be made in the folder.
        """
        if self.where == "device":
            return self.on_device
        store = SlabStore(FileSlabs(self.folder) if self.where == "nvme" else HostSlabs())
        return Offloaded(store, self.devices_per_link)

    def free(self) -> int:
        """Bytes that there are for them, where they do not live on the devices.

        Raises:
            ConfigError: the folder cannot be used.
        """
        try:
            free = available_host_memory() if self.where == "host" else shutil.disk_usage(self.folder).free
        except OSError as error:
            raise ConfigError(f"no spill file can be made in {self.folder}: {error.strerror}") from error
        return int(_SAFE * free)


_CONTIGUOUS = Contiguous()
ON_DEVICES = KVPlace()


@dataclasses.dataclass(frozen=True)
class KVDemand:
    """Bytes that batches of a size take.

    Attributes:
        place: where keys and values live.
        first: of the memory that a limit is for, by the first batch of a pass.
        further: of the same, by every other one, its waiting hidden states included.
        elsewhere: where keys and values live if not there, by every batch.
    """

    place: KVPlace
    first: int
    further: int
    elsewhere: int

    @classmethod
    def of(cls, footprint: Footprint, place: KVPlace, slots: int, rows: int) -> Self:
        """Of batches of `rows` rows that hold up to `slots` tokens each.

        Raises:
            ConfigError: the model has no keys and values to keep, or there are not so many devices on a link.
        """
        spec, devices = footprint.store.spec, footprint.tensor * footprint.data
        if place.where != "device" and not spec.generates:
            raise ConfigError(f"kv_offload is for models that generate; this {spec.family} model does not")
        if place.devices_per_link > devices:
            raise ConfigError(f"devices_per_link={place.devices_per_link} exceeds the {devices} devices there are")
        whole = mesh_kv_bytes(footprint, slots, rows, place.on_device)
        here = whole if footprint.shared else -(-whole // devices)
        hidden = rows * slots * spec.width * np.dtype(footprint.dtype).itemsize
        hidden = hidden if footprint.shared else -(-hidden // footprint.data)
        if place.where == "device":
            return cls(place, here, here + hidden, 0)
        layers = len(spec.layers)
        # Of the device that offloads fewest.
        offloaded = layers // place.devices_per_link
        staying = here - here * offloaded // layers
        moving = _LAYERS_ON_THEIR_WAY * -(-here // layers)
        if not footprint.shared:  # hidden states wait on the host as well
            return cls(place, staying + moving, staying, whole * offloaded // layers + hidden)
        # What comes, and what goes, is on the host a second time.
        settled = here if place.where == "host" else staying
        return cls(place, settled + 2 * moving, settled + hidden, whole * offloaded // layers)

    def together(self, batches: int) -> int:
        """Bytes that so many batches of a pass take of the memory that a limit is for."""
        return self.first + (batches - 1) * self.further

    def batches(self, left: int, taken: int) -> int:
        """How many share a pass.

        Args:
            left: bytes of the memory that a limit is for.
            taken: bytes of host memory that will be in use for weights.
        """
        found = 1 + max(0, left - self.first) // self.further if self.further else _MANY
        return max(1, min(found, self.batches_elsewhere(taken)))

    def batches_elsewhere(self, taken: int) -> int:
        """How many there is room for where their keys and values live, if that is not on the devices."""
        if self.place.where == "device":
            return sys.maxsize
        free = self.place.free() - (taken if self.place.where == "host" else 0)
        return max(0, free) // max(1, self.elsewhere)


def most_slots(max_tokens: int) -> int:
    """Slots per row that a batch may take whose rows have up to `max_tokens` tokens, as prompts are padded."""
    padding = max((token_bucket(n) - n for n in range(1, min(max_tokens, 1024))), default=0)
    return Contiguous().slots(max_tokens + padding)


def mesh_kv_bytes(footprint: Footprint, slots: int, rows: int, cache: CacheSpec = _CONTIGUOUS) -> int:
    """Bytes of the KV memory of a batch on all devices."""
    return cache.bytes(kv_shapes(footprint.store.spec, footprint.tensor), rows, slots, footprint.dtype)
