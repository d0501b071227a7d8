"""How operators choose Triton, and that its kernels fit into JAX: vmap, shard_map, derivatives, compiled programs."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

pytest.importorskip("jax_triton")

from jdsi.errors import UnsupportedError
from jdsi.pallas_kernels import triton_support
from jdsi.pallas_kernels.attention import AttentionForm
from jdsi.pallas_kernels.decode_attention import decode_attention, paged_decode_attention
from jdsi.pallas_kernels.device import H200, target
from jdsi.pallas_kernels.linear import linear
from jdsi.pallas_kernels.quantized_linear import WeightFormat, quantize
from jdsi.pallas_kernels.ragged_paged_attention import ragged_paged_attention
from jdsi.sharding import topology
from kernels import ON_GPU, relative_error
from triton_interpreter import A100, compile_for, interpreted_triton

FORM = AttentionForm(scale=0.1)
NUMBERS = jax.ShapeDtypeStruct((2,), jnp.int32)


def bf16(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.bfloat16)


def operators() -> dict[str, tuple[Callable[..., Any], tuple[Any, ...], list[str]]]:
    """Each operator on arguments that its Triton kernels take, and the kernels it then launches."""
    weight = jax.eval_shape(lambda: quantize(jnp.zeros((256, 256)), WeightFormat("int4", group=128)))
    pages, tables = bf16(8, 2, 64, 64), jax.ShapeDtypeStruct((2, 6), jnp.int32)

    def decode(q: Any, k: Any, n: Any, **more: Any) -> Any:
        return decode_attention(q, k, k, FORM, q_start=n, **more)

    def paged(q: Any, k: Any, tables: Any, n: Any, **more: Any) -> Any:
        return paged_decode_attention(q, k, k, tables, FORM, q_start=n, **more)

    def ragged(q: Any, k: Any, tables: Any, offsets: Any, n: Any, **more: Any) -> Any:
        return ragged_paged_attention(q, k, k, tables, FORM, q_offsets=offsets, k_lengths=n, **more)

    offsets = jax.ShapeDtypeStruct((3,), jnp.int32)
    return {
        "linear": (linear, (bf16(2, 4096), bf16(4096, 4096)), ["product"]),
        "quantized_linear": (linear, (bf16(2, 256), weight), ["product"]),
        "decode_attention": (decode, (bf16(2, 1, 4, 64), bf16(2, 2, 384, 64), NUMBERS), ["decode", "combine"]),
        "paged_decode_attention": (paged, (bf16(2, 1, 4, 64), pages, tables, NUMBERS), ["decode", "combine"]),
        "ragged_paged_attention": (ragged, (bf16(5, 4, 64), pages, tables, offsets, NUMBERS), ["ragged"]),
    }


@pytest.mark.parametrize("name", operators())
def test_older_gpus_get_triton(name: str) -> None:
    function, arguments, kernels = operators()[name]
    assert [kernel.name for kernel in compile_for(A100, function, *arguments)] == kernels
    assert compile_for(A100, partial(function, implementation="xla"), *arguments) == []
    with target(A100), pytest.raises(UnsupportedError, match=f"{name}: implementation='pallas' cannot take this"):
        jax.eval_shape(partial(function, implementation="pallas"), *arguments)
    turing = dataclasses.replace(A100, kind="Tesla T4", capability=(7, 5))
    assert compile_for(turing, function, *arguments) == []  # and no error


@pytest.mark.parametrize("name", operators())
def test_without_jax_triton_the_reference_runs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    function, arguments, _ = operators()[name]
    monkeypatch.setattr(triton_support, "_installed", lambda: False)
    monkeypatch.setattr(triton_support, "_call", lambda *_: pytest.fail("launched"))
    with target(dataclasses.replace(A100, kind="a GPU that no other test has traced for")):
        jax.eval_shape(function, *arguments)
        with pytest.raises(UnsupportedError, match=r"jax-triton is not installed: pip install 'jdsi\[cuda\]'"):
            jax.eval_shape(partial(function, implementation="triton"), *arguments)


@pytest.mark.aot
@pytest.mark.parametrize("name", operators())
@pytest.mark.parametrize("device", [A100, H200], ids=lambda d: d.kind)
def test_xla_compiles_the_whole_program(name: str, device: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the assembler that XLA finds, as on the GPU."""
    described = topology._TARGETS["h200"]
    for ours, theirs in (
        ("major: 9 minor: 0", "major: 8 minor: 0"),
        ("core_count: 132", "core_count: 108"),
        ("fpus_per_core: 128", "fpus_per_core: 64"),
        ("shared_memory_per_core: 233472", "shared_memory_per_core: 167936"),
        ("optin: 232448", "optin: 166912"),
        ("NVIDIA H200", "NVIDIA A100-SXM4-80GB"),
    ):
        described = described.replace(ours, theirs)
    monkeypatch.setitem(topology._TARGETS, "a100", described)
    mesh = Mesh(np.array(topology.topology_devices("h200" if device is H200 else "a100")), ("device",))
    here = NamedSharding(mesh, PartitionSpec())
    function, arguments, kernels = operators()[name]
    placed = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), arguments)
    with target(device):
        text = jax.jit(partial(function, implementation="triton")).lower(*placed).compile().as_text()
    assert text is not None
    assert text.count("triton_kernel_call_ffi") == len(kernels)


