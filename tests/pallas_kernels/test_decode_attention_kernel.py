"""Decode attention's Mosaic GPU kernel against float64: interpreted here, the same cases and real sizes on a GPU."""

import contextlib
import dataclasses
from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from accumulators import accumulators
from decode_cases import Case, call, jitted, make, oracle
from jdsi.pallas_kernels import Alibi, AttentionForm
from jdsi.pallas_kernels.attention.tile import combine
from jdsi.pallas_kernels.decode_attention.pallas import candidates, run
from jdsi.pallas_kernels.decode_attention.specs import decode_attention_specs, paged_decode_attention_specs
from jdsi.pallas_kernels.device import H200
from kernels import RELATIVE, interpreted_or_gpu, relative_error, with_slow
from lowered import kernels_of

WINDOW, ALIBI = AttentionForm(0.125, window=50), Alibi((0.5, 0.05, 0.3, 0.7))
EVERYTHING = AttentionForm(0.5, window=120, softcap=5.0, alibi=ALIBI)
WIDE_EVERYTHING = dataclasses.replace(EVERYTHING, alibi=Alibi(tuple(0.9**i for i in range(32))))
# By default as many parts as there are multiprocessors for, else that many; two stages so that all are used again.
CASES = {
    "one key": Case((1,), heads=(1, 1), capacity=64),
    "odd lengths": Case((200, 129, 64, 320, 0)),
    "many parts": (Case((200, 320, 3)), {"splits": 7, "stages": 2}),
    "one part": (Case((320, 131)), {"splits": 1, "stages": 2}),
    "several queries": Case((3, 200), queries=3, heads=(8, 2)),
    "more queries than one block": Case((200,), queries=8, heads=(16, 1), capacity=256),
    "16 queries": Case((15, 193), queries=16, heads=(2, 2)),
    "groups of eight": Case((200,), heads=(8, 1), dim=128),
    "groups of seven": Case((70, 200), heads=(7, 1)),
    "both ways": Case((0, 70, 200), queries=2, form=AttentionForm(0.125, causal=False)),
    "window": (Case((300, 20), form=WINDOW), {"stages": 2, "splits": 2}),
    "window of several queries": Case((300, 20), queries=8, form=WINDOW),
    "both ways in a window": Case((300,), queries=2, starts=(100,), form=dataclasses.replace(WINDOW, causal=False)),
    "sinks": (Case((300, 20, 130), sinks=70, form=WINDOW), {"stages": 2, "splits": 2}),
    "sinks of several queries": Case((300,), sinks=3, queries=3, form=WINDOW),
    "softcap": Case((200,), form=AttentionForm(2.0, softcap=5.0)),
    "alibi": Case((200,), queries=2, form=AttentionForm(0.125, alibi=ALIBI)),
    "everything": Case((300,), queries=3, sinks=5, form=EVERYTHING),
    "behind all keys": Case((0, 70, 200), starts=(5, 300, 230), form=WINDOW),
    "head dim 80": Case((200,), dim=80),
    "head dim 96": Case((200,), dim=96),
    "head dim 256": (Case((200,), dim=256), {"stages": 2}),
    "values of another width": Case((200,), dim=64, v_dim=96),
    "wide values of many queries": Case((200,), queries=16, heads=(4, 1), dim=256, capacity=256),
    "latent": Case((200,), heads=(16, 1), dim=576, value_dim=512, capacity=256),
    "latents of 64 heads": (
        Case((200, 64, 0), heads=(64, 1), dim=320, value_dim=256, capacity=256),
        {"splits": 1},
    ),
    "latents of 32 heads, two queries, everything": Case(
        (3, 300), queries=2, heads=(32, 1), dim=320, value_dim=256, sinks=5, form=WIDE_EVERYTHING
    ),
    "latent of many heads": (Case((200, 64), heads=(40, 1), dim=576, value_dim=512, capacity=256), {"splits": 1}),
}
PAGED = {
    "pages of 16": Case((200, 320, 0), page=16, holes=0.2),
    "pages of 32": Case((200, 320), page=32, holes=0.2, queries=3),
    "pages of a tile": (Case((200, 320, 1), page=64, holes=0.3), {"stages": 2, "splits": 1}),
    "pages of 128": Case((300, 384), page=128, capacity=384, holes=0.3, dim=128),
    "pages of 256": Case((300, 511), page=256, capacity=512),
    "only holes": Case((200, 320), page=16, holes=1.0),
    "a window with sinks in pages": Case((300, 100), page=16, holes=0.1, form=WINDOW, sinks=20),
    "latents of 128 heads in pages": (
        Case((130,), heads=(128, 1), dim=320, value_dim=256, page=32, holes=0.3, capacity=192),
        {"splits": 2},
    ),
    "latent in pages": Case((200,), heads=(16, 1), dim=576, value_dim=512, capacity=256, page=64, holes=0.3),
}
NARROW = {
    "int8": (Case((0, 200, 320), narrow="int8"), {"stages": 2, "splits": 2}),
    "e4m3": (Case((0, 200, 320), narrow="float8_e4m3fn"), {"stages": 2, "splits": 2}),
    "int8 of several queries": Case((200,), narrow="int8", queries=3, heads=(8, 1), dim=128, form=WINDOW, sinks=9),
    "e4m3 of head dim 96": Case((200,), narrow="float8_e4m3fn", dim=96),
    "int8 in pages": Case((200, 320), narrow="int8", page=16, holes=0.2),
    "e4m3 in pages": Case((300, 320), narrow="float8_e4m3fn", page=64, holes=0.2),
    "int8, wide, of many queries": Case((130,), narrow="int8", queries=16, heads=(4, 1), dim=256, capacity=192),
}
ALL = CASES | PAGED | NARROW
# Every line of the kernels, every way to cut the keys, and every end of a row or page is in the others.
SLOW = {
    "one part",
    "several queries",
    "16 queries",
    "groups of eight",
    "window",
    "window of several queries",
    "sinks of several queries",
    "softcap",
    "alibi",
    "head dim 96",
    "wide values of many queries",
    "latent",
    "latents of 64 heads",
    "pages of 32",
    "pages of 128",
    "latents of 128 heads in pages",
    "e4m3 in pages",
}


