"""The arithmetic of one tile of scores, which the attention kernels share, against float64."""

import jax.numpy as jnp
import numpy as np
import pytest

from jdsi.pallas_kernels.attention import Alibi, AttentionForm
from jdsi.pallas_kernels.attention.tile import combine, finish, start, tile_scores, update

FORMS = {
    "causal": AttentionForm(0.3),
    "full": AttentionForm(0.3, causal=False),
    "window": AttentionForm(0.3, window=4),
    "full window": AttentionForm(0.3, causal=False, window=4),
    "softcap and alibi": AttentionForm(3.0, causal=False, softcap=2.0, alibi=Alibi((0.5,))),
}
KEYS, TILE, QUERIES = 24, 8, 6


def tiles(form: AttentionForm, axis: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Tile by tile: the result, its logarithms; and both in float64. Keys lie along `axis` of a tile."""
    rng = np.random.default_rng(seed)
    raw, v = rng.standard_normal((QUERIES, KEYS)) * 9, rng.standard_normal((KEYS, 5))
    distance = np.arange(KEYS) - (np.arange(QUERIES)[:, None] * 5 - 3)  # the first query stands before every key
    seen = rng.random((QUERIES, KEYS)) < 0.7
    seen[1] = False

    state, values = start(QUERIES), jnp.zeros((QUERIES, 5))
    for at in range(0, KEYS, TILE):
        raw_t, distance_t, seen_t = (x[:, at : at + TILE] for x in (raw, distance, seen))
        if axis == 0:
            raw_t, distance_t, seen_t = raw_t.T, distance_t.T, seen_t.T
        scores, factor = tile_scores(
            jnp.asarray(raw_t, jnp.float32), form, jnp.asarray(distance_t), slope=jnp.float32(0.5), visible=seen_t
        )
        weights, rescale, state = update(state, scores, factor, axis=axis)
        weights = weights if axis else weights.T
        values = values * rescale[:, None] + weights @ jnp.asarray(v[at : at + TILE], jnp.float32)
    reciprocal, lse = finish(state)

    scores = raw * form.scale
    if form.softcap is not None:
        scores = form.softcap * np.tanh(scores / form.softcap)
    if form.alibi is not None:
        scores = scores + 0.5 * distance
    visible = seen & ((distance <= 0) | (not form.causal)) & (np.abs(distance) < (form.window or 10**6))
    weights = np.where(visible, np.exp(scores), 0)
    total = weights.sum(1)
    with np.errstate(divide="ignore"):
        expected = weights @ v / np.where(total > 0, total, 1)[:, None], np.log(total)
    return np.asarray(values * reciprocal[:, None]), np.asarray(lse), *expected


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_tiles_agree_with_float64(form: AttentionForm, axis: int) -> None:
    for seed in range(3):
        values, lse, expected, logarithms = tiles(form, axis, seed)
        np.testing.assert_allclose(values, expected, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(lse, logarithms, rtol=1e-5, atol=1e-5)
        assert np.isneginf(lse[1])


def test_combine_is_exact_and_takes_parts_without_keys() -> None:
    rng = np.random.default_rng(0)
    scores, v = rng.standard_normal((4, 3, 10)) * 30, rng.standard_normal((10, 2))
    weights = np.exp(scores)
    weights[:, :, :4] *= np.array([1, 1, 0])[:, None]  # no key in one row's first part,
    weights[3] = 0  # none at all in another
    parts = [slice(0, 4), slice(4, 5), slice(5, 10)]
    totals = np.stack([weights[..., p].sum(-1) for p in parts])
    safe = np.where(totals > 0, totals, 1)[..., None]
    outs = np.stack([weights[..., p] @ v[p] for p in parts]) / safe
    with np.errstate(divide="ignore"):
        out, lse = combine(jnp.asarray(outs, jnp.float32), jnp.asarray(np.log(totals), jnp.float32))
        expected = np.log(weights.sum(-1))
    np.testing.assert_allclose(lse, expected, rtol=1e-5, atol=1e-5)
    whole = weights.sum(-1)
    np.testing.assert_allclose(out, weights @ v / np.where(whole > 0, whole, 1)[..., None], rtol=1e-4, atol=1e-5)
