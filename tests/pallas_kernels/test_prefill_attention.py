"""Prefill attention's reference against float64, and what the operator refuses."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdsi.errors import UnsupportedError
from jdsi.pallas_kernels.attention import Alibi, AttentionForm, RoundedAlibi, attention
from jdsi.pallas_kernels.device import H200, Device, target
from jdsi.pallas_kernels.prefill_attention import PREFILL_ATTENTION, prefill_attention
from prefill_cases import Case, check

SLOPES = (0.5, 0.25, 0.1, 0.05)
FORMS = {
    "causal": AttentionForm(0.3),
    "full": AttentionForm(0.3, causal=False),
    "window": AttentionForm(0.3, window=5),
    "full window": AttentionForm(0.3, causal=False, window=5),
    "softcap": AttentionForm(2.0, softcap=1.5),
    "alibi": AttentionForm(0.3, alibi=Alibi(SLOPES)),
}
SMALL = Case(9, 13, (4, 2), (5, 3), batch=2)
MASKS: dict[str, Any] = {
    "plain": {"keys": 9},
    "start": {"q_start": (0, 11)},  # the second row's last queries stand behind the window of every key
    "lengths": {"k_lengths": (0, 4)},
    "segments": {"segments": (2, 5, 1)},
    "all": {"q_start": (3, 1), "k_lengths": (2, 7), "segments": (4, 4)},
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_reference_agrees_with_float64(form: AttentionForm, mask: dict[str, Any]) -> None:
    check(dataclasses.replace(SMALL, form=form, **mask), "float32", 1e-5)


def test_reference_agrees_with_float64_on_long_prompts() -> None:
    check(Case(700, 700, (2, 1), (4, 4), AttentionForm(0.5, window=300)), "float32", 1e-5)
    check(Case(332, 628, (4, 1), (8, 8), q_start=(296,)), "float32", 1e-5)


def test_a_prompt_alone_costs_what_attention_without_masks_costs() -> None:
    q, k, v, *_ = Case(300, 300, (2, 1), (4, 4), batch=2).arrays("float32")
    at = jnp.tile(jnp.arange(300), (2, 1))

    def flops(function: Any) -> float:
        cost = jax.jit(function).lower(q, k, v).compile().cost_analysis() or {}
        return cost["flops"]

    form = AttentionForm(0.5)
    expected = flops(lambda q, k, v: attention(q, k, v, form, q_positions=at, k_positions=at, aligned=True))
    assert flops(lambda q, k, v: prefill_attention(q, k, v, form)) <= 1.01 * expected


def test_gradients_flow_where_nothing_is_seen() -> None:
    q, k, v, *_ = SMALL.arrays("float32")
    lengths = jnp.array([0, 5])
    grads = jax.grad(lambda *a: prefill_attention(*a, AttentionForm(0.3), k_lengths=lengths).sum(), (0, 1, 2))(q, k, v)
    assert all(np.isfinite(g).all() for g in grads)
    assert not np.asarray(grads[2][0]).any()


def test_shapes_that_do_not_fit_are_named() -> None:
    q, k, v = jnp.ones((2, 3, 4, 8)), jnp.ones((2, 2, 5, 8)), jnp.ones((2, 2, 5, 6))
    form = AttentionForm(1.0)
    with pytest.raises(ValueError, match="2 rows and head dim 8, k has 2 and 7"):
        prefill_attention(q, k[..., :7], v, form)
    with pytest.raises(ValueError, match=r"keys \(2, 2, 5\), v has \(2, 2, 4\)"):
        prefill_attention(q, k, v[:, :, :4], form)
    with pytest.raises(ValueError, match="3 query heads do not divide over 2"):
        prefill_attention(q[:, :, :3], k, v, form)
    with pytest.raises(ValueError, match="go together"):
        prefill_attention(q, k, v, form, q_segments=jnp.zeros((2, 3), int))
    with pytest.raises(ValueError, match=r"k_lengths has shape \(3,\), not \(2,\)"):
        prefill_attention(q, k, v, form, k_lengths=jnp.zeros(3, int))
    with pytest.raises(ValueError, match=r"k_segments has shape \(2, 3\), not \(2, 5\)"):
        prefill_attention(q, k, v, form, q_segments=jnp.zeros((2, 3), int), k_segments=jnp.zeros((2, 3), int))


def refusal(case: Case, dtype: Any = jnp.bfloat16, device: Device = H200) -> str:
    with target(device), pytest.raises(UnsupportedError) as error:
        PREFILL_ATTENTION(*case.arrays(dtype), form=case.form, return_lse=False, implementation="pallas")
    return str(error.value)


def test_the_kernel_says_what_it_cannot_take() -> None:
    assert "Hopper" in refusal(Case(8, 8), device=dataclasses.replace(H200, kind="NVIDIA A100", capability=(8, 0)))
    assert "bfloat16 or all float16, not float32" in refusal(Case(8, 8), jnp.float32)
    assert "multiples of 16 up to 256, not 40 for keys and 64" in refusal(Case(8, 8, dim=(40, 64)))
    assert "not 64 for keys and 512" in refusal(Case(8, 8, dim=(64, 512)))
    assert "nothing to compute" in refusal(Case(8, 0))
    assert "absolute positions" in refusal(Case(8, 8, form=AttentionForm(0.1, alibi=RoundedAlibi((0.5,)))))
    assert "2 ALiBi slopes for 1 query heads" in refusal(Case(8, 8, form=AttentionForm(0.1, alibi=Alibi((0.5, 0.25)))))
    assert "scale must be positive" in refusal(Case(8, 8, form=AttentionForm(0.0)))
    assert "soft cap must be positive" in refusal(Case(8, 8, form=AttentionForm(1.0, softcap=0.0)))
