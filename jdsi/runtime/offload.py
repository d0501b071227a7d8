"""Choosing where a model's weights live, and the executor that runs them from there."""

import dataclasses
import shutil
import tempfile
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from jdsi.converters.block_store import BlockStore
from jdsi.errors import CapacityError, ConfigError
from jdsi.models import TransformerSpec
from jdsi.models.tensor_parallel import local_spec
from jdsi.pallas_kernels.operator import Implementation
from jdsi.sharding import DATA, TENSOR

from .kv_offload import FileSlabs, HostSlabs, SlabStore
from .memory import available_host_memory, available_memory
from .residency import Footprint, Residency, least_bytes, plan_residency
from .shapes import capacity_bucket
from .streamed import StreamedExecutor
from .weight_sources import HostSource

PROCESS_BYTES = 400 << 20
"""What Python, JAX and the compiled programs take beside weights and KV."""


_LAYERS_ON_THEIR_WAY = 5
"""Layers of offloaded keys and values that a device holds: coming, in use, and being cut for their way back."""


@dataclasses.dataclass(frozen=True)
class KVPlace:
    """Where keys and values live between the turns of their layers.

    Attributes:
        where: "device", "host" or "nvme".
        folder: where the spill file lies.
        devices_per_link: see `OffloadedKV`.
    """

    where: str = "device"
    folder: Path = Path(tempfile.gettempdir())
    devices_per_link: int = 1

    def store(self) -> SlabStore | None:
        """What holds them, if the devices do not.

        Raises:
            ConfigError: no file can be made in the folder.
        """
        if self.where == "device":
            return None
        return SlabStore(FileSlabs(self.folder) if self.where == "nvme" else HostSlabs())

    def on_device(self, footprint: Footprint, kv: int) -> tuple[int, int]:
        """Bytes of the limit's memory that a batch takes, and that all take together, of a batch's `kv` bytes."""
        if self.where == "device":
            return kv, 0
        layer = -(-kv // len(footprint.store.spec.layers))
        staying = kv - kv // self.devices_per_link
        if not footprint.shared:
            return staying, _LAYERS_ON_THEIR_WAY * layer
        # What comes, and what goes, is on the host a second time.
        return (kv if self.where == "host" else staying), 2 * _LAYERS_ON_THEIR_WAY * layer

    def most_batches(self, kv: int) -> int | None:
        """How many batches' keys and values have room where they live; `None` if that is on the devices.

        Raises:
            ConfigError: the folder cannot be used.
        """
        if self.where == "device":
            return None
        try:
            free = available_host_memory() if self.where == "host" else shutil.disk_usage(self.folder).free
        except OSError as error:
            raise ConfigError(f"no spill file can be made in {self.folder}: {error.strerror}") from error
        return int(0.8 * free) // max(1, kv)


@dataclasses.dataclass(frozen=True)
class OffloadPlan:
    """Where the weights of a model live.

    Attributes:
        where: "device", "host" or "nvme".
        residency: which blocks stay on the device.
        batches_per_pass: how many batches share one reading of the weights.
    """

    where: str
    residency: Residency
    batches_per_pass: int


def footprint_on(store: BlockStore, dtype: np.dtype, mesh: Mesh | None = None) -> Footprint:
    """A model's footprint on a mesh, or on JAX's default device."""
    devices = {} if mesh is None else {"tensor": mesh.shape[TENSOR], "data": mesh.shape[DATA]}
    return Footprint(store, np.dtype(dtype), **devices, shared=jax.default_backend() == "cpu")


def plan_offload(
    footprint: Footprint,
    offload: str,
    limit: int | None,
    *,
    max_tokens: int,
    max_batch_size: int,
    kv_place: KVPlace = KVPlace(),
) -> OffloadPlan:
    """Decides from the sizes of the model and of the memory.

    The limit holds the process (on a CPU), the weights kept and under way, and the KV of the batches of a pass. KV is
    set aside for one batch, but for no more than half of the limit; what the weights then leave is for more batches.

    Args:
        footprint: of the model.
        offload: "host", "nvme" or "auto".
        limit: bytes of a device's memory; `None` for what is free.
        max_tokens, max_batch_size: of a batch.
        kv_place: where keys and values live.

    Raises:
        CapacityError: the limit is too small to run the model at all, or host memory to hold it.
    """
    store, on_cpu = footprint.store, footprint.shared
    process = PROCESS_BYTES if on_cpu else 0
    free = available_memory() if limit is None else limit - process
    whole = footprint_of_kv(footprint, capacity_bucket(max_tokens)) * max_batch_size
    each, together = kv_place.on_device(footprint, whole)
    kv = each + together
    reserved = min(kv, max(free, 0) // 2)
    everything = plan_residency(footprint, None, stream=False)
    if offload == "auto" and everything.nbytes <= free - reserved:
        return OffloadPlan("device", everything, 1)
    where = offload
    if offload == "auto":
        where = "nvme" if on_cpu or store.nbytes > 0.8 * available_host_memory() else "host"
    if where == "host" and store.nbytes > available_host_memory():
        raise CapacityError(
            f"{store.path}: {store.nbytes:,} bytes of weights do not fit host memory, of which "
            f"{available_host_memory():,} are free; offload='nvme' leaves them on disk"
        )
    if where == "host" and on_cpu:  # the host's memory is the device's: nothing is gained by moving weights within it
        return OffloadPlan("device", everything, 1)
    try:
        residency = plan_residency(footprint, free - reserved)
    except CapacityError as error:
        least = least_bytes(footprint)
        given = f"{free:,} bytes are free" if limit is None else f"memory_limit={limit:,} is too small"
        raise CapacityError(
            f"{store.path}: {given}: to stream it takes {process + least + min(kv, least):,} bytes ({least:,} for two "
            f"buffers of its largest block and what has to stay, {min(kv, least):,} for the KV cache"
            + (f", {process:,} for the process)" if process else ")")
        ) from error
    batches = [(free - residency.nbytes - together) // each] if each else []
    elsewhere = kv_place.most_batches(whole)
    batches += [] if elsewhere is None else [elsewhere]
    return OffloadPlan(where, residency, max(1, min(batches)))


def kv_bytes(spec: TransformerSpec, tokens: int, dtype: np.dtype) -> int:
    """Bytes of the KV cache of one sequence; encoders have none."""
    if not spec.causal:
        return 0
    return sum(heads * (k + v) for heads, k, v in spec.kv_heads) * tokens * np.dtype(dtype).itemsize


def footprint_of_kv(footprint: Footprint, tokens: int) -> int:
    """Bytes that the KV cache of one sequence takes of the memory that the limit is for."""
    ranks, spec = footprint.tensor, footprint.store.spec
    own = kv_bytes(local_spec(spec, ranks), tokens, footprint.dtype)  # heads may be padded, or held by several ranks
    return own * ranks if footprint.shared else -(-own // footprint.data)


def offloaded_executor(
    footprint: Footprint,
    plan: OffloadPlan,
    implementation: Implementation | None,
    mesh: Mesh | None = None,
    kv_place: KVPlace = KVPlace(),
) -> StreamedExecutor:
    """The executor that follows a plan."""
    return StreamedExecutor(
        footprint.store,
        plan.residency,
        dtype=footprint.dtype,
        mesh=mesh,
        source=HostSource(footprint.store) if plan.where == "host" else None,
        batches_per_pass=plan.batches_per_pass,
        kv=kv_place.store(),
        devices_per_link=kv_place.devices_per_link,
        park=kv_place.where != "device" and not footprint.shared,
        implementation=implementation,
    )
