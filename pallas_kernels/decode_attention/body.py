"""What one block of the decode attention kernel does: one part of the keys of one key/value head of one row."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ..mosaic import block_indices
from .block import Span, on_leader
from .by_key import ByKey
from .by_query import ByQuery
from .plan import Inputs, Plan
from .tiles import Memory, visible_tiles


def body(plan: Plan, inputs: Inputs, results: Sequence[Any], memory: dict[str, Any]) -> None:
    """Writes one part's result and logarithm; one without visible keys writes zeros and -inf.

    Args:
        results: `[split, row, column, value dim]` and `[split, row, column]`, or, where nothing is left to be combined,
            what `decode_attention` returns alone.
    """
    row, split, column_tile = block_indices(inputs.q.shape[0], plan.tiling.splits, plan.column_tiles)
    first_column = column_tile * plan.tiling.columns
    columns = pl.ds(first_column, plan.tiling.columns)
    group = lax.axis_index("warpgroup") if plan.warpgroups > 1 else None

    @on_leader(group)
    def _() -> None:
        plgpu.copy_gmem_to_smem(inputs.q.at[row, columns], memory["q"], memory["q_ready"])

    sequence, head = lax.div(row, plan.kv_heads), lax.rem(row, plan.kv_heads)
    q_start, k_length = inputs.q_start[sequence], jnp.minimum(inputs.k_lengths[sequence], plan.capacity)
    tiles = visible_tiles(plan, q_start, k_length)
    share = lax.div(tiles.count + (plan.tiling.splits - 1), plan.tiling.splits)
    begin = jnp.minimum(split * share, tiles.count)
    stop = jnp.minimum(begin + share, tiles.count)
    source = Memory(plan, inputs, sequence, head, tiles)
    span = Span(begin, stop, first_column, q_start, k_length)
    block = (ByQuery if plan.by_query else ByKey)(plan, source, memory, group, span)
    block.fill()
    if inputs.slopes is not None:
        block.load_slopes(inputs.slopes.at[head, columns])
    plgpu.barrier_wait(memory["q_ready"])
    sums, state = block.attend()
    if plan.direct:
        assert isinstance(block, ByKey)  # the others leave no shared memory to write results through
        block.send(sums, state, results[0].at[sequence], head)
    else:
        out, lse = results
        block.write(sums, state, out.at[split, row, columns], lse.at[split, row, columns])
