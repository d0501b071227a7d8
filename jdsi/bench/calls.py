"""The time of one operator call on the device, taken from the host.

A call can take less time than the host needs to start it, and its operands can fit a cache that they would not be in
when a model runs. So what is timed is one compiled program of many calls, each on operands of its own: calls follow
each other without the host, and by the time operands come round again the cache holds others.
"""

import math
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jdsi.pallas_kernels.device import current_device
from jdsi.pallas_kernels.operator import ArgumentSpec, Arrays

# What the calls of one program touch together where memory allows: four times the cache of an H200 (50 MB), for its
# replacement is not strictly by age.
_TOUCHED = 2**28
_MOST, _MOST_ON_CPU = 64, 8  # where starting a call costs nothing beside it
_FIGURE_SECONDS = 0.02  # a figure is the mean over about so long


def tree_bytes(tree: Any) -> int:
    """Bytes of all arrays, which may be abstract."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def call_count(spec: ArgumentSpec, footprint: int, max_bytes: int) -> int:
    """How many calls one program makes; 0 if the operands and results of one, `footprint`, exceed `max_bytes`.

    Operands of less than 4 MB are repeated 64 times only (on a CPU 8). What of them stays in the cache would do so in a
    model too, where the operation before has just written it.
    """
    # Two calls at least, so that the host starts one while another runs.
    most = _MOST_ON_CPU if current_device().platform == "cpu" else _MOST
    wanted = min(max(-(-_TOUCHED // max(spec.bytes, 1)), 2), most)
    return min(wanted, max_bytes // max(footprint, 1))


class Operands:
    """Random operands for a number of calls; those that are updated in place are replaced by every run.

    Args:
        spec: makes them.
        calls: sets of operands.
        seed: equal seeds give equal operands.
    """

    def __init__(self, spec: ArgumentSpec, calls: int, seed: int = 0) -> None:
        make = jax.jit(spec.make)
        sets = [make(key) for key in jax.random.split(jax.random.key(seed), calls)]
        self._in_place = spec.in_place
        self.kept = [tuple(None if i in spec.in_place else a for i, a in enumerate(arrays)) for arrays in sets]
        self.updated = [tuple(arrays[i] for i in spec.in_place) for arrays in sets]
        jax.block_until_ready((self.kept, self.updated))

    def merge(self, kept: Arrays, updated: Arrays) -> Arrays:
        """The arguments of one call."""
        arrays = list(kept)
        for i, array in zip(self._in_place, updated, strict=True):
            arrays[i] = array
        return tuple(arrays)

    def replace(self, results: list[Any]) -> None:
        """Takes the updated arrays from the results: of each the first with its shape and dtype, as donation does."""
        self.updated = [_take(updated, result) for updated, result in zip(self.updated, results, strict=True)]


def _take(updated: Arrays, result: Any) -> Arrays:
    left = jax.tree.leaves(result)

    def first_like(array: Any) -> Any:
        place = next(i for i, leaf in enumerate(left) if (leaf.shape, leaf.dtype) == (array.shape, array.dtype))
        return left.pop(place)

    return jax.tree.map(first_like, updated)


class Calls:
    """Calls of `function`, one after the other, on all sets of `operands`, as one compiled program."""

    def __init__(self, function: Callable[..., Any], operands: Operands) -> None:
        call = jax.jit(function)  # traced once, however many calls there are

        def program(updated: list[Arrays], kept: list[Arrays]) -> list[Any]:
            results: list[Any] = []
            for arrays in map(operands.merge, kept, updated):
                if results:  # XLA must neither merge two calls nor run them at the same time
                    arrays, results[-1] = jax.lax.optimization_barrier((arrays, results[-1]))
                results.append(call(*arrays))
            return results

        self.program = jax.jit(program, donate_argnums=0)
        self.operands = operands
        self._repeats: int | None = None

    def run(self) -> list[Any]:
        """The results of all calls, perhaps before they are ready."""
        results = self.program(self.operands.updated, self.operands.kept)
        self.operands.replace(results)
        return results

    def seconds(self) -> float:
        """Mean time of one call; the first run, which is not timed, compiles."""
        jax.block_until_ready(self.run())
        if self._repeats is None:
            self._repeats = max(1, round(_FIGURE_SECONDS / self._timed(1)))
        return self._timed(self._repeats) / (self._repeats * len(self.operands.kept))

    def _timed(self, repeats: int) -> float:
        start = time.perf_counter()
        for _ in range(repeats):
            results = self.run()
        jax.block_until_ready(results)  # pyright: ignore[reportPossiblyUnboundVariable]
        return time.perf_counter() - start


def difference(actual: Any, expected: Any) -> float:
    """How far results are from those expected; NaN where one is not a number.

    Per array the larger of two: the norm of the difference over the norm of what is expected, which sees many small
    errors, and the largest difference over the largest value, which sees a few wrong values among many.
    """
    found, wanted = jax.tree.leaves(actual), jax.tree.leaves(expected)
    if [(x.shape, x.dtype) for x in found] != [(y.shape, y.dtype) for y in wanted]:
        return math.inf
    errors = [float(_difference(x, y)) for x, y in zip(found, wanted, strict=True) if x.size]
    return math.nan if any(map(math.isnan, errors)) else max(errors, default=0.0)


@jax.jit
def _difference(actual: jax.Array, expected: jax.Array) -> jax.Array:
    actual, expected = actual.astype(jnp.float32), expected.astype(jnp.float32)
    wrong = jnp.where(actual == expected, 0, jnp.abs(actual - expected))  # equal infinities are no difference
    expected = jnp.where(jnp.isinf(expected), 0, expected)
    smallest = jnp.finfo(jnp.float32).tiny
    norms = jnp.linalg.norm(wrong.ravel()) / jnp.maximum(jnp.linalg.norm(expected.ravel()), smallest)
    return jnp.maximum(norms, wrong.max() / jnp.maximum(jnp.abs(expected).max(), smallest))


def tolerance(results: Any) -> float:
    """The largest `difference` that rounding explains: a few steps of the coarsest floating dtype among the results."""
    steps = [
        float(jnp.finfo(leaf.dtype).eps)
        for leaf in jax.tree.leaves(results)
        if jnp.issubdtype(leaf.dtype, jnp.floating)
    ]
    return 3 * max(steps, default=2**-7) + 1e-4
