"""Pytrees whose arrays have one entry per row of a batch."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp


@jax.jit
def _join[Tree](trees: tuple[Tree, ...]) -> Tree:
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *trees)


def join_rows[Tree](trees: Sequence[Tree]) -> Tree:
    """The rows of several pytrees of the same structure, one behind another."""
    return _join(tuple(trees))
