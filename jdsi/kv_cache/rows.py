"""Pytrees whose arrays have one entry per row of a batch."""

import functools
from collections.abc import Sequence
from typing import Any, Protocol, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int

from jdsi.sharding import DATA, axis_index


@jax.jit
def _join[Tree](trees: tuple[Tree, ...]) -> Tree:
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *trees)


def join_rows[Tree](trees: Sequence[Tree]) -> Tree:
    """The rows of several pytrees of the same structure, one behind another."""
    return _join(tuple(trees))


class Divided(Protocol):
    """A pytree that knows how it lies on a mesh, see `AttentionContext.partition`."""

    def partition(self) -> Self:
        """A `PartitionSpec` in place of each array."""
        ...


def select_rows[Tree: Divided](tree: Tree, rows: Int[Array | np.ndarray, " N"]) -> Tree:
    """Row i is a copy of row `rows[i]`; where there are as many as before, the arrays are donated.

    On a mesh a row must lie in the same group of the axis "data" as the one it is copied from.
    """
    first = jax.tree.leaves(tree)[0]
    mesh = first.sharding.mesh if isinstance(first.sharding, NamedSharding) else None
    divided = mesh is not None and mesh.shape.get(DATA, 1) > 1
    return _select(mesh if divided else None, len(rows) == len(first))(tree, rows)


@functools.lru_cache(maxsize=64)
def _select(mesh: Mesh | None, donate: bool) -> Any:
    def take(tree: Any, rows: Array) -> Any:
        return jax.tree.map(lambda leaf: jnp.take(leaf, rows - axis_index(DATA) * leaf.shape[0], axis=0), tree)

    def select(tree: Any, rows: Array) -> Any:
        if mesh is None:
            return take(tree, rows)
        # Left to itself XLA would add up the rows of all groups on every device.
        spread = tree.partition()
        own = jax.shard_map(take, mesh=mesh, in_specs=(spread, PartitionSpec(DATA)), out_specs=spread, check_vma=False)
        return own(tree, rows)

    return jax.jit(select, donate_argnums=0 if donate else ())
