"""Decode attention in Triton, contiguous and paged: interpreted (or on the GPU), and compiled for its GPUs."""

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
from jdsi.pallas_kernels.decode_attention import decode_attention, paged_decode_attention
from jdsi.pallas_kernels.device import H200, target
from kernels import RELATIVE, array, relative_error
from triton_interpreter import A100, L40, compile_for, interpreted_triton

FORM = AttentionForm(scale=0.2)


@dataclasses.dataclass(frozen=True)
class Case:
    """One call: `keys` real keys of each row, the last of the `queries` at the end of them."""

    keys: tuple[int, ...]
    queries: int = 1
    heads: tuple[int, int] = (4, 2)
    dim: int = 32
    v_dim: int | None = None  # None: that of the keys
    capacity: int = 300
    page: int = 0
    form: AttentionForm = FORM
    sinks: int = 0
    value_dim: int | None = None  # values are part of the keys
    narrow: Any = None
    dtype: str = "bfloat16"
    holes: float = 0.0
    seed: int = 0


def alibi(heads: int, kind: Any = Alibi) -> Any:
    return kind(tuple(2.0**-i for i in range(1, heads + 1)))


CASES = {
    "one chunk": Case((5, 40), capacity=64),
    "several chunks": Case((1, 257, 300, 256)),
    "multi-head": Case((70, 300), heads=(2, 2)),
    "eight share a head": Case((270,), heads=(8, 1)),
    "odd group": Case((90, 0), heads=(7, 1), dim=80),
    "no keys": Case((0, 3), capacity=600),
    "several queries": Case((6, 280), queries=5),
    "many queries": Case((80, 290), queries=40, heads=(8, 4)),
    "window": Case((33, 299), form=dataclasses.replace(FORM, window=20)),
    "window with sinks": Case((33, 299, 700), capacity=768, form=dataclasses.replace(FORM, window=20), sinks=4),
    "both ways": Case((33, 299), queries=3, form=dataclasses.replace(FORM, causal=False, window=30)),
    "soft cap": Case((99, 300), form=dataclasses.replace(FORM, softcap=1.5)),
    "alibi": Case((99, 300), queries=2, form=dataclasses.replace(FORM, alibi=alibi(4))),
    "narrow values": Case((99, 300), dim=48, v_dim=16),
    "latent": Case((10, 270), heads=(20, 1), dim=80, value_dim=64),
    "int8": Case((20, 280), narrow=jnp.int8),
    "fp8": Case((20, 280), narrow=jnp.float8_e4m3fn),
    "latent int8": Case((10, 270), heads=(4, 1), dim=48, value_dim=32, narrow=jnp.int8),
}


