"""Over which axes of a mesh values differ inside `jax.shard_map`, a part of their type that kernels lose."""

from typing import Any

import jax


def varying_axes(arrays: Any) -> frozenset[Any]:
    """The mesh axes over which any array of the pytree differs from device to device."""
    leaves = [x for x in jax.tree.leaves(arrays) if hasattr(x, "dtype")]
    return frozenset[Any]().union(*(jax.typeof(x).manual_axis_type.varying for x in leaves))


def vary_like(results: Any, arrays: Any) -> Any:
    """`results` typed to differ over every axis over which `arrays` do: so do values computed from them.

    Without it `jax.shard_map` would take the results of kernels for equal on all devices.
    """
    axes = varying_axes(arrays)

    def cast(y: jax.Array) -> jax.Array:
        missing = tuple(axes - jax.typeof(y).manual_axis_type.varying)
        return jax.lax.pcast(y, missing, to="varying") if missing else y

    return jax.tree.map(cast, results)
