"""A GPU's part without a GPU: kernels in Pallas' interpreter, and programs compiled for an H200."""

import contextlib
import dataclasses
import importlib
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import jdsi
from jdsi.errors import ConfigError
from jdsi.pallas_kernels.device import H200, target
from jdsi.sharding.topology import topology_devices

_CORES = 4  # multiprocessors of the GPU that is played


@contextlib.contextmanager
def interpreted(operator: str) -> Iterator[None]:
    """An operator's kernels run in the interpreter, on an H200 of few multiprocessors.

    It lacks what some kernels need. In a checkout of the repository the tests teach it that; elsewhere those kernels
    fail, and are named.
    """
    tests = Path(jdsi.__file__).resolve().parents[1] / "tests"
    if (tests / "interpreting.py").is_file():
        if str(tests) not in sys.path:
            sys.path.append(str(tests))
        with importlib.import_module("interpreting").interpreting(operator, _CORES):
            yield
        return
    from jax.experimental.pallas import mosaic_gpu as plgpu

    mode = plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams())
    with mode, target(dataclasses.replace(H200, cores=_CORES)):
        yield


def why_not_compiled() -> str | None:
    """Why nothing can be compiled for an H200 here, or `None`."""
    try:
        topology_devices("h200")
    except ConfigError as error:
        return str(error)
    return None


def lowered_for_h200(function: Callable[..., Any], *arguments: Any, **options: Any) -> jax.stages.Lowered:
    """`function` traced and lowered for one H200, with kernels chosen as there.

    Args:
        function: what `jax.jit` takes.
        arguments: pytrees of arrays, or of shapes and dtypes.
        options: of `jax.jit`.

    Raises:
        ConfigError: there is no compiler for it.
    """
    everywhere = NamedSharding(Mesh(np.array(topology_devices("h200")), ("device",)), PartitionSpec())
    placed = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere), arguments)
    with target(H200):
        return jax.jit(function, **options).lower(*placed)


def compile_seconds(function: Callable[..., Any], *arguments: Any) -> float:
    """Seconds to trace, lower and compile `function` for one H200; see `lowered_for_h200`."""
    began = time.perf_counter()
    lowered = lowered_for_h200(function, *arguments)
    with target(H200):
        lowered.compile()
    return time.perf_counter() - began
