"""Choosing where a model's weights live, and the executor that runs them from there."""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np

from jdsi.converters.block_store import Block, BlockStore
from jdsi.converters.direct_io import DirectReader, PageBuffer
from jdsi.errors import CapacityError
from jdsi.models import TransformerSpec
from jdsi.pallas_kernels.operator import Implementation

from .memory import available_host_memory, available_memory, used_memory
from .residency import Residency, plan_residency
from .shapes import capacity_bucket
from .streamed import StreamedExecutor
from .weight_stream import DiskSource

PROCESS_BYTES = 400 << 20
"""What Python, JAX and the compiled programs take beside weights and KV."""


class HostSource:
    """Blocks that stay in host memory, pinned where the device is a GPU, and go to the device for every pass."""

    def __init__(self, blocks: list[Block]) -> None:
        self._reader = DirectReader()
        self._blocks = {block.name: self._load(block) for block in blocks}
        self._reader.close()

    def _load(self, block: Block) -> Mapping[str, np.ndarray | jax.Array]:
        memory = PageBuffer(block.nbytes).bytes
        self._reader.read(block.segments, memory)
        arrays = block.arrays(memory)
        if jax.default_backend() == "cpu":
            return arrays
        # The driver copies from pinned memory at the link's speed, from other memory at a tenth of it.
        pinned = jax.sharding.SingleDeviceSharding(jax.local_devices()[0], memory_kind="pinned_host")
        return jax.block_until_ready(jax.device_put(arrays, pinned))

    def read(self, block: Block, memory: np.ndarray) -> Mapping[str, np.ndarray | jax.Array]:
        """See `BlockSource.read`."""
        return self._blocks[block.name]

    def close(self) -> None:
        """See `BlockSource.close`."""
        self._blocks.clear()


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


def plan_offload(
    store: BlockStore, offload: str, limit: int | None, dtype: np.dtype, *, max_tokens: int, max_batch_size: int
) -> OffloadPlan:
    """Decides from the sizes of the model and of the memory.

    The limit holds the process (on a CPU), the weights kept and under way, and the KV of the batches of a pass. KV is
    set aside for one batch, but for no more than half of the limit; what the weights then leave is for more batches.

    Args:
        store: the model.
        offload: "host", "nvme" or "auto".
        limit: bytes of the device's memory; `None` for what is free.
        dtype: that the model runs in.
        max_tokens, max_batch_size: of a batch.

    Raises:
        CapacityError: the limit is too small to run the model at all, or host memory to hold it.
    """
    on_cpu = jax.default_backend() == "cpu"
    free = available_memory() if limit is None else limit - (PROCESS_BYTES if on_cpu else 0)
    kv = kv_bytes(store.spec, capacity_bucket(max_tokens), dtype)
    reserved = min(kv * max_batch_size, max(free, 0) // 2)
    room = free - reserved
    everything = sum(store.blocks[name].nbytes_as(dtype) for name in store.blocks)
    if offload == "auto" and everything <= room:
        resident = plan_residency(store, everything, dtype)
        return OffloadPlan("device", resident, 1)
    where = offload
    if offload == "auto":
        where = "nvme" if on_cpu or store.nbytes > 0.8 * available_host_memory() else "host"
    if where == "host" and not on_cpu and store.nbytes > available_host_memory():
        raise CapacityError(
            f"{store.path}: {store.nbytes:,} bytes of weights do not fit host memory, of which "
            f"{available_host_memory():,} are free; offload='nvme' leaves them on disk"
        )
    if where == "host" and on_cpu:  # the host's memory is the device's: nothing is gained by moving weights within it
        room = max(room, everything)
    residency = plan_residency(store, None if limit is None and where == "nvme" and not on_cpu else room, dtype)
    left = free - residency.nbytes
    return OffloadPlan(where, residency, max(1, math.floor(left / max(1, kv * max_batch_size))))


def kv_bytes(spec: TransformerSpec, tokens: int, dtype: np.dtype) -> int:
    """Bytes of the KV cache of one sequence."""
    return sum(heads * (k + v) for heads, k, v in spec.kv_heads) * tokens * np.dtype(dtype).itemsize


def offloaded_executor(
    store: BlockStore, plan: OffloadPlan, dtype: np.dtype, implementation: Implementation | None
) -> StreamedExecutor:
    """The executor that follows a plan."""
    streamed = [store.blocks[name] for name in dict.fromkeys(plan.residency.streamed)]
    source = HostSource(streamed) if plan.where == "host" and streamed else DiskSource()
    return StreamedExecutor(
        store,
        plan.residency,
        dtype=dtype,
        source=source,
        batches_per_pass=plan.batches_per_pass,
        implementation=implementation,
    )


def describe(path: Path, plan: OffloadPlan) -> str:
    """One line for people."""
    kept = len([name for name in plan.residency.resident if name.startswith("layers.")])
    moving = len([name for name in plan.residency.streamed if name.startswith("layers.")])
    if not moving:
        return f"{path}: all weights on the device"
    return (
        f"{path}: {kept} of {kept + moving} layers on the device, {moving} from {plan.where}; "
        f"{plan.residency.nbytes / 1e9:.2f} GB for weights, process {used_memory() / 1e9:.2f} GB, "
        f"{plan.batches_per_pass} batches a pass"
    )
