"""One Triton kernel after another, launched on arrays that come through a pipe: a script, see triton_interpreter.py.

Triton chooses its interpreter when it is imported, so that needs a process of its own. Nothing of JAX is imported here.
"""

import importlib
import os
import pickle
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

ON_GPU = os.environ.get("JDSI_TEST_GPU") == "1"
GUARD = 256  # bytes before and after each buffer that no kernel may touch
POISON = 0xFF  # NaN in every float type


def main() -> None:
    """Answers launches until the pipe closes. Standard output carries the answers, so prints go elsewhere."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    if not ON_GPU:
        _mend_interpreter()
    while True:
        try:
            request = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            answer: Any = run(*request)
        except BaseException as error:
            answer = RuntimeError(f"{type(error).__name__}: {error}")
        pickle.dump(answer, answers)
        answers.flush()


def _mend_interpreter() -> None:
    """Triton 3.9's interpreter keeps bfloat16 as its bits, and mistakes those for numbers, or truncates to them."""
    import ml_dtypes
    import triton.language as tl
    from triton.runtime import interpreter

    multiply = interpreter.InterpreterBuilder.create_dot

    def widened(x: Any) -> Any:
        if x.dtype.scalar != tl.bfloat16:
            return x
        bits = x.data.astype(np.uint32) << np.uint32(16)
        return interpreter.TensorHandle(bits.view(np.float32), tl.float32)

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return multiply(self, widened(a), widened(b), *rest)

    convert = interpreter._convert_float

    def rounded(data: Any, source: Any, result: Any, mode: Any) -> Any:
        if (source, result) != (tl.float32, tl.bfloat16):
            return convert(data, source, result, mode)
        return data.astype(ml_dtypes.bfloat16).view(np.uint16)

    cast = interpreter.InterpreterBuilder.cast_impl

    def cast_impl(self: Any, source: Any, target: Any) -> Any:
        if target.scalar == tl.bfloat16 and source.dtype.scalar.is_int():
            source = cast(self, source, tl.float32)
        return cast(self, source, target)

    interpreter.InterpreterBuilder.create_dot = create_dot
    interpreter.InterpreterBuilder.cast_impl = cast_impl
    interpreter._convert_float = rounded


def run(
    module: str,
    name: str,
    operands: Sequence[Any],
    out: Sequence[tuple[tuple[int, ...], np.dtype]],
    grid: tuple[int, ...],
    options: dict[str, int],
    constants: dict[str, Any],
) -> list[np.ndarray]:
    """One launch, on the CPU or on the GPU. Results start as NaN; a write outside of them is an error."""
    import torch

    kernel = getattr(importlib.import_module(module), name)
    buffers: list[tuple[Any, np.ndarray | None]] = []

    def place(array: np.ndarray | None, shape: tuple[int, ...], dtype: np.dtype) -> Any:
        size = int(np.prod(shape)) * dtype.itemsize
        buffer = torch.full((size + 2 * GUARD,), POISON, dtype=torch.uint8)
        if array is not None:
            buffer[GUARD : GUARD + size] = torch.from_numpy(array.reshape(-1).view(np.uint8).copy())
        buffer = buffer.to("cuda" if ON_GPU else "cpu")
        buffers.append((buffer, array))
        return buffer[GUARD : GUARD + size].view(getattr(torch, dtype.name)).reshape(shape)

    given = [place(x, x.shape, x.dtype) if isinstance(x, np.ndarray) else x for x in operands]
    results = [place(None, shape, dtype) for shape, dtype in out]
    kernel[grid](*given, *results, **constants, **(options if ON_GPU else {}))
    found = []
    for buffer, array in buffers:
        held = buffer.cpu().numpy()
        if (held[:GUARD] != POISON).any() or (held[len(held) - GUARD :] != POISON).any():
            raise AssertionError(f"{name} wrote outside of its arrays")
        if array is not None and held[GUARD:-GUARD].tobytes() != array.tobytes():
            raise AssertionError(f"{name} wrote to its operands")
        if array is None:
            found.append(held[GUARD:-GUARD])
    return [x.view(dtype).reshape(shape) for x, (shape, dtype) in zip(found, out, strict=True)]


if __name__ == "__main__":
    main()
