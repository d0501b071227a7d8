"""The arguments ragged paged attention is compiled, timed and tuned on."""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array

from ..attention.form import AttentionForm
from ..operator import ArgumentSpec

_BUDGET = 768  # tokens of a step, FastGen's default
_PAGE = 128


@dataclasses.dataclass(frozen=True)
class _Model:
    heads: int
    kv_heads: int
    dim: int


_MODELS: Mapping[str, _Model] = {
    "llama-8b": _Model(32, 8, 128),
    "llama-70b": _Model(64, 8, 128),
    "opt-30b": _Model(56, 56, 128),
}

Lengths = tuple[tuple[int, int], ...]  # new tokens and keys of each sequence
_MIXES: Mapping[str, Lengths] = {
    "256 decodes": ((1, 2048),) * 256,
    "chunk and 255 decodes": ((512, 1024), *((1, 2048),) * 255),
    "4 chunks": ((192, 192), (192, 576), (192, 1152), (192, 2048)),
    "prefill": ((_BUDGET, _BUDGET),),
}


def argument_specs() -> tuple[ArgumentSpec, ...]:
    """One layer's attention in steps of serving: all decodes, mixes, all prompt; and decodes with long contexts."""
    specs = [
        _spec(f"{name} {mix}", model, lengths, 256, jnp.bfloat16)
        for name, model in _MODELS.items()
        for mix, lengths in _MIXES.items()
    ]
    specs.append(_spec("llama-8b 4 decodes at 131k", _MODELS["llama-8b"], ((1, 131072),) * 4, 4, jnp.bfloat16))
    specs.append(_spec("llama-70b 4 decodes at 131k", _MODELS["llama-70b"], ((1, 131072),) * 4, 4, jnp.float16))
    return tuple(specs)


def _spec(name: str, model: _Model, lengths: Lengths, sequences: int, dtype: DTypeLike) -> ArgumentSpec:
    """`lengths` in a bucket of `sequences` sequences, whose last ones are empty."""
    tokens = sum(new for new, _ in lengths)
    pages = [-(-keys // _PAGE) for _, keys in lengths]
    offsets = np.full(sequences + 1, tokens, np.int32)
    offsets[: len(lengths)] = np.cumsum([0, *(new for new, _ in lengths[:-1])])
    k_lengths = np.zeros(sequences, np.int32)
    k_lengths[: len(lengths)] = [keys for _, keys in lengths]

    def make(key: Array) -> tuple[Array, ...]:
        random = jax.random.split(key, 4)
        shape = sum(pages), model.kv_heads, _PAGE, model.dim
        shuffled = jax.random.permutation(random[3], sum(pages)).astype(jnp.int32)
        tables = jnp.full((sequences, max(pages)), -1, jnp.int32)
        start = 0
        for b, count in enumerate(pages):
            tables = tables.at[b, :count].set(shuffled[start : start + count])
            start += count
        return (
            jax.random.normal(random[0], (tokens, model.heads, model.dim), dtype),
            jax.random.normal(random[1], shape, dtype),
            jax.random.normal(random[2], shape, dtype),
            tables,
            jnp.asarray(offsets),
            jnp.asarray(k_lengths),
        )

    size = jnp.dtype(dtype).itemsize
    keys = sum(keys for _, keys in lengths)
    queries = 2 * tokens * model.heads * model.dim * size  # read, and the results written
    numbers = 4 * (sum(pages) + 2 * sequences + 1)  # entries of the tables that are looked at, offsets, lengths
    # Each query meets the keys up to its own: products of scores and of values, a multiplication and an addition each.
    pairs = sum(new * keys - new * (new - 1) // 2 for new, keys in lengths)
    return ArgumentSpec(
        f"{name} {jnp.dtype(dtype).name}",
        make,
        bytes=2 * keys * model.kv_heads * model.dim * size + queries + numbers,
        flops=4 * pairs * model.heads * model.dim,
        static={"form": AttentionForm(scale=model.dim**-0.5)},
    )
