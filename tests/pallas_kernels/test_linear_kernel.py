"""The linear operator's Mosaic GPU kernel: interpreted here, on the GPU where there is one."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from jdsi.pallas_kernels.device import H200
from jdsi.pallas_kernels.linear import pallas
from jdsi.pallas_kernels.linear.form import LinearForm
from kernels import RELATIVE, relative_error
from linear_cases import LAYER, RMS, call, case, kernels_run, oracle

# Token counts by how they meet wgmma's 8 columns; sizes that end within a tile of rows, of inputs, of both, of neither.
SHAPES = [
    (1, 64, 256),
    (2, 33, 72),
    (3, 50, 128),
    (8, 136, 328),
    (10, 72, 64),
    (11, 257, 72),
    (16, 40, 1024),
    (33, 50, 72),
    (64, 64, 192),
]
# In `make test`: one token and many, fewer than eight more than columns, rows and inputs that end within a tile.
ONCE = {
    (1, 64, 256): "bfloat16",
    (8, 136, 328): "float16",
    (11, 257, 72): "bfloat16",
    (16, 40, 1024): "bfloat16",
    (33, 50, 72): "bfloat16",
    (64, 64, 192): "bfloat16",
}


@pytest.mark.parametrize(
    ("tokens", "outputs", "inputs", "dtype"),
    [
        pytest.param(*shape, dtype, marks=() if dtype == ONCE.get(shape) else pytest.mark.slow)
        for dtype, shapes in (("bfloat16", SHAPES), ("float16", SHAPES[::3]))
        for shape in shapes
    ],
)
def test_shapes(tokens: int, outputs: int, inputs: int, dtype: str) -> None:
    arguments = case(tokens, outputs, inputs, dtype, bias=True, residual=True, seed=tokens)
    with kernels_run():
        y = call(arguments, "pallas")
    assert y.dtype == dtype
    assert relative_error(y, oracle(arguments)) <= RELATIVE[dtype]


# "gelu" is the one with a formula of its own in the kernel. Every pair of choices occurs in the nine that are not slow.
FUSIONS = [
    pytest.param(
        dict(bias=bias, activation=activation, residual=residual, norm=norm),
        marks=() if bias == ((i + j) % 3 > 0) and residual == ((i + 2 * j) % 3 == 0) else pytest.mark.slow,
    )
    for i, activation in enumerate([None, "gelu", "silu"])
    for j, norm in enumerate([None, RMS, LAYER])
    for bias, residual in itertools.product([False, True], repeat=2)
]


@pytest.mark.parametrize("fusion", FUSIONS, ids=lambda f: "-".join(n for n, v in f.items() if v) or "none")
def test_fusions(fusion: dict) -> None:
    arguments = case(3, 40, 256, **fusion)
    with kernels_run():
        assert relative_error(call(arguments, "pallas"), oracle(arguments)) <= RELATIVE["bfloat16"]


@pytest.mark.parametrize(
    ("tokens", "outputs", "inputs", "fusion"),
    [
        (1, 72, 128, dict(activation="silu", norm=RMS)),
        pytest.param(4, 40, 64, dict(activation="gelu", bias=True), marks=pytest.mark.slow),
        (10, 24, 192, dict(activation=None, norm=LAYER, bias=True)),  # more columns than a fused norm takes
        (2, 33, 72, dict(activation="gelu_new", bias=True, norm=LAYER)),
        (17, 32, 128, dict(activation="silu")),
    ],
)
def test_gated(tokens: int, outputs: int, inputs: int, fusion: dict) -> None:
    arguments = case(tokens, outputs, inputs, gated=True, **fusion)
    with kernels_run():
        assert relative_error(call(arguments, "pallas"), oracle(arguments)) <= RELATIVE["bfloat16"]


@pytest.mark.parametrize(
    ("config", "gated"),
    [
        pytest.param(config, gated, marks=() if gated == (i % 2 == 0) else pytest.mark.slow)
        for i, config in enumerate([dict(splits=2), dict(splits=3), dict(rows=8), dict(rows=192, step=64, stages=3)])
        for gated in (False, True)
    ],
)
def test_any_tiling_gives_the_result(config: dict, gated: bool) -> None:
    arguments = case(5, 200, 448, bias=True, activation="gelu_new", residual=not gated, gated=gated)
    arrays = [arguments.get(name) for name in ("x", "weight", "bias", "residual")]
    form = LinearForm("gelu_new", gated)
    device = dataclasses.replace(H200, cores=3)
    config = {"step": 64, "stages": 4, **config}
    with kernels_run(cores=3):
        run = jax.jit(lambda *arrays: pallas.run(*arrays, device=device, config=config, form=form))
        assert relative_error(run(*arrays), oracle(arguments)) <= RELATIVE["bfloat16"]


def test_tiles_of_several_turns_keep_apart() -> None:
    """One multiprocessor, more tiles than pipeline stages: residual, norm and result of one tile wait for the last."""
    arguments = case(4, 328, 128, bias=True, residual=True, norm=RMS)
    with kernels_run(cores=1):
        assert relative_error(call(arguments, "pallas"), oracle(arguments)) <= RELATIVE["bfloat16"]


@pytest.mark.parametrize(
    ("dtype", "outputs"),
    [
        ("float32", 50),
        ("float16", 44),
        pytest.param("float32", 44, marks=pytest.mark.slow),
        pytest.param("float16", 50, marks=pytest.mark.slow),
    ],
)
def test_result_dtype(dtype: str, outputs: int) -> None:
    arguments = case(3, outputs, 128, bias=True)
    with kernels_run():
        y = call(arguments, "pallas", out_dtype=jnp.dtype(dtype))
    assert y.dtype == dtype
    assert relative_error(y, oracle(arguments)) <= {"float32": 1e-5, "float16": 2e-3}[dtype]


@pytest.mark.parametrize("name", ["quick_gelu", "relu", "relu2", "tanh"])  # the others are above, and "gelu_new"
def test_activations(name: str) -> None:
    arguments = case(1, 16, 64, bias=True, activation=name)
    with kernels_run(cores=1):
        assert relative_error(call(arguments, "pallas"), oracle(arguments)) <= RELATIVE["bfloat16"]


def test_wider_neighbours() -> None:
    """Norm weights, bias and residual in float32 around 16-bit weights."""
    arguments = case(3, 40, 128, bias=True, residual=True, norm=LAYER)
    for name in ("bias", "residual", "norm_weight", "norm_bias"):
        arguments[name] = arguments[name].astype(jnp.float32)
    with kernels_run():
        y = call(arguments, "pallas", out_dtype=jnp.dtype("float32"))
    assert relative_error(y, oracle(arguments)) <= RELATIVE["bfloat16"]


def test_a_large_mean_survives_the_fused_layer_norm() -> None:
    arguments = case(2, 40, 256, norm=LAYER)
    arguments["x"] = (arguments["x"] + 50).astype(jnp.bfloat16)
    with kernels_run():
        assert relative_error(call(arguments, "pallas"), oracle(arguments)) <= RELATIVE["bfloat16"]


def test_vmap_and_shard_map() -> None:
    arguments = case(4, 48, 64)
    x, weight = arguments["x"], arguments["weight"]
    mesh = Mesh(np.array(jax.devices()[:1]), ("tensor",))

    def product(x: jax.Array, weight: jax.Array) -> jax.Array:
        return call({"x": x, "weight": weight, "activation": None, "norm": None}, "pallas")

    sharded = jax.shard_map(
        product, mesh=mesh, in_specs=(PartitionSpec(), PartitionSpec("tensor")), out_specs=PartitionSpec(None, "tensor")
    )
    with kernels_run():
        expected = product(x, weight)
        many = jax.jit(jax.vmap(product, in_axes=(0, None)))(jnp.stack([x, -x]), weight)
        split = jax.jit(sharded)(x, weight)
    np.testing.assert_array_equal(many[1], -expected)
    np.testing.assert_array_equal(split, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 7, 8, 10, 64])
@pytest.mark.parametrize(
    ("outputs", "inputs", "fusion"),
    [
        (6144, 4096, dict(norm=RMS)),
        (4096, 14336, dict(residual=True)),
        (14336, 4096, dict(norm=RMS, activation="silu", gated=True)),
        (6400, 1600, dict(norm=LAYER, activation="gelu_new", bias=True)),
        (50257, 1600, {}),
    ],
)
def test_real_sizes(tokens: int, outputs: int, inputs: int, fusion: dict) -> None:
    arguments = case(tokens, outputs, inputs, **fusion)
    assert relative_error(call(arguments, "pallas"), oracle(arguments)) <= RELATIVE["bfloat16"]
