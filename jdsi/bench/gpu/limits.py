"""What the GPU and its link give to programs that do one thing only: the measures of all that follows."""

import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from ..calls import tree_bytes
from ..device_limits import DeviceLimits
from ..report import spread
from .backend import start
from .contenders import take_turns
from .stage_worker import Task

_ROUNDS = 5
_LAUNCHES = 200
_CALLS = 100
_LINK_ARRAYS, _LINK_BYTES = 8, 2**27
NO_GRAPHS: Mapping[str, Any] = {"xla_gpu_enable_command_buffer": ""}
"""Compiler options with which every kernel is launched by itself, and no CUDA graph holds it."""


def measure(task: Task) -> None:
    """Copies, a product, copies over the link both ways, and launches with and without CUDA graphs."""
    device = start(task)
    tiny = task.rehearsal
    limits = DeviceLimits(2**20, 128, "float32") if tiny else DeviceLimits.of(device.platform)
    link = link_copies(2, 2**16) if tiny else link_copies(_LINK_ARRAYS, _LINK_BYTES)
    launches = 10 if tiny else _LAUNCHES
    runs = {
        **limits.contenders(),
        **{name: run for name, (run, _) in link.items()},
        "kernels in CUDA graphs": partial(_launch_seconds, _chain(launches, {}), launches),
        "kernels launched one by one": partial(_launch_seconds, _chain(launches, NO_GRAPHS), launches),
        "host's part of a call": _call_seconds(),
    }
    figures = take_turns(task, "limits", runs, _ROUNDS)
    moved = {"copy": 2 * limits.copy_bytes, **{name: nbytes for name, (_, nbytes) in link.items()}}
    for name, seconds in figures.items():
        flops = 2 * limits.size**3 if name == "matmul" else None
        each = "launch" if name.startswith("kernels") else ""
        task.emit(name, each, seconds=spread(seconds), bytes=moved.get(name), flops=flops)


def link_copies(count: int, nbytes: int) -> dict[str, tuple[Callable[[], float], int]]:
    """Copies between pinned host memory and the device, by name, and how many bytes each moves.

    Args:
        count: arrays that are under way at a time.
        nbytes: of each.
    """
    device = jax.local_devices()[0]
    there, here = (jax.sharding.SingleDeviceSharding(device, memory_kind=kind) for kind in ("device", "pinned_host"))
    keys = jax.random.split(jax.random.key(0), count)
    on_device = [jax.random.bits(key, (nbytes // 4,), jnp.uint32) for key in keys]
    on_host = jax.block_until_ready(jax.device_put(on_device, here))

    def copy(arrays: Any, to: Any) -> float:
        began = time.perf_counter()
        jax.block_until_ready(jax.device_put(arrays, to))
        return time.perf_counter() - began

    return {
        "pinned host memory to the device": (partial(copy, on_host, there), tree_bytes(on_host)),
        "the device to pinned host memory": (partial(copy, on_device, here), tree_bytes(on_device)),
    }


def _chain(launches: int, options: Mapping[str, Any]) -> Callable[[], float]:
    """A program of so many kernels that do next to nothing, one after another; gives its seconds."""

    def program(x: jax.Array) -> jax.Array:
        for i in range(launches):
            x = jax.lax.optimization_barrier(x * 0.5 + i)
        return x

    x = jnp.ones(1024)
    compiled = jax.jit(program).lower(x).compile(dict(options))

    def run() -> float:
        began = time.perf_counter()
        compiled(x).block_until_ready()
        return time.perf_counter() - began

    return run


def _launch_seconds(run: Callable[[], float], launches: int) -> float:
    return min(run() for _ in range(10)) / launches


def _call_seconds() -> Callable[[], float]:
    increment, x = jax.jit(lambda x: x + 1), jnp.ones(())

    def run() -> float:
        jax.block_until_ready(increment(x))
        began = time.perf_counter()
        done = [increment(x) for _ in range(_CALLS)]
        seconds = time.perf_counter() - began
        jax.block_until_ready(done)
        return seconds / _CALLS

    return run
