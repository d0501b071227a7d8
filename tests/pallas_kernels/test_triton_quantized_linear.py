"""The skinny product with quantised weights in Triton: interpreted (or on the GPU), compiled for its GPUs."""

import dataclasses
import importlib.metadata
import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("triton")

from jdsi.pallas_kernels.device import H200
from jdsi.pallas_kernels.linear.form import LinearForm
from jdsi.pallas_kernels.normalization import NormForm
from jdsi.pallas_kernels.quantized_linear import QuantizedWeight, WeightFormat, dequantize, quantize, triton
from kernels import RELATIVE, array, relative_error
from triton_interpreter import A100, compile_for, interpreted_triton

TRITON = tuple(map(int, importlib.metadata.version("triton").split(".")[:2]))
FORMATS = {
    "int8": WeightFormat("int8"),
    "int8 groups": WeightFormat("int8", group=64),
    "int8 small groups": WeightFormat("int8", group=32, scale_dtype="float16"),
    "int4": WeightFormat("int4", group=128),
    "int4 zeros": WeightFormat("int4", group=64, zero_points=True),
    "int4 small groups": WeightFormat("int4", group=32, zero_points=True, scale_dtype="float32"),
    "fp8": WeightFormat("fp8"),
    "fp8 blocks": WeightFormat("fp8", blocks=True),
}
SMALL = {"block_out": 32, "stages": 2}
FLOAT32 = np.dtype(np.float32)


def make(
    form: WeightFormat, tokens: int, outputs: int, inputs: int, dtype: Any = jnp.bfloat16, seed: int = 0
) -> tuple[jax.Array, QuantizedWeight, np.ndarray]:
    """Tokens, a weight, and their product in float64."""
    rng = np.random.default_rng(seed)
    x = array(rng.standard_normal((tokens, inputs)), dtype)
    weight = quantize(rng.standard_normal((outputs, inputs)) / math.sqrt(inputs), form)
    return x, weight, np.asarray(x, np.float64) @ np.asarray(dequantize(weight), np.float64).T


def run(*arrays: Any, config: Any = SMALL, **form: Any) -> np.ndarray:
    arrays += (None,) * (4 - len(arrays))
    with interpreted_triton():
        return jax.jit(partial(triton.run, device=A100, config=config, form=LinearForm(**form)))(*arrays)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
def test_equals_float64(form: WeightFormat, dtype: str) -> None:
    x, weight, expected = make(form, 3, 136, 256, dtype)
    # The sums are exact but for float32 roundings, whatever the format.
    assert relative_error(run(x, weight, out_dtype=FLOAT32), expected) < 1e-6
    assert relative_error(run(x, weight), expected) < RELATIVE[dtype]


@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
def test_gate_and_splits(form: WeightFormat) -> None:
    x, weight, expected = make(form, 5, 144, 384, seed=1)
    for splits in (1, 2):
        y = run(x, weight, config=SMALL | {"splits": splits}, gated=True, out_dtype=FLOAT32)
        assert relative_error(y, expected[:, :72] * expected[:, 72:]) < 1e-6


@pytest.mark.parametrize(("tokens", "outputs", "inputs", "splits"), [(1, 17, 32, 1), (9, 33, 352, 3), (64, 48, 96, 2)])
@pytest.mark.parametrize("name", ["int8", "int4 small groups", "fp8"])
def test_odd_sizes(name: str, tokens: int, outputs: int, inputs: int, splits: int) -> None:
    for seed in range(2):
        x, weight, expected = make(FORMATS[name], tokens, outputs, inputs, seed=seed)
        assert relative_error(run(x, weight, config=SMALL | {"splits": splits}), expected) < RELATIVE["bfloat16"]


def test_what_follows_the_product() -> None:
    x, weight, product = make(FORMATS["int4"], 4, 48, 256)
    rng = np.random.default_rng(0)
    bias, residual = (array(rng.standard_normal(shape), jnp.bfloat16) for shape in ((48,), (4, 48)))
    for splits in (1, 2):
        y = run(x, weight, bias, residual, config=SMALL | {"splits": splits}, activation="relu")
        expected = np.asarray(residual, np.float64) + np.maximum(product + np.asarray(bias, np.float64), 0)
        assert relative_error(y, expected) < RELATIVE["bfloat16"]


def test_every_fp8_number_is_exact() -> None:
    numbers = np.arange(256, dtype=np.uint8).view(jnp.float8_e4m3fn)
    numbers = numbers[np.isfinite(numbers.astype(np.float32))]
    values = np.zeros((len(numbers), 32), jnp.float8_e4m3fn)
    values[:, 0] = numbers
    weight = QuantizedWeight(jnp.asarray(values), jnp.ones((1, len(numbers))), None, FORMATS["fp8"])
    for dtype in (jnp.bfloat16, jnp.float16):
        y = run(jnp.ones((1, 32), dtype), weight, out_dtype=FLOAT32)
        np.testing.assert_array_equal(y[0], numbers.astype(np.float32))


def test_tokens_do_not_depend_on_their_company() -> None:
    x, weight, _ = make(FORMATS["int4 zeros"], 40, 32, 128)
    together = run(x, weight)
    for tokens in (1, 5, 16):
        np.testing.assert_array_equal(run(x[:tokens], weight), together[:tokens])


@pytest.mark.aot
@pytest.mark.parametrize("device", [A100, H200], ids=lambda d: d.kind)
@pytest.mark.parametrize("name", ["int8", "int8 groups", "int4", "int4 zeros", "fp8", "fp8 blocks"])
def test_compiles(name: str, device: Any) -> None:
    weight = jax.eval_shape(lambda: quantize(jnp.zeros((8192, 4096)), FORMATS[name]))
    for tokens, gated in ((1, False), (64, True)):
        x = jax.ShapeDtypeStruct((tokens, 4096), jnp.bfloat16)
        call = partial(triton.run, device=device, config=None, form=LinearForm("silu", gated))
        (kernel,) = compile_for(device, call, x, weight)
        # How registers are dealt out is the compiler's doing: Triton 3.8 spills three of them for int4, 3.9 none.
        assert kernel.spills <= (0 if TRITON >= (3, 9) else 12), kernel


def test_what_it_cannot_take_is_said() -> None:
    x, weight, _ = make(FORMATS["int8"], 65, 16, 64)
    plain = LinearForm()
    for device, given, form, message in [
        (dataclasses.replace(A100, capability=(7, 5)), (x[:1], weight), plain, "need compute capability 8.0, not 7.5"),
        (A100, (x, weight), plain, "at most 64 tokens, not 65"),
        (A100, (x[:1].astype(jnp.float32), weight), plain, "x must be bfloat16 or float16, not float32"),
        (A100, (x[:1, :48], weight.columns(0, 48)), plain, "in must be a multiple of 32, for rows of 16 bytes, not 48"),
        (A100, (x[:1], weight), LinearForm(norm=NormForm(centred=False, eps=1e-6)), "it fuses no norm"),
        (A100, (x[:1], weight), LinearForm(out_dtype=np.dtype(np.int8)), "the result cannot be int8"),
    ]:
        with interpreted_triton():
            assert message in (triton.why_not(*given, None, None, device=device, form=form) or "")
            assert triton.why_not(x[:64], weight, None, None, device=A100, form=plain) is None
