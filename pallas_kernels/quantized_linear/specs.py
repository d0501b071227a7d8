"""Layers of real models that products with quantised weights are compiled, timed and tuned on."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from ..linear.form import LinearForm
from ..operator import ArgumentSpec, Arrays
from .weight import QuantizedWeight, WeightFormat, quantize

_INT8, _INT8_GROUPS = WeightFormat("int8"), WeightFormat("int8", 128)
_FP8, _FP8_BLOCKS = WeightFormat("fp8"), WeightFormat("fp8", blocks=True)
_INT4 = {
    (group, zero): WeightFormat("int4", group, zero_points=zero) for group in (32, 64, 128) for zero in (False, True)
}
_TOKENS = (1, 8, 64)
_SILU_GATE = LinearForm("silu", gated=True)

# Layer, outputs, inputs, form; a gated layer has twice as many rows of weights as outputs.
_LLAMA_8B = (
    ("qkv", 6144, 4096, LinearForm()),
    ("attention out", 4096, 4096, LinearForm()),
    ("gate up", 14336, 4096, _SILU_GATE),
    ("down", 4096, 14336, LinearForm()),
)
_LLAMA_70B = (
    ("qkv", 10240, 8192, LinearForm()),
    ("attention out", 8192, 8192, LinearForm()),
    ("gate up", 28672, 8192, _SILU_GATE),
    ("down", 8192, 28672, LinearForm()),
)
_DEEPSEEK_V3 = (
    ("expert gate up", 2048, 7168, _SILU_GATE),
    ("expert down", 7168, 2048, LinearForm()),
    ("dense gate up", 18432, 7168, _SILU_GATE),
    ("dense down", 7168, 18432, LinearForm()),
)
_MIXTRAL = (("expert gate up", 14336, 4096, _SILU_GATE), ("expert down", 4096, 14336, LinearForm()))
_LLAMA_FORMATS = (_INT8, _INT8_GROUPS, *_INT4.values(), _FP8, _FP8_BLOCKS)


def argument_specs() -> tuple[ArgumentSpec, ...]:
    """Every layer in every format it is likely to be stored in, for one, a few and many tokens."""
    models = (
        ("llama-8b", _LLAMA_8B, _LLAMA_FORMATS),
        ("llama-70b", _LLAMA_70B, _LLAMA_FORMATS),
        ("deepseek-v3", _DEEPSEEK_V3, (_FP8_BLOCKS,)),
        ("mixtral-8x7b", _MIXTRAL, (_INT4[128, False], _INT4[128, True])),
    )
    return tuple(
        _spec(f"{model} {layer}", out, inputs, form, stored, tokens)
        for model, layers, formats in models
        for layer, out, inputs, form in layers
        for stored in formats
        for tokens in _TOKENS
    )


def format_name(stored: WeightFormat) -> str:
    """As "int4 g128 zeros"."""
    groups = "blocks" if stored.blocks else "channel" if stored.group is None else f"g{stored.group}"
    return f"{stored.kind} {groups}{' zeros' if stored.zero_points else ''}"


def _spec(name: str, out: int, inputs: int, form: LinearForm, stored: WeightFormat, tokens: int) -> ArgumentSpec:
    rows = out * form.operands
    weight: QuantizedWeight = jax.eval_shape(lambda: quantize(jnp.zeros((rows, inputs)), stored))
    return ArgumentSpec(
        name=f"{name} {format_name(stored)} T={tokens} bfloat16",
        make=_maker(tokens, rows, inputs, stored),
        bytes=weight.nbytes + 2 * tokens * (inputs + out),
        flops=2 * tokens * rows * inputs,
        static={"form": form},
    )


def _maker(tokens: int, rows: int, inputs: int, stored: WeightFormat) -> Callable[[jax.Array], Arrays]:
    def make(key: jax.Array) -> Arrays:
        for_x, for_weight = jax.random.split(key)
        x = jax.random.normal(for_x, (tokens, inputs), jnp.bfloat16)
        return x, quantize(jax.random.normal(for_weight, (rows, inputs)) * inputs**-0.5, stored), None, None

    return make
