"""Shapes of real models that the norms are compiled, timed and tuned on."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from ..operator import ArgumentSpec, Arrays
from .form import NormForm

_RMS, _LAYER = NormForm(centred=False, eps=1e-5), NormForm(centred=True, eps=1e-5)
# Name, width, norm, whether the sublayer's bias is added here, dtype.
_MODELS = (
    ("llama-8b", 4096, _RMS, False, "bfloat16"),
    ("llama-70b", 8192, _RMS, False, "bfloat16"),
    ("opt-30b", 7168, _LAYER, True, "float16"),
    ("gpt-j", 4096, _LAYER, True, "float16"),
    ("deepseek-v3", 7168, NormForm(centred=False, eps=1e-6), False, "bfloat16"),
)
_TOKENS = (1, 8, 64, 2048)


def argument_specs() -> tuple[ArgumentSpec, ...]:
    """`add_norm` after a sublayer, at the sizes of decoding one, a few and many sequences and of a prompt."""
    return tuple(_spec(*model, tokens) for model in _MODELS for tokens in _TOKENS)


def _spec(name: str, width: int, form: NormForm, bias: bool, dtype: str, tokens: int) -> ArgumentSpec:
    vectors = 1 + bias + form.centred
    # Two sums with the bias, two for the mean, two for the squares, one to scale, one for each vector of the norm.
    operations = 1 + bias + 2 * form.centred + 2 + 1 + 1 + form.centred
    return ArgumentSpec(
        name=f"{name} T={tokens} {dtype}",
        make=_maker(tokens, width, form, bias, dtype),
        bytes=(4 * tokens + vectors) * width * jnp.dtype(dtype).itemsize,
        flops=operations * tokens * width,
        static={"form": form},
    )


def _maker(tokens: int, width: int, form: NormForm, bias: bool, dtype: str) -> Callable[[jax.Array], Arrays]:
    def make(key: jax.Array) -> Arrays:
        shapes = ((tokens, width), (tokens, width), (width,), (width,), (width,))
        there = (True, True, bias, True, form.centred)
        keys = jax.random.split(key, len(shapes))
        return tuple(
            jax.random.normal(k, shape, jnp.dtype(dtype)) if given else None
            for k, shape, given in zip(keys, shapes, there, strict=True)
        )

    return make