def make(case: Case) -> tuple[dict[str, Any], np.ndarray, np.ndarray]:
    """Arguments, what the attention is in float64, and its logarithms. Memory nobody may look at is NaN."""
    rng = np.random.default_rng(case.seed)
    rows, (heads, kv_heads) = len(case.keys), case.heads
    lengths = np.array(case.keys)
    q = np.asarray(array(rng.standard_normal((rows, case.queries, heads, case.dim)), case.dtype), np.float64)
    dims = {"k": case.dim} | ({} if case.value_dim else {"v": case.v_dim or case.dim})
    there = np.arange(case.capacity) < lengths[:, None]
    arrays, wide = {"q": array(q, case.dtype)}, {}
    if case.page:
        columns = -(-case.capacity // case.page)
        tables = rng.choice([-1, rows * columns, 2**31 - 1], (rows, columns)).astype(np.int32)
        real = (np.arange(columns) * case.page < lengths[:, None]) & (rng.random((rows, columns)) >= case.holes)
        tables[real] = rng.permutation(rows * columns)[: real.sum()]
        there &= np.repeat(real, case.page, axis=1)[:, : case.capacity]
        arrays["block_tables"] = tables
    for name, dim in dims.items():
        x = rng.standard_normal((rows, kv_heads, case.capacity, dim))
        scales = None
        if case.narrow is not None:
            scales = np.abs(x).max(-1).astype(np.float32) / (127 if case.narrow == jnp.int8 else 448)
            x = np.asarray(jnp.asarray(np.round(x / scales[..., None]), case.narrow), np.float64)
            wide[name] = x * scales[..., None]
        else:
            x = np.asarray(array(x, case.dtype), np.float64)
            wide[name] = x
            x = np.where(there[:, None, :, None], x, np.nan)
        for key, part in ((name, x), (f"{name}_scales", scales)):
            if part is not None:
                if case.page:
                    fill = np.nan if case.narrow is None or part is scales else 0
                    part = _paged(part, arrays["block_tables"], case.page, fill)
                dtype = case.dtype if case.narrow is None else case.narrow if key == name else "float32"
                arrays[key] = array(part, dtype)
    arrays["q_start"] = np.maximum(lengths - case.queries, 0).astype(np.int32)
    arrays["k_lengths"] = lengths.astype(np.int32)
    values = wide["v"] if "v" in wide else wide["k"][..., : case.value_dim]
    out = np.zeros((rows, case.queries, heads, values.shape[-1]))
    lse = np.full(out.shape[:3], -np.inf)
    for row, query, head in np.ndindex(lse.shape):
        position = arrays["q_start"][row] + query
        distance = np.arange(case.capacity) - position
        seen = there[row].copy()
        if case.form.causal:
            seen &= distance <= 0
        if case.form.window is not None:
            seen &= (np.abs(distance) < case.form.window) | (np.arange(case.capacity) < case.sinks)
        if not seen.any():
            continue
        kv = head // (heads // kv_heads)
        scores = wide["k"][row, kv, seen] @ q[row, query, head] * case.form.scale
        if case.form.softcap is not None:
            scores = case.form.softcap * np.tanh(scores / case.form.softcap)
        if case.form.alibi is not None:
            scores += case.form.alibi.slopes[head] * distance[seen]
        lse[row, query, head] = np.logaddexp.reduce(scores)
        out[row, query, head] = np.exp(scores - lse[row, query, head]) @ values[row, kv, seen]
    return arrays, out, lse


def _paged(x: np.ndarray, tables: np.ndarray, page: int, fill: float) -> np.ndarray:
    """`[B, K, L, ...]` as pages `[P, K, page, ...]`, filled up with `fill`."""
    pages = np.full((tables.size, x.shape[1], page, *x.shape[3:]), fill)
    for row, column in zip(*np.nonzero((tables >= 0) & (tables < len(pages))), strict=True):
        part = x[row, :, column * page : (column + 1) * page]
        pages[tables[row, column], :, : part.shape[1]] = part
    return pages


def run(case: Case, arrays: dict[str, Any], implementation: Any = "triton") -> tuple[np.ndarray, np.ndarray]:
    call = paged_decode_attention if case.page else decode_attention
    names = {"k": "k_pages", "v": "v_pages"} if case.page else {}
    static = {"form": case.form, "sinks": case.sinks, "value_dim": case.value_dim, "return_lse": True}
    given = {names.get(key, key): x for key, x in arrays.items()} | (
        {} if "v" in arrays else {names.get("v", "v"): None}
    )
    with interpreted_triton():
        out, lse = jax.jit(partial(call, **static, implementation=implementation))(**given)
    assert out.dtype == arrays["q"].dtype
    return np.asarray(out, np.float64), np.asarray(lse, np.float64)


@pytest.mark.parametrize("page", [0, 16])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_every_variant(case: Case, page: int) -> None:
    case = dataclasses.replace(case, page=page, holes=0.1)
    arrays, expected, expected_lse = make(case)
    out, lse = run(case, arrays)
    assert relative_error(out, expected) < RELATIVE[case.dtype]
    np.testing.assert_allclose(lse, expected_lse, atol=2e-3)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("page", [0, 8, 24])
def test_half_precision_and_seeds(page: int, seed: int) -> None:
    case = Case((300, 17, 256), dtype="float16", page=page, holes=0.2, capacity=312, seed=seed)
    arrays, expected, _ = make(case)
    assert relative_error(run(case, arrays)[0], expected) < RELATIVE["float16"]


def test_all_pages_are_holes() -> None:
    case = Case((30, 300), page=16, holes=1.0)
    out, lse = run(case, make(case)[0])
    assert not out.any()
    assert np.isneginf(lse).all()


def test_rounded_alibi_is_the_references() -> None:
    case = Case((300, 40), queries=2, form=dataclasses.replace(FORM, alibi=alibi(4, RoundedAlibi)))
    arrays = {k: jnp.nan_to_num(x) if k in "kv" else x for k, x in make(case)[0].items()}
    for ours, reference in zip(run(case, arrays), run(case, arrays, "xla"), strict=True):
        assert relative_error(ours, reference) < RELATIVE["bfloat16"]


def test_lengths_follow_from_the_queries() -> None:
    case = Case((30, 290), queries=2)
    arrays, expected, _ = make(case)
    assert relative_error(run(case, {k: x for k, x in arrays.items() if k != "k_lengths"})[0], expected) < 1e-2


def test_a_row_does_not_depend_on_its_company() -> None:
    case = Case((300, 40, 256))
    arrays, _, _ = make(case)
    together = run(case, arrays)[0]
    for row in range(3):
        alone = run(case, {k: x[row : row + 1] for k, x in arrays.items()})[0]
        np.testing.assert_array_equal(alone[0], together[row])


SHAPES = {
    "llama": ((1, 1, 32, 8, 8192, 128), None, FORM),
    "llama speculative": ((8, 4, 32, 8, 8192, 128), None, FORM),
    "phi": ((1, 1, 32, 32, 2048, 80), None, FORM),
    "gemma": ((1, 1, 8, 4, 8192, 256), None, dataclasses.replace(FORM, softcap=50.0, window=4096)),
    "deepseek": ((1, 1, 128, 1, 8192, 576), 512, FORM),
}


# Always: every shape and kind of memory for the A100, and for the others what differs there, which is 8-bit floats, how
# little shared memory the L40 has, and the H200's products.
COMPILED = [
    *((name, "contiguous", A100) for name in SHAPES),
    *((name, "contiguous", H200) for name in ("llama", "deepseek")),
    *(("llama", kind, A100) for kind in ("paged", "int8", "fp8")),
    *((name, "fp8", device) for name, device in (("llama", L40), ("llama", H200), ("deepseek", H200))),
    *(("deepseek", kind, A100) for kind in ("int8", "fp8")),
    *((name, "paged", L40) for name in ("llama", "phi", "deepseek")),
]
MORE = [
    *((name, "contiguous", H200) for name in ("llama speculative", "phi", "gemma")),
    *(("llama", kind, device) for kind, device in (("int8", L40), ("int8", H200), ("paged", H200))),
    ("deepseek", "int8", H200),
]


@pytest.mark.aot
@pytest.mark.parametrize(
    ("name", "kind", "device"),
    [*COMPILED, *(pytest.param(*case, marks=pytest.mark.slow) for case in MORE)],
    ids=lambda x: getattr(x, "kind", x),
)
def test_compiles_without_spills(device: Any, name: str, kind: str) -> None:
    (batch, queries, heads, kv_heads, capacity, dim), value_dim, form = SHAPES[name]
    page = 64 if kind == "paged" else 0
    pages = (capacity // page * batch, kv_heads, page, dim) if page else (batch, kv_heads, capacity, dim)
    narrow = {"int8": jnp.int8, "fp8": jnp.float8_e4m3fn}.get(kind)
    k = jax.ShapeDtypeStruct(pages, narrow or jnp.bfloat16)
    scales = jax.ShapeDtypeStruct(pages[:3], jnp.float32) if narrow else None
    numbers = jax.ShapeDtypeStruct((batch,), jnp.int32)
    tables = jax.ShapeDtypeStruct((batch, capacity // page), jnp.int32) if page else None

    def call(q: Any, k: Any, v: Any, scales: Any, tables: Any, numbers: Any) -> Any:
        more = {"q_start": numbers, "k_scales": scales, "v_scales": None if v is None else scales}
        more |= {"implementation": "triton", "value_dim": value_dim if v is None else None}
        if tables is not None:
            return paged_decode_attention(q, k, v, tables, form, **more)
        return decode_attention(q, k, v, form, **more)

    q = jax.ShapeDtypeStruct((batch, queries, heads, dim), jnp.bfloat16)
    compiled = compile_for(device, call, q, k, None if value_dim else k, scales, tables, numbers)
    assert [kernel.name for kernel in compiled] == ["decode", "combine"]
    assert not any(kernel.spills for kernel in compiled), compiled


def test_what_it_cannot_take_is_said() -> None:
    case = Case((5, 40), capacity=64)
    arrays, _, _ = make(case)
    q, k, v = (arrays[name] for name in "qkv")
    rest = {"q_start": arrays["q_start"], "implementation": "triton"}
    wide = [x.astype(jnp.float32) for x in (q, k, v)]
    for device, given, form, more, message in [
        (dataclasses.replace(A100, capability=(7, 0)), (q, k, v), FORM, {}, "need compute capability 8.0, not 7.0"),
        (dataclasses.replace(A100, shared_memory=2048), (q, k, v), FORM, {}, "do not fit 2048 bytes"),
        (A100, wide, FORM, {}, "q must be bfloat16 or float16, not float32"),
        (A100, (q, *wide[1:]), FORM, {}, "k must be bfloat16 or float16, not float32"),
        (A100, (q, k, v), dataclasses.replace(FORM, alibi=alibi(3)), {}, "3 ALiBi slopes for 4 query heads"),
        (A100, (q[..., :24], k[..., :24], None), FORM, {"value_dim": 20}, "value_dim must be at most 16 of 24"),
    ]:
        with interpreted_triton(), target(device), pytest.raises(UnsupportedError, match=message):
            decode_attention(*given, form, **rest, **more)
