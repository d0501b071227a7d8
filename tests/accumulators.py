"""Teaches Pallas' GPU interpreter what flash attention needs: weights in registers and accumulators that carry on."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels import ON_GPU
from register_operands import register_operands


@contextlib.contextmanager
def accumulators() -> Iterator[None]:
    """Within it kernels may use `pl.run_state(body)(plgpu.ACC.init(array))`: the products are summed apart, then added.

    Also takes a `wgmma` whose left operand is an array. On a GPU nothing is changed.
    """
    if ON_GPU:
        yield
        return
    with register_operands(), mock.patch.object(pl, "run_state", _run_state):
        yield


_plain_run_state = pl.run_state


def _run_state(body: Callable[[Any], None]) -> Callable[[Any], Any]:
    def run(initial: Any) -> Any:
        if not hasattr(initial, "_init"):  # no accumulator
            return _plain_run_state(body)(initial)

        def scope(accumulator: Any) -> jax.Array:
            body(accumulator)
            return accumulator[...]

        return initial._init + pl.run_scoped(scope, plgpu.ACC(initial.shape, initial.dtype))

    return run