@contextlib.contextmanager
def kernels() -> Iterator[None]:
    with accumulators(), interpreted_or_gpu(cores=4):
        yield


def operands(case: Case, arrays: dict[str, Any]) -> tuple[Any, ...]:
    names = ("q", "k", "v", "k_scales", "v_scales", "block_tables", "q_start", "k_lengths")
    return tuple(arrays.get(name) for name in names)


def check(case: Case | tuple[Case, dict[str, int]], dtype: str, seed: int = 0, *, lse_error: float = 1e-4) -> None:
    case, config = case if isinstance(case, tuple) else (case, {})
    arrays = make(case, dtype, seed)
    expected, expected_lse = oracle(case, arrays)
    static: dict[str, Any] = {"form": case.form, "sinks": case.sinks, "value_dim": case.value_dim, "return_lse": True}
    with kernels():
        if config:
            out, lse = jax.jit(partial(run, device=H200, config=config, **static))(*operands(case, arrays))
        else:
            out, lse = jitted(case, arrays, implementation="pallas")
    assert relative_error(out, expected) <= RELATIVE[dtype]
    np.testing.assert_allclose(lse, expected_lse, rtol=1e-5, atol=lse_error)
    assert not np.asarray(out)[np.isneginf(expected_lse)].any()


# Where registers are scarce the logarithm is that of the rounded weights, which the values are multiplied with.
ROUNDED = ("more queries than one block", "latent of many heads")


@pytest.mark.parametrize("name", with_slow(ALL, SLOW))
def test_kernel_agrees_with_float64(name: str) -> None:
    check(ALL[name], "bfloat16", lse_error=1e-3 if name in ROUNDED else 1e-4)


