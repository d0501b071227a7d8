"""The Hopper kernel of products with quantised weights: interpreted or run, and compiled for the H200."""

import dataclasses
import re
from functools import partial
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from jdsi.pallas_kernels.device import H200, current_device
from jdsi.pallas_kernels.linear.form import LinearForm
from jdsi.pallas_kernels.quantized_linear import QuantizedWeight, WeightFormat, dequantize, pallas, quantize, unpack
from jdsi.pallas_kernels.quantized_linear.api import QUANTIZED_LINEAR
from jdsi.pallas_kernels.quantized_linear.specs import argument_specs, format_name
from jdsi.pallas_kernels.quantized_linear.tiling import Shape, best, tilings
from kernels import RELATIVE, array, compile_for_h200, interpreted_or_gpu, relative_error
from lowered import kernels_of
from packed_numbers import packed_numbers, spread

INT8, INT8_GROUPS, FP8 = WeightFormat("int8"), WeightFormat("int8", 64), WeightFormat("fp8")
BLOCKS = WeightFormat("fp8", blocks=True)
INT4 = {
    (group, zero): WeightFormat("int4", group, zero_points=zero) for group in (32, 64, 128) for zero in (False, True)
}
PLAIN, GATED = LinearForm(), LinearForm("silu", gated=True)
# As one program each, which takes less long to compile than one for every operation of theirs.
quantized, restored = jax.jit(quantize, static_argnums=1), jax.jit(dequantize)
# Two warpgroups: the interpreter waits in threads of XLA's pool, which has one per core.
SIDE_BY_SIDE = {"rows": 2, "blocks": 1, "inputs": 1, "splits": 1, "stages": 2}
ONE_ABOVE_THE_OTHER = {"rows": 1, "blocks": 2, "inputs": 1, "splits": 1, "stages": 2}
OVER_INPUTS = {"rows": 1, "blocks": 1, "inputs": 2, "splits": 1, "stages": 2}
SPLIT = {"rows": 1, "blocks": 1, "inputs": 1, "splits": 2, "stages": 3}


@dataclasses.dataclass(frozen=True)
class Case:
    tokens: int
    out: int
    inputs: int
    stored: WeightFormat
    dtype: str = "bfloat16"
    form: LinearForm = PLAIN
    config: Any = None
    bias: bool = False
    residual: bool = False

    def __str__(self) -> str:
        extra = "-".join(name for name in ("bias", "residual") if getattr(self, name))
        gate = "-gated" if self.form.gated else ""
        return f"{self.tokens}x{self.out}x{self.inputs}-{format_name(self.stored)}-{self.dtype}{gate}-{extra}"

    def arrays(self) -> tuple[jax.Array, QuantizedWeight, jax.Array | None, jax.Array | None]:
        rng, rows = np.random.default_rng(self.tokens + self.out), self.out * self.form.operands
        x = array(rng.standard_normal((self.tokens, self.inputs)), self.dtype)
        weight = quantized(rng.standard_normal((rows, self.inputs)) * self.inputs**-0.5, self.stored)
        bias = array(rng.standard_normal(rows), self.dtype) if self.bias else None
        return (
            x,
            weight,
            bias,
            array(rng.standard_normal((self.tokens, self.out)), self.dtype) if self.residual else None,
        )

    def run(self, *arrays: Any) -> jax.Array:
        return pallas.run(*arrays, device=current_device(), config=self.config, form=self.form)


def expected(case: Case, x: Any, weight: Any, bias: Any, residual: Any) -> np.ndarray:
    y = np.asarray(x, np.float64) @ np.asarray(restored(weight), np.float64).T
    y += 0 if bias is None else np.asarray(bias, np.float64)
    act = {None: lambda y: y, "silu": lambda y: y / (1 + np.exp(-y)), "relu2": lambda y: np.maximum(y, 0) ** 2}
    parts = np.split(y, case.form.operands, axis=1)
    y = act[case.form.activation](parts[0]) * (parts[1] if case.form.gated else 1)
    return y if residual is None else y + np.asarray(residual, np.float64)


def check(case: Case) -> None:
    arrays = case.arrays()
    with packed_numbers(), interpreted_or_gpu(cores=4):
        y = jax.jit(case.run)(*arrays)
    assert y.dtype == jnp.dtype(case.dtype)
    assert relative_error(y, expected(case, *arrays)) <= RELATIVE[case.dtype]


