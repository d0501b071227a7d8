"""Choosing where a model's weights live, and the executor that runs them from there."""

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence

import jax
import numpy as np

from jdsi.converters.block_store import Block, BlockStore
from jdsi.converters.direct_io import DirectReader, PageBuffer
from jdsi.errors import CapacityError
from jdsi.models import TransformerSpec
from jdsi.pallas_kernels.operator import Implementation

from .memory import available_host_memory, available_memory
from .residency import Residency, least_bytes, plan_residency
from .shapes import capacity_bucket
from .streamed import StreamedExecutor

PROCESS_BYTES = 400 << 20
"""What Python, JAX and the compiled programs take beside weights and KV."""


class HostSource:
    """Blocks that stay in host memory, pinned where the device is a GPU, and go to the device for every pass."""

    needs_memory = False

    def __init__(self, blocks: Sequence[Block]) -> None:
        with contextlib.closing(DirectReader()) as reader:
            self._blocks = {block.name: self._load(reader, block) for block in blocks}

    def _load(self, reader: DirectReader, block: Block) -> Mapping[str, np.ndarray | jax.Array]:
        memory = PageBuffer(block.nbytes).bytes
        reader.read(block.segments, memory)
        # The driver copies from pinned memory at the link's speed, from other memory at a tenth of it.
        pinned = jax.sharding.SingleDeviceSharding(jax.local_devices()[0], memory_kind="pinned_host")
        return jax.block_until_ready(jax.device_put(block.arrays(memory), pinned))

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
    process = PROCESS_BYTES if on_cpu else 0
    free = available_memory() if limit is None else limit - process
    kv = kv_bytes(store.spec, capacity_bucket(max_tokens), dtype) * max_batch_size
    reserved = min(kv, max(free, 0) // 2)
    everything = plan_residency(store, None, dtype, stream=False)
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
        residency = plan_residency(store, free - reserved, dtype)
    except CapacityError as error:
        least = least_bytes(store, dtype)
        given = f"{free:,} bytes are free" if limit is None else f"memory_limit={limit:,} is too small"
        raise CapacityError(
            f"{store.path}: {given}: to stream it takes {process + least + min(kv, least):,} bytes ({least:,} for two "
            f"buffers of its largest block and what has to stay, {min(kv, least):,} for the KV cache"
            + (f", {process:,} for the process)" if process else ")")
        ) from error
    left = free - residency.nbytes
    return OffloadPlan(where, residency, max(1, left // max(1, kv)))


def kv_bytes(spec: TransformerSpec, tokens: int, dtype: np.dtype) -> int:
    """Bytes of the KV cache of one sequence; encoders have none."""
    if not spec.causal:
        return 0
    return sum(heads * (k + v) for heads, k, v in spec.kv_heads) * tokens * np.dtype(dtype).itemsize


def offloaded_executor(
    store: BlockStore, plan: OffloadPlan, dtype: np.dtype, implementation: Implementation | None
) -> StreamedExecutor:
    """The executor that follows a plan."""
    streamed = [store.blocks[name] for name in dict.fromkeys(plan.residency.streamed)]
    return StreamedExecutor(
        store,
        plan.residency,
        dtype=dtype,
        source=HostSource(streamed) if plan.where == "host" else None,
        batches_per_pass=plan.batches_per_pass,
        implementation=implementation,
    )