@pytest.mark.parametrize("seed", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", with_slow(["odd lengths", "pages of 16", "int8"], ["pages of 16"]))
def test_kernel_agrees_with_float64_in_float16(name: str, seed: int) -> None:
    check(ALL[name], "float16", seed)


def test_every_configuration_gives_the_same() -> None:
    case = Case((500, 77), capacity=512)
    arrays = make(case, "bfloat16")
    expected, _ = oracle(case, arrays)
    static: dict[str, Any] = {"device": H200, "form": case.form}
    configs = candidates(*operands(case, arrays), **static)
    assert len({tuple(config.items()) for config in configs}) == len(configs) > 2
    for config in (configs[0], configs[-1], {"keys": 128, "columns": 16}):
        with kernels():
            out = jax.jit(partial(run, config=config, **static))(*operands(case, arrays))
        assert relative_error(out, expected) <= RELATIVE["bfloat16"]


def test_a_kernel_with_nothing_to_combine_writes_the_result_itself() -> None:
    """Several queries and heads, more of them than a block takes, dims that no tensor core takes, narrow keys."""
    for case in (
        Case((131, 0), queries=3, heads=(14, 2), capacity=192),
        Case((70,), queries=8, heads=(16, 1), capacity=128),
        Case((131,), dim=80, capacity=192, heads=(2, 2)),
        Case((70,), narrow="int8", page=32, holes=0.3, capacity=128, heads=(3, 1)),
    ):
        arrays = make(case, "bfloat16")
        static: dict[str, Any] = {"form": case.form, "value_dim": case.value_dim, "device": H200}
        alone = partial(run, config={"splits": 1}, **static)
        [kernel] = kernels_of(alone, *operands(case, jax.eval_shape(lambda arrays=arrays: arrays)))
        with kernels():
            out = jax.jit(alone)(*operands(case, arrays))
        assert kernel.results[0].shape == out.shape
        assert relative_error(out, oracle(case, arrays)[0]) <= RELATIVE["bfloat16"]


def test_parts_of_the_keys_combine() -> None:
    case = Case((200,))
    arrays = make(case, "float16")
    expected, expected_lse = oracle(case, arrays)
    parts = []
    with kernels():
        for span, start, length in ((slice(0, 128), 199, 128), (slice(128, 320), 199 - 128, 200 - 128)):
            part = {name: arrays[name][:, :, span] for name in "kv"}
            numbers = {"q_start": jnp.array([start]), "k_lengths": jnp.array([length])}
            parts.append(jitted(case, arrays | part | numbers, implementation="pallas"))
    out, lse = combine(*(jnp.stack(x) for x in zip(*parts, strict=True)))
    assert relative_error(out, expected) <= RELATIVE["float16"]
    np.testing.assert_allclose(lse, expected_lse, rtol=1e-4)


def test_batching_maps_the_kernel() -> None:
    case = Case((300,), capacity=512)  # in two parts
    several = [make(case, "bfloat16", seed) for seed in (0, 1)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *several)
    with kernels():
        outs = jax.jit(jax.vmap(lambda arrays: call(case, arrays, implementation="pallas")))(stacked)
    for arrays, out in zip(several, outs, strict=True):
        assert relative_error(out, oracle(case, arrays)[0]) <= RELATIVE["bfloat16"]


def test_heads_on_several_devices() -> None:
    case = Case((300,), capacity=512)  # in two parts
    arrays = make(case, "bfloat16")
    mesh = Mesh(np.array(jax.devices()[:1]), ("tensor",))
    heads = {"q": PartitionSpec(None, None, "tensor"), "k": PartitionSpec(None, "tensor")}
    heads = {name: heads.get(name, heads["k"] if name == "v" else PartitionSpec()) for name in arrays}

    def attend(arrays: dict[str, Any]) -> jax.Array:
        return call(case, arrays, implementation="pallas")

    with kernels():
        mapped = jax.shard_map(attend, mesh=mesh, in_specs=(heads,), out_specs=heads["q"], check_vma=False)
        out = jax.jit(mapped)(arrays)
    assert relative_error(out, oracle(case, arrays)[0]) <= RELATIVE["bfloat16"]


REAL = {
    spec.name: spec for spec in (*decode_attention_specs(), *paged_decode_attention_specs()) if "L=8192" in spec.name
}


@pytest.mark.gpu
@pytest.mark.parametrize("name", REAL)
def test_real_sizes_agree_with_the_reference(name: str) -> None:
    from jdsi.pallas_kernels.decode_attention import DECODE_ATTENTION

    spec = REAL[name]
    arrays = jax.jit(spec.make)(jax.random.key(0))
    ours, reference = (
        jax.jit(partial(DECODE_ATTENTION, implementation=implementation, **spec.static))(*arrays)
        for implementation in ("pallas", "xla")
    )
    assert relative_error(ours.astype(jnp.float32), reference.astype(jnp.float32)) <= 2 * RELATIVE["bfloat16"]
