"""The reference of ragged paged attention, and what the public function refuses."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdsi.pallas_kernels.attention import Alibi, AttentionForm, attention
from jdsi.pallas_kernels.ragged_paged_attention import ragged_paged_attention
from jdsi.pallas_kernels.ragged_paged_attention.blocks import query_blocks
from jdsi.pallas_kernels.ragged_paged_attention.schedule import SLOT, SPLITS, TOKENS, make_schedule, most_slots
from kernels import relative_error
from ragged_cases import Batch, exact, make_batch

pytestmark = pytest.mark.usefixtures("quick_compilation")

FORM = AttentionForm(scale=0.125)
SLOPES = Alibi((0.5, 0.25, 0.125, 0.0625))
MIX = ((1, 33), (37, 37), (0, 5), (1, 1), (0, 0), (20, 50), (1, 16))
FORMS = {
    "causal": FORM,
    "window": dataclasses.replace(FORM, window=9),
    "softcap": dataclasses.replace(FORM, softcap=2.0),
    "alibi": dataclasses.replace(FORM, alibi=SLOPES),
    "both ways": dataclasses.replace(FORM, causal=False, window=12),
    "all of it": AttentionForm(scale=0.3, window=20, softcap=5.0, alibi=SLOPES),
}


def run(batch: Batch, form: AttentionForm) -> tuple[np.ndarray, np.ndarray]:
    function = partial(ragged_paged_attention, form=form, return_lse=True)
    out, lse = jax.jit(lambda *a: function(*a[:4], q_offsets=a[4], k_lengths=a[5]))(*batch.arrays)
    return np.asarray(out, np.float64), np.asarray(lse, np.float64)


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("page", [4, 16])
def test_every_form_over_a_mixed_batch(form: AttentionForm, page: int) -> None:
    batch = make_batch(MIX, page=page, padding=3, holes=0.1, dtype=jnp.float32, dim=(16, 24))
    out, lse = run(batch, form)
    expected, expected_lse = exact(batch, form)
    assert relative_error(out, expected) < 1e-5
    np.testing.assert_allclose(lse, expected_lse, atol=1e-4)
    assert not out[-3:].any()
    assert np.isneginf(lse[-3:]).all()


def test_a_query_that_sees_no_key_gets_zeros() -> None:
    batch = make_batch(((1, 20), (2, 20)), holes=1.0, dtype=jnp.float32)
    out, lse = run(batch, FORM)
    assert not out.any()
    assert np.isneginf(lse).all()


def test_a_whole_prompt_is_dense_attention() -> None:
    batch = make_batch(((40, 40),), heads=(4, 2), page=8, dtype=jnp.float32)
    table = batch.block_tables[0, :5]
    k, v = (pages[table].swapaxes(0, 1).reshape(1, 2, 40, 64) for pages in (batch.k_pages, batch.v_pages))
    positions = jnp.arange(40)[None]
    expected = attention(batch.q[None], k, v, FORM, q_positions=positions, k_positions=positions)[0]
    np.testing.assert_allclose(run(batch, FORM)[0], expected, rtol=1e-4, atol=1e-5)


def test_derivatives_do_not_see_what_is_hidden() -> None:
    batch = make_batch(((3, 7), (1, 9)), page=4, padding=2, holes=0.3, dtype=jnp.float32, dim=8, seed=3)
    rest = {"q_offsets": batch.q_offsets, "k_lengths": batch.k_lengths}

    @jax.jit
    def total(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return (ragged_paged_attention(q, k, v, batch.block_tables, FORM, **rest) ** 2).sum()

    clean = [jnp.nan_to_num(x) for x in batch.arrays[:3]]
    # NaN in memory nobody sees would make the numeric derivative NaN too, so the analytic one takes it alone.
    gradients = jax.jit(jax.grad(total, (0, 1, 2)))
    for gradient, dirty in zip(gradients(*clean), gradients(*batch.arrays[:3]), strict=True):
        np.testing.assert_allclose(np.nan_to_num(dirty), gradient, rtol=1e-5, atol=1e-6)
    step = [jax.random.normal(jax.random.key(i), x.shape) for i, x in enumerate(clean)]
    _, slope = jax.jvp(total, clean, step)
    ahead, behind = (total(*(x + s * 1e-2 * d for x, d in zip(clean, step, strict=True))) for s in (1, -1))
    np.testing.assert_allclose(slope, (ahead - behind) / 2e-2, rtol=2e-2)


@pytest.mark.parametrize("size", [1, 4, 16])
def test_every_token_is_in_the_block_that_says_so(size: int) -> None:
    lengths = np.array([3, 0, 17, 1, 0, 4])
    offsets = np.cumsum([0, *lengths])
    blocks = query_blocks(offsets, lengths + 2, 30, size)
    sequence, token, tokens = (np.asarray(x) for x in (blocks.sequence, blocks.token, blocks.tokens))
    assert tokens.sum() == 30
    assert tokens.max() <= size
    for t, i in enumerate(np.asarray(blocks.of_token)):
        assert token[i] <= t < token[i] + tokens[i]
        owner = np.searchsorted(offsets[1:], t, side="right")
        assert sequence[i] == owner
        if owner < len(lengths):
            assert blocks.position[i] == 2 + token[i] - offsets[owner]


def test_parts_of_tokens_have_places_of_their_own() -> None:
    """All within what is set aside for them, which does not grow with the tokens of long chunks."""
    tokens, sequences, splits, units = 256, 8, 6, 3
    sizes = {"tokens": tokens, "keys": 512, "block": 16, "tile": 16, "chunk": 32, "splits": splits}
    schedule = jax.jit(partial(make_schedule, form=FORM, units=units, cores=7, **sizes))
    rng, most = np.random.default_rng(0), 0
    for _ in range(20):
        new = rng.choice([0, 1, 2, 7, 8, 9, 16, 30, 40, 64], sequences)
        new[np.cumsum(new) > tokens] = 0
        keys = np.maximum(new, rng.integers(0, 513, sequences))
        made = schedule(np.cumsum([0, *new]).astype(np.int32), keys.astype(np.int32))
        items = np.asarray(made.items)[: made.shares[-1] // units]
        places = [item[SLOT] + t * item[SPLITS] for item in items if item[SPLITS] > 1 for t in range(item[TOKENS])]
        assert len(set(places)) == len(places)
        most = max([most, *(place + 1 for place in places)])
    assert tokens < most <= most_slots(tokens, sequences, splits) < splits * tokens


def test_shapes_that_do_not_go_together_are_named() -> None:
    batch = make_batch(((2, 3),), heads=(4, 2))
    call = partial(ragged_paged_attention, form=FORM)
    good = dict(zip(("q", "k_pages", "v_pages", "block_tables", "q_offsets", "k_lengths"), batch.arrays, strict=True))
    for change, message in [
        ({"q": batch.q[0]}, "q has 2 dimensions, not 3"),
        ({"q": batch.q[..., :32]}, "queries have 32 dimensions, keys 64"),
        ({"q": batch.q[:, :3]}, "3 query heads do not divide over 2"),
        ({"v_pages": batch.v_pages[1:]}, "k_pages are .* v_pages"),
        ({"k_lengths": np.zeros(2, np.int32)}, r"k_lengths have shape \(2,\), the block tables 1 rows"),
        ({"q_offsets": np.zeros(1, np.int32)}, r"q_offsets have shape \(1,\), not \(2,\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            call(**(good | change))
