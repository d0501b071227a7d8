"""Decode attention's second pass, against float64 and compiled for the H200."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdsi.pallas_kernels.decode_attention import DECODE_ATTENTION
from jdsi.pallas_kernels.decode_attention.combine import combine, padded
from jdsi.pallas_kernels.decode_attention.specs import decode_attention_specs
from kernels import RELATIVE, compile_for_h200, interpreted_or_gpu, relative_error

# Parts; batch, queries, key/value heads, query heads of each, value dims.
CASES = {
    "one part": (1, (2, 2, 2, 3, 80)),
    "two parts": (2, (2, 1, 2, 2, 64)),
    "a part for each warp": (4, (1, 1, 2, 2, 128)),
    "many parts": (33, (1, 1, 1, 4, 64)),
    "several queries": (7, (2, 2, 2, 3, 64)),
    "value dim 96": (7, (1, 1, 1, 2, 96)),
    "value dim 80": (7, (1, 1, 1, 2, 80)),
}


def parts(splits: int, shape: tuple[int, int, int, int, int], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Results and logarithms of `[splits, B, K, S, G]`; every third has no keys, the very first query none at all."""
    batch, length, kv_heads, group, values = shape
    rng = np.random.default_rng(seed)
    outs = rng.standard_normal((splits, batch, kv_heads, length, group, values)).astype(np.float32)
    lses = (rng.standard_normal(outs.shape[:-1]) * 3 + rng.choice([-200, 0, 200], outs.shape[1:-1])).astype(np.float32)
    empty = rng.random(lses.shape) < 1 / 3
    empty[:, 0, 0, 0, 0] = True
    return np.where(empty[..., None], 0, outs), np.where(empty, -np.inf, lses)


def in_memory(x: np.ndarray, splits: int, columns: int, width: int | None = None) -> jax.Array:
    """As the first pass leaves them; NaN where it writes nothing."""
    _, batch, kv_heads, length, group, *values = x.shape
    x = x.reshape(splits, batch * kv_heads, length * group, *values)
    sizes = (padded(splits), batch * kv_heads, columns) + ((width,) if width else ())
    return jnp.asarray(np.pad(x, [(0, n - m) for n, m in zip(sizes, x.shape, strict=True)], constant_values=np.nan))


def by_token(x: np.ndarray) -> np.ndarray:
    """`[B, K, S, G, ...]` to `[B, S, H, ...]`."""
    x = x.swapaxes(1, 2)
    return x.reshape(*x.shape[:2], -1, *x.shape[4:])


@pytest.mark.parametrize(("splits", "shape"), CASES.values(), ids=CASES)
def test_it_agrees_with_float64(splits: int, shape: tuple[int, int, int, int, int]) -> None:
    batch, length, kv_heads, group, values = shape
    outs, lses = parts(splits, shape, seed=splits)
    top = np.maximum(lses.max(0), -1e30).astype(np.float64)
    weights = np.exp(lses - top)
    total = weights.sum(0)
    expected = (outs * weights[..., None]).sum(0) / np.where(total > 0, total, 1)[..., None]
    with np.errstate(divide="ignore"):
        logarithms = np.where(total > 0, top + np.log(total), -np.inf)
    columns, result = -(-length * group // 8) * 8, (batch, length, kv_heads * group, values)
    arrays = in_memory(outs, splits, columns, -(-values // 64) * 64), in_memory(lses, splits, columns)
    for dtype, return_lse in (("float32", True), ("bfloat16", False)):
        static = {"splits": splits, "shape": result, "dtype": dtype, "return_lse": return_lse}
        with interpreted_or_gpu():
            out, lse = jax.jit(partial(combine, **static))(*arrays)
        assert out.dtype == dtype
        assert relative_error(out.astype(jnp.float32), by_token(expected)) <= RELATIVE[dtype]
        assert not np.asarray(out, np.float32)[0, 0, 0].any()
        if return_lse:
            np.testing.assert_allclose(lse, by_token(logarithms), rtol=1e-6, atol=1e-6)
        else:
            assert lse is None


def test_no_key_anywhere_gives_zeros() -> None:
    with interpreted_or_gpu():
        static = {"splits": 6, "shape": (1, 1, 8, 64), "dtype": jnp.bfloat16, "return_lse": True}
        out, lse = jax.jit(partial(combine, **static))(jnp.zeros((8, 1, 8, 64)), jnp.full((8, 1, 8), -jnp.inf))
    assert not np.asarray(out, np.float32).any()
    assert np.isneginf(lse).all()


def test_what_is_not_a_number_stays_so() -> None:
    outs, lses = jnp.ones((4, 1, 8, 64)), jnp.zeros((4, 1, 8))
    with interpreted_or_gpu():
        static = {"splits": 4, "shape": (1, 1, 8, 64), "dtype": jnp.bfloat16, "return_lse": True}
        out, lse = jax.jit(partial(combine, **static))(outs.at[1, 0, 0, 3].set(jnp.nan), lses.at[2, 0, 5].set(jnp.nan))
    hidden = np.isnan(np.asarray(out, np.float32))[0, 0]
    assert hidden[0, 3]
    assert hidden[5].all()
    assert hidden.sum() == 65
    assert np.isnan(lse)[0, 0].tolist() == [i == 5 for i in range(8)]


SPECS = {spec.name: spec for spec in decode_attention_specs()}


@pytest.mark.aot
@pytest.mark.parametrize("return_lse", [False, True])
@pytest.mark.parametrize(
    "name", ["llama-8b B=1 L=8192 bfloat16", "llama-8b B=8 L=32768 bfloat16", "deepseek-v3 B=1 L=8192 bfloat16"]
)
def test_divided_keys_cost_one_launch_more(name: str, return_lse: bool) -> None:
    spec = SPECS[name]
    call = partial(DECODE_ATTENTION, implementation="pallas", return_lse=return_lse, **spec.static)
    text = compile_for_h200(call, *spec.abstract()).text
    entry = text[text.index("\nENTRY ") :]
    assert len(re.findall(r" custom-call\(", entry)) == 2
    assert not re.findall(r" (?:fusion|copy|transpose|reduce|slice|pad)\(", entry)


@pytest.mark.aot
@pytest.mark.parametrize(("splits", "values"), [(7, 80), (33, 128), (192, 128)])
def test_many_parts_compile_without_spills(splits: int, values: int) -> None:
    width = -(-values // 64) * 64
    outs, lses = (jax.ShapeDtypeStruct((padded(splits), 8, 8, *rest), jnp.float32) for rest in ((width,), ()))
    static = {"splits": splits, "shape": (1, 1, 32, values), "dtype": jnp.bfloat16, "return_lse": True}
    compiled = compile_for_h200(partial(combine, **static), outs, lses)
    assert compiled.registers > 0
    assert compiled.spills == 0
