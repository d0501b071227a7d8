"""Prompts of real models that prefill attention is compiled, timed and tuned on."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from ..attention.form import AttentionForm
from ..operator import ArgumentSpec, Arrays


@dataclasses.dataclass(frozen=True)
class _Model:
    """One layer's attention; `segments` are the lengths of the sequences packed in each row."""

    name: str
    heads: int
    kv_heads: int
    dim: int
    value_dim: int
    lengths: tuple[int, ...] = (512, 2048, 8192)
    causal: bool = True
    window: int | None = None
    softcap: float | None = None
    dtype: str = "bfloat16"
    rows: int = 1
    segments: tuple[int, ...] = ()


_MODELS = (
    _Model("llama-8b", 32, 8, 128, 128),
    _Model("llama-70b", 64, 8, 128, 128),
    _Model("gpt-j", 16, 16, 256, 256, dtype="float16"),
    _Model("opt-30b", 56, 56, 128, 128, dtype="float16"),
    _Model("gpt-2-xl", 25, 25, 64, 64, dtype="float16"),
    _Model("phi-2", 32, 32, 80, 80),
    _Model("phi-3-mini", 32, 32, 96, 96),
    _Model("deepseek-v3", 128, 128, 192, 128),
    _Model("gemma-2-9b", 16, 8, 256, 256, window=4096, softcap=50.0),
    _Model("bert-large packed", 16, 16, 64, 64, (512,), causal=False, rows=16, segments=(200, 184, 128)),
    _Model("bert-large packed", 16, 16, 64, 64, (8192,), causal=False, segments=(512, 300, 212) * 8),
)


def argument_specs() -> tuple[ArgumentSpec, ...]:
    """Whole prompts, queries and keys of the same tokens."""
    return tuple(_spec(model, length) for model in _MODELS for length in model.lengths)


def _spec(model: _Model, length: int) -> ArgumentSpec:
    head_numbers = (model.heads + model.kv_heads) * (model.dim + model.value_dim)
    item = jnp.dtype(model.dtype).itemsize
    return ArgumentSpec(
        name=f"{model.name} B={model.rows} S={length} {model.dtype}",
        make=_maker(model, length),
        bytes=model.rows * length * (head_numbers * item + (8 if model.segments else 0)),
        flops=2 * model.rows * model.heads * _visible_pairs(model, length) * (model.dim + model.value_dim),
        static={
            "form": AttentionForm(model.dim**-0.5, causal=model.causal, window=model.window, softcap=model.softcap),
            "return_lse": False,
        },
    )


def _visible_pairs(model: _Model, length: int) -> int:
    """Pairs of a query and a key that it sees, in one row and head."""
    if not model.causal:
        return sum(n * n for n in model.segments or (length,))
    seen = np.arange(1, length + 1)
    return int(np.minimum(seen, model.window or length).sum())


def _maker(model: _Model, length: int) -> Callable[[jax.Array], Arrays]:
    shapes = (
        (model.rows, length, model.heads, model.dim),
        (model.rows, model.kv_heads, length, model.dim),
        (model.rows, model.kv_heads, length, model.value_dim),
    )

    def make(key: jax.Array) -> Arrays:
        keys = jax.random.split(key, len(shapes))
        arrays = (jax.random.normal(k, s, jnp.dtype(model.dtype)) for k, s in zip(keys, shapes, strict=True))
        segments = None
        if model.segments:
            owner = np.repeat(np.arange(len(model.segments), dtype=np.int32), model.segments)
            segments = jnp.broadcast_to(owner, (model.rows, length))
        return (*arrays, None, None, segments, segments)

    return make
