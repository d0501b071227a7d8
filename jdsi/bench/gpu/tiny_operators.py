"""Arguments of every operator that are small enough for Pallas' interpreter, for rehearsals."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp

from jdsi.pallas_kernels import AttentionForm, NormForm, Rotary
from jdsi.pallas_kernels.linear.form import LinearForm
from jdsi.pallas_kernels.operator import ArgumentSpec, Arrays
from jdsi.pallas_kernels.quantized_linear import WeightFormat, quantize

_HEADS, _KV_HEADS, _DIM, _KEYS, _PAGE = 4, 2, 64, 128, 64
_FORM = AttentionForm(_DIM**-0.5)


def _normal(key: jax.Array, *shape: int) -> jax.Array:
    return jax.random.normal(key, shape, jnp.bfloat16)


def _linear(key: jax.Array) -> Arrays:
    one, two = jax.random.split(key)
    return _normal(one, 3, 128), _normal(two, 64, 128) * 128**-0.5, None, None, None, None


def _quantized(key: jax.Array) -> Arrays:
    one, two = jax.random.split(key)
    return _normal(one, 3, 256), quantize(jax.random.normal(two, (64, 256)) / 16, WeightFormat("int8")), None, None


def _prefill(key: jax.Array) -> Arrays:
    one, two, three = jax.random.split(key, 3)
    memory = (1, _KV_HEADS, _KEYS, _DIM)
    return _normal(one, 1, _KEYS, _HEADS, _DIM), _normal(two, *memory), _normal(three, *memory), None, None, None, None


def _decode(key: jax.Array, *, paged: bool) -> Arrays:
    one, two, three = jax.random.split(key, 3)
    lines = (4, _KV_HEADS, _PAGE) if paged else (2, _KV_HEADS, _KEYS)
    tables = jnp.array([[2, 0], [1, 3]], jnp.int32) if paged else None
    k, v = (_normal(some, *lines, _DIM) for some in (two, three))
    lengths = jnp.array([_KEYS, 70], jnp.int32)
    return _normal(one, 2, 1, _HEADS, _DIM), k, v, None, None, tables, lengths - 1, lengths


def _ragged(key: jax.Array) -> Arrays:
    one, two, three = jax.random.split(key, 3)
    k, v = (_normal(some, 4, _KV_HEADS, _PAGE, _DIM) for some in (two, three))
    tables = jnp.array([[2, 0], [1, -1]], jnp.int32)
    offsets, lengths = jnp.array([0, 1, 17], jnp.int32), jnp.array([100, 40], jnp.int32)
    return _normal(one, 17, _HEADS, _DIM), k, v, tables, offsets, lengths


def _norm(key: jax.Array) -> Arrays:
    one, two = jax.random.split(key)
    return _normal(one, 3, 256), _normal(two, 3, 256), None, jnp.ones(256, jnp.bfloat16), None


def _write(key: jax.Array) -> Arrays:
    rows, slots = jnp.arange(2, dtype=jnp.int32), jnp.array([5, 70], jnp.int32)
    memory = [jnp.zeros((2, _KV_HEADS, _KEYS, _DIM), jnp.bfloat16) for _ in range(2)]
    qkv = _normal(key, 2, _HEADS + 2 * _KV_HEADS, _DIM)
    return qkv, None, None, *memory, rows, slots, slots, slots + 1, None, None


_MAKERS: Mapping[str, tuple[Callable[[jax.Array], Arrays], Mapping[str, Any], tuple[int, ...]]] = MappingProxyType(
    {
        "linear": (_linear, {"form": LinearForm()}, ()),
        "quantized_linear": (_quantized, {"form": LinearForm()}, ()),
        "prefill_attention": (_prefill, {"form": _FORM, "return_lse": False}, ()),
        "decode_attention": (lambda key: _decode(key, paged=False), {"form": _FORM}, ()),
        "paged_decode_attention": (lambda key: _decode(key, paged=True), {"form": _FORM}, ()),
        "ragged_paged_attention": (_ragged, {"form": _FORM}, ()),
        "add_norm": (_norm, {"form": NormForm(centred=False, eps=1e-5)}, ()),
        "rotary_kv_write": (_write, {"rotary": Rotary(_DIM), "ascending": True, "num_heads": _HEADS}, (3, 4)),
    }
)


def tiny_spec(operator: str) -> ArgumentSpec:
    """Small arguments of an operator; bytes and operations are not counted."""
    make, static, in_place = _MAKERS[operator]
    return ArgumentSpec(f"{operator} tiny bfloat16", make, 1, 1, static, in_place)
