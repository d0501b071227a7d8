"""Triton kernels without a GPU: run by Triton's interpreter, and compiled for GPUs that are not there."""

import atexit
import contextlib
import dataclasses
import functools
import os
import pickle
import re
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from jdsi.pallas_kernels import triton_support
from jdsi.pallas_kernels.device import Device, target

ON_GPU = os.environ.get("JDSI_TEST_GPU") == "1"

A100 = Device("NVIDIA A100-SXM4-80GB", "cuda", (8, 0), cores=108, shared_memory=163 * 1024)
RTX3090 = Device("NVIDIA GeForce RTX 3090", "cuda", (8, 6), cores=82, shared_memory=99 * 1024)
L40 = Device("NVIDIA L40", "cuda", (8, 9), cores=142, shared_memory=99 * 1024)

_LOCK = threading.Lock()


@functools.cache
def _worker() -> subprocess.Popen:
    settings = {"PYTHONPATH": os.pathsep.join(sys.path)} | ({} if ON_GPU else {"TRITON_INTERPRET": "1"})
    script = Path(__file__).with_name("triton_worker.py")
    process = subprocess.Popen(
        [sys.executable, str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=os.environ | settings
    )

    @atexit.register
    def stop() -> None:
        assert process.stdin is not None
        process.stdin.close()
        process.wait()

    return process


def _remote(request: tuple) -> list[np.ndarray]:
    process = _worker()
    assert process.stdin is not None
    assert process.stdout is not None
    with _LOCK:  # devices of a mesh launch at the same time
        try:
            pickle.dump(request, process.stdin)
            process.stdin.flush()
            answer = pickle.load(process.stdout)
        except (EOFError, BrokenPipeError):
            _worker.cache_clear()  # the next launch has a new one
            answer = RuntimeError(f"{request[1]} broke down, as a kernel does that reads far outside of its arrays")
    if isinstance(answer, BaseException):
        raise answer
    return answer


@contextlib.contextmanager
def _calling(call: Callable[..., Any]) -> Iterator[None]:
    """Launches go to `call`; jax-triton, which would take them, need not be installed."""
    with mock.patch.multiple(triton_support, _call=call, _installed=lambda: True):
        yield


@contextlib.contextmanager
def interpreted_triton(cores: int = 4) -> Iterator[None]:
    """Runs Triton kernels in the interpreter as on an A100 of `cores` multiprocessors; on a GPU through PyTorch.

    Memory starts as NaN, also before and after every array.
    """

    def call(
        kernel: Any, operands: Sequence[Any], out: Any, grid: Any, device: Any, warps: int, stages: int, constants: Any
    ):
        arrays = [x for x in operands if isinstance(x, jax.Array)]
        results = [(tuple(x.shape), np.dtype(x.dtype)) for x in out]

        def launch(*arrays: Any) -> list[np.ndarray]:
            given = iter(arrays)
            every = [np.asarray(next(given)) if isinstance(x, jax.Array) else x for x in operands]
            options = {"num_warps": warps, "num_stages": stages}
            return _remote((kernel.fn.__module__, kernel.fn.__name__, every, results, grid, options, constants))

        return jax.pure_callback(launch, list(out), *arrays, vmap_method="sequential")

    device = dataclasses.replace(A100, kind="Triton's interpreter", cores=cores)
    with _calling(call), target(device):
        yield


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A kernel as compiled for a GPU: its name and what a thread and a block of it take."""

    name: str
    registers: int
    spills: int
    shared_memory: int


def compile_for(device: Device, function: Callable[..., Any], *arguments: Any) -> list[Compiled]:
    """The Triton kernels that `function` launches, compiled for `device`; `arguments` are shapes and dtypes."""
    compiled = []

    def call(
        kernel: Any, operands: Sequence[Any], out: Any, grid: Any, device: Any, warps: int, stages: int, constants: Any
    ):
        compiled.append(_compile(kernel, [*operands, *out], device, warps, stages, constants))
        return [jnp.zeros(x.shape, x.dtype) for x in out]

    with _calling(call), target(device):
        jax.eval_shape(function, *arguments)
    return compiled


def _compile(kernel: Any, operands: Sequence[Any], device: Device, warps: int, stages: int, constants: Any) -> Compiled:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    capability = 10 * device.capability[0] + device.capability[1]
    names = [name for name in kernel.arg_names if name not in constants]
    signature, values, attributes = dict.fromkeys(constants, "constexpr"), dict(constants), {}
    for name, operand in zip(names, operands, strict=True):
        if hasattr(operand, "dtype"):
            signature[name] = f"*{_TYPES[np.dtype(operand.dtype).name]}"
            attributes[(kernel.arg_names.index(name),)] = [["tt.divisibility", 16]]
        elif operand is None or operand == 1:
            signature[name], values[name] = "constexpr", operand
        else:
            signature[name] = "fp32" if isinstance(operand, float) else "i32"
    signature = {name: signature[name] for name in kernel.arg_names}
    source = ASTSource(kernel, signature, {(kernel.arg_names.index(k),): v for k, v in values.items()}, attributes)
    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
    result = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    assert result.metadata.shared <= device.shared_memory, f"{kernel.fn.__name__}: {result.metadata.shared} bytes"
    assembler = triton.knobs.nvidia.ptxas if capability < 90 else triton.knobs.nvidia.ptxas_blackwell
    architecture = f"sm_{capability}{'a' if capability >= 90 else ''}"
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(result.asm["ptx"])
        file.flush()
        command = [assembler.path, "-v", f"--gpu-name={architecture}", file.name, "-o", os.devnull]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return Compiled(
        kernel.fn.__name__,
        max(map(int, re.findall(r"Used (\d+) registers", report))),
        sum(map(int, re.findall(r"(\d+) bytes spill (?:stores|loads)", report))),
        result.metadata.shared,
    )


_TYPES = {
    "bfloat16": "bf16",
    "float16": "fp16",
    "float32": "fp32",
    "int32": "i32",
    "int16": "i16",
    "int8": "i8",
    "uint8": "u8",
    "float8_e4m3fn": "fp8e4nv",
    "float8_e5m2": "fp8e5",
}
