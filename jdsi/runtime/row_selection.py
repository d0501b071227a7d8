"""Rows of a context copied to other places, as beam search does between steps."""

import functools
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int

from jdsi.sharding import DATA, axis_index

from .kv_offload import OffloadedContext
from .staged_context import StagedContext


def select_rows(context: Any, rows: Int[Array | np.ndarray, " N"]) -> Any:
    """A context whose row i is a copy of row `rows[i]`; where there are as many as before, `context` is donated.

    On a mesh a row must lie in the same group of the axis "data" as the one it is copied from.
    """
    if isinstance(context, StagedContext):
        on_host = np.asarray(rows)  # every stage has devices of its own, and the indices come from the last one's
        return context.each(lambda stage: select_rows(stage, on_host))
    if isinstance(context, OffloadedContext):
        return context.select(rows)
    sharding = context.lengths.sharding
    mesh = sharding.mesh if isinstance(sharding, NamedSharding) and sharding.mesh.shape.get(DATA, 1) > 1 else None
    return _program(mesh, len(rows) == context.batch)(context, rows)


@functools.cache
def _program(mesh: Mesh | None, donate: bool) -> Any:
    def select(context: Any, rows: Array) -> Any:
        if mesh is None:
            return context.select(rows)
        # Left to itself XLA would add up the rows of all groups on every device.
        spread = context.partition()
        own = jax.shard_map(
            lambda context, rows: context.select(rows - axis_index(DATA) * context.batch),
            mesh=mesh,
            in_specs=(spread, PartitionSpec(DATA)),
            out_specs=spread,
            check_vma=False,
        )
        return own(context, rows)

    return jax.jit(select, donate_argnums=0 if donate else ())
