"""Shapes of real models that the KV write is compiled, timed and tuned on."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from ..operator import ArgumentSpec, Arrays
from ..rotary import Rotary
from ..rotary.scaling import Llama3Scaling

_LLAMA = Rotary(128, theta=5e5, scaling=Llama3Scaling(8.0, 1.0, 4.0, 8192))
_CAPACITY, _PAGE = 4096, 128


@dataclasses.dataclass(frozen=True)
class _Model:
    name: str
    heads: int
    kv_heads: int
    dim: int
    rotary: Rotary
    dtype: str


_MODELS = (
    _Model("llama-8b", 32, 8, 128, _LLAMA, "bfloat16"),
    _Model("llama-70b", 64, 8, 128, _LLAMA, "bfloat16"),
    _Model("gpt-j", 16, 16, 256, Rotary(64, interleaved=True), "float16"),
)


def argument_specs() -> tuple[ArgumentSpec, ...]:
    """Decoding 1, 8 and 64 sequences and a prompt of 2048 tokens, in contiguous memory and in pages, and fused."""
    return tuple(
        _spec(model, sequences, tokens, paged, fused)
        for model in _MODELS
        for sequences, tokens in ((1, 1), (8, 1), (64, 1), (1, 2048))
        for paged, fused in ((False, False), (True, False), (False, True))
    )


def _spec(model: _Model, sequences: int, tokens: int, paged: bool, fused: bool) -> ArgumentSpec:
    """`tokens` new ones for each of `sequences`; with `fused`, q, k and v as one array."""
    total, pairs = sequences * tokens, model.rotary.dim // 2
    heads = 2 * model.heads + 4 * model.kv_heads  # q, k and v are read and written
    kind = f"decode B={sequences}" if tokens == 1 else f"prefill T={tokens}"
    return ArgumentSpec(
        name=f"{model.name} {kind} {'paged' if paged else 'contiguous'}{' fused' * fused} {model.dtype}",
        make=_maker(model, sequences, tokens, paged, fused),
        bytes=total * (heads * model.dim * jnp.dtype(model.dtype).itemsize + 3 * 4) + pairs * 4,
        # Six to turn a pair; the phase, its sine and its cosine.
        flops=total * pairs * (6 * (model.heads + model.kv_heads) + 3),
        static={"rotary": model.rotary, "ascending": not paged} | ({"num_heads": model.heads} if fused else {}),
        in_place=(3, 4),  # keys, values
    )


def _maker(model: _Model, sequences: int, tokens: int, paged: bool, fused: bool) -> Callable[[jax.Array], Arrays]:
    def make(key: jax.Array) -> Arrays:
        normal, starts, table = jax.random.split(key, 3)
        first = jax.random.randint(starts, (sequences,), 0, _CAPACITY - tokens + 1)
        positions = (first[:, None] + jnp.arange(tokens)).reshape(-1)
        rows = jnp.repeat(jnp.arange(sequences), tokens)
        shape = (sequences, model.kv_heads, _CAPACITY, model.dim)
        if paged:
            pages = _CAPACITY // _PAGE
            shape = (sequences * pages, model.kv_heads, _PAGE, model.dim)
            rows = jax.random.permutation(table, shape[0])[rows * pages + positions // _PAGE]
        slots = positions % _PAGE if paged else positions
        shapes = [(sequences * tokens, n, model.dim) for n in (model.heads, model.kv_heads, model.kv_heads)]
        keys = jax.random.split(normal, 3)
        q, k, v = (jax.random.normal(k, s, jnp.dtype(model.dtype)) for k, s in zip(keys, shapes, strict=True))
        memory = [jnp.zeros(shape, jnp.dtype(model.dtype)) for _ in range(2)]
        new = (jnp.concatenate((q, k, v), axis=1), None, None) if fused else (q, k, v)
        return (*new, *memory, rows, slots, positions, positions + 1, None, None)

    return make
