"""Norms alone and after a residual sum: the reference against float64, the kernel against the same."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdsi.errors import UnsupportedError
from jdsi.pallas_kernels.device import H200, target
from jdsi.pallas_kernels.normalization import NormForm, add_norm, norm
from jdsi.pallas_kernels.normalization.api import ADD_NORM
from jdsi.pallas_kernels.normalization.pallas import Tiling, run
from jdsi.pallas_kernels.normalization.specs import argument_specs
from kernels import RELATIVE, compile_for_h200, interpreted, interpreted_or_gpu, relative_error
from lowered import kernels_of

RMS, LAYER = NormForm(centred=False, eps=1e-5), NormForm(centred=True, eps=1e-5)
GEMMA = NormForm(centred=False, eps=1e-6, weight_offset=1.0)


def arrays(rows: int, width: int, dtype: Any, form: NormForm, parts: str, seed: int = 0) -> tuple[Any, ...]:
    """x, residual, bias, weight, norm_bias; `parts` names those beside x, of r, b, w and n."""
    random = np.random.default_rng(seed)
    shapes = {"x": (rows, width), "r": (rows, width), "b": (width,), "w": (width,), "n": (width,)}
    parts = parts.replace("n", "") if not form.centred else parts
    return tuple(
        (random.standard_normal(shape) * 2 + 1).astype(jnp.dtype(dtype)) if name in "x" + parts else None
        for name, shape in shapes.items()
    )


def oracle(x: Any, residual: Any, bias: Any, weight: Any, norm_bias: Any, form: NormForm) -> tuple[Any, Any]:
    """In float64, but for the one rounding that is part of the definition."""

    def wide(a: Any) -> Any:
        return 0.0 if a is None else np.asarray(a, np.float64)

    summed = np.asarray((wide(x) + wide(residual) + wide(bias)).astype(np.float32).astype(x.dtype), np.float64)
    centred = summed - summed.mean(-1, keepdims=True) if form.centred else summed
    normed = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + form.eps)
    if weight is not None:
        normed = normed * (wide(weight) + form.weight_offset)
    return normed + wide(norm_bias), summed


def check(rows: int, width: int, dtype: str, form: NormForm, parts: str, seed: int = 0, **how: Any) -> None:
    given = arrays(rows, width, dtype, form, parts, seed)
    normed, summed = jax.jit(partial(add_norm, form=form, **how))(*given)
    expected = oracle(*given, form)
    assert normed.dtype == summed.dtype == jnp.dtype(dtype)
    assert relative_error(normed, expected[0]) <= RELATIVE[dtype]
    assert relative_error(summed, expected[1]) <= RELATIVE[dtype] / 100  # but for a tie in the float32 sum of three


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("form", [RMS, LAYER, GEMMA], ids=["rms", "layer", "gemma"])
def test_reference_agrees_with_float64(form: NormForm, dtype: str) -> None:
    for parts in ("rbwn", "rw", "bwn", "w"):
        check(5, 201, dtype, form, parts, implementation="xla")


def test_layer_norm_goes_without_weight() -> None:
    check(3, 128, "float32", LAYER, "r", implementation="xla")
    with interpreted():
        check(3, 128, "bfloat16", LAYER, "r", implementation="pallas")


# DeepSpeed tests its norms at widths from 128 to 14432; rows of a warp, of one and of several warpgroups, overlapping
# last reads, narrow reads.
WIDTHS = [64, 128, 129, 136, 256, 512, 768, 1124, 1600, 2048, 3584, 4096, 7168, 8192, 14432]
ONCE = [(64, RMS), (129, RMS), (512, LAYER), (1124, LAYER), (2048, LAYER), (7168, RMS), (14432, RMS)]  # in `make test`


@pytest.mark.parametrize(
    ("width", "form"),
    [
        pytest.param(width, form, marks=() if (width, form) in ONCE else pytest.mark.slow)
        for width, form in [*zip(WIDTHS, [RMS, LAYER] * 7 + [RMS], strict=True), (14432, LAYER)]
    ],
)
def test_kernel_agrees_with_float64_at_every_width(width: int, form: NormForm) -> None:
    with interpreted_or_gpu():
        check(3, width, "bfloat16", form, "rbwn", seed=width, implementation="pallas")


@pytest.mark.parametrize(("rows", "dtype"), [(1, "float16"), (4, "float16"), (5, "bfloat16"), (8, "float32")])
def test_kernel_takes_any_number_of_rows(rows: int, dtype: str) -> None:
    with interpreted_or_gpu():
        check(rows, 128, dtype, RMS, "rw", seed=rows, implementation="pallas")
        check(rows, 640, dtype, LAYER, "rbwn", seed=rows, implementation="pallas")


@pytest.mark.parametrize(("parts", "form"), [("rw", LAYER), ("bwn", LAYER), ("w", RMS), ("bw", GEMMA)])
def test_kernel_leaves_out_what_is_not_there(parts: str, form: NormForm) -> None:
    with interpreted_or_gpu():
        check(2, 1024, "bfloat16", form, parts, implementation="pallas")
        check(4, 256, "bfloat16", form, parts, implementation="pallas")


@pytest.mark.parametrize(
    "tiling",
    [*Tiling.all(1024, 2), Tiling(1, 8, narrow=True)],
    ids=lambda t: f"{t.warpgroups}x{t.vector}{'n' * t.narrow}",
)
def test_every_tiling_gives_the_same(tiling: Tiling) -> None:
    given = arrays(4, 1024, "bfloat16", LAYER, "rbwn")
    with interpreted_or_gpu():
        config = dataclasses.asdict(tiling)
        normed, summed = jax.jit(partial(run, device=H200, config=config, form=LAYER))(*given)
    expected = oracle(*given, LAYER)
    assert relative_error(normed, expected[0]) <= RELATIVE["bfloat16"]
    assert relative_error(summed, expected[1]) == 0


@pytest.mark.parametrize("width", [128, 640, 1600])
def test_a_row_does_not_depend_on_the_others(width: int) -> None:
    x, residual, _, weight, _ = arrays(4, width, "bfloat16", RMS, "rw")
    with interpreted_or_gpu():
        both = [
            jax.jit(partial(add_norm, form=RMS, implementation="pallas"))(x[:n], residual[:n], None, weight, None)
            for n in (1, 4)
        ]
    for one, four in zip(*both, strict=True):
        np.testing.assert_array_equal(one, four[:1])


def test_statistics_survive_a_mean_far_from_zero() -> None:
    """The difference of two large means would lose the variance: 1000^2 is where float32 steps by 0.06."""
    x = (1000 + jax.random.normal(jax.random.key(0), (2, 1024))).astype(jnp.float32)
    weight = jnp.ones(1024)
    expected = oracle(x, None, None, weight, None, LAYER)[0]
    with interpreted_or_gpu():
        assert relative_error(norm(x, weight, None, LAYER, implementation="pallas"), expected) < 1e-4


def test_weights_may_be_wider_than_the_tokens() -> None:
    x, residual, bias, _, _ = arrays(2, 1024, "bfloat16", RMS, "rb")
    weight = jax.random.normal(jax.random.key(1), (1024,))
    with interpreted_or_gpu():
        normed, _ = jax.jit(partial(add_norm, form=RMS, implementation="pallas"))(x, residual, bias, weight, None)
    assert relative_error(normed, oracle(x, residual, bias, weight, None, RMS)[0]) <= RELATIVE["bfloat16"]


def test_norm_takes_any_leading_axes() -> None:
    x = jax.random.normal(jax.random.key(0), (2, 3, 4, 128), jnp.bfloat16)
    weight = jnp.linspace(-1, 1, 128, dtype=jnp.bfloat16)
    expected = oracle(x, None, None, weight, None, RMS)[0]
    with interpreted_or_gpu():
        assert relative_error(norm(x, weight, None, RMS, implementation="pallas"), expected) <= RELATIVE["bfloat16"]
    assert relative_error(norm(x, weight, None, RMS), expected) <= RELATIVE["bfloat16"]


@pytest.mark.gpu
@pytest.mark.parametrize("spec", argument_specs(), ids=lambda spec: spec.name)
def test_real_sizes_on_the_gpu(spec: Any) -> None:
    given = jax.jit(spec.make)(jax.random.key(0))
    normed, summed = jax.jit(partial(ADD_NORM, implementation="pallas", **spec.static))(*given)
    expected = oracle(*given, spec.static["form"])
    assert relative_error(normed, expected[0]) <= RELATIVE[str(normed.dtype)]
    assert relative_error(summed, expected[1]) <= RELATIVE[str(summed.dtype)] / 100


def test_batching_and_sharding() -> None:
    given = [arrays(2, 256, "bfloat16", RMS, "rw", seed=seed)[:2] for seed in (1, 2)]
    x, residual = (jnp.stack(parts) for parts in zip(*given, strict=True))
    weight = jnp.linspace(-1, 1, 256, dtype=jnp.bfloat16)

    def call(x: Any, residual: Any, how: Any = "pallas") -> Any:
        return add_norm(x, residual, None, weight, None, RMS, implementation=how)

    expected = jax.vmap(partial(call, how="xla"))(x, residual)
    with interpreted_or_gpu():
        mapped = jax.jit(jax.vmap(call))(x, residual)
        mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("data",))
        spec = jax.P("data")
        sharded = jax.shard_map(call, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
        one = jax.jit(sharded)(x[0], residual[0])
    for ours, theirs in zip(mapped, expected, strict=True):
        assert relative_error(ours, theirs) <= RELATIVE["bfloat16"]
    assert relative_error(one[0], expected[0][0]) <= RELATIVE["bfloat16"]


def test_derivatives_come_from_the_reference() -> None:
    x, residual, _, weight, _ = arrays(2, 128, "float32", RMS, "rw")

    def gradients(how: Any) -> Any:
        def loss(x: Any, residual: Any, weight: Any) -> Any:
            return sum(y.sum() for y in add_norm(x, residual, None, weight, None, RMS, implementation=how))

        return jax.grad(loss, (0, 1, 2))(x, residual, weight)

    expected = gradients("xla")
    with target(H200):
        actual = gradients("pallas")
    for ours, theirs in zip(actual, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)  # which of them is jitted differs


@pytest.mark.parametrize(
    ("rows", "width", "dtype", "reason"),
    [
        (2, 31, "bfloat16", "must be 32 to 512, or a multiple of 4 up to about 32768, not 31"),
        (2, 65536, "bfloat16", "not 65536"),
        (2, 1025, "float16", "not 1025"),
        (0, 128, "bfloat16", "there are no rows"),
        (2, 128, "float8_e4m3fn", "x is float8_e4m3fn, not bfloat16"),
    ],
)
def test_kernel_says_what_it_cannot_take(rows: int, width: int, dtype: str, reason: str) -> None:
    x, weight = jnp.zeros((rows, width), dtype), jnp.zeros(width, jnp.float32)
    with target(H200), pytest.raises(UnsupportedError, match=reason):
        norm(x, weight, None, RMS, implementation="pallas")


def test_few_rows_are_left_to_xla_unless_the_kernel_is_named() -> None:
    few, many = (arrays(rows, 128, "bfloat16", RMS, "rw") for rows in (64, 65))
    assert not kernels_of(partial(ADD_NORM, form=RMS), *few)
    assert kernels_of(partial(ADD_NORM, form=RMS), *many)
    assert kernels_of(partial(ADD_NORM, form=RMS, implementation="pallas"), *few)


def test_kernel_is_for_hopper() -> None:
    with target(dataclasses.replace(H200, capability=(8, 0))), pytest.raises(UnsupportedError, match="Hopper"):
        norm(jnp.zeros((1, 128)), jnp.zeros(128), None, RMS, implementation="pallas")


def test_arrays_that_do_not_fit_are_named() -> None:
    x, weight = jnp.zeros((2, 8)), jnp.zeros(8)
    with pytest.raises(ValueError, match=r"x is float32\[2,8\] but the residual float32\[3,8\]"):
        add_norm(x, jnp.zeros((3, 8)), None, weight, None, RMS)
    with pytest.raises(ValueError, match="but the residual bfloat16"):
        add_norm(x, x.astype(jnp.bfloat16), None, weight, None, RMS)
    with pytest.raises(ValueError, match=r"bias has shape \(4,\), not \(8,\)"):
        add_norm(x, None, jnp.zeros(4), weight, None, RMS)
    with pytest.raises(ValueError, match=r"weight has shape \(4,\), not \(8,\)"):
        norm(x, jnp.zeros(4), None, RMS)


@pytest.mark.aot
@pytest.mark.parametrize("spec", argument_specs()[::3], ids=lambda spec: spec.name)
def test_compiles_for_the_h200_without_spills(spec: Any) -> None:
    compiled = compile_for_h200(partial(ADD_NORM, implementation="pallas", **spec.static), *spec.abstract())
    assert compiled.registers > 0
    assert compiled.spills == 0


@pytest.mark.aot
@pytest.mark.parametrize("width", [128, 1600, 14432, 32768])
def test_awkward_widths_compile_without_spills(width: int) -> None:
    given = arrays(8, width, "bfloat16", LAYER, "rbwn")
    compiled = compile_for_h200(partial(add_norm, form=LAYER, implementation="pallas"), *given)
    assert compiled.registers > 0
    assert compiled.spills == 0