@pytest.mark.parametrize(
    "case",
    [
        # Every format and both dtypes; one token; rows that end inside a tile, and inputs inside a step.
        Case(1, 48, 256, INT8, config=OVER_INPUTS, bias=True),
        Case(3, 80, 384, INT8, "float16", config=OVER_INPUTS, residual=True),
        Case(8, 64, 256, INT8_GROUPS, config=OVER_INPUTS),
        Case(8, 64, 384, INT4[32, False], config=OVER_INPUTS, form=LinearForm("relu2")),
        pytest.param(Case(1, 64, 256, INT4[32, True], "float16", config=SPLIT), marks=pytest.mark.slow),
        Case(2, 64, 256, INT4[64, True], config=SPLIT, bias=True, residual=True),
        Case(8, 64, 256, INT4[128, False], "float16", config=OVER_INPUTS),
        Case(11, 96, 128, INT4[128, True], config=SIDE_BY_SIDE, residual=True),
        pytest.param(Case(5, 64, 256, FP8, config=OVER_INPUTS), marks=pytest.mark.slow),
        Case(8, 64, 384, FP8, "float16", config=SPLIT, bias=True),
        Case(8, 272, 256, BLOCKS, config=ONE_ABOVE_THE_OTHER),
        # Gate and up; more tokens than one tile of eight; both ways to cut rows; splits that are not of equal length.
        Case(2, 128, 384, BLOCKS, form=GATED, config=SPLIT),
        Case(24, 80, 128, INT4[64, False], form=GATED, config=SIDE_BY_SIDE, bias=True),
        pytest.param(
            Case(64, 144, 256, INT8, "float16", config=ONE_ABOVE_THE_OTHER, residual=True), marks=pytest.mark.slow
        ),
        Case(64, 64, 128, INT4[32, True], config=SIDE_BY_SIDE),
    ],
    ids=str,
)
def test_equals_float64(case: Case) -> None:
    check(case)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 8, 13, 64])
@pytest.mark.parametrize("stored", [INT8, INT8_GROUPS, FP8, BLOCKS, *INT4.values()], ids=format_name)
@pytest.mark.parametrize("form", [PLAIN, GATED], ids=["plain", "gated"])
def test_equals_float64_at_real_sizes(tokens: int, stored: WeightFormat, form: LinearForm) -> None:
    check(Case(tokens, 1536, 4096, stored, form=form, bias=True))


def test_packed_instructions_do_what_the_interpreter_is_told() -> None:
    """The permutation of bytes as the kernel has it, worked out for every two numbers of 8 bits."""
    assembly: list[str] = []
    inline_ptx = unpack.utils.inline_ptx

    def noting(text: str, *operands: Any, **options: Any) -> Any:
        assembly.append(text)
        return inline_ptx(text, *operands, **options)

    weight = jax.eval_shape(lambda: quantize(jnp.zeros((64, 128)), INT8))
    x = jax.ShapeDtypeStruct((8, 128), jnp.bfloat16)
    with mock.patch.object(unpack.utils, "inline_ptx", noting):
        assert kernels_of(partial(QUANTIZED_LINEAR, implementation="pallas", form=PLAIN), x, weight, None, None)
    [instruction] = {text for text in assembly if "prmt" in text}
    other, selector = (int(word, 0) for word in re.fullmatch(r"prmt\.b32 \$0, \$1, (.*), (.*);", instruction).groups())
    numbers = np.arange(2**16, dtype=np.uint16)
    source = [(number >> 8 * i) & 255 for number in (numbers.astype(int), other) for i in range(4)]
    result = sum(source[selector >> 4 * i & 7] << 8 * i for i in range(4))
    expected = np.asarray(spread(jnp.asarray(numbers).view(jnp.int8))).view(np.uint32)
    np.testing.assert_array_equal(result, expected)


