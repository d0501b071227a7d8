"""The three proofs of a GPU kernel: interpreted here, compiled for the H200 here, run where there is a GPU."""

import contextlib
import dataclasses
import os
import re
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret.interpret_pallas_call import reset_gpu_interpret_mode_state
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from bulk_copies import bulk_copies
from compilation import few_optimizations
from jdsi.pallas_kernels.device import H200, target
from jdsi.sharding.topology import topology_devices
from lowered import recorded

ON_GPU = os.environ.get("JDSI_TEST_GPU") == "1"
RELATIVE = {"float32": 1e-5, "bfloat16": 1e-2, "float16": 2e-3}


@contextlib.contextmanager
def interpreted(cores: int = 2) -> Iterator[None]:
    """Runs Mosaic GPU kernels in the interpreter on a Hopper GPU of `cores` multiprocessors.

    Memory starts as NaN; a copy to global memory that a GPU would not end with its row is an error.
    """
    mode = plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True))
    with mode, target(dataclasses.replace(H200, cores=cores)), few_optimizations(), bulk_copies():
        try:
            yield
        except BaseException:
            reset_gpu_interpret_mode_state()
            raise


@contextlib.contextmanager
def interpreted_or_gpu(cores: int = 2) -> Iterator[None]:
    """The interpreter, or under `make test-gpu` the GPU itself: the same cases serve both."""
    with contextlib.nullcontext() if ON_GPU else interpreted(cores):
        yield


def with_slow(names: Iterable[str], slow: Collection[str]) -> list[Any]:
    """`names` for `parametrize`; those in `slow` prove nothing that others do not, and run with `make test-all`."""
    names = list(names)
    assert set(slow) <= set(names), set(slow) - set(names)
    return [pytest.param(name, marks=pytest.mark.slow) if name in slow else name for name in names]


def array(x: Any, dtype: Any = None) -> jax.Array:
    """An array on the device that NumPy has converted: JAX would compile a program for every shape."""
    return jnp.asarray(np.asarray(x, None if dtype is None else jnp.dtype(dtype)))


def relative_error(actual: Any, expected: Any) -> float:
    """Relative norm of the difference; a NaN anywhere gives NaN, which no comparison passes."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    return float(np.linalg.norm(actual - expected) / max(np.linalg.norm(expected), 1e-30))


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A program compiled for an H200.

    Attributes:
        text: the optimised HLO.
        registers: most registers per thread of any Mosaic kernel in it, 0 if it has none.
        spills: bytes of register spills of the worst of them.
    """

    text: str
    registers: int
    spills: int


def compile_for_h200(function: Callable[..., Any], *arguments: Any, donate: tuple[int, ...] = ()) -> Compiled:
    """Compiles `function` for one H200; `arguments` are pytrees of shapes and dtypes, `None` included.

    Kernels are chosen as on that GPU, so `implementation=None` finds them. On the way their launches and copies are
    looked at: none may be beyond the hardware's limits, or leave a row of an array (see lowered.py).
    """
    mesh = Mesh(np.array(topology_devices("h200")), ("device",))
    everywhere = NamedSharding(mesh, PartitionSpec())
    placed = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere), arguments)
    with target(H200), tempfile.TemporaryFile("w+") as file:
        with _native_output_to(file.fileno()), recorded() as launches:
            text = jax.jit(function, donate_argnums=donate).lower(*placed).compile().as_text() or ""
        file.seek(0)
        report = file.read()
    found = (
        max(map(int, re.findall(r"Used (\d+) registers", report)), default=0),
        sum(map(int, re.findall(r"(\d+) bytes spill (?:stores|loads)", report))),
    )
    assert not [fault for launch in launches for fault in launch.faults()]
    # A kernel that this process has compiled before is not compiled, nor reported on, again.
    kernels = re.findall(r'kernel_hash = "((?:[^"\\]|\\.)*)"', text)
    reports = [_REPORTS.setdefault(kernel, found) for kernel in kernels]
    registers, spills = (max(column, default=0) for column in zip(*reports, strict=True)) if reports else (0, 0)
    print(f"{len(kernels)} Mosaic kernels: at most {registers} registers a thread, {spills} bytes spilled")
    return Compiled(text, registers, spills)


_REPORTS: dict[str, tuple[int, int]] = {}  # by kernel: registers and spills of the program that it was first part of


@contextlib.contextmanager
def _native_output_to(descriptor: int) -> Iterator[None]:
    """Sends what native code writes to standard output, here the assembler's report on every kernel, to a file."""
    os.environ["MOSAIC_GPU_DUMP_PTXAS"] = "1"
    saved = os.dup(1)
    os.dup2(descriptor, 1)
    try:
        yield
    finally:
        os.dup2(saved, 1)
        os.close(saved)
        del os.environ["MOSAIC_GPU_DUMP_PTXAS"]
