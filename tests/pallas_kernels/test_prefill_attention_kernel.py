"""Prefill attention's Mosaic GPU kernel against float64: interpreted here, the same cases and real sizes on a GPU."""

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from accumulators import accumulators
from jdsi.pallas_kernels.attention import Alibi, AttentionForm
from jdsi.pallas_kernels.attention.tile import combine
from jdsi.pallas_kernels.device import H200
from jdsi.pallas_kernels.prefill_attention import PREFILL_ATTENTION, prefill_attention
from jdsi.pallas_kernels.prefill_attention.pallas import candidates, run
from kernels import RELATIVE, interpreted_or_gpu, relative_error, with_slow
from prefill_cases import Case, check

CAUSAL, FULL = AttentionForm(0.125), AttentionForm(0.125, causal=False)
WINDOW, FULL_WINDOW = AttentionForm(0.125, window=50), AttentionForm(0.125, causal=False, window=50)
SOFTCAP, ALIBI = AttentionForm(2.0, softcap=5.0), AttentionForm(0.125, alibi=Alibi((0.5, 0.05)))
CASES = {
    "one token": Case(1, 1),
    "few": Case(3, 3, (2, 1), batch=2),
    "odd": Case(77, 77, (2, 2)),
    "more than a block": Case(141, 141),
    "full, odd keys": Case(20, 203, form=FULL),
    "odd room for more keys": Case(20, 203),
    "packed in room for more keys": Case(150, 291, segments=(40, 110)),
    "window": Case(200, 200, form=WINDOW),
    "full window": Case(140, 300, form=FULL_WINDOW),
    "softcap": Case(64, 64, form=SOFTCAP),
    "alibi": Case(130, 130, (2, 2), form=ALIBI),
    "rows of several lengths": Case(40, 200, batch=3, k_lengths=(0, 131, 200), form=FULL),
    "continuation": Case(83, 157, (4, 1), q_start=(74,)),
    "continuations": Case(60, 330, batch=3, q_start=(0, 270, 100), k_lengths=(60, 330, 130)),
    "behind the window": Case(40, 40, batch=2, form=WINDOW, q_start=(70, 400)),
    "GQA 32/8": Case(24, 24, (4, 1)),
    "GQA 64/16": Case(24, 24, (8, 2)),
    "GQA 40/8": Case(24, 24, (5, 1)),
    "two packed prompts": Case(128, 128, segments=(51, 72)),
    "packed": Case(280, 280, segments=(130, 3, 1, 140), form=FULL),
    "packed, everything": Case(150, 290, segments=(100, 90, 95), q_start=(20,), k_lengths=(160,), form=WINDOW),
    "head dim 80": Case(70, 70, dim=(80, 80)),
    "head dim 96": Case(70, 70, dim=(96, 96)),
    "head dim 128": Case(70, 400, dim=(128, 128), q_start=(330,)),
    "head dim 256": Case(70, 300, dim=(256, 256), q_start=(230,)),
    "unequal head dims": Case(70, 300, dim=(192, 128), q_start=(230,)),
    "small head dims": Case(17, 17, dim=(16, 32)),
}
# Every line of the kernel, every kind of span, and every end of a row or block is in the others.
SLOW = {
    "few",
    "odd",
    "odd room for more keys",
    "packed in room for more keys",
    "continuation",
    "GQA 32/8",
    "GQA 64/16",
    "head dim 96",
    "head dim 128",
}


@contextlib.contextmanager
def kernels() -> Iterator[None]:
    with accumulators(), interpreted_or_gpu():
        yield


@pytest.mark.parametrize("name", with_slow(CASES, SLOW))
def test_kernel_agrees_with_float64(name: str) -> None:
    with kernels():
        check(CASES[name], "bfloat16", RELATIVE["bfloat16"], implementation="pallas")


@pytest.mark.parametrize("seed", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "name", with_slow(["packed, everything", "more than a block", "softcap"], ["more than a block", "softcap"])
)
def test_kernel_agrees_with_float64_in_float16(name: str, seed: int) -> None:
    with kernels():
        check(CASES[name], "float16", RELATIVE["float16"], seed, implementation="pallas")


