"""The attention operator against a float64 loop, one query and one head at a time."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdsi.pallas_kernels import Alibi, AttentionForm, attention, attention_weights
from kernels import array

pytestmark = pytest.mark.usefixtures("quick_compilation")


def brute_force(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, form: AttentionForm, q_at: np.ndarray, k_at: np.ndarray
) -> np.ndarray:
    batch, length, heads, _ = q.shape
    group = heads // k.shape[1]
    out = np.zeros((batch, length, heads, v.shape[-1]))
    for b, s, h in np.ndindex(batch, length, heads):
        scores = k[b, h // group] @ q[b, s, h] * form.scale
        if form.softcap is not None:
            scores = form.softcap * np.tanh(scores / form.softcap)
        distance = k_at[b] - q_at[b, s]
        if form.alibi is not None:
            scores = scores + form.alibi.slopes[h] * distance
        hidden = np.zeros(len(scores), bool)
        if form.causal:
            hidden |= distance > 0
        if form.window is not None:
            hidden |= np.abs(distance) >= form.window
        scores[hidden] = -np.inf
        weights = np.exp(scores - scores.max())
        out[b, s, h] = weights @ v[b, h // group] / weights.sum()
    return out


FORMS = {
    "causal": AttentionForm(0.3),
    "full": AttentionForm(0.3, causal=False),
    "window": AttentionForm(0.3, window=3),
    "softcap": AttentionForm(2.0, softcap=1.5),
    "alibi": AttentionForm(0.3, alibi=Alibi((0.5, 0.25, 0.1, 0.05, 0.3, 0.7))),
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize(("batch", "length"), [(1, 1), (3, 1), (5, 1), (2, 6)])
@pytest.mark.parametrize("kv_heads", [1, 2, 6])
def test_equals_brute_force(form: AttentionForm, batch: int, length: int, kv_heads: int) -> None:
    rng = np.random.default_rng(batch)
    keys = 9
    q = rng.standard_normal((batch, length, 6, 5))
    k = rng.standard_normal((batch, kv_heads, keys, 5))
    v = rng.standard_normal((batch, kv_heads, keys, 4))
    q_at = np.arange(length) + rng.integers(0, keys - length + 1, (batch, 1))
    k_at = np.tile(np.arange(keys), (batch, 1))
    arrays = [array(a, jnp.float32) for a in (q, k, v)]
    positions = {"q_positions": array(q_at, jnp.int32), "k_positions": array(k_at, jnp.int32)}
    out = jax.jit(lambda q, k, v: attention(q, k, v, form, **positions))(*arrays)
    np.testing.assert_allclose(out, brute_force(q, k, v, form, q_at, k_at), rtol=1e-5, atol=1e-5)


def test_long_prompts_in_blocks_equal_one_block() -> None:
    rng = np.random.default_rng(0)
    length = 700
    q, k, v = (
        array(rng.standard_normal(shape), jnp.float32) for shape in [(1, length, 2, 4)] + [(1, 1, length, 4)] * 2
    )
    positions = jnp.arange(length)[None]
    form = AttentionForm(0.5, window=300)
    arguments = {"q_positions": positions, "k_positions": positions, "visible": jnp.arange(length)[None, None] % 7 != 3}
    arguments["visible"] = jnp.broadcast_to(arguments["visible"], (1, length, length))
    weights = attention_weights(q, k, form, **arguments)
    expected = jnp.einsum("bkgsl,bkld->bskgd", weights, v).reshape(1, length, 2, 4)
    np.testing.assert_allclose(attention(q, k, v, form, **arguments), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("length", [1, 130, 300, 1100])
def test_skipping_what_lies_behind_the_diagonal_changes_nothing(length: int) -> None:
    rng = np.random.default_rng(length)
    q, k, v = (
        array(rng.standard_normal((2, *shape)), jnp.float32) for shape in [(length, 2, 4)] + [(1, length, 4)] * 2
    )
    positions = jnp.tile(jnp.arange(length), (2, 1))
    segments = jnp.asarray(np.sort(rng.integers(0, 3, (2, length))))
    visible = segments[:, :, None] == segments[:, None, :]
    at = {"q_positions": positions, "k_positions": positions, "visible": visible}
    for form in (AttentionForm(0.5), AttentionForm(0.5, window=50), AttentionForm(0.5, causal=False)):
        expected = jax.jit(attention, static_argnums=3)(q, k, v, form, **at)
        aligned = jax.jit(partial(attention, aligned=True), static_argnums=3)(q, k, v, form, **at)
        np.testing.assert_allclose(aligned, expected, rtol=1e-5, atol=1e-5)


def test_a_query_that_sees_nothing_gives_numbers() -> None:
    q, k = jnp.ones((1, 1, 1, 2)), jnp.ones((1, 1, 3, 2))
    at = {"q_positions": jnp.zeros((1, 1), int), "k_positions": jnp.zeros((1, 3), int)}
    out = attention(q, k, k, AttentionForm(1.0), **at, visible=jnp.zeros((1, 1, 3), bool))
    assert np.isfinite(out).all()


def test_heads_that_do_not_divide_are_an_error() -> None:
    at = {"q_positions": jnp.zeros((1, 1), int), "k_positions": jnp.zeros((1, 1), int)}
    with pytest.raises(ValueError, match="3 query heads do not divide over 2"):
        attention(jnp.ones((1, 1, 3, 2)), jnp.ones((1, 2, 1, 2)), jnp.ones((1, 2, 1, 2)), AttentionForm(1.0), **at)
