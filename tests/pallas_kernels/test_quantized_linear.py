"""Quantised weights, and the product with them in its reference form, against float64."""

from functools import partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from jdsi.errors import UnsupportedError
from jdsi.pallas_kernels.activations import ACTIVATIONS
from jdsi.pallas_kernels.device import H200, target
from jdsi.pallas_kernels.linear import gated_linear, linear
from jdsi.pallas_kernels.normalization import NormForm
from jdsi.pallas_kernels.quantized_linear import (
    QuantizedWeight,
    WeightFormat,
    dequantize,
    quantize,
)
from jdsi.pallas_kernels.quantized_linear.specs import argument_specs, format_name
from jdsi.pallas_kernels.quantized_linear.weight import pack, unpack
from kernels import relative_error

INT4 = [WeightFormat("int4", group, zero_points=zero) for group in (32, 64, 128) for zero in (False, True)]
INT8 = [WeightFormat("int8"), WeightFormat("int8", 128), WeightFormat("int8", 32, scale_dtype="float16")]
FP8 = [WeightFormat("fp8"), WeightFormat("fp8", blocks=True)]
FORMATS = INT8 + INT4 + FP8
SUBNORMAL = 2.0**-125  # smaller float32 numbers may count as zero
by_name = pytest.mark.parametrize("stored", FORMATS, ids=format_name)
# As one program each: a program for every operation of theirs, format and shape would take longer to compile.
quantized = jax.jit(quantize, static_argnums=1)
restored = jax.jit(dequantize)