def test_every_configuration_gives_the_same() -> None:
    case = Case(100, 700, q_start=(600,))  # so many keys that every place in shared memory is used again
    arrays = case.arrays("bfloat16")
    static: dict[str, Any] = {"form": case.form, "return_lse": False, "device": H200}
    expected, _ = case.oracle(arrays)
    configs = candidates(*arrays, **static)
    assert {config["key_block"] for config in configs} == {64, 128}
    for config in (configs[0], configs[-1], {"key_block": 64, "stages": 2}):
        with kernels():
            out = jax.jit(partial(run, config=config, **static))(*arrays)
        assert relative_error(out, expected) <= RELATIVE["bfloat16"]


def test_room_behind_the_queries_changes_no_bit() -> None:
    q, k, v, *_ = Case(70, 300).arrays("bfloat16")
    with kernels():
        attend = jax.jit(partial(prefill_attention, form=CAUSAL, return_lse=True, implementation="pallas"))
        for whole, alone in zip(attend(q, k, v), attend(q, k[:, :, :70], v[:, :, :70]), strict=True):
            np.testing.assert_array_equal(whole, alone)


def test_parts_of_the_keys_combine() -> None:
    case = Case(20, 200, (2, 1), form=FULL)
    q, k, v, *_ = arrays = case.arrays("bfloat16")
    with kernels():
        attend = jax.jit(partial(prefill_attention, form=FULL, return_lse=True, implementation="pallas"))
        parts = [attend(q, k[:, :, at], v[:, :, at]) for at in (slice(0, 130), slice(130, 200))]
    out, lse = combine(*(jnp.stack(both) for both in zip(*parts, strict=True)))
    expected, logarithms = case.oracle(arrays)
    assert relative_error(out, expected) <= RELATIVE["bfloat16"]
    np.testing.assert_allclose(lse, logarithms, atol=1e-4)


def test_kernel_under_vmap_and_shard_map() -> None:
    case = Case(24, 24, (2, 2), batch=2)
    arrays = case.arrays("bfloat16")
    expected, _ = case.oracle(arrays)
    attend = partial(prefill_attention, form=CAUSAL, implementation="pallas")
    with kernels():
        mapped = jax.jit(jax.vmap(lambda q, k, v: attend(q[None], k[None], v[None])[0]))(*arrays[:3])
    assert relative_error(mapped, expected) <= RELATIVE["bfloat16"]
    mesh = Mesh(np.array(jax.devices()[:1]), ("tensor",))
    heads = PartitionSpec(None, None, "tensor"), PartitionSpec(None, "tensor"), PartitionSpec(None, "tensor")
    with kernels():
        sharded = jax.jit(jax.shard_map(attend, mesh=mesh, in_specs=heads, out_specs=heads[0]))(*arrays[:3])
    assert relative_error(sharded, expected) <= RELATIVE["bfloat16"]


REAL = {
    **{f"prompt of {n}": Case(n, n, (32, 8), (128, 128)) for n in (2, 37, 128, 500, 1024, 2037)},
    "two packed prompts": Case(1232, 1232, (32, 8), (128, 128), segments=(514, 713)),
    "continuation": Case(332, 628, (32, 8), (128, 128), q_start=(296,)),
    "GQA 64/16": Case(700, 700, (64, 16), (128, 128)),
    "GQA 40/8": Case(700, 700, (40, 8), (128, 128)),
    "window": Case(1500, 1500, (16, 8), (256, 256), AttentionForm(0.0625, window=400, softcap=50.0)),
    "alibi": Case(900, 900, (8, 8), form=AttentionForm(0.125, alibi=Alibi(tuple(2.0**-n for n in range(1, 9))))),
    "unequal head dims": Case(600, 600, (16, 16), (192, 128)),
    "head dim 80": Case(1100, 1100, (32, 32), (80, 80)),
    "head dim 96": Case(1100, 1100, (32, 32), (96, 96), FULL),
}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("case", REAL.values(), ids=REAL)
def test_kernel_agrees_with_float64_at_real_sizes(case: Case, dtype: str) -> None:
    check(case, dtype, RELATIVE[dtype], implementation="pallas")


@pytest.mark.gpu
def test_kernel_is_deterministic() -> None:
    arrays = REAL["prompt of 2037"].arrays("bfloat16")
    attend = jax.jit(partial(PREFILL_ATTENTION, form=CAUSAL, return_lse=False, implementation="pallas"))
    first = np.asarray(attend(*arrays), np.float32)
    for _ in range(5):
        np.testing.assert_array_equal(np.asarray(attend(*arrays), np.float32), first)
