"""Which tiles of keys a row's queries see, and where each lies in memory."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from .plan import Inputs, Plan


class Tiles(NamedTuple):
    """The tiles that some query of a row can see, numbered without gaps.

    Attributes:
        sinks: tiles in front of the window's first that hold sinks.
        skipped: tiles between those and the window's first.
        count: tiles in all.
    """

    sinks: jax.Array
    skipped: jax.Array
    count: jax.Array

    def position(self, number: jax.Array) -> jax.Array:
        """Which tile of the row is the `number`-th visible one."""
        return number + jnp.where(number < self.sinks, 0, self.skipped)


def visible_tiles(plan: Plan, q_start: jax.Array, k_length: jax.Array) -> Tiles:
    """The tiles between the first and the last key that `form`, `sinks` and the length leave."""
    form, keys = plan.form, plan.tiling.keys
    end = k_length
    if form.causal:
        end = jnp.minimum(end, q_start + plan.length)
    elif form.window is not None:
        end = jnp.minimum(end, q_start + (plan.length - 1 + form.window))
    end = lax.div(jnp.maximum(end, 0) + (keys - 1), keys)
    if form.window is None:
        return Tiles(end * 0, end * 0, end)
    first = jnp.minimum(lax.div(jnp.maximum(q_start - (form.window - 1), 0), keys), end)
    sinks = jnp.minimum(-(-plan.sinks // keys), first)
    return Tiles(sinks, first - sinks, sinks + end - first)


class Place(NamedTuple):
    """Where one copy of a tile begins.

    Attributes:
        index: along the first axis of k and v; beyond its end for a hole.
        key: along the second.
    """

    index: jax.Array
    key: jax.Array


class Memory(NamedTuple):
    """The keys and values of one key/value head of one row.

    Attributes:
        plan, inputs: of the call.
        sequence, head: which row, which head.
        tiles: those of the row.
    """

    plan: Plan
    inputs: Inputs
    sequence: jax.Array
    head: jax.Array
    tiles: Tiles

    def find(self, number: jax.Array) -> list[Place]:
        """The copies that bring the `number`-th visible tile."""
        plan = self.plan
        key = self.tiles.position(number) * plan.tiling.keys
        if not plan.page:
            return [Place(self.sequence * plan.kv_heads + self.head, key)]
        columns = self.inputs.block_tables.shape[1]
        places = []
        for i in range(plan.copies):
            column = lax.div(key, plan.page) + i
            page = self.inputs.block_tables[self.sequence, jnp.clip(column, 0, columns - 1)]
            there = (column < columns) & (page >= 0) & (page < plan.pages)
            # A copy from beyond the array's end reads nothing and fills with zeros.
            index = jnp.where(there, page, plan.pages) * plan.kv_heads + jnp.where(there, self.head, 0)
            places.append(Place(index, lax.rem(key, plan.page)))
        return places

    def is_there(self, number: jax.Array, key: jax.Array) -> jax.Array:
        """Whether each of a tile's keys, given by their place in it, is on a page and not in a hole."""
        end, per_copy = self.plan.pages * self.plan.kv_heads, self.plan.tiling.keys // self.plan.copies
        holes = jnp.int32(0)
        for i, place in enumerate(self.find(number)):
            holes |= jnp.where(place.index >= end, 1 << i, 0)
        return lax.shift_right_logical(jnp.broadcast_to(holes, key.shape), lax.div(key, per_copy)) & 1 == 0

    def copy(self, places: list[Place], which: str, memory: dict[str, Any], slot: jax.Array) -> None:
        """Starts the copies of a tile of "k" or "v", with its scales, to a slot of shared memory."""
        source, target, ready = getattr(self.inputs, which), memory[which], memory[f"{which}_ready"].at[slot]
        size = self.plan.tiling.keys // len(places)
        for i, (index, key) in enumerate(places):
            there = pl.ds(i * size, size)
            # Where the target is wider than the array, the copy reaches beyond its end and fills with zeros.
            width = pl.ds(index * 0, target.shape[-1])
            plgpu.copy_gmem_to_smem(source.at[index, pl.ds(key, size), width], target.at[slot, there], ready)
            if self.plan.narrow:
                scales = getattr(self.inputs, f"{which}_scales").at[index, pl.ds(key, size)]
                plgpu.copy_gmem_to_smem(scales, memory[f"{which}_scales"].at[slot, there], ready)
