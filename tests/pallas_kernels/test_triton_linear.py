"""The skinny matrix product in Triton: interpreted (or on the GPU), and compiled for the GPUs it is for."""

import dataclasses
import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("triton")

from jdsi.errors import UnsupportedError
from jdsi.pallas_kernels.activations import ACTIVATIONS
from jdsi.pallas_kernels.device import H200, target
from jdsi.pallas_kernels.linear import triton
from jdsi.pallas_kernels.linear.api import gated_linear, linear
from jdsi.pallas_kernels.linear.form import LinearForm
from jdsi.pallas_kernels.normalization import NormForm
from kernels import RELATIVE, array, relative_error
from triton_interpreter import A100, L40, compile_for, interpreted_triton

EXACT = {
    None: lambda x: x,
    "gelu": lambda x: 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))),
    "gelu_new": lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "quick_gelu": lambda x: x / (1 + np.exp(-1.702 * x)),
    "relu": lambda x: np.maximum(x, 0),
    "relu2": lambda x: np.maximum(x, 0) ** 2,
    "silu": lambda x: x / (1 + np.exp(-x)),
    "tanh": np.tanh,
}
EXACT |= {"gelu_fast": EXACT["gelu_new"], "gelu_pytorch_tanh": EXACT["gelu_new"], "swish": EXACT["silu"]}


def make(tokens: int, outputs: int, inputs: int, dtype: Any = jnp.bfloat16, seed: int = 0) -> dict[str, jax.Array]:
    rng = np.random.default_rng(seed)
    shapes = {"x": (tokens, inputs), "weight": (outputs, inputs), "bias": (outputs,), "residual": (tokens, outputs)}
    arrays = {name: rng.standard_normal(shape) for name, shape in shapes.items()}
    arrays["weight"] /= math.sqrt(inputs)
    return {name: array(x, dtype) for name, x in arrays.items()}


def wide(*arrays: jax.Array) -> list[np.ndarray]:
    return [np.asarray(x, np.float64) for x in arrays]


def run(function: Any, *arrays: Any, **rest: Any) -> np.ndarray:
    with interpreted_triton():
        return jax.jit(partial(function, implementation="triton", **rest))(*arrays)


def test_every_activation_is_known() -> None:
    assert EXACT.keys() == {None, *ACTIVATIONS}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(
    ("tokens", "outputs", "inputs"),
    [(1, 40, 72), (3, 130, 136), (8, 64, 128), (17, 33, 264), (64, 70, 1000), (1, 1, 8), (5, 20, 3000)],
)
def test_equals_float64(tokens: int, outputs: int, inputs: int, dtype: str) -> None:
    case = make(tokens, outputs, inputs, dtype)
    y = run(linear, case["x"], case["weight"])
    x, weight = wide(case["x"], case["weight"])
    assert y.dtype == dtype
    assert relative_error(y, x @ weight.T) < RELATIVE[dtype]


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_splits_add_up(splits: int, gated: bool, seed: int) -> None:
    case = make(6, 70, 328, seed=seed)
    form = LinearForm("silu", gated)
    config = {"block_out": 16, "block_in": 32, "splits": splits}
    residual = case["residual"][:, :35] if gated else case["residual"]
    arrays = (case["x"], case["weight"], case["bias"], residual)
    with interpreted_triton():
        y = jax.jit(partial(triton.run, device=A100, config=config, form=form))(*arrays)
    x, weight, bias, before = wide(*arrays)
    product = x @ weight.T + bias
    activated = EXACT["silu"](product[:, :35]) * product[:, 35:] if gated else EXACT["silu"](product)
    assert relative_error(y, before + activated) < RELATIVE["bfloat16"]


