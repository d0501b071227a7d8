"""The arguments that decode attention is compiled, timed and tuned on."""

import dataclasses
from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from ..attention.form import AttentionForm
from ..operator import ArgumentSpec, Arrays


@dataclasses.dataclass(frozen=True)
class _Model:
    """One layer's attention. Without `value_dim` keys and values have `dim` each; with it the keys hold the values."""

    name: str
    heads: int
    kv_heads: int
    dim: int
    value_dim: int | None = None
    scale: float | None = None

    @property
    def widths(self) -> tuple[int, int]:
        """Dims of a key and of a value."""
        return self.dim, self.dim if self.value_dim is None else self.value_dim

    def key_bytes(self, dtype: str) -> int:
        """What is read of one key and value of one head."""
        numbers = 2 * self.dim if self.value_dim is None else self.dim
        itemsize = jnp.dtype(dtype).itemsize
        return numbers * itemsize + (8 if itemsize == 1 else 0)


LLAMA_8B = _Model("llama-8b", 32, 8, 128)
LLAMA_70B = _Model("llama-70b", 64, 8, 128)
GPT_J = _Model("gpt-j", 16, 16, 256)
OPT_30B = _Model("opt-30b", 56, 56, 128)
DEEPSEEK_V3 = _Model("deepseek-v3", 128, 1, 576, value_dim=512, scale=192**-0.5)

_BATCHES, _LENGTHS = (1, 8, 64), (8192, 32768, 131072)
_MEMORY = 36 * 10**9  # of keys and values, so that the reference's copies fit beside them


def decode_attention_specs() -> tuple[ArgumentSpec, ...]:
    """Contiguous memories, all of them full."""
    models = (LLAMA_8B, LLAMA_70B, GPT_J, OPT_30B, DEEPSEEK_V3)
    kinds = [(model, "bfloat16") for model in models] + [(LLAMA_8B, "int8"), (LLAMA_8B, "float8_e4m3fn")]
    return tuple(_spec(model, batch, length, dtype) for model, dtype in kinds for batch, length in _sizes(model, dtype))


def paged_decode_attention_specs() -> tuple[ArgumentSpec, ...]:
    """Memories in pages, whose order is random."""
    kinds = [(LLAMA_8B, "bfloat16", 64), (LLAMA_8B, "bfloat16", 128), (LLAMA_8B, "int8", 64)]
    return tuple(
        _spec(model, batch, length, dtype, page)
        for model, dtype, page in kinds
        for batch, length in _sizes(model, dtype)
    )


def _sizes(model: _Model, dtype: str) -> Iterator[tuple[int, int]]:
    for batch in _BATCHES:
        for length in _LENGTHS:
            if batch * length * model.kv_heads * model.key_bytes(dtype) <= _MEMORY:
                yield batch, length


def _spec(model: _Model, batch: int, length: int, dtype: str, page: int = 0) -> ArgumentSpec:
    dim, value_dim = model.widths
    scale = dim**-0.5 if model.scale is None else model.scale
    static: dict[str, Any] = {"form": AttentionForm(scale)}
    if model.value_dim is not None:
        static["value_dim"] = model.value_dim
    pages = f" page={page}" if page else ""
    tables = batch * (length // page) * 4 if page else 0
    return ArgumentSpec(
        name=f"{model.name} B={batch} L={length}{pages} {dtype}",
        make=partial(_make, model, batch, length, dtype, page),
        bytes=batch * length * model.kv_heads * model.key_bytes(dtype)
        + batch * model.heads * (dim + value_dim) * 2
        + batch * 8
        + tables,
        flops=2 * batch * length * model.heads * (dim + value_dim),
        static=static,
    )


def _make(model: _Model, batch: int, length: int, dtype: str, page: int, key: jax.Array) -> Arrays:
    keys = jax.random.split(key, 6)
    q = jax.random.normal(keys[0], (batch, 1, model.heads, model.dim), jnp.bfloat16)
    lines = (batch * length // page, model.kv_heads, page) if page else (batch, model.kv_heads, length)
    k = _numbers(keys[1], (*lines, model.dim), dtype)
    v = None if model.value_dim is not None else _numbers(keys[2], (*lines, model.dim), dtype)
    scales = [None, None]
    if jnp.dtype(dtype).itemsize == 1:
        steps = 127 if dtype == "int8" else 1
        scales = [jax.random.uniform(some, lines, jnp.float32, 0.5, 2.0) / steps for some in keys[3:5]]
    tables = jax.random.permutation(keys[5], lines[0]).reshape(batch, -1).astype(jnp.int32) if page else None
    start = jnp.full((batch,), length - 1, jnp.int32)
    return q, k, v, *scales, tables, start, start + 1


def _numbers(key: jax.Array, shape: tuple[int, ...], dtype: str) -> jax.Array:
    if dtype == "int8":
        return jax.random.randint(key, shape, -127, 128, jnp.int8)
    # Made in the narrow type where there is one: in float32 the largest would not fit into memory.
    return jax.random.normal(key, shape, jnp.bfloat16).astype(dtype)
