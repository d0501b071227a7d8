"""Choosing where a model's weights live, and the executor that runs them from there."""

import dataclasses

import jax
import numpy as np
from jax.sharding import Mesh

from jdsi.converters.block_store import BlockStore
from jdsi.errors import CapacityError
from jdsi.pallas_kernels.operator import Implementation
from jdsi.sharding import DATA, TENSOR

from .gpu_direct import gpu_direct_source
from .kv_demand import ON_DEVICES, KVDemand, KVPlace, most_slots
from .memory import available_host_memory, available_memory
from .residency import Footprint, Residency, least_bytes, plan_residency
from .streamed import StreamedExecutor
from .weight_sources import BlockSource, HostSource

PROCESS_BYTES = 400 << 20
"""What Python, JAX and the compiled programs take beside weights and KV."""


@dataclasses.dataclass(frozen=True)
class OffloadPlan:
    """Where the weights of a model live.

    Attributes:
        where: "device", "host" or "nvme".
        residency: which blocks stay on the device.
        batches_per_pass: how many batches share one reading of the weights.
        kv_limit: bytes that keys and values of a batch may take of the memory that was given; `None` if none was.
    """

    where: str
    residency: Residency
    batches_per_pass: int
    kv_limit: int | None = None


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
    batches_per_pass: int | None = None,
    kv_place: KVPlace = ON_DEVICES,
) -> OffloadPlan:
    """Decides from the sizes of the model and of the memory.

    The limit holds the process (on a CPU), the weights kept and under way, and the KV of the batches of a pass. KV is
    set aside for one batch, but for no more than half of the limit, or for as many batches as are asked for; what the
    weights then leave is for more batches. Layers are kept first: unless asked, batches share a pass in what is left,
    or if their keys and values are elsewhere.

    Args:
        footprint: of the model.
        offload: "host", "nvme" or "auto".
        limit: bytes of a device's memory; `None` for what is free.
        max_tokens, max_batch_size: of a batch.
        batches_per_pass: how many batches must be able to share a pass; by default one.
        kv_place: where keys and values live.

    Raises:
        CapacityError: the limit is too small to run the model at all, or with so many batches; host memory to hold it;
            or the place for keys and values for so many batches.
    """
    store, on_cpu = footprint.store, footprint.shared
    process = PROCESS_BYTES if on_cpu else 0
    free = available_memory() if limit is None else limit - process
    demand = KVDemand.of(footprint, kv_place, most_slots(max_tokens), max_batch_size)
    reserved = min(demand.first, max(free, 0) // 2)
    streaming = reserved if batches_per_pass is None else demand.together(batches_per_pass)
    everything = plan_residency(footprint, None, stream=False)
    fits = everything.nbytes <= free - reserved
    where = offload
    if offload == "auto":
        where = "nvme" if on_cpu or store.nbytes > 0.8 * available_host_memory() else "host"
    if (offload == "auto" and fits) or (where == "host" and on_cpu):
        # On a CPU the host's memory is the device's: nothing is gained by moving weights within it.
        if not fits:
            raise CapacityError(
                f"{store.path}: {everything.nbytes:,} bytes of weights do not fit host memory, {free - reserved:,} are "
                "left for them; offload='nvme' leaves them on disk"
            )
        return OffloadPlan("device", everything, 1, None if limit is None else free - everything.nbytes)
    if where == "host" and store.nbytes > available_host_memory():
        raise CapacityError(
            f"{store.path}: {store.nbytes:,} bytes of weights do not fit host memory, of which "
            f"{available_host_memory():,} are free; offload='nvme' leaves them on disk"
        )
    try:
        residency = plan_residency(footprint, free - streaming)
    except CapacityError as error:
        least = least_bytes(footprint)
        given = f"{free:,} bytes are free" if limit is None else f"memory_limit={limit:,} is too small"
        kv = min(demand.first, least) if batches_per_pass is None else streaming
        raise CapacityError(
            f"{store.path}: {given}: to stream it takes {process + least + kv:,} bytes ({least:,} for two "
            f"buffers of its largest block and what has to stay, {kv:,} for the KV cache"
            + (f", {process:,} for the process)" if process else ")")
        ) from error
    left = free - residency.nbytes
    taken = store.nbytes if where == "host" else 0
    room = demand.batches_elsewhere(taken)
    if batches_per_pass is not None and room < batches_per_pass:
        raise CapacityError(
            f"keys and values of batches_per_pass={batches_per_pass} batches of {demand.elsewhere:,} bytes do not fit "
            f"where kv_offload={kv_place.where!r} puts them, {room} would"
        )
    batches = batches_per_pass or demand.batches(left, taken)
    return OffloadPlan(where, residency, batches, None if limit is None else left)


def offloaded_executor(
    footprint: Footprint,
    plan: OffloadPlan,
    implementation: Implementation | None,
    mesh: Mesh | None = None,
    kv_place: KVPlace = ON_DEVICES,
    gpu_direct: bool = False,
) -> StreamedExecutor:
    """The executor that follows a plan; with `gpu_direct` files are read straight into the memory of GPUs.

    Raises:
        ConfigError: they cannot be.
    """
    source: BlockSource | None = gpu_direct_source(footprint.store) if gpu_direct else None
    return StreamedExecutor(
        footprint.store,
        plan.residency,
        dtype=footprint.dtype,
        mesh=mesh,
        source=HostSource(footprint.store) if plan.where == "host" else source,
        batches_per_pass=plan.batches_per_pass,
        kv_limit=plan.kv_limit,
        cache=kv_place.cache(),
        park=kv_place.where != "device" and not footprint.shared,
        implementation=implementation,
    )
