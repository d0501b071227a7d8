"""Decode attention's reference against float64, and what its functions refuse."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decode_cases import Case, call, jitted, make, oracle
from jdsi.errors import UnsupportedError
from jdsi.pallas_kernels import Alibi, AttentionForm, attention
from jdsi.pallas_kernels.attention import RoundedAlibi
from jdsi.pallas_kernels.decode_attention import DECODE_ATTENTION, decode_attention
from jdsi.pallas_kernels.device import H200, target
from kernels import relative_error

SMALL = {"dim": 6, "capacity": 40, "form": AttentionForm(0.4)}
CASES = {
    "causal": Case((1, 17, 40), **SMALL),
    "several queries": Case((3, 17, 40), queries=3, heads=(6, 2), **SMALL),
    "both ways": Case((0, 17, 40), queries=2, **SMALL | {"form": AttentionForm(0.4, causal=False)}),
    "window": Case((4, 30), queries=2, **SMALL | {"form": AttentionForm(0.4, window=5)}),
    "both ways in a window": Case(
        (30,), queries=2, starts=(12,), **SMALL | {"form": AttentionForm(0.4, causal=False, window=5)}
    ),
    "sinks": Case((2, 30), queries=2, sinks=3, **SMALL | {"form": AttentionForm(0.4, window=5)}),
    "softcap": Case((30,), **SMALL | {"form": AttentionForm(2.0, softcap=1.5)}),
    "alibi": Case((30,), queries=2, **SMALL | {"form": AttentionForm(0.4, alibi=Alibi((0.5, 0.25, 0.1, 0.7)))}),
    "values of another width": Case((30,), v_dim=4, **SMALL),
    "latent": Case((30,), heads=(4, 1), value_dim=4, **SMALL),
    "int8": Case((0, 30), narrow="int8", **SMALL),
    "e4m3": Case((0, 30), narrow="float8_e4m3fn", **SMALL),
    "more queries than keys": Case((2,), queries=4, **SMALL),
    "behind all keys": Case((0, 9, 20), starts=(5, 30, 39), **SMALL | {"form": AttentionForm(0.4, window=5)}),
}


@pytest.mark.parametrize("page", [0, 8])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_reference_equals_float64(case: Case, page: int) -> None:
    case = dataclasses.replace(case, page=page, holes=0.2)
    arrays = make(case, "float32")
    out, lse = jitted(case, arrays)
    expected, expected_lse = oracle(case, arrays)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(lse, expected_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize("queries", [1, 3])
def test_the_usual_call_is_plain_attention(batch: int, queries: int) -> None:
    arrays = make(Case((40,) * batch, queries=queries, **SMALL), "float32")
    q, k, v, start = (arrays[name] for name in ("q", "k", "v", "q_start"))
    form = AttentionForm(0.4, window=7)
    positions = {
        "q_positions": start[:, None] + jnp.arange(queries, dtype=jnp.int32),
        "k_positions": jnp.broadcast_to(jnp.arange(40, dtype=jnp.int32), (batch, 40)),
    }
    ours = jax.make_jaxpr(lambda *x: decode_attention(*x, form, q_start=start))(q, k, v)
    plain = jax.make_jaxpr(lambda *x: attention(*x, form, **positions))(q, k, v)
    assert [str(e.primitive) for e in ours.eqns][-len(plain.eqns) :] == [str(e.primitive) for e in plain.eqns]
    np.testing.assert_array_equal(decode_attention(q, k, v, form, q_start=start), attention(q, k, v, form, **positions))


def test_it_has_derivatives() -> None:
    case = Case((9, 30), queries=2, **SMALL)
    arrays = make(case, "float32")
    arrays |= {name: jnp.nan_to_num(arrays[name]) for name in "kv"}

    def loss(q: Any, implementation: Any) -> Any:
        return (call(case, arrays | {"q": q}, implementation=implementation) ** 2).sum()

    gradient = jax.grad(loss)(arrays["q"], None)
    step = 1e-2 * gradient / jnp.linalg.norm(gradient)
    slope = (loss(arrays["q"] + step, "xla") - loss(arrays["q"] - step, "xla")) / 2
    assert relative_error(slope, jnp.vdot(gradient, step)) < 1e-2


WRONG = {
    "queries have 6 dimensions, keys 5": {"k": (1, 2, 8, 5), "v": (1, 2, 8, 5)},
    "queries have 1 rows, keys 2": {"k": (2, 2, 8, 6), "v": (2, 2, 8, 6)},
    "4 query heads do not divide over 3": {"k": (1, 3, 8, 6), "v": (1, 3, 8, 6)},
    "keys are (1, 2, 8) and values (1, 2, 9)": {"v": (1, 2, 9, 6)},
    "q has 3 dimensions, not 4": {"q": (1, 4, 6)},
    "give either v or value_dim": {"value_dim": 4},
    "value_dim is 7, the keys have 6": {"v": None, "value_dim": 7},
    "k_scales do not go with float32": {"k_scales": (1, 2, 8)},
    "q_start has shape (2,), not (1,)": {"q_start": (2,)},
    "k_lengths has shape (3,), not (1,)": {"k_lengths": (3,)},
    "sinks must not be negative": {"sinks": -1},
}


@pytest.mark.parametrize("message", WRONG)
def test_shapes_that_do_not_fit_are_named(message: str) -> None:
    given = {"q": (1, 1, 4, 6), "k": (1, 2, 8, 6), "v": (1, 2, 8, 6), "q_start": (1,)} | WRONG[message]
    given = {
        name: jnp.zeros(x, "int32" if name in ("q_start", "k_lengths") else "float32") if isinstance(x, tuple) else x
        for name, x in given.items()
    }
    with pytest.raises(ValueError, match=message.replace("(", r"\(").replace(")", r"\)")):
        decode_attention(**given, form=AttentionForm(1.0))


def test_scales_must_come_with_narrow_keys() -> None:
    q, k = jnp.zeros((1, 1, 2, 32)), jnp.zeros((1, 2, 8, 32), jnp.int8)
    start = jnp.zeros(1, jnp.int32)
    scales = jnp.ones((1, 2, 8))
    for scale, message in ((None, "k_scales are missing"), (scales[..., :7], r"k_scales have shape \(1, 2, 7\), not")):
        with pytest.raises(ValueError, match=message):
            decode_attention(q, k, k, AttentionForm(1.0), q_start=start, k_scales=scale, v_scales=scales)


REFUSED = {
    "queries must be bfloat16 or float16, not float32": {"dtype": "float32"},
    "keys are float16, queries bfloat16": {"kv": "float16"},
    "rounded ALiBi": {"form": AttentionForm(1.0, alibi=RoundedAlibi((1.0, 2.0)))},
    "keys have 24 dimensions, not a multiple of 16": {"dim": 24},
    "keys have 80 dimensions, not a multiple of 32": {"dim": 80, "kv": "int8"},
    "there is memory for 30 keys, not a multiple of 8": {"capacity": 30},
    "a page has 12 keys, not a multiple of 8": {"capacity": 12, "page": True},
    "pages of 96 keys neither divide nor are divided": {"capacity": 96, "page": True},
    "values have 528 dimensions, more than 512": {"dim": 528},
    "a multiple of 64 dimensions, not 48": {"dim": 64, "value_dim": 48},
    "values of 320 dimensions are not to be divided": {"dim": 320, "value_dim": 320, "length": 32},
    "must not be quantised": {"dim": 64, "value_dim": 64, "kv": "int8"},
    "for Hopper GPUs, not NVIDIA B200": {"device": dataclasses.replace(H200, kind="NVIDIA B200", capability=(10, 0))},
    "does not fit into shared memory": {"device": dataclasses.replace(H200, shared_memory=48 * 1024), "dim": 128},
    "no queries or no keys": {"rows": 0},
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_the_kernel_does_not_take_is_said(reason: str) -> None:
    given = {"dtype": "bfloat16", "kv": None, "dim": 64, "capacity": 64, "value_dim": None, "page": False, "rows": 1}
    given |= {"length": 1, "form": AttentionForm(1.0), "device": H200} | REFUSED[reason]
    rows, kv = given["rows"], given["kv"] or given["dtype"]
    q = jnp.zeros((rows, given["length"], 2, given["dim"]), given["dtype"])
    k = jnp.zeros((rows, 1, given["capacity"], given["dim"]), kv)
    v = k if given["value_dim"] is None else None
    scales = jnp.ones(k.shape[:3]) if kv == "int8" else None
    numbers = jnp.zeros(rows, jnp.int32)
    tables = jnp.zeros((rows, 1), jnp.int32) if given["page"] else None
    arrays = (q, k, v, scales, scales if v is not None else None, tables, numbers, numbers)
    with target(given["device"]), pytest.raises(UnsupportedError, match=reason):
        DECODE_ATTENTION(*arrays, form=given["form"], value_dim=given["value_dim"], implementation="pallas")
