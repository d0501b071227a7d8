"""Arguments, oracle and interpreter of the linear operator's tests."""

import contextlib
import math
from collections.abc import Iterator
from typing import Any
from unittest import mock

import jax
import numpy as np
from jax.experimental.pallas import mosaic_gpu as plgpu

from jdsi.pallas_kernels.linear import block, gated_linear, linear
from jdsi.pallas_kernels.normalization import NormForm
from kernels import ON_GPU, array, interpreted_or_gpu

RMS = NormForm(centred=False, eps=1e-5, weight_offset=1.0)
LAYER = NormForm(centred=True, eps=1e-5)

Case = dict[str, Any]  # keyword arguments of `linear`, or of `gated_linear` if "gated" is true


def case(
    tokens: int,
    outputs: int,
    inputs: int,
    dtype: str = "bfloat16",
    *,
    bias: bool = False,
    activation: str | None = None,
    residual: bool = False,
    norm: NormForm | None = None,
    gated: bool = False,
    seed: int = 0,
) -> Case:
    """Random arguments; the weight has twice `outputs` rows if gated."""
    rng = np.random.default_rng(seed)
    rows = outputs * (2 if gated else 1)

    def normal(*shape: int, offset: float = 0.0, scale: float = 1.0) -> jax.Array:
        return array(offset + scale * rng.standard_normal(shape), dtype)

    arguments: Case = {
        "x": normal(tokens, inputs, offset=0.5),
        "weight": normal(rows, inputs, scale=inputs**-0.5),
        "activation": activation,
        "norm": norm,
    }
    if bias:
        arguments["bias"] = normal(rows)
    if residual:
        arguments["residual"] = normal(tokens, outputs)
    if norm is not None:
        arguments["norm_weight"] = normal(inputs, offset=1.0, scale=0.1)
        if norm.centred:
            arguments["norm_bias"] = normal(inputs, scale=0.1)
    return arguments | ({"gated": True} if gated else {})


def call(arguments: Case, implementation: str | None = None, **more: Any) -> jax.Array:
    """The public function on a case, jitted."""
    arrays = {name: value for name, value in arguments.items() if isinstance(value, jax.Array)}
    static = {name: value for name, value in arguments.items() if name not in arrays and name != "gated"} | more
    function = gated_linear if "gated" in arguments else linear
    return jax.jit(lambda arrays: function(**arrays, **static, implementation=implementation))(arrays)


def oracle(arguments: Case) -> np.ndarray:
    """The same in float64, nowhere rounded."""
    wide = {name: np.asarray(v, np.float64) for name, v in arguments.items() if isinstance(v, jax.Array)}
    x = wide["x"]
    if norm := arguments["norm"]:
        if norm.centred:
            x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x * x).mean(-1, keepdims=True) + norm.eps)
        x = x * (wide["norm_weight"] + norm.weight_offset) + wide.get("norm_bias", 0)
    y = x @ wide["weight"].T + wide.get("bias", 0)
    act = ACTIVATIONS[arguments["activation"]]
    if "gated" in arguments:
        half = y.shape[1] // 2
        y = act(y[:, :half]) * y[:, half:]
    else:
        y = act(y)
    return y + wide.get("residual", 0)


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def _gelu_tanh(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


ACTIVATIONS = {
    None: lambda x: x,
    "gelu": lambda x: 0.5 * x * np.vectorize(math.erfc)(-x / math.sqrt(2)),
    "gelu_new": _gelu_tanh,
    "gelu_fast": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "quick_gelu": lambda x: x * _sigmoid(1.702 * x),
    "relu": lambda x: np.maximum(x, 0),
    "relu2": lambda x: np.maximum(x, 0) ** 2,
    "silu": lambda x: x * _sigmoid(x),
    "swish": lambda x: x * _sigmoid(x),
    "tanh": np.tanh,
}


@contextlib.contextmanager
def kernels_run(cores: int = 2) -> Iterator[None]:
    """Within it kernels run: interpreted, or on the GPU.

    The interpreter gives each view of a `RefUnion` memory of its own; as it does not model how memory is tiled, one
    buffer in both roles stands for the two views.
    """
    with contextlib.ExitStack() as stack:
        if not ON_GPU:
            stack.enter_context(mock.patch.object(plgpu, "RefUnion", lambda by_tma, by_wgmma: by_wgmma))
            stack.enter_context(mock.patch.object(block, "_views", lambda ref, flat: (ref, ref)))
        stack.enter_context(interpreted_or_gpu(cores))
        yield
