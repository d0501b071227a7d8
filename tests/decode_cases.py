"""Calls of decode attention with their results in float64, for the tests of every implementation."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jdsi.pallas_kernels.attention import AttentionForm
from jdsi.pallas_kernels.decode_attention import decode_attention, paged_decode_attention
from kernels import array

FORM = AttentionForm(0.125)


@dataclasses.dataclass(frozen=True)
class Case:
    """One call.

    Attributes:
        lengths: keys of each row.
        queries: per row; the last stands at the last key unless `starts` says otherwise.
        heads: of queries, of keys.
        dim, v_dim: of keys, of values; `value_dim` instead of `v_dim`: the values are part of the keys.
        capacity: keys that there is memory for.
        page: keys per page, 0 if contiguous.
        holes: share of a table's pages that are missing.
        narrow: dtype of keys and values if they are quantised.
        starts: index of each row's first query.
    """

    lengths: tuple[int, ...]
    queries: int = 1
    heads: tuple[int, int] = (4, 2)
    dim: int = 64
    v_dim: int | None = None
    value_dim: int | None = None
    capacity: int = 320
    page: int = 0
    holes: float = 0.0
    form: AttentionForm = FORM
    sinks: int = 0
    narrow: str | None = None
    starts: tuple[int, ...] | None = None


def make(case: Case, dtype: str, seed: int = 0) -> dict[str, Any]:
    """Arguments of the public functions. Memory that nothing may read is NaN, where the dtype has one."""
    rng = np.random.default_rng(seed)
    lengths = np.array(case.lengths, np.int32)
    rows, (heads, kv_heads) = len(lengths), case.heads
    starts = np.maximum(lengths - case.queries, 0) if case.starts is None else np.array(case.starts)
    arrays: dict[str, Any] = {
        "q": array(rng.standard_normal((rows, case.queries, heads, case.dim)), dtype),
        "q_start": array(starts, jnp.int32),
        "k_lengths": jnp.asarray(lengths),
        "v": None,
    }
    tables = None
    if case.page:
        columns = case.capacity // case.page
        tables = rng.permutation(2 * rows * columns)[: rows * columns].reshape(rows, columns).astype(np.int32)
        outside = rng.choice([-1, 2 * rows * columns, 2**31 - 1, -(2**31)], tables.shape)
        tables = np.where(rng.random(tables.shape) < case.holes, outside, tables)
        arrays["block_tables"] = jnp.asarray(tables)
    seen = np.arange(case.capacity) < lengths[:, None]
    dims = {"k": case.dim} | ({} if case.value_dim else {"v": case.v_dim or case.dim})
    for name, dim in dims.items():
        x = rng.standard_normal((rows, kv_heads, case.capacity, dim))
        parts = {name: (x, case.narrow or dtype, np.nan if case.narrow != "int8" else 77)}
        if case.narrow:
            x *= 40  # rounds to int8, and within what e4m3 holds
            scales = rng.uniform(0.5, 2.0, x.shape[:3]) / 40
            parts = {name: (np.clip(np.round(x), -127, 127), *parts[name][1:])}
            parts[f"{name}_scales"] = (scales, "float32", np.nan)
        for key, (part, kind, rest) in parts.items():
            part = np.where(seen[:, None, :, None] if part.ndim == 4 else seen[:, None], part, rest)
            part = part if tables is None else _paged(part, tables, case.page, 2 * tables.size, rest)
            arrays[key] = array(np.asarray(part, np.float32), kind)
    return arrays


def _paged(x: np.ndarray, tables: np.ndarray, page: int, pages: int, rest: float) -> np.ndarray:
    found = np.full((pages, x.shape[1], page, *x.shape[3:]), rest)
    for row, column in np.argwhere((tables >= 0) & (tables < pages)):
        found[tables[row, column]] = x[row, :, column * page : (column + 1) * page]
    return found


def call(case: Case, arrays: dict[str, Any], **options: Any) -> Any:
    """The public function on what `make` gave."""
    names = {"k": "k_pages", "v": "v_pages"} if case.page else {}
    given = {names.get(name, name): x for name, x in arrays.items()}
    function = paged_decode_attention if case.page else decode_attention
    return function(**given, form=case.form, sinks=case.sinks, value_dim=case.value_dim, **options)


def jitted(case: Case, arrays: dict[str, Any], **options: Any) -> tuple[np.ndarray, np.ndarray]:
    """Result and logarithms."""
    out, lse = jax.jit(lambda arrays: call(case, arrays, return_lse=True, **options))(arrays)
    assert out.dtype == arrays["q"].dtype
    assert lse.dtype == jnp.float32
    return np.asarray(out, np.float64), np.asarray(lse, np.float64)


def oracle(case: Case, arrays: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Result and logarithms in float64, one query and one head at a time."""
    wide = {name: None if x is None else np.asarray(x, np.float64) for name, x in arrays.items()}
    q, lengths = wide["q"], np.asarray(arrays["k_lengths"])
    there = np.arange(case.capacity) < lengths[:, None]
    keys = {name: wide.get(name) for name in ("k", "v", "k_scales", "v_scales")}
    if case.page:
        tables, pages = np.asarray(arrays["block_tables"]), len(wide["k"])
        real = (tables >= 0) & (tables < pages)
        there &= np.repeat(real, case.page, axis=1)
        keys = {name: None if x is None else _contiguous(x, np.where(real, tables, 0)) for name, x in keys.items()}
    k, v = keys["k"], keys["v"]
    if case.narrow:
        k = k * keys["k_scales"][..., None]
        v = v * keys["v_scales"][..., None]
    v = k[..., : case.value_dim] if v is None else v
    out = np.zeros((*q.shape[:3], v.shape[-1]))
    lse = np.full(q.shape[:3], -np.inf)
    group = case.heads[0] // case.heads[1]
    for row, query, head in np.ndindex(lse.shape):
        distance = np.arange(case.capacity) - (int(arrays["q_start"][row]) + query)
        seen = there[row].copy()
        if case.form.causal:
            seen &= distance <= 0
        if case.form.window is not None:
            seen &= (np.abs(distance) < case.form.window) | (np.arange(case.capacity) < case.sinks)
        if not seen.any():
            continue
        scores = k[row, head // group, seen] @ q[row, query, head] * case.form.scale
        if case.form.softcap is not None:
            scores = case.form.softcap * np.tanh(scores / case.form.softcap)
        if case.form.alibi is not None:
            scores += case.form.alibi.slopes[head] * distance[seen]
        lse[row, query, head] = np.logaddexp.reduce(scores)
        out[row, query, head] = np.exp(scores - lse[row, query, head]) @ v[row, head // group, seen]
    return out, lse


def _contiguous(pages: np.ndarray, tables: np.ndarray) -> np.ndarray:
    rows = pages[tables].swapaxes(1, 2)
    return rows.reshape(*rows.shape[:2], -1, *rows.shape[4:])
