"""Every launch and every copy between global and shared memory is within what the hardware does, at real sizes.

Read from the lowered kernels, which takes no GPU and no compiler. `compile_for_h200` looks at what it compiles in the
same way, so that here are sizes that no other test compiles, and first of all rows that end within a block.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jdsi.pallas_kernels import AttentionForm, Rotary, registry
from jdsi.pallas_kernels.decode_attention import DECODE_ATTENTION
from jdsi.pallas_kernels.kv_write.api import ROTARY_KV_WRITE
from jdsi.pallas_kernels.linear import LinearForm
from jdsi.pallas_kernels.mosaic import send_rows
from jdsi.pallas_kernels.operator import ArgumentSpec
from jdsi.pallas_kernels.prefill_attention import PREFILL_ATTENTION
from jdsi.pallas_kernels.quantized_linear import WeightFormat, quantize
from jdsi.pallas_kernels.quantized_linear.api import QUANTIZED_LINEAR
from kernels import interpreted
from lowered import Kernel, kernels_of

# Rows of results whose length no tile divides, in every way a tile is stored.
ENDS_WITHIN_A_TILE = (
    "llama-8b out T=64",
    "llama-8b head T=2",
    "llama-8b head T=8",
    "gpt-2-xl qkv T=64",
    "gpt-2-xl out T=8",
    "gpt-2-xl up T=2",
    "gpt-2-xl up T=10",
    "gpt-2-xl up T=64",
    "gpt-2-xl head T=1 ",
    "gpt-2-xl head T=64",
)


def check(kernels: Sequence[Kernel]) -> None:
    """No launch or copy is refused, no copy leaves its row, and results are written whole and once."""
    assert kernels
    assert not [fault for kernel in kernels for fault in kernel.faults()]
    for kernel in kernels:
        for argument in {copy.argument for copy in kernel.copies if copy.store and copy.known}:
            assert (kernel.times_written(argument - kernel.operands) == 1).all(), kernel.name


def check_specs(name: str, specs: Sequence[ArgumentSpec]) -> None:
    operator = registry.operators()[name].operator
    for spec in specs:
        check(kernels_of(partial(operator, implementation="pallas", **spec.static), *spec.abstract()))


@pytest.mark.parametrize("name", registry.NAMES)
def test_real_sizes(name: str) -> None:
    specs = registry.operators()[name].argument_specs()
    some = specs[1 :: max(1, len(specs) // 3)]
    if name == "linear":
        some = [spec for spec in specs if spec.name.startswith(ENDS_WITHIN_A_TILE)]
        assert len(some) == len(ENDS_WITHIN_A_TILE)
    check_specs(name, some)


@pytest.mark.slow
@pytest.mark.parametrize("name", registry.NAMES)
def test_all_real_sizes(name: str) -> None:
    check_specs(name, registry.operators()[name].argument_specs())


@pytest.mark.parametrize(
    ("tokens", "out", "inputs", "stored", "form"),
    [
        (8, 1456, 4096, WeightFormat("int8"), LinearForm()),  # split; the last tile has blocks past the end
        (2, 80, 384, WeightFormat("int4", 64), LinearForm("silu", gated=True)),
        (64, 144, 256, WeightFormat("fp8"), LinearForm()),
        (3, 192, 256, WeightFormat("int8"), LinearForm()),
    ],
)
def test_quantized_rows_that_end_within_a_tile(
    tokens: int, out: int, inputs: int, stored: WeightFormat, form: LinearForm
) -> None:
    rows = out * form.operands
    weight = jax.eval_shape(lambda: quantize(jnp.zeros((rows, inputs)), stored))
    x = jax.ShapeDtypeStruct((tokens, inputs), jnp.bfloat16)
    check(kernels_of(partial(QUANTIZED_LINEAR, implementation="pallas", form=form), x, weight, None, None))


def test_launches_of_many_sequences() -> None:
    """More heads, tokens or sequences than the hardware counts along most axes of a grid."""

    def bfloat16(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16)

    def integers(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.int32)

    form, keys = AttentionForm(0.1), bfloat16(64, 8, 131072, 128)
    few_tokens = bfloat16(64, 16, 64, 128), keys, keys, None, None, None, integers(64), integers(64)
    check(kernels_of(partial(DECODE_ATTENTION, implementation="pallas", form=form), *few_tokens))
    keys = bfloat16(16384, 8, 64, 64)
    sequences = bfloat16(16384, 1, 8, 64), keys, keys, None, None, None, integers(16384), integers(16384)
    check(kernels_of(partial(DECODE_ATTENTION, implementation="pallas", form=form), *sequences))
    q, keys = bfloat16(65536, 8, 1, 64), bfloat16(65536, 1, 8, 64)
    prompts = q, keys, keys, None, None, None, None
    check(kernels_of(partial(PREFILL_ATTENTION, implementation="pallas", form=form, return_lse=False), *prompts))
    q, k, memory, numbers = bfloat16(65536, 8, 64), bfloat16(65536, 2, 64), bfloat16(64, 2, 1024, 64), integers(65536)
    write = partial(ROTARY_KV_WRITE, implementation="pallas", rotary=Rotary(64), ascending=False)
    check(kernels_of(write, q, k, k, memory, memory, *[numbers] * 4, None, None))


def stored_in_blocks(columns: int, *, whole: bool, grid: int = 2) -> Any:
    """A kernel that writes ones to two rows, 64 columns a block; `whole` blocks also where the row ends before."""

    def body(out: Any, block_s: Any) -> None:
        block_s[...] = plgpu.layout_cast(jnp.ones((2, 64), jnp.float32), plgpu.Layout.WG_STRIDED((2, 64), 1))
        plgpu.commit_smem()
        block = lax.axis_index("block")
        if whole:
            for row in range(2):
                plgpu.copy_smem_to_gmem(block_s.at[row], out.at[row, pl.ds(block * 64, 64)])
        else:
            send_rows(block_s, out, block, grid)
        plgpu.wait_smem_to_gmem(0)

    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((2, columns), jnp.float32),
        grid=(1, grid),
        grid_names=("unit", "block"),
        scratch_types=[plgpu.SMEM((2, 64), jnp.float32)],
    )


def test_a_row_that_is_left_is_seen() -> None:
    [kernel] = kernels_of(stored_in_blocks(80, whole=True))
    assert {fault.split(": ")[-1] for fault in kernel.faults()} == {"it reaches 128 in dimension 1, which ends at 80"}
    twice = kernel.times_written(0)
    assert (twice[0] == 1).all()
    assert twice[1].tolist() == [2] * 48 + [1] * 32
    with interpreted(), pytest.raises(jax.errors.JaxRuntimeError, match="would go on where the next row begins"):
        jax.block_until_ready(jax.jit(stored_in_blocks(80, whole=True))())


@pytest.mark.parametrize(("columns", "grid"), [(80, 2), (128, 2), (64, 3), (68, 3)])
def test_rows_are_sent_to_their_end(columns: int, grid: int) -> None:
    """Also where the blocks reach so far that some are wholly outside."""
    check(kernels_of(stored_in_blocks(columns, whole=False, grid=grid)))
    with interpreted():
        np.testing.assert_array_equal(jax.jit(stored_in_blocks(columns, whole=False, grid=grid))(), 1)


def test_a_grid_too_large_is_seen() -> None:
    def body(out: Any) -> None:
        out[lax.axis_index("many"), lax.axis_index("one")] = jnp.float32(1)

    kernel = partial(plgpu.kernel, body, out_type=jax.ShapeDtypeStruct((65536, 1), jnp.float32))
    [one] = kernels_of(kernel(grid=(65536, 1), grid_names=("many", "one")))
    assert list(one.faults()) == ["body: 65536 blocks along y, where there are 1 to 65535"]
    [other] = kernels_of(kernel(grid=(1, 65536), grid_names=("one", "many")))
    assert not list(other.faults())
