"""The linear operator against float64, in every form it takes by rows and dtype."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdsi.pallas_kernels import linear

RELATIVE = {"float32": 1e-6, "bfloat16": 1e-2, "float16": 2e-3}


def case(rows: int, dtype: str) -> tuple[jax.Array, jax.Array, jax.Array]:
    rng = np.random.default_rng(rows)
    arrays = (rng.standard_normal((rows, 70)), rng.standard_normal((33, 70)), rng.standard_normal(33))
    x, weight, bias = (jnp.asarray(a, dtype) for a in arrays)
    return x, weight, bias


@pytest.mark.parametrize("dtype", RELATIVE)
@pytest.mark.parametrize("rows", [1, 2, 5, 16, 17, 64, 65])
def test_equals_float64(rows: int, dtype: str) -> None:
    x, weight, bias = case(rows, dtype)
    y = jax.jit(linear)(x, weight, bias)
    assert y.dtype == x.dtype
    assert y.shape == (rows, 33)
    wide = [np.asarray(a, np.float64) for a in (x, weight, bias)]
    expected = wide[0] @ wide[1].T + wide[2]
    assert np.linalg.norm(np.asarray(y, np.float64) - expected) <= RELATIVE[dtype] * np.linalg.norm(expected)


@pytest.mark.parametrize("rows", [1, 4, 40])
def test_gradients_and_vmap(rows: int) -> None:
    x, weight, bias = case(rows, "float32")

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
    x, weight, _ = case(3, "bfloat16")
    y = linear(x, weight, out_dtype=jnp.float32)
    assert y.dtype == jnp.float32
    expected = np.asarray(x, np.float64) @ np.asarray(weight, np.float64).T
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)