def test_the_extremes_of_every_format_are_exact() -> None:
    """One-hot activations take out single weights: every number a format has, with scale 1."""
    x = jnp.eye(8, 128)
    for stored, dtype in (
        (INT8, jnp.bfloat16),
        (INT8, jnp.float16),
        (FP8, jnp.bfloat16),
        (INT4[32, False], jnp.bfloat16),
    ):
        numbers = {"int8": np.arange(-127, 128), "int4": np.arange(-7, 8)}.get(stored.kind)
        if numbers is None:
            numbers = np.arange(256, dtype=np.uint8).view(jnp.float8_e4m3fn).astype(np.float64)
            numbers = numbers[np.isfinite(numbers)]
        matrix = np.resize(numbers, (64, 128)).astype(np.float64)
        matrix[:, ::32] = np.abs(numbers).max()
        weight = quantized(matrix, stored)
        with packed_numbers(), interpreted_or_gpu():
            run = partial(pallas.run, device=current_device(), config=OVER_INPUTS | {"inputs": 1}, form=LinearForm())
            y = jax.jit(run)(x.astype(dtype), weight, None, None)
        np.testing.assert_array_equal(y.astype(jnp.float32), matrix.T[:8])


def test_maps_and_shards() -> None:
    case = Case(2, 64, 128, INT4[64, True], config=OVER_INPUTS | {"inputs": 1})
    x, weight, *_ = case.arrays()
    many = jnp.stack([x, 2 * x])
    mesh = Mesh(np.array(jax.devices()[:1]), ("tensor",))
    specs = QuantizedWeight(
        PartitionSpec("tensor"), PartitionSpec(None, "tensor"), PartitionSpec(None, "tensor"), weight.format
    )
    with packed_numbers(), interpreted_or_gpu():
        run = partial(case.run)
        mapped = jax.jit(jax.vmap(lambda x: run(x, weight, None, None)))(many)
        sharded = jax.jit(
            jax.shard_map(
                lambda x, w: run(x, w, None, None),
                mesh=mesh,
                in_specs=(PartitionSpec(), specs),
                out_specs=PartitionSpec(None, "tensor"),
                check_vma=False,
            )
        )(x, weight)
    wanted = expected(case, x, weight, None, None)
    assert relative_error(mapped[1], 2 * wanted) <= RELATIVE["bfloat16"]
    assert relative_error(sharded, wanted) <= RELATIVE["bfloat16"]


def test_tilings_fit_and_leave_no_split_empty() -> None:
    for spec in argument_specs()[::7]:
        x, weight, *_ = spec.abstract()
        shape = Shape.of(x, weight, spec.static["form"])
        assert best(shape, H200)
        for tiling in tilings(shape, H200):
            assert (tiling.splits - 1) * tiling.steps(shape) * tiling.inputs * 128 < shape.inputs
            assert tiling.stages >= 2


AOT = (
    "llama-8b qkv int8 channel T=1",
    "llama-8b gate up int8 g128 T=64",
    "llama-8b down int4 g32 T=8",
    "llama-8b gate up int4 g32 T=64",
    "llama-8b down int4 g32 zeros T=64",
    "llama-70b attention out int4 g64 zeros T=64",
    "llama-70b gate up int4 g128 T=8",
    "llama-8b down fp8 channel T=64",
    "deepseek-v3 expert gate up fp8 blocks T=8",
    "deepseek-v3 dense down fp8 blocks T=64",
    "mixtral-8x7b expert gate up int4 g128 zeros T=1",
)


@pytest.mark.aot
@pytest.mark.parametrize("name", AOT)
def test_compiles_for_the_h200_without_spills(name: str) -> None:
    [spec] = [spec for spec in argument_specs() if spec.name == f"{name} bfloat16"]
    compiled = compile_for_h200(partial(QUANTIZED_LINEAR, implementation="pallas", **spec.static), *spec.abstract())
    assert compiled.registers > 0
    assert compiled.spills == 0


@pytest.mark.aot
@pytest.mark.parametrize("stored", [INT8, FP8, INT4[32, True]], ids=format_name)
def test_float16_with_everything_that_follows_compiles(stored: WeightFormat) -> None:
    shape = jax.ShapeDtypeStruct
    weight = jax.eval_shape(lambda: quantize(jnp.zeros((16384, 4096)), stored))
    rows = shape((16384,), jnp.float16), shape((64, 16384), jnp.float16)
    run = partial(QUANTIZED_LINEAR, implementation="pallas", form=LinearForm("gelu"))
    assert compile_for_h200(run, shape((64, 4096), jnp.float16), weight, *rows).spills == 0
