"""Rotary embedding with the KV write: the reference against float64, the kernel against the same."""

import dataclasses
import re
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdsi.errors import UnsupportedError
from jdsi.pallas_kernels.device import H200, target
from jdsi.pallas_kernels.kv_write import rotary_kv_write, rotary_kv_write_fused
from jdsi.pallas_kernels.kv_write.api import ROTARY_KV_WRITE
from jdsi.pallas_kernels.kv_write.pallas import candidates, run
from jdsi.pallas_kernels.kv_write.specs import argument_specs
from jdsi.pallas_kernels.rotary import Rotary, base_frequencies
from jdsi.pallas_kernels.rotary.scaling import DynamicNtkScaling, LongRopeScaling, YarnScaling
from kernels import RELATIVE, compile_for_h200, interpreted_or_gpu, relative_error, with_slow

ALL = Rotary(64)
NTK = DynamicNtkScaling(2.0, 16)
YARN = YarnScaling(4.0, 1024, attention_factor=1.2)
LONG = LongRopeScaling(tuple(1 + i / 8 for i in range(32)), tuple(2 + i / 8 for i in range(32)), 64, 1.1)


@dataclasses.dataclass(frozen=True)
class Case:
    tokens: int = 3
    heads: int = 4
    kv_heads: int = 2
    dim: int = 64
    value_dim: int = 64
    rotary: Rotary | None = ALL
    dtype: str = "bfloat16"
    memory: str | None = None
    rows: int = 4
    slots: int = 8
    positions: tuple[int, ...] = (4095, 0, 131071)

    def arrays(self, seed: int = 0) -> dict[str, Any]:
        """The arguments. Of more than one token, the second and the last but one are dropped."""
        random = np.random.default_rng(seed)
        memory = self.memory or self.dtype
        shapes = {
            "q": ((self.tokens, self.heads, self.dim), self.dtype),
            "k": ((self.tokens, self.kv_heads, self.dim), self.dtype),
            "v": ((self.tokens, self.kv_heads, self.value_dim), self.dtype),
            "keys": ((self.rows, self.kv_heads, self.slots, self.dim), memory),
            "values": ((self.rows, self.kv_heads, self.slots, self.value_dim), memory),
        }
        arrays = {name: random.standard_normal(s).astype(jnp.dtype(dtype)) for name, (s, dtype) in shapes.items()}
        places = random.permutation(self.rows * self.slots)[: self.tokens]
        rows, slots = np.int32(places // self.slots), np.int32(places % self.slots)
        if self.tokens > 1:
            rows[1], slots[-2] = -1, self.slots if self.tokens > 3 else -1
        if memory in ("int8", "float8_e4m3fn"):
            for name in ("key_scales", "value_scales"):
                arrays[name] = random.standard_normal((self.rows, self.kv_heads, self.slots)).astype(np.float32)
        positions = np.array([self.positions[i % len(self.positions)] for i in range(self.tokens)], np.int32)
        return {**arrays, "rows": rows, "slots": slots, "positions": positions, "lengths": positions // 2 + 3}


def turned(x: Any, positions: Any, lengths: Any, rotary: Rotary | None) -> np.ndarray:
    """In float64, but for the frequencies and the phase, whose float32 is part of the definition."""
    wide = np.asarray(x, np.float64)
    if rotary is None:
        return wide
    scaling, pairs = rotary.scaling, rotary.dim // 2
    frequencies = base_frequencies(rotary.dim, rotary.theta)
    if scaling is not None:
        frequencies = np.asarray(scaling.frequencies(rotary.dim, rotary.theta, jnp.asarray(lengths)), np.float32)
    phase = np.float64(np.asarray(positions, np.float32)[:, None] * frequencies)
    factor = 1.0 if scaling is None else scaling.attention_factor
    cos, sin = (f(phase)[:, None] * factor for f in (np.cos, np.sin))
    first, second = (
        (slice(0, rotary.dim, 2), slice(1, rotary.dim, 2))
        if rotary.interleaved
        else (slice(pairs), slice(pairs, 2 * pairs))
    )
    out = wide.copy()
    out[..., first] = wide[..., first] * cos - wide[..., second] * sin
    out[..., second] = wide[..., second] * cos + wide[..., first] * sin
    return out


def oracle(arrays: dict[str, Any], rotary: Rotary | None) -> tuple[np.ndarray, ...]:
    q, k = (turned(arrays[name], arrays["positions"], arrays["lengths"], rotary) for name in ("q", "k"))
    keys, values = (np.asarray(arrays[name], np.float64).copy() for name in ("keys", "values"))
    for t, (row, slot) in enumerate(zip(arrays["rows"], arrays["slots"], strict=True)):
        if 0 <= row < keys.shape[0] and 0 <= slot < keys.shape[2]:
            keys[row, :, slot], values[row, :, slot] = k[t], np.asarray(arrays["v"][t], np.float64)
    return q, keys, values


def fused(arrays: dict[str, Any]) -> dict[str, Any]:
    """The arguments with q, k and v as one array."""
    rest = {name: array for name, array in arrays.items() if name not in ("q", "k", "v")}
    return {"qkv": jnp.concatenate([jnp.asarray(arrays[name]) for name in ("q", "k", "v")], axis=1), **rest}


def check(case: Case, seed: int = 0, *, as_one: bool = False, **how: Any) -> None:
    arrays = case.arrays(seed)
    if as_one:
        write = partial(rotary_kv_write_fused, num_heads=case.heads, rotary=case.rotary, **how)
        results = jax.jit(write)(**fused(arrays))
    else:
        results = jax.jit(partial(rotary_kv_write, rotary=case.rotary, **how))(**arrays)
    for ours, theirs in zip(results, oracle(arrays, case.rotary), strict=True):
        assert relative_error(ours, theirs) <= RELATIVE[case.dtype]
    assert [x.dtype for x in results] == [arrays[name].dtype for name in ("q", "keys", "values")]
    where = np.zeros(arrays["keys"].shape[::2][:2], bool)
    for row, slot in zip(arrays["rows"], arrays["slots"], strict=True):
        if 0 <= row < where.shape[0] and 0 <= slot < where.shape[1]:
            where[row, slot] = True
    for new, name in zip(results[1:], ("keys", "values"), strict=True):  # the rest is as it was, to the bit
        old = np.asarray(arrays[name]).swapaxes(1, 2)
        np.testing.assert_array_equal(np.asarray(new).swapaxes(1, 2)[~where], old[~where])


CASES = {
    "llama": Case(),
    "llama-fp16": Case(heads=8, kv_heads=8, dim=128, value_dim=128, rotary=Rotary(128, theta=5e5), dtype="float16"),
    "gpt-j": Case(kv_heads=4, dim=256, value_dim=256, rotary=Rotary(64, interleaved=True)),
    "all-interleaved": Case(rotary=Rotary(64, interleaved=True), dtype="float16"),
    "neox": Case(kv_heads=4, dim=80, value_dim=80, rotary=Rotary(20)),
    "neox-96": Case(kv_heads=4, dim=96, value_dim=96, rotary=Rotary(24)),
    "opt": Case(kv_heads=4, rotary=None),
    "falcon": Case(heads=71, kv_heads=1),
    "few-heads": Case(heads=6, kv_heads=3, dim=80, value_dim=80, rotary=Rotary(80)),
    "other-value-dim": Case(dim=96, value_dim=40, rotary=Rotary(32)),
    "one-token": Case(tokens=1),
    "many-tokens": Case(tokens=9, heads=2, kv_heads=1, rows=3, slots=16, positions=(5, 6, 7, 0, 1, 100, 101, 4095, 2)),
    "pages": Case(tokens=6, rows=8, slots=2),
    "ntk": Case(rotary=Rotary(64, scaling=NTK)),
    "yarn": Case(rotary=Rotary(64, scaling=YARN)),
    "long-rope": Case(rotary=Rotary(64, scaling=LONG), positions=(100, 200, 3)),
    "wider-memory": Case(memory="float32"),
    "other-memory": Case(dtype="float16", memory="bfloat16", rotary=None),
    "float32": Case(dtype="float32", positions=(4095, 5, 100)),
}


@pytest.mark.parametrize("name", CASES)
def test_reference_agrees_with_float64(name: str) -> None:
    check(CASES[name], implementation="xla")


# The reference is looked at in all of CASES; the kernel's lines, and heads of every kind, are in the others.
@pytest.mark.parametrize("name", with_slow(CASES, ["llama-fp16", "all-interleaved", "neox-96", "few-heads", "yarn"]))
def test_kernel_agrees_with_float64(name: str) -> None:
    with interpreted_or_gpu():
        check(CASES[name], seed=1, implementation="pallas")


FUSED = {
    name: CASES[name]
    for name in (
        "llama",
        "llama-fp16",
        "gpt-j",
        "neox",
        "opt",
        "falcon",
        "few-heads",
        "one-token",
        "many-tokens",
        "ntk",
    )
} | {
    "interleaved-gqa-pages": Case(
        tokens=5, heads=6, dim=128, value_dim=128, rotary=Rotary(32, interleaved=True), rows=8, slots=2
    ),
    "one-kv-head": Case(tokens=7, heads=5, kv_heads=1, rotary=Rotary(32), memory="float32"),
    "float32": CASES["float32"],
}


@pytest.mark.parametrize("name", with_slow(FUSED, ["llama", "llama-fp16", "gpt-j", "few-heads", "one-token"]))
def test_kernel_takes_the_fused_projection(name: str) -> None:
    with interpreted_or_gpu():
        check(FUSED[name], seed=2, as_one=True, implementation="pallas")


@pytest.mark.parametrize("memory", [None, "int8", "float8_e4m3fn"])
@pytest.mark.parametrize("implementation", ["xla", "pallas"])
def test_fused_or_not_is_the_same_to_the_bit(implementation: Any, memory: str | None) -> None:
    case = dataclasses.replace(FUSED["interleaved-gqa-pages"], memory=memory)
    arrays = case.arrays()
    how: dict[str, Any] = {"rotary": case.rotary, "implementation": implementation}
    with interpreted_or_gpu():
        apart = jax.jit(partial(rotary_kv_write, **how))(**arrays)
        whole = jax.jit(partial(rotary_kv_write_fused, num_heads=case.heads, **how))(**fused(arrays))
    for a, b in zip(apart, whole, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(("heads", "reason"), [(8, "8 heads, 8 of them"), (0, "8 heads, 0 of them"), (3, "an odd")])
def test_heads_that_q_leaves_are_counted(heads: int, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        rotary_kv_write_fused(**fused(Case().arrays()), num_heads=heads, rotary=None)


@pytest.mark.parametrize(
    ("name", "memory", "implementation"),
    [
        ("llama", "int8", "xla"),
        ("llama", "float8_e4m3fn", "xla"),
        pytest.param("llama", "int8", "pallas", marks=pytest.mark.slow),
        ("gpt-j", "float8_e4m3fn", "pallas"),
        ("neox", "int8", "pallas"),
        pytest.param("falcon", "float8_e4m3fn", "pallas", marks=pytest.mark.slow),
    ],
)
def test_quantized_memory(name: str, memory: str, implementation: Any) -> None:
    limit, tolerance = {"int8": (127, 0.01), "float8_e4m3fn": (448, 0.04)}[memory]
    case = dataclasses.replace(CASES[name], memory=memory)
    arrays = case.arrays()
    arrays["k"][0, 0], arrays["v"][0, 0] = 0, 0  # a head of zeros stays one
    with interpreted_or_gpu():
        call = jax.jit(partial(rotary_kv_write, rotary=case.rotary, implementation=implementation))
        q, *written = map(np.asarray, call(**arrays))
    expected = [turned(arrays[n], arrays["positions"], arrays["lengths"], case.rotary) for n in ("q", "k")]
    assert relative_error(q, expected[0]) <= RELATIVE["bfloat16"]
    new = (expected[1], np.asarray(arrays["v"], np.float64))
    dropped = np.ones((case.rows, case.slots), bool)
    for t, (row, slot) in enumerate(zip(arrays["rows"], arrays["slots"], strict=True)):
        if row >= 0 and slot >= 0:
            dropped[row, slot] = False
            for stored, scales, exact in zip(written[:2], written[2:], new, strict=True):
                numbers, scale = stored[row, :, slot].astype(np.float64), scales[row, :, slot, None]
                assert relative_error(numbers * scale, exact[t]) <= tolerance
                assert set(np.abs(numbers).max(-1)) <= {0, limit}
                np.testing.assert_allclose(scale[:, 0], np.abs(exact[t]).max(-1) / limit, rtol=0.02)
    for ours, name in zip(written, ("keys", "values", "key_scales", "value_scales"), strict=True):
        np.testing.assert_array_equal(ours.swapaxes(1, 2)[dropped], arrays[name].swapaxes(1, 2)[dropped])


@pytest.mark.parametrize("dim", [64, 80, 96])
@pytest.mark.parametrize("implementation", ["xla", "pallas"])
def test_phase_is_float32_at_the_last_position(implementation: Any, dim: int) -> None:
    """DeepSpeed's bias-free rotary test; a phase in bfloat16 would be off by whole turns at position 4095."""
    case = Case(dim=dim, value_dim=dim, rotary=Rotary(dim), dtype="float32", positions=(4095, 4094, 1))
    with interpreted_or_gpu():
        check(case, implementation=implementation)


def test_sequences_may_be_mixed() -> None:
    """DeepSpeed's blocked rotary: tokens of several sequences, each at its own position, in pages of their own."""
    pages = np.array([[5, 2], [0, 7], [3, 1]])
    tokens = [(0, 3), (0, 4), (1, 0), (2, 6), (2, 7), (1, 1)]  # sequence, position; pages of 4
    case = Case(tokens=6, rows=8, slots=4)
    arrays = case.arrays()
    arrays |= {
        "rows": jnp.array([pages[s, p // 4] for s, p in tokens]),
        "slots": jnp.array([p % 4 for _, p in tokens]),
        "positions": jnp.array([p for _, p in tokens]),
    }
    with interpreted_or_gpu():
        results = jax.jit(partial(rotary_kv_write, rotary=case.rotary, implementation="pallas"))(**arrays)
    for ours, theirs in zip(results, oracle(arrays, case.rotary), strict=True):
        assert relative_error(ours, theirs) <= RELATIVE["bfloat16"]


def test_ascending_places_take_the_fast_path_of_xla() -> None:
    case = Case(tokens=4, rows=2, slots=8)
    arrays = case.arrays() | {"rows": jnp.array([0, 0, 1, 1]), "slots": jnp.array([3, 4, 0, 8])}
    fast, slow = (
        jax.jit(partial(rotary_kv_write, rotary=case.rotary, ascending=ascending))(**arrays)
        for ascending in (True, False)
    )
    for a, b in zip(fast, slow, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("config", candidates(jnp.zeros((1, 16, 64)), device=H200), ids=str)
def test_every_configuration_gives_the_same(config: dict[str, int]) -> None:
    arrays = Case(heads=16, kv_heads=4).arrays()
    with interpreted_or_gpu():
        results = jax.jit(partial(run, device=H200, config=config, rotary=ALL, ascending=False))(
            *arrays.values(), None, None
        )
    for ours, theirs in zip(results, oracle(arrays, Rotary(64)), strict=True):
        assert relative_error(ours, theirs) <= RELATIVE["bfloat16"]


def test_batching() -> None:
    cases = [Case().arrays(seed) for seed in (1, 2)]
    stacked = {name: jnp.stack([case[name] for case in cases]) for name in cases[0]}
    call = partial(rotary_kv_write, rotary=ALL, implementation="pallas")
    with interpreted_or_gpu():
        mapped = jax.jit(jax.vmap(lambda arrays: call(**arrays)))(stacked)
    for results, case in zip(zip(*mapped, strict=True), cases, strict=True):
        for ours, theirs in zip(results, oracle(case, ALL), strict=True):
            assert relative_error(ours, theirs) <= RELATIVE["bfloat16"]


@pytest.mark.aot
@pytest.mark.parametrize("rotary", [Rotary(128), Rotary(64, interleaved=True), None], ids=["llama", "gpt-j", "none"])
def test_donated_memory_is_not_copied(rotary: Rotary | None) -> None:
    case = Case(dim=128, value_dim=128, rows=8, slots=4096, rotary=rotary)
    arrays = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in case.arrays().items()}
    memory = [arrays.pop(name) for name in ("keys", "values")]

    def step(memory: Any, arrays: dict[str, Any]) -> Any:
        """Two layers, so that the memory is neither only an argument nor only a result."""
        call = partial(rotary_kv_write, rotary=rotary, implementation="pallas")
        for _ in range(2):
            q, *memory = call(**arrays | dict(zip(("keys", "values"), memory, strict=True)))
            arrays = arrays | {"q": q}
        return q, memory

    copies = [
        len(re.findall(r"= bf16\[8,2,4096,[^=]*? (?:copy|fusion)\(", text))
        for text in (compile_for_h200(step, memory, arrays, donate=donate).text for donate in ((0,), ()))
    ]
    assert copies == [0, 2]  # what may not be overwritten has to be copied: the count does see copies


def test_sharding_over_heads() -> None:
    case = Case()
    arrays = case.arrays()
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("tensor",))
    heads = jax.P(None, "tensor")
    specs = {name: heads if array.ndim > 1 else jax.P() for name, array in arrays.items()}
    call = partial(rotary_kv_write, rotary=case.rotary, implementation="pallas")
    with interpreted_or_gpu():
        sharded = jax.shard_map(
            lambda arrays: call(**arrays), mesh=mesh, in_specs=(specs,), out_specs=heads, check_vma=False
        )
        results = jax.jit(sharded)(arrays)
    for ours, theirs in zip(results, oracle(arrays, case.rotary), strict=True):
        assert relative_error(ours, theirs) <= RELATIVE["bfloat16"]


@pytest.mark.gpu
@pytest.mark.parametrize("spec", argument_specs(), ids=lambda spec: spec.name)
def test_real_sizes_on_the_gpu(spec: Any) -> None:
    arrays = jax.jit(spec.make)(jax.random.key(0))
    run_as = {how: jax.jit(partial(ROTARY_KV_WRITE, implementation=how, **spec.static)) for how in ("pallas", "xla")}
    for ours, theirs in zip(run_as["pallas"](*arrays), run_as["xla"](*arrays), strict=True):
        assert relative_error(ours, theirs) <= RELATIVE[str(ours.dtype)]


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        (Case(dtype="float8_e4m3fn"), "q is float8_e4m3fn, not bfloat16"),
        (Case(memory="float8_e5m2", rotary=None), "keys is float8_e5m2, not bfloat16"),
        (Case(tokens=0), r"q of shape \(0, 4, 64\) is empty"),
        (Case(dim=2048), "the heads of q have 2048 numbers, more than 1024"),
        (Case(dim=65, rotary=Rotary(64, interleaved=True)), "a head of 65 numbers, which is odd"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_kernel_says_what_it_cannot_take(case: Case, reason: str) -> None:
    with target(H200), pytest.raises(UnsupportedError, match=reason):
        rotary_kv_write(**case.arrays(), rotary=case.rotary, implementation="pallas")


def test_a_row_is_no_longer_than_threads_can_count() -> None:
    arrays = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in Case(dim=128, value_dim=128).arrays().items()}
    arrays |= {name: jax.ShapeDtypeStruct((4, 2, 2**23, 128), jnp.bfloat16) for name in ("keys", "values")}
    with target(H200), pytest.raises(UnsupportedError, match="a row of keys has 2147483648 numbers, more than"):
        jax.eval_shape(lambda arrays: rotary_kv_write(**arrays, rotary=None, implementation="pallas"), arrays)


def test_kernel_is_for_hopper() -> None:
    with target(dataclasses.replace(H200, capability=(8, 0))), pytest.raises(UnsupportedError, match="Hopper"):
        rotary_kv_write(**Case().arrays(), rotary=None, implementation="pallas")


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("v", (2, 2, 64), r"v has shape \(2, 2, 64\), not \(3, 2, 64\)"),
        ("keys", (4, 3, 8, 64), r"keys has shape \(4, 3, 8, 64\), not \(4, 2, 8, 64\)"),
        ("values", (4, 2, 9, 64), r"values has shape \(4, 2, 9, 64\), not \(4, 2, 8, 64\)"),
        ("slots", (4,), r"slots has shape \(4,\), not \(3,\)"),
    ],
)
def test_arrays_that_do_not_fit_are_named(name: str, shape: tuple[int, ...], message: str) -> None:
    arrays = Case().arrays()
    arrays[name] = jnp.zeros(shape, arrays[name].dtype)
    with pytest.raises(ValueError, match=message):
        rotary_kv_write(**arrays, rotary=None)


def test_scales_go_with_8_bits() -> None:
    arrays = Case().arrays()
    with pytest.raises(ValueError, match="key_scales do not go with bfloat16"):
        rotary_kv_write(**arrays, key_scales=jnp.zeros((4, 2, 8)), rotary=None)
    with pytest.raises(ValueError, match="key_scales are missing for int8"):
        rotary_kv_write(**arrays | {"keys": jnp.zeros((4, 2, 8, 64), jnp.int8)}, rotary=None)
    memory = {"keys": jnp.zeros((4, 2, 8, 64), jnp.int8), "key_scales": jnp.zeros((4, 2, 8))}
    with pytest.raises(ValueError, match="keys are int8 and values bfloat16: both need scales, or neither"):
        rotary_kv_write(**arrays | memory, rotary=None)


def test_too_many_rotated_dimensions_are_named() -> None:
    with pytest.raises(ValueError, match="66 rotated dimensions: an even number up to the head's 64 is needed"):
        rotary_kv_write(**Case().arrays(), rotary=Rotary(66))


@pytest.mark.aot
@pytest.mark.parametrize("rotary", [Rotary(128), Rotary(64, interleaved=True), None], ids=["llama", "gpt-j", "none"])
def test_a_fused_projection_is_not_copied(rotary: Rotary | None) -> None:
    case = Case(tokens=8, heads=32, kv_heads=8, dim=128, value_dim=128, rows=8, slots=512, rotary=rotary)
    shapes = jax.eval_shape(lambda: {name: jnp.asarray(x) for name, x in fused(case.arrays()).items()})
    memory = {name: shapes.pop(name) for name in ("keys", "values")}

    def step(memory: Any, qkv: Any, rest: Any) -> Any:
        """As a model has it: the projection is a matrix, and what follows wants q alone."""
        qkv = qkv.reshape(8, -1, 128)
        return rotary_kv_write_fused(qkv, 32, **memory, **rest, rotary=rotary, implementation="pallas")

    flat = jax.ShapeDtypeStruct((8, 48 * 128), shapes.pop("qkv").dtype)
    text = compile_for_h200(step, memory, flat, shapes, donate=(0,)).text
    assert text.count('custom_call_target="mosaic_gpu') == 1
    assert not re.findall(r"= bf16\[\S* (?:copy|fusion|slice|broadcast)\(", text)


# Every fourth: of the three kinds of memory in turn.
@pytest.mark.aot
@pytest.mark.parametrize("spec", argument_specs()[::4], ids=lambda spec: spec.name)
def test_compiles_for_the_h200_without_spills(spec: Any) -> None:
    compiled = compile_for_h200(partial(ROTARY_KV_WRITE, implementation="pallas", **spec.static), *spec.abstract())
    assert compiled.registers > 0
    assert compiled.spills == 0


AWKWARD = ["neox", "falcon", "few-heads", "ntk", "wider-memory"]


@pytest.mark.aot
@pytest.mark.parametrize(
    ("name", "memory"), [*((name, None) for name in AWKWARD), ("neox", "int8"), ("gpt-j", "float8_e4m3fn")]
)
def test_awkward_heads_compile_without_spills(name: str, memory: str | None) -> None:
    case = dataclasses.replace(CASES[name], memory=memory or CASES[name].memory)
    arrays = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in case.arrays().items()}
    compiled = compile_for_h200(
        lambda arrays: rotary_kv_write(**arrays, rotary=case.rotary, implementation="pallas"), arrays
    )
    assert compiled.registers > 0
    assert compiled.spills == 0
