"""Whether an operator's kernels are right at sizes of real models: before anything is timed, one process each."""

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jdsi.pallas_kernels import registry
from jdsi.pallas_kernels.device import H200, Device, current_device
from jdsi.pallas_kernels.operator import ArgumentSpec, Implementation, Operator

from ..calls import difference, tolerance
from ..contest import reason
from .backend import start
from .operator_cases import PROVEN, specs_of
from .stage_worker import Task
from .tiny_operators import tiny_spec

_REPEATS, _REHEARSED_REPEATS = 100, 2
_SEEDS = (0, 1)


def prove(task: Task, operator: str) -> None:
    """Compares every kernel of an operator with its reference, on fresh values and again and again on the same.

    Args:
        task: the stage's.
        operator: its name; the arguments are those of `PROVEN`.
    """
    device = start(task)
    found = registry.operators()[operator].operator
    specs = specs_of(operator, PROVEN[operator])
    if not task.rehearsal:
        for spec in task.cases(specs, lambda spec: spec.name):
            for kernel in found.kernels:
                _prove(task, found, spec, kernel, device, _REPEATS)
        return
    from .rehearsal import interpreted

    for kernel in found.kernels:
        if kernel == "pallas":
            with interpreted(operator):
                _prove(task, found, tiny_spec(operator), kernel, current_device(), _REHEARSED_REPEATS)
    if not task.short:
        _compile(task, found, specs)


def _prove(
    task: Task, operator: Operator, spec: ArgumentSpec, kernel: Implementation, device: Device, repeats: int
) -> None:
    static = dict(spec.static)
    if why := operator.why_not(kernel, *spec.abstract(), device=device, **static):
        task.emit(spec.name, kernel, skipped=why)
        return
    run = jax.jit(partial(operator, implementation=kernel, **static))
    reference, make = jax.jit(partial(operator.reference, **static)), jax.jit(spec.make)
    largest, others = 0.0, 0
    with contextlib.suppress(_Unproven):
        for seed in _SEEDS:
            with _named(task, spec, "", "its reference"):  # no fault of the kernel's
                arrays = make(jax.random.key(seed))
                expected = jax.block_until_ready(reference(*arrays))
            with _named(task, spec, kernel, kernel):
                results = jax.block_until_ready(run(*arrays))
                error, allowed = difference(results, expected), tolerance(expected)
                largest = max(largest, error)
                if not error <= allowed:
                    text = f"its results differ from the reference's by {error:.1e}, where {allowed:.1e} is rounding"
                    task.emit(spec.name, kernel, wrong=text, error=error)
                    return
                if seed == _SEEDS[-1]:
                    others = _different(lambda arrays=arrays: run(*arrays), results, repeats)
            del arrays, expected, results  # before others take their place
        if others:
            task.emit(spec.name, kernel, wrong=f"{others} of {repeats} runs on the same values give other bits")
            return
        task.emit(spec.name, kernel, error=largest, facts={"runs of equal bits": repeats})


class _Unproven(Exception):
    """Something failed, which is in the report."""


@contextlib.contextmanager
def _named(task: Task, spec: ArgumentSpec, kernel: str, doing: str) -> Iterator[None]:
    """Work on a kernel, or for "" on something else; where it fails or does not come back, that is the one to blame."""
    task.doing(f"{doing}, {spec.name}", kernel or None)
    try:
        yield
    except Exception as error:
        task.emit(spec.name, kernel, failed=reason(error) if kernel else f"{doing}: {reason(error)}")
        raise _Unproven from error
    task.doing(spec.name)


def _different(run: Callable[[], Any], first: Any, repeats: int) -> int:
    """How many of so many runs give other bits than the first."""
    return sum(not bool(_same_bits(run(), first)) for _ in range(repeats))


@jax.jit
def _same_bits(one: Any, other: Any) -> jax.Array:
    equal = [
        jnp.array_equal(_bits(x), _bits(y)) for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    ]
    return jnp.all(jnp.array(equal))


def _bits(x: jax.Array) -> jax.Array:
    if not jnp.issubdtype(x.dtype, jnp.inexact):
        return x
    return jax.lax.bitcast_convert_type(x, {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize])


def _compile(task: Task, operator: Operator, specs: list[ArgumentSpec]) -> None:
    """Compiles the kernel for an H200 at the sizes that are proven there."""
    from .rehearsal import compile_seconds, why_not_compiled

    if why := why_not_compiled():
        task.emit(f"{operator.name} for an H200", skipped=why)
        return
    for spec in task.cases(specs, lambda spec: spec.name):
        for kernel in operator.kernels:
            if kernel != "pallas":  # what is not Mosaic's has a compiler of its own
                continue
            if why := operator.why_not(kernel, *spec.abstract(), device=H200, **spec.static):
                task.emit(spec.name, kernel, skipped=why)
                continue
            with contextlib.suppress(_Unproven), _named(task, spec, kernel, f"compiling {kernel}"):
                call = partial(operator, implementation=kernel, **spec.static)
                seconds = compile_seconds(call, *spec.abstract())
                task.emit(spec.name, kernel, facts={"seconds to compile": round(seconds, 1)})
