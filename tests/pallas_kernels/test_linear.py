"""The linear operator against float64, in every form it takes by rows and dtype; its arguments; its partition."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jdsi.errors import ConfigError, UnsupportedError
from jdsi.pallas_kernels.device import H200, Device, target
from jdsi.pallas_kernels.linear import epilogue, gated_linear, linear
from jdsi.pallas_kernels.linear.partition import (
    Problem,
    best,
    cost,
    slot_bytes,
    staging_bytes,
    steps_per_split,
    units,
)
from jdsi.pallas_kernels.normalization import NormForm, normalise
from kernels import array, relative_error
from linear_cases import ACTIVATIONS, LAYER, RMS, call, case, oracle

RELATIVE = {"float32": 1e-6, "bfloat16": 1e-2, "float16": 2e-3}


def plain_case(rows: int, dtype: str) -> tuple[jax.Array, jax.Array, jax.Array]:
    rng = np.random.default_rng(rows)
    arrays = (rng.standard_normal((rows, 70)), rng.standard_normal((33, 70)), rng.standard_normal(33))
    x, weight, bias = (array(a, dtype) for a in arrays)
    return x, weight, bias


@pytest.mark.parametrize("dtype", RELATIVE)
@pytest.mark.parametrize("rows", [1, 2, 5, 16, 17, 64, 65])
def test_equals_float64(rows: int, dtype: str) -> None:
    x, weight, bias = plain_case(rows, dtype)
    y = jax.jit(linear)(x, weight, bias)
    assert y.dtype == x.dtype
    assert y.shape == (rows, 33)
    wide = [np.asarray(a, np.float64) for a in (x, weight, bias)]
    expected = wide[0] @ wide[1].T + wide[2]
    assert np.linalg.norm(np.asarray(y, np.float64) - expected) <= RELATIVE[dtype] * np.linalg.norm(expected)


@pytest.mark.parametrize("rows", [1, 4, 40])
def test_gradients_and_vmap(rows: int) -> None:
    x, weight, bias = plain_case(rows, "float32")

    def loss(x: jax.Array, weight: jax.Array, bias: jax.Array) -> jax.Array:
        return jnp.sum(jnp.sin(linear(x, weight, bias)))

    def plain(x: jax.Array, weight: jax.Array, bias: jax.Array) -> jax.Array:
        return jnp.sum(jnp.sin(x @ weight.T + bias))

    ours = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(x, weight, bias)
    for a, b in zip(ours, jax.grad(plain, argnums=(0, 1, 2))(x, weight, bias), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
    many = jax.vmap(linear, in_axes=(0, None, None))(jnp.stack([x, 2 * x]), weight, bias)
    np.testing.assert_allclose(many[1], linear(2 * x, weight, bias), rtol=1e-5, atol=1e-5)


def test_float32_result_of_narrow_inputs() -> None:
    x, weight, _ = plain_case(3, "bfloat16")
    y = linear(x, weight, out_dtype=jnp.float32)
    assert y.dtype == jnp.float32
    expected = np.asarray(x, np.float64) @ np.asarray(weight, np.float64).T
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)


FUSIONS = [
    dict(bias=bias, activation=activation, residual=residual, norm=norm)
    for bias in (False, True)
    for activation in (None, "gelu", "silu")
    for residual in (False, True)
    for norm in (None, RMS, LAYER)
]


@pytest.mark.parametrize("fusion", FUSIONS, ids=lambda f: "-".join(n for n, v in f.items() if v) or "none")
def test_every_fusion_equals_float64(fusion: dict) -> None:
    arguments = case(3, 50, 72, "float32", **fusion)
    assert relative_error(call(arguments), oracle(arguments)) <= 1e-5


@pytest.mark.parametrize(
    ("activation", "tokens", "dtype"),
    [(activation, 10, "float32") for activation in sorted(ACTIVATIONS, key=str)]
    + [("silu", tokens, dtype) for tokens in (1, 65) for dtype in RELATIVE],
)
def test_gated_equals_float64(activation: str | None, tokens: int, dtype: str) -> None:
    arguments = case(tokens, 33, 72, dtype, gated=True, bias=True, norm=RMS, activation=activation)
    assert relative_error(call(arguments), oracle(arguments)) <= max(1e-5, RELATIVE[dtype])


def test_rounds_where_single_operators_do() -> None:
    """Bit for bit: tokens must not depend on whether a model calls one operator or four."""
    arguments = case(4, 50, 72, bias=True, residual=True, norm=LAYER)
    weights = [arguments[name] for name in ("norm_weight", "norm_bias")]
    product = linear(normalise(arguments["x"], *weights, LAYER), arguments["weight"], arguments["bias"])
    np.testing.assert_array_equal(call(arguments), arguments["residual"] + product)


def test_the_kernels_gelu_is_exact() -> None:
    x = np.concatenate([np.linspace(-12, 12, 20001), [-1e-3, 0, 1e-3, 50.0]]).astype(np.float32)
    expected = ACTIVATIONS["gelu"](x.astype(np.float64))
    # float32 cannot square what stands in the exponent any better: relative error 2^-24 x^2 far out.
    np.testing.assert_allclose(epilogue.gelu(jnp.asarray(x)), expected, rtol=2e-5, atol=1e-30)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(x=jnp.ones((3, 64))), "x has 64 columns, weight 72"),
        (dict(x=jnp.ones(72)), r"matrices, not of shapes \(72,\)"),
        (dict(bias=jnp.ones(51)), r"bias has shape \(51,\), not \(50,\)"),
        (dict(residual=jnp.ones((3, 51))), r"residual has shape \(3, 51\), not \(3, 50\)"),
        (dict(residual=jnp.ones((3, 50), jnp.bfloat16)), "residual is bfloat16, the result float32"),
        (dict(norm_weight=jnp.ones(72)), "need `norm`"),
        (dict(norm=RMS), "an RMSNorm needs a weight"),
        (dict(norm=RMS, norm_weight=jnp.ones(71)), r"\(71,\), not \(72,\)"),
        (dict(norm=RMS, norm_weight=jnp.ones(72), norm_bias=jnp.ones(72)), "an RMSNorm has no bias"),
    ],
)
def test_arguments_that_do_not_go_together(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        linear(**{"x": jnp.ones((3, 72)), "weight": jnp.ones((50, 72)), **change})


def test_other_bad_arguments() -> None:
    x, weight = jnp.ones((3, 72)), jnp.ones((51, 72))
    with pytest.raises(ValueError, match="as many rows for up as for gate, not 51"):
        gated_linear(x, weight, activation="silu")
    with pytest.raises(ConfigError, match=r"unknown 'gleu' .did you mean 'gelu'"):
        linear(x, weight, activation="gleu")
    with pytest.raises(ValueError, match="no weight offset, not 1"):
        NormForm(centred=True, eps=1e-5, weight_offset=1.0)


@pytest.mark.parametrize(
    ("tokens", "inputs", "dtypes", "device", "message"),
    [
        (1, 64, ("bfloat16", "bfloat16"), dataclasses.replace(H200, capability=(8, 0)), "Hopper GPU.*not.*8.0"),
        (1, 64, ("float32", "float32"), H200, "x must be bfloat16 or float16, not float32"),
        (1, 64, ("bfloat16", "float16"), H200, "dtype of x, bfloat16, not float16"),
        (65, 64, ("bfloat16", "bfloat16"), H200, "at most 64 tokens, not 65"),
        (1, 60, ("bfloat16", "bfloat16"), H200, "multiple of 8.*not 60"),
        (0, 64, ("bfloat16", "bfloat16"), H200, "nothing to compute"),
    ],
)
def test_what_the_kernel_does_not_take(
    tokens: int, inputs: int, dtypes: tuple[str, str], device: Device, message: str
) -> None:
    x, weight = jnp.ones((tokens, inputs), dtypes[0]), jnp.ones((32, inputs), dtypes[1])
    with target(device), pytest.raises(UnsupportedError, match=message):
        linear(x, weight, implementation="pallas")


@given(
    tokens=st.integers(1, 64),
    outputs=st.integers(1, 4000).map(lambda n: 8 * n) | st.integers(1, 130000),
    inputs=st.integers(1, 3600).map(lambda n: 8 * n),
    operands=st.sampled_from([1, 2]),
    flat=st.booleans(),
    cores=st.sampled_from([1, 78, 132]),
)
@settings(max_examples=60, deadline=None)
def test_a_partition_covers_everything_and_fits(
    tokens: int, outputs: int, inputs: int, operands: int, flat: bool, cores: int
) -> None:
    problem = Problem(tokens, outputs, inputs, operands, flat=flat)
    device = dataclasses.replace(H200, cores=cores)
    tilings = best(problem, 220 * 1024, device, count=1000)
    assert tilings
    for tiling in tilings:
        slots = tiling.stages * slot_bytes(problem, tiling.rows, tiling.step)
        assert slots + staging_bytes(problem, tiling) <= 220 * 1024
        assert units(problem, tiling) * tiling.rows >= outputs * tiling.splits
        # All inputs, and no split past their end.
        split = steps_per_split(problem, tiling) * tiling.step
        assert (tiling.splits - 1) * split < inputs <= tiling.splits * split
        assert operands * tiling.padded_rows * problem.columns <= 128 * 128
    costs = [cost(problem, tiling, device) for tiling in tilings]
    assert costs == sorted(costs)


@pytest.mark.parametrize(("outputs", "inputs"), [(6144, 4096), (4096, 4096), (4096, 14336), (8192, 28672)])
def test_llama_projections_of_one_token_need_no_second_pass_and_use_the_chip(outputs: int, inputs: int) -> None:
    problem = Problem(1, outputs, inputs)
    [tiling] = best(problem, 220 * 1024, H200)
    assert tiling.splits == 1
    assert units(problem, tiling) / H200.cores % 1 > 0.95
