"""The arguments that the linear operator is compiled, timed and tuned on: projections of real models."""

import dataclasses
from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp

from ..normalization import NormForm
from ..operator import ArgumentSpec, Arrays
from .form import PLAIN, LinearForm

TOKENS = (1, 2, 4, 8, 10, 64)

_RMS = NormForm(centred=False, eps=1e-5)
_LAYER = NormForm(centred=True, eps=1e-5)


@dataclasses.dataclass(frozen=True)
class Projection:
    """One matrix of a model with what the model does around it.

    Attributes:
        outputs: of the result; a gated weight has twice as many rows.
    """

    name: str
    outputs: int
    inputs: int
    form: LinearForm = PLAIN
    bias: bool = False
    residual: bool = False


def _decoder(name: str, width: int, qkv: int, hidden: int, form: LinearForm, *, bias: bool) -> Iterator[Projection]:
    """The four projections of a layer with a norm before each half; `form` is that of the first feed-forward one."""
    yield Projection(f"{name} qkv", qkv, width, LinearForm(norm=form.norm), bias)
    yield Projection(f"{name} out", width, width, PLAIN, bias, True)
    yield Projection(f"{name} {'gate_up' if form.gated else 'up'}", hidden, width, form, bias)
    yield Projection(f"{name} down", width, hidden, PLAIN, bias, True)


def projections() -> tuple[Projection, ...]:
    """All of them, each once."""
    llama = LinearForm("silu", gated=True, norm=_RMS)
    logits = jnp.dtype("float32")
    return (
        *_decoder("llama-8b", 4096, 6144, 14336, llama, bias=False),
        Projection("llama-8b head", 128256, 4096, LinearForm(norm=_RMS, out_dtype=logits)),
        *_decoder("llama-70b", 8192, 10240, 28672, llama, bias=False),
        # GPT-J has one norm before both halves and no bias in attention.
        Projection("gpt-j qkv", 12288, 4096, LinearForm(norm=_LAYER)),
        Projection("gpt-j up", 16384, 4096, LinearForm("gelu_new", norm=_LAYER), bias=True),
        *_decoder("opt-30b", 7168, 21504, 28672, LinearForm("relu", norm=_LAYER), bias=True),
        *_decoder("gpt-2-xl", 1600, 4800, 6400, LinearForm("gelu_new", norm=_LAYER), bias=True),
        Projection("gpt-2-xl head", 50257, 1600, LinearForm(norm=_LAYER, out_dtype=logits)),
        # An expert's tokens were gathered after the norm.
        Projection("mixtral-8x7b expert gate_up", 14336, 4096, LinearForm("silu", gated=True)),
        Projection("mixtral-8x7b expert down", 4096, 14336),
    )


def argument_specs() -> tuple[ArgumentSpec, ...]:
    """Every projection at every count of tokens, in bfloat16."""
    return tuple(spec(projection, tokens) for projection in projections() for tokens in TOKENS)


def spec(projection: Projection, tokens: int, dtype: str = "bfloat16") -> ArgumentSpec:
    """One projection of `tokens` tokens."""
    form, itemsize = projection.form, jnp.dtype(dtype).itemsize
    rows, inputs = projection.outputs * form.operands, projection.inputs
    result = tokens * projection.outputs * form.result_dtype(dtype).itemsize
    norm = 0 if form.norm is None else inputs * (2 if form.norm.centred else 1)
    numbers = tokens * inputs + rows * inputs + rows * projection.bias + norm
    return ArgumentSpec(
        name=f"{projection.name} T={tokens} {dtype}",
        make=partial(_arrays, projection=projection, tokens=tokens, dtype=dtype),
        bytes=numbers * itemsize + result * (1 + projection.residual),
        flops=2 * tokens * rows * inputs,
        static={"form": form},
    )


def _arrays(key: jax.Array, projection: Projection, tokens: int, dtype: str) -> Arrays:
    form, inputs = projection.form, projection.inputs
    rows = projection.outputs * form.operands
    keys = iter(jax.random.split(key, 6))

    def array(*shape: int) -> jax.Array:
        return jax.random.normal(next(keys), shape, jnp.dtype(dtype))

    return (
        array(tokens, inputs),
        array(rows, inputs) * jnp.asarray(inputs**-0.5, dtype),
        array(rows) if projection.bias else None,
        array(tokens, projection.outputs).astype(form.result_dtype(dtype)) if projection.residual else None,
        1 + array(inputs) if form.norm else None,
        array(inputs) if form.norm and form.norm.centred else None,
    )
