"""How much memory streaming takes, in processes of their own."""

from pathlib import Path
from typing import Any

import numpy as np

from jdsi.converters.block_store import BlockStore
from jdsi.models import abstract_parameters
from jdsi.runtime.kv_demand import mesh_kv_bytes, most_slots
from jdsi.runtime.offload import PROCESS_BYTES, footprint_on
from jdsi.runtime.residency import plan_residency

from .processes import ask

TOKENS = 64
"""That the model is set up for."""


def streaming_limit(store: BlockStore, dtype: str) -> int:
    """The memory limit under which no layer stays: ring, embedding, head, a KV cache, and the process."""
    footprint = footprint_on(store, np.dtype(dtype))
    return PROCESS_BYTES + plan_residency(footprint, None).nbytes + mesh_kv_bytes(footprint, most_slots(TOKENS), 1)


def loaded_bytes(store: BlockStore, dtype: str) -> int:
    """What the weights take once all of them are loaded as `dtype`."""
    return sum(leaf.size for leaf in abstract_parameters(store.spec).values()) * np.dtype(dtype).itemsize


def peak_memory(store: Path, tiny: Path, dtype: str) -> dict[str, Any]:
    """Peak memory over that of the same work on a model of 0.3 MB, which is what importing and starting up take.

    Args:
        store: the model, all of whose layers are streamed.
        tiny: the small one.
        dtype: that both run in.
    """
    blocks = BlockStore.open(store)
    goal = streaming_limit(blocks, dtype)
    baseline = ask("offload", folder=tiny, dtype=dtype, tokens=TOKENS, limit=2 * PROCESS_BYTES)["peak"]
    peak = ask("offload", folder=store, dtype=dtype, tokens=TOKENS, limit=goal)["peak"]
    return {
        "what": "peak memory",
        "weights": blocks.nbytes,
        "planned": plan_residency(footprint_on(blocks, np.dtype(dtype)), None).nbytes,
        "peak": peak,
        "baseline": baseline,
        "peak_over_baseline": peak - baseline,
        "goal": goal,
        "within": peak - baseline <= goal,
    }
