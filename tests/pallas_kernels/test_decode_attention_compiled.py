"""Decode attention's Mosaic GPU kernel compiled for the H200: at sizes of real models, and in its other forms."""

import dataclasses
import re
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from jdsi.pallas_kernels import Alibi, AttentionForm
from jdsi.pallas_kernels.decode_attention import DECODE_ATTENTION, PAGED_DECODE_ATTENTION
from jdsi.pallas_kernels.decode_attention.plan import Tiling, default_tiling
from jdsi.pallas_kernels.decode_attention.specs import decode_attention_specs, paged_decode_attention_specs
from jdsi.pallas_kernels.device import H200
from jdsi.pallas_kernels.operator import ArgumentSpec
from kernels import compile_for_h200

# Longer memories and other batches give the same kernel but for the number of tiles on their way.
SPECS = {f"{spec.name}": (DECODE_ATTENTION, spec) for spec in decode_attention_specs() if "B=8 L=8192" in spec.name} | {
    f"{spec.name}": (PAGED_DECODE_ATTENTION, spec)
    for spec in paged_decode_attention_specs()
    if "B=8 L=8192" in spec.name
}
FORM = AttentionForm(0.1)
EVERYTHING = AttentionForm(0.1, window=4096, softcap=50.0, alibi=Alibi((0.5,) * 32))


@dataclasses.dataclass(frozen=True)
class Shape:
    """Queries `[4, length, heads, dim]` and keys `[4, kv_heads, 4096, dim]`."""

    length: int
    heads: int
    kv_heads: int
    dim: int
    value_dim: int | None = None
    dtype: str = "bfloat16"
    narrow: str | None = None
    form: AttentionForm = FORM


SHAPES = {
    "speculation": Shape(8, 64, 8, 128),
    "speculation on wide heads": Shape(16, 16, 4, 256),
    "speculation on latents": Shape(4, 16, 1, 576, 512),
    "narrow keys of many queries": Shape(8, 64, 8, 128, narrow="int8"),
    "a rank's heads of latents": Shape(1, 32, 1, 576, 512),
    "every form": Shape(2, 32, 8, 128, form=EVERYTHING),
    "keys of 336 dims": Shape(1, 8, 8, 336),
    "latents of 320 dims in many heads": Shape(1, 64, 1, 320, 256),
    "groups of seven": Shape(1, 28, 4, 128),
    "head dim 64": Shape(1, 32, 8, 64, dtype="float16"),
    "head dim 80": Shape(1, 32, 32, 80),
    "head dim 96": Shape(3, 32, 32, 96, narrow="float8_e4m3fn"),
}


def arrays(shape: Shape) -> tuple[Any, ...]:
    array = jax.ShapeDtypeStruct
    q = array((4, shape.length, shape.heads, shape.dim), shape.dtype)
    k = array((4, shape.kv_heads, 4096, shape.dim), shape.narrow or shape.dtype)
    scales = array(k.shape[:3], jnp.float32) if shape.narrow else None
    numbers = array((4,), jnp.int32)
    return q, k, k if shape.value_dim is None else None, scales, scales, None, numbers, numbers


def tiling(spec: ArgumentSpec) -> Tiling:
    q, k, v, _, _, tables, *_ = spec.abstract()
    found = default_tiling(q, k, v, tables, spec.static["form"], spec.static.get("value_dim"), H200)
    assert found is not None
    return found


@pytest.mark.aot
@pytest.mark.parametrize("name", SPECS)
def test_models_compile_without_spills(name: str) -> None:
    operator, spec = SPECS[name]
    compiled = compile_for_h200(partial(operator, implementation="pallas", **spec.static), *spec.abstract())
    assert compiled.registers > 0
    assert compiled.spills == 0
    entry = compiled.text[compiled.text.index("\nENTRY ") :]
    # The kernel, and what combines its parts if there are several.
    launches = len(re.findall(r" (?:custom-call|fusion|copy|transpose|reduce|slice|pad|convert)\(", entry))
    assert launches == (1 if tiling(spec).splits == 1 else 2)


@pytest.mark.aot
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_other_forms_compile_without_spills(shape: Shape) -> None:
    static = {"form": shape.form, "value_dim": shape.value_dim, "sinks": 4 if shape.form.window else 0}
    call = partial(DECODE_ATTENTION, implementation="pallas", return_lse=True, **static)
    compiled = compile_for_h200(call, *arrays(shape))
    assert compiled.registers > 0
    assert compiled.spills == 0


@pytest.mark.parametrize("name", SPECS)
def test_every_multiprocessor_has_work(name: str) -> None:
    _, spec = SPECS[name]
    q, k, *_ = spec.abstract()
    queries = q.shape[1] * q.shape[2] // k.shape[1]
    blocks = q.shape[0] * k.shape[1] * -(-queries // tiling(spec).columns) * tiling(spec).splits
    rounds = -(-blocks // H200.cores)
    assert blocks >= 0.84 * rounds * H200.cores