def small() -> tuple[jax.Array, jax.Array]:
    rng = np.random.default_rng(0)
    return jnp.asarray(rng.standard_normal((3, 64)), jnp.bfloat16), jnp.asarray(
        rng.standard_normal((32, 64)), jnp.bfloat16
    )


run = partial(linear, implementation="triton")


def test_vmap() -> None:
    x, weight = small()
    with interpreted_triton():
        many = jax.jit(jax.vmap(run, in_axes=(0, None)))(jnp.stack([x, 2 * x, -x]), weight)
        np.testing.assert_array_equal(many[1], run(2 * x, weight))
        np.testing.assert_array_equal(many[2], run(-x, weight))


@pytest.mark.parametrize("check_vma", [True, False])
def test_shard_map(check_vma: bool) -> None:
    x, weight = small()
    mesh = Mesh(np.array(jax.devices()[:1]), ("tensor",))
    rows = PartitionSpec("tensor")

    def local(x: jax.Array, weight: jax.Array) -> jax.Array:
        return jax.lax.psum(run(x, weight), "tensor")

    with interpreted_triton():
        sharded = jax.shard_map(
            local, mesh=mesh, in_specs=(PartitionSpec(), rows), out_specs=PartitionSpec(), check_vma=check_vma
        )
        np.testing.assert_array_equal(jax.jit(sharded)(x, weight), run(x, weight))


def test_derivatives_are_the_references() -> None:
    x, weight = small()
    with interpreted_triton():
        ours = jax.jit(jax.grad(lambda w: jnp.sin(run(x, w)).sum().astype(jnp.float32)))(weight)
    reference = jax.grad(lambda w: jnp.sin(linear(x, w, implementation="xla")).sum().astype(jnp.float32))(weight)
    assert relative_error(ours, reference) < 1e-2


@pytest.mark.gpu
@pytest.mark.parametrize("name", operators())
def test_both_kernels_agree(name: str) -> None:
    """On the GPU itself, launched by JAX: Triton's result and that of the other implementations."""
    function, arguments, _ = operators()[name]
    rng = np.random.default_rng(0)

    def fill(x: jax.ShapeDtypeStruct) -> jax.Array:
        if x.dtype == jnp.bfloat16:
            return jnp.asarray(rng.standard_normal(x.shape), x.dtype)
        if x.dtype == jnp.int16:  # 4-bit weights
            return jnp.asarray(rng.integers(-(2**15), 2**15, x.shape), x.dtype)
        return jnp.asarray({(2,): [383, 100], (3,): [0, 1, 5]}.get(x.shape, [[0, 1, 2, 3, 4, 5], [6, 7, -1, 0, 1, 2]]))

    values = jax.tree.map(fill, arguments)
    assert ON_GPU
    expected = jax.jit(partial(function, implementation="xla"))(*values)
    for implementation in ("triton", "pallas"):
        y = jax.jit(partial(function, implementation=implementation))(*values)
        assert relative_error(y, expected) < 1e-2, implementation
