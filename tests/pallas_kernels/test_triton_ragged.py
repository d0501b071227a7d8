"""Ragged paged attention in Triton: interpreted (or on the GPU), and compiled for the GPUs it is for."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("triton")

from jdsi.errors import UnsupportedError
from jdsi.pallas_kernels.attention import Alibi, AttentionForm, RoundedAlibi
from jdsi.pallas_kernels.device import H200, target
from jdsi.pallas_kernels.ragged_paged_attention import ragged_paged_attention
from kernels import RELATIVE, relative_error
from ragged_cases import Batch, exact, make_batch
from triton_interpreter import A100, L40, compile_for, interpreted_triton

FORM = AttentionForm(scale=0.125)
SLOPES = (0.5, 0.25, 0.125, 0.0625)
MIX = ((1, 33), (37, 37), (0, 5), (1, 1), (0, 0), (20, 50), (1, 16))
FORMS = {
    "causal": FORM,
    "window": dataclasses.replace(FORM, window=9),
    "softcap": dataclasses.replace(FORM, softcap=2.0),
    "alibi": dataclasses.replace(FORM, alibi=Alibi(SLOPES)),
    "both ways": dataclasses.replace(FORM, causal=False, window=12),
    "all of it": AttentionForm(scale=0.3, window=20, softcap=5.0, alibi=Alibi(SLOPES)),
}


def run(batch: Batch, form: AttentionForm, implementation: Any = "triton") -> tuple[np.ndarray, np.ndarray]:
    call = partial(ragged_paged_attention, form=form, return_lse=True, implementation=implementation)
    with interpreted_triton():
        out, lse = jax.jit(lambda *a: call(*a[:4], q_offsets=a[4], k_lengths=a[5]))(*batch.arrays)
    assert out.dtype == batch.q.dtype
    return np.asarray(out, np.float64), np.asarray(lse, np.float64)


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_every_form_over_a_mixed_batch(form: AttentionForm, dtype: str) -> None:
    batch = make_batch(MIX, page=16, padding=3, holes=0.1, dtype=dtype)
    out, lse = run(batch, form)
    expected, expected_lse = exact(batch, form)
    assert relative_error(out, expected) < RELATIVE[dtype]
    np.testing.assert_allclose(lse, expected_lse, atol=1e-3)
    assert not out[-3:].any()
    assert np.isneginf(lse[-3:]).all()


@pytest.mark.parametrize(
    ("heads", "dim", "page"),
    [((4, 4), 64, 16), ((8, 1), 64, 4), ((7, 1), 80, 16), ((6, 2), (96, 24), 24), ((2, 1), 16, 8)],
)
def test_heads_and_sizes(heads: tuple[int, int], dim: int | tuple[int, int], page: int) -> None:
    batch = make_batch(((5, 30), (1, 70), (66, 66)), heads=heads, dim=dim, page=page, seed=1)
    out, lse = run(batch, FORM)
    expected, expected_lse = exact(batch, FORM)
    assert relative_error(out, expected) < RELATIVE["bfloat16"]
    np.testing.assert_allclose(lse, expected_lse, atol=1e-3)


def test_rounded_alibi_is_the_references() -> None:
    form = dataclasses.replace(FORM, alibi=RoundedAlibi(SLOPES, scale=0.5))
    batch = make_batch(((3, 300), (1, 41)), page=16)
    for ours, reference in zip(run(batch, form), run(batch, form, "xla"), strict=True):
        assert relative_error(ours, reference) < RELATIVE["bfloat16"]


def test_no_visible_key_gives_zeros() -> None:
    out, lse = run(make_batch(((1, 20), (2, 20)), holes=1.0), FORM)
    assert not out.any()
    assert np.isneginf(lse).all()


def test_a_sequence_does_not_depend_on_its_company() -> None:
    alone = make_batch(((1, 33),))
    together = make_batch(((1, 33), (9, 40), (1, 1)))
    same = dataclasses.replace(
        together,
        q=together.q.at[0].set(alone.q[0]),
        **{
            name: getattr(together, name)
            .at[together.block_tables[0, :3]]
            .set(getattr(alone, name)[alone.block_tables[0, :3]])
            for name in ("k_pages", "v_pages")
        },
    )
    np.testing.assert_array_equal(run(same, FORM)[0][0], run(alone, FORM)[0][0])


def abstract(batch: int, tokens: int, heads: int, kv_heads: int, dim: int) -> tuple[jax.ShapeDtypeStruct, ...]:
    pages = jax.ShapeDtypeStruct((1024, kv_heads, 64, dim), jnp.bfloat16)
    numbers = [jax.ShapeDtypeStruct(s, jnp.int32) for s in ((batch, 64), (batch + 1,), (batch,))]
    return jax.ShapeDtypeStruct((tokens, heads, dim), jnp.bfloat16), pages, pages, *numbers


@pytest.mark.aot
@pytest.mark.parametrize("device", [A100, L40, H200], ids=lambda d: d.kind)
@pytest.mark.parametrize(
    ("shape", "form"),
    [
        ((8, 512, 32, 8, 128), FORM),
        ((8, 512, 32, 32, 80), FORM),
        ((8, 8, 8, 4, 256), dataclasses.replace(FORM, softcap=50.0, window=4096)),
        ((8, 64, 28, 4, 128), FORM),
    ],
    ids=["llama", "phi", "gemma", "qwen"],
)
def test_compiles_without_spills(device: Any, shape: tuple[int, ...], form: AttentionForm) -> None:
    def call(*a: Any) -> Any:
        return ragged_paged_attention(*a[:4], form, q_offsets=a[4], k_lengths=a[5], implementation="triton")

    (kernel,) = compile_for(device, call, *abstract(*shape))
    assert kernel.spills == 0, kernel


def test_what_it_cannot_take_is_said() -> None:
    batch = make_batch(((2, 3),))
    other = partial(ragged_paged_attention, q_offsets=batch.q_offsets, k_lengths=batch.k_lengths)
    old = dataclasses.replace(A100, kind="Tesla T4", capability=(7, 5))
    small = dataclasses.replace(A100, shared_memory=8 * 1024)
    wide = [x.astype(jnp.float32) for x in batch.arrays[:3]]
    for device, arrays, form, message in [
        (old, batch.arrays[:3], FORM, "need compute capability 8.0, not 7.5"),
        (small, batch.arrays[:3], FORM, "do not fit 8192 bytes of shared memory"),
        (A100, wide, FORM, "q must be bfloat16 or float16, not float32"),
        (A100, (wide[0].astype(jnp.float16), *batch.arrays[1:3]), FORM, "q is float16 but k_pages is bfloat16"),
        (A100, batch.arrays[:3], dataclasses.replace(FORM, alibi=Alibi((1.0,))), "1 ALiBi slopes for 4 query heads"),
        (A100, batch.arrays[:3], dataclasses.replace(FORM, softcap=-1.0), "the soft cap must be positive"),
    ]:
        with interpreted_triton(), target(device), pytest.raises(UnsupportedError, match=message):
            other(*arrays, batch.block_tables, form, implementation="triton")