@pytest.mark.parametrize("activation", EXACT)
def test_activations(activation: str | None) -> None:
    case = make(2, 48, 64)
    case["x"] = case["x"].at[1].multiply(8.0)
    x, weight, bias, residual = wide(*case.values())
    y = run(linear, case["x"], case["weight"], case["bias"], activation=activation, out_dtype=jnp.float32)
    assert y.dtype == jnp.float32
    assert relative_error(y, EXACT[activation](x @ weight.T + bias)) < 1e-5
    y = run(linear, case["x"], case["weight"], case["bias"], activation=activation, residual=case["residual"])
    assert relative_error(y, residual + EXACT[activation](x @ weight.T + bias)) < RELATIVE["bfloat16"]
    y = run(gated_linear, case["x"], case["weight"], case["bias"], activation=activation)
    gate, up = np.split(x @ weight.T + bias, 2, axis=1)
    assert relative_error(y, EXACT[activation](gate) * up) < RELATIVE["bfloat16"]


@pytest.mark.parametrize("norm", [NormForm(centred=False, eps=1e-5), NormForm(centred=True, eps=1e-5)])
def test_norm_comes_first(norm: NormForm) -> None:
    case = make(3, 40, 64)
    weight = jnp.full((64,), 0.5, jnp.bfloat16)
    both = [
        run(linear, case["x"], case["weight"], norm=norm, norm_weight=weight),
        linear(case["x"], case["weight"], norm=norm, norm_weight=weight, implementation="xla"),
    ]
    assert relative_error(*both) < RELATIVE["bfloat16"]


def test_tokens_do_not_depend_on_their_company() -> None:
    case = make(64, 48, 512)
    together = run(linear, case["x"], case["weight"])
    for tokens in (1, 5, 16):
        np.testing.assert_array_equal(run(linear, case["x"][:tokens], case["weight"]), together[:tokens])


MODELS = {
    "qkv": (6144, 4096, False),
    "up": (2 * 14336, 4096, True),
    "down": (4096, 14336, False),
    "small": (768, 3072, False),
}


@pytest.mark.aot
@pytest.mark.parametrize("device", [A100, L40, H200], ids=lambda d: d.kind)
@pytest.mark.parametrize("tokens", [1, 16, 64])
def test_compiles_without_spills(device: Any, tokens: int) -> None:
    for outputs, inputs, gated in MODELS.values():
        arrays = [jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in ((tokens, inputs), (outputs, inputs), (outputs,))]
        call = partial(gated_linear if gated else linear, activation="silu", implementation="triton")
        (kernel,) = compile_for(device, call, *arrays)
        assert kernel.spills == 0, kernel


@pytest.mark.parametrize("tokens", [1, 33, 64])
def test_every_candidate_fits(tokens: int) -> None:
    for name, (outputs, inputs, gated) in MODELS.items():
        arrays = [jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in ((tokens, inputs), (outputs, inputs))]
        for device in (A100, L40):
            options = triton.candidates(*arrays, device=device, form=LinearForm(gated=gated))
            assert len(options) > 10, name
            assert len({tuple(option.items()) for option in options}) == len(options)


def test_what_it_cannot_take_is_said() -> None:
    case = make(65, 16, 64)
    x, weight = case["x"], case["weight"]
    for device, arrays, more, message in [
        (dataclasses.replace(A100, capability=(7, 5)), (x[:1], weight), {}, "need compute capability 8.0, not 7.5"),
        (A100, (x, weight), {}, "at most 64 tokens, not 65"),
        (A100, (x[:0], weight), {}, "nothing to compute"),
        (A100, (x[:1, :12], weight[:, :12]), {}, "in must be a multiple of 8, for rows of 16 bytes, not 12"),
        (A100, (x[:1].astype(jnp.float32), weight), {}, "x must be bfloat16 or float16, not float32"),
        (A100, (x[:1], weight.astype(jnp.float16)), {}, "x is bfloat16 but weight is float16"),
        (A100, (x[:1], weight), {"out_dtype": jnp.int8}, "the result cannot be int8"),
    ]:
        with interpreted_triton(), target(device), pytest.raises(UnsupportedError, match=message):
            linear(*arrays, implementation="triton", **more)