def numbers_of(weight: QuantizedWeight) -> tuple[np.ndarray, np.ndarray]:
    """Stored numbers less their zero points, and the scale of each, read the long way round; float64."""
    stored, (rows, inputs) = weight.format, weight.shape
    if stored.kind == "int4":
        numbers = np.zeros((rows, inputs))
        for column in range(inputs):
            run, place = divmod(column, 32)
            word = np.asarray(weight.values)[:, 8 * run + place % 8].astype(np.int64)
            numbers[:, column] = word >> 4 * (place // 8) & 15
        for column in range(inputs):
            group = column // stored.group
            numbers[:, column] -= 8 if weight.zeros is None else np.asarray(weight.zeros)[group]
    else:
        numbers = np.asarray(weight.values).astype(np.float64)
    scales = np.asarray(weight.scales).astype(np.float64).repeat(stored.columns or inputs, 0).T
    return numbers, (scales.repeat(128, 0)[:rows] if stored.blocks else scales)


@given(
    stored=st.sampled_from(FORMATS),
    rows=st.sampled_from([1, 130]),
    matrix=hnp.arrays(np.float32, (130, 256), elements=st.floats(-8, 8, width=32), fill=st.floats(-8, 8, width=32)),
    magnitude=st.sampled_from([1e-8, 1e-3, 1.0, 1e4]),
)
@settings(max_examples=30, deadline=None)
def test_at_most_half_a_step_is_lost(stored: WeightFormat, rows: int, matrix: np.ndarray, magnitude: float) -> None:
    matrix = matrix[:rows] * np.float32(magnitude)
    weight = quantized(matrix, stored)
    numbers, scales = numbers_of(weight)
    assert np.isfinite(numbers).all()
    assert np.isfinite(scales).all()
    step = scales
    if stored.kind == "fp8":  # three bits of mantissa, and the smallest exponent is -6
        with np.errstate(divide="ignore", invalid="ignore"):
            exponent = np.floor(np.log2(np.abs(matrix.astype(np.float64) / scales)))
        step = scales * 2.0 ** (np.nan_to_num(exponent, nan=-6, neginf=-6).clip(-6, 8) - 3)
    assert (np.abs(matrix - numbers * scales) <= step * (0.5 + 1e-5) + SUBNORMAL).all()
    np.testing.assert_allclose(restored(weight), numbers * scales, rtol=1e-6, atol=SUBNORMAL)


def test_scales_below_the_smallest_normal_number_are_large_enough() -> None:
    matrix = np.full((1, 32), 1e-5, np.float32)
    weight = quantize(matrix, WeightFormat("int8", 32, scale_dtype="float16"))
    assert (np.asarray(weight.scales, np.float64) * 127 >= matrix.max()).all()


@pytest.mark.parametrize("stored", [f for f in FORMATS if f.scale_dtype != "float16"], ids=format_name)
def test_numbers_whose_scale_would_count_as_zero_are_not_lost(stored: WeightFormat) -> None:
    """The magnitude is a normal float32; what remains of it for a step may be none, and float16 has none so small."""
    matrix = np.zeros((128, 128), np.float32)
    matrix[0, 0] = 4e-37
    assert restored(quantized(matrix, stored))[0, 0] == pytest.approx(4e-37, rel=0.1)


@by_name
def test_groups_of_zeros_are_zero(stored: WeightFormat) -> None:
    matrix = np.random.default_rng(0).standard_normal((128, 256))
    matrix[:, :128] = 0
    matrix[3] = 0
    for some in (matrix, 0 * matrix):
        back = np.asarray(restored(quantized(some, stored)))
        assert np.isfinite(back).all()
        assert (back[some == 0] == 0).all()


@by_name
def test_representable_matrices_come_back(stored: WeightFormat) -> None:
    rng = np.random.default_rng(1)
    rows, inputs = 256, 256
    scales = 2.0 ** rng.integers(-9, 3, (rows if not stored.blocks else 2, inputs // (stored.columns or inputs)))
    scales = scales.repeat(128, 0) if stored.blocks else scales
    scales = scales.repeat(stored.columns or inputs, 1)
    if stored.kind == "fp8":
        numbers = rng.standard_normal((rows, inputs)).astype(ml_dtypes.float8_e4m3fn).astype(np.float64)
        numbers[:, ::32] = 448
    elif stored.zero_points:
        numbers = rng.integers(-5, 11, (rows, inputs)).astype(np.float64)
        numbers[:, ::32], numbers[:, 1::32] = -5, 10
    else:
        largest = 7 if stored.kind == "int4" else 127
        numbers = rng.integers(-largest, largest + 1, (rows, inputs)).astype(np.float64)
        numbers[:, ::32] = largest
    np.testing.assert_array_equal(restored(quantized(numbers * scales, stored)), numbers * scales)


def test_the_packing_of_four_bits() -> None:
    numbers = np.random.default_rng(2).integers(0, 16, (3, 96))
    words = np.asarray(pack(jnp.asarray(numbers)))
    assert words.shape == (3, 24)
    for row, column in np.ndindex(numbers.shape):
        run, place = divmod(column, 32)
        assert int(words[row, 8 * run + place % 8]) >> 4 * (place // 8) & 15 == numbers[row, column]
    np.testing.assert_array_equal(unpack(jnp.asarray(words)), numbers)


def test_bytes() -> None:
    matrix = np.ones((200, 256))
    sizes = {format_name(stored): quantized(matrix, stored).nbytes for stored in FORMATS}
    values, groups = 200 * 256, 200 * 256 // 128
    assert sizes["int8 channel"] == sizes["fp8 channel"] == values + 4 * 200
    assert sizes["int8 g128"] == values + 2 * groups
    assert sizes["int4 g128"] == values // 2 + 2 * groups
    assert sizes["int4 g32 zeros"] == values // 2 + 3 * 4 * groups
    assert sizes["fp8 blocks"] == values + 4 * 2 * 2


@by_name
def test_slices_are_those_of_the_matrix(stored: WeightFormat) -> None:
    weight = quantized(np.random.default_rng(3).standard_normal((300, 512)), stored)
    whole = np.asarray(restored(weight))
    np.testing.assert_array_equal(restored(weight.rows(128, 256)), whole[128:256])
    np.testing.assert_array_equal(restored(weight.rows(256, 300)), whole[256:])
    np.testing.assert_array_equal(restored(weight.columns(128, 384)), whole[:, 128:384])
    if stored.group == 32:
        np.testing.assert_array_equal(restored(weight.columns(32, 96)), whole[:, 32:96])
    with pytest.raises(ValueError, match="rows 10 to 301 of 300"):
        weight.rows(10, 301)
    with pytest.raises(ValueError, match="columns 8 to 8 of 512"):
        weight.columns(8, 8)
    if stored.columns is not None:
        with pytest.raises(ValueError, match=f"columns 0 to 16 cut a group of {stored.columns} inputs"):
            weight.columns(0, 16)
    if stored.blocks:
        with pytest.raises(ValueError, match="rows 0 to 100 cut a block of 128 rows"):
            weight.rows(0, 100)


def test_made_from_numpy_and_carried_through_transformations() -> None:
    rng = np.random.default_rng(4)
    weight = QuantizedWeight(
        values=rng.integers(-127, 128, (6, 128), np.int8),
        scales=rng.random((1, 6), np.float32),
        zeros=None,
        format=WeightFormat("int8"),
    )
    assert weight.rows(2, 4).values.base is weight.values or weight.rows(2, 4).values.base is weight.values.base
    expected = np.asarray(weight.values) * np.asarray(weight.scales).T
    np.testing.assert_allclose(jax.jit(dequantize)(weight), expected, rtol=1e-6)
    two = jax.tree.map(lambda *arrays: np.stack(arrays), weight, weight)
    np.testing.assert_allclose(jax.vmap(dequantize)(two)[1], expected, rtol=1e-6)
    leaves, structure = jax.tree.flatten(weight)
    assert len(leaves) == 2
    assert jax.tree.unflatten(structure, leaves).format == weight.format


def test_formats_that_do_not_exist() -> None:
    with pytest.raises(ValueError, match="kind: 'int3' is none of int8, int4, fp8"):
        WeightFormat("int3")
    with pytest.raises(ValueError, match="group: int8 has groups of 32, 64, 128, not 48"):
        WeightFormat("int8", 48)
    with pytest.raises(ValueError, match="group: int4 needs one"):
        WeightFormat("int4")
    with pytest.raises(ValueError, match="group: fp8 has groups of none, not 32"):
        WeightFormat("fp8", 32)
    with pytest.raises(ValueError, match="only fp8 has blocks, not int8"):
        WeightFormat("int8", blocks=True)
    with pytest.raises(ValueError, match="only int4 has zero points, not fp8"):
        WeightFormat("fp8", zero_points=True)
    with pytest.raises(ValueError, match="scale_dtype: 'int8' is none of"):
        WeightFormat("int8", scale_dtype="int8")


def test_arrays_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="96 inputs are not a multiple of the 64"):
        quantize(np.ones((4, 96)), WeightFormat("int4", 64))
    with pytest.raises(ValueError, match="a weight is a matrix, not"):
        quantize(np.ones(4), WeightFormat("int8"))
    values, stored = np.zeros((4, 64), np.int8), WeightFormat("int8", 32)
    with pytest.raises(ValueError, match=r"scales: \(1, 4\) for a matrix \(4, 64\), not \(2, 4\)"):
        QuantizedWeight(values, np.ones((1, 4)), None, stored)
    with pytest.raises(ValueError, match="values: int8 is stored as int8, not int16"):
        QuantizedWeight(values.astype(np.int16), np.ones((2, 4)), None, stored)
    with pytest.raises(ValueError, match="zeros: the format has zero points False"):
        QuantizedWeight(values, np.ones((2, 4)), np.zeros((2, 4), np.int8), stored)


def case(stored: WeightFormat, tokens: int, dtype: str = "float32") -> tuple[jax.Array, QuantizedWeight, np.ndarray]:
    rng = np.random.default_rng(tokens)
    weight = quantized(rng.standard_normal((64, 256)), stored)
    numbers, scales = numbers_of(weight)
    return jnp.asarray(rng.standard_normal((tokens, 256)), dtype), weight, numbers * scales


@by_name
@pytest.mark.parametrize(("dtype", "bound"), [("float32", 1e-5), ("bfloat16", 1e-2), ("float16", 2e-3)])
def test_reference_equals_float64(stored: WeightFormat, dtype: str, bound: float) -> None:
    x, weight, matrix = case(stored, 5, dtype)
    rng = np.random.default_rng(7)
    bias, residual = jnp.asarray(rng.standard_normal(64), dtype), jnp.asarray(rng.standard_normal((5, 64)), dtype)
    wide, wide_bias = np.asarray(x, np.float64), np.asarray(bias, np.float64)
    expected = np.asarray(ACTIVATIONS["gelu"](wide @ matrix.T + wide_bias)) + np.asarray(residual, np.float64)
    y = jax.jit(lambda *a: linear(*a[:3], activation="gelu", residual=a[3]))(x, weight, bias, residual)
    assert y.dtype == x.dtype
    assert relative_error(y, expected) <= bound
    products = wide @ matrix.T + wide_bias
    gated = np.asarray(jax.nn.silu(products[:, :32])) * products[:, 32:]
    gate = partial(gated_linear, activation="silu", out_dtype=jnp.float32)
    y = jax.jit(gate)(x, weight, bias)
    assert y.dtype == jnp.float32
    assert relative_error(y, gated) <= (1e-5 if dtype == "float32" else bound)


def test_norm_goes_first() -> None:
    x, weight, matrix = case(INT4[0], 3)
    scale = jnp.linspace(0.5, 2, 256)
    y = linear(x, weight, norm=NormForm(centred=False, eps=1e-6), norm_weight=scale)
    normal = np.asarray(x) / np.sqrt((np.asarray(x) ** 2).mean(-1, keepdims=True) + 1e-6) * np.asarray(scale)
    assert relative_error(y, normal @ matrix.T) <= 1e-5
    with pytest.raises(ValueError, match="need `norm`"):
        linear(x, weight, norm_weight=scale)


def test_gradients_reach_the_activations() -> None:
    x, weight, matrix = case(INT4[1], 3)
    gradient = jax.grad(lambda x: linear(x, weight).sum())(x)
    assert relative_error(gradient, np.broadcast_to(matrix.sum(0), x.shape)) <= 1e-5


def test_shapes_that_do_not_go_together() -> None:
    x, weight, _ = case(INT8[0], 3)
    with pytest.raises(ValueError, match="x has 128 columns, weight 256"):
        linear(x[:, :128], weight)
    with pytest.raises(ValueError, match=r"bias has shape \(3,\), not \(64,\)"):
        linear(x, weight, jnp.ones(3))
    with pytest.raises(ValueError, match=r"residual has shape \(3, 3\), not \(3, 64\)"):
        linear(x, weight, residual=jnp.ones((3, 3)))
    with pytest.raises(ValueError, match="residual is float16, the result float32"):
        linear(x, weight, residual=jnp.ones((3, 64), jnp.float16))
    with pytest.raises(ValueError, match="as many rows for up as for gate, not 63"):
        gated_linear(x, weight.rows(0, 63), activation=None)


def test_what_the_kernel_does_not_take() -> None:
    x, weight, _ = case(INT8[0], 3, "bfloat16")

    def pallas(x: jax.Array, weight: QuantizedWeight, **static: object) -> None:
        with target(H200):
            linear(x, weight, implementation="pallas", **static)

    with pytest.raises(UnsupportedError, match="activations are bfloat16 or float16, not float32"):
        pallas(x.astype(jnp.float32), weight)
    with (
        pytest.raises(UnsupportedError, match="results are bfloat16, float16 or float32, not float64"),
        jax.enable_x64(),
    ):
        pallas(x, weight, out_dtype=jnp.float64)
    with pytest.raises(UnsupportedError, match="1 to 64 rows of activations, not 65"):
        pallas(jnp.zeros((65, 256), jnp.bfloat16), weight)
    with pytest.raises(UnsupportedError, match="1 to 64 rows of activations, not 0"):
        pallas(x[:0], weight)
    with pytest.raises(UnsupportedError, match="inputs must be a multiple of 128 and outputs of 16, not 192 and 64"):
        pallas(x[:, :192], weight.columns(0, 192))
    with pytest.raises(UnsupportedError, match="inputs must be a multiple of 128 and outputs of 16, not 256 and 60"):
        pallas(x, weight.rows(0, 60))
    blocks = quantize(np.ones((128, 256)), FP8[1])
    with pytest.raises(UnsupportedError, match="64 rows of the gate are not a multiple of the 128"), target(H200):
        gated_linear(x, blocks, activation="silu", implementation="pallas")
    with pytest.raises(UnsupportedError, match="needs an NVIDIA GPU"):
        linear(x, weight, implementation="pallas")


def test_specs_count_what_is_stored() -> None:
    specs = {spec.name: spec for spec in argument_specs()}
    assert len(specs) == len(argument_specs())
    spec = specs["llama-8b qkv int4 g128 zeros T=8 bfloat16"]
    stored = 6144 * 4096 // 2 + 6144 * 32 * 3
    assert spec.bytes == stored + 2 * 8 * (4096 + 6144)
    assert spec.flops == 2 * 8 * 4096 * 6144
    assert spec.abstract()[1].nbytes == stored
    assert specs["deepseek-v3 dense gate up fp8 blocks T=1 bfloat16"].abstract()[1].scales.shape == (56, 288)
