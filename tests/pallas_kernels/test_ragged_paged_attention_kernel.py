"""The Hopper kernel of ragged paged attention: in the interpreter, or under `make test-gpu` on the GPU."""

import contextlib
import dataclasses
import re
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from accumulators import accumulators
from jdsi.errors import UnsupportedError
from jdsi.pallas_kernels.attention import Alibi, AttentionForm, RoundedAlibi
from jdsi.pallas_kernels.device import H200, current_device, target
from jdsi.pallas_kernels.ragged_paged_attention import RAGGED_PAGED_ATTENTION, pallas, ragged_paged_attention
from jdsi.pallas_kernels.ragged_paged_attention.specs import argument_specs
from kernels import ON_GPU, RELATIVE, compile_for_h200, interpreted_or_gpu, relative_error, with_slow
from ragged_cases import Batch, exact, make_batch

FORM = AttentionForm(scale=0.125)
MIX = ((1, 65), (37, 37), (0, 5), (1, 1), (0, 0), (20, 50), (1, 16))
SPLIT = {"chunk": 64, "splits": 4, "stages": 2}  # so that short sequences are split, and stages used again


@contextlib.contextmanager
def kernels_run(cores: int = 2) -> Iterator[None]:
    with contextlib.nullcontext() if ON_GPU else accumulators(), interpreted_or_gpu(cores):
        yield


def run(batch: Batch, form: AttentionForm, config: dict[str, int] | None = None) -> tuple[np.ndarray, np.ndarray]:
    with kernels_run():
        function = partial(pallas.run, form=form, return_lse=True, device=current_device(), config=config)
        out, lse = jax.jit(function)(*map(jnp.asarray, batch.arrays))
        return np.asarray(out, np.float64), np.asarray(lse, np.float64)


def check(batch: Batch, form: AttentionForm, config: dict[str, int] | None = None) -> None:
    out, lse = run(batch, form, config)
    expected, expected_lse = exact(batch, form)
    assert relative_error(out, expected) < RELATIVE[str(batch.q.dtype)]
    np.testing.assert_allclose(lse, expected_lse, atol=1e-4)
    end = batch.q_offsets[-1]
    assert not out[end:].any()


def slopes(heads: int) -> Alibi:
    return Alibi(tuple(2.0**-i for i in range(1, heads + 1)))


CASES: dict[str, tuple[dict[str, Any], AttentionForm, dict[str, int] | None]] = {
    "mix": ({"lengths": MIX, "padding": 5}, FORM, None),
    "mix, float16, holes": ({"lengths": MIX, "holes": 0.2, "dtype": jnp.float16, "seed": 1}, FORM, None),
    "one token": ({"lengths": ((1, 1),), "heads": (2, 2)}, FORM, None),
    "group of 8, window": (
        {"lengths": ((1, 200), (9, 70), (0, 0), (1, 3)), "heads": (8, 1), "page": 64, "seed": 2},
        dataclasses.replace(FORM, window=70),
        {"stages": 2},
    ),
    "no group, ALiBi": (
        {"lengths": ((66, 70), (1, 90)), "heads": (2, 2), "dim": 96, "seed": 3},
        dataclasses.replace(FORM, alibi=slopes(2)),
        None,
    ),
    "both ways, softcap, dims 80 and 48": (
        {"lengths": ((3, 80), (1, 140)), "dim": (80, 48), "page": 32, "holes": 0.2, "seed": 4, "padding": 1},
        dataclasses.replace(FORM, causal=False, window=60, softcap=3.0),
        {"keys": 128, "stages": 2},
    ),
    "splits": ({"lengths": ((1, 300), (3, 290), (1, 20), (0, 9), (1, 64))}, FORM, SPLIT),
    "splits, float16, ALiBi, window, softcap, holes": (
        {
            "lengths": ((1, 260), (2, 150)),
            "heads": (3, 1),
            "dim": 128,
            "holes": 0.2,
            "dtype": jnp.float16,
            "padding": 2,
        },
        AttentionForm(scale=0.1, window=200, softcap=4.0, alibi=slopes(3)),
        SPLIT,
    ),
    "head dim 256, pages of 256": (
        {"lengths": ((1, 300), (5, 5)), "heads": (2, 1), "dim": 256, "page": 256},
        dataclasses.replace(FORM, softcap=9.0),
        None,
    ),
    "heads of a group in two blocks": (
        {"lengths": ((1, 40), (2, 30)), "heads": (5, 1), "seed": 5},
        dataclasses.replace(FORM, alibi=slopes(5)),
        {"heads": 3, "warpgroups": 1},
    ),
}


# What these put together the others have.
@pytest.mark.parametrize("name", with_slow(CASES, ["mix, float16, holes", "no group, ALiBi"]))
def test_against_float64(name: str) -> None:
    arguments, form, config = CASES[name]
    check(make_batch(**arguments), form, config)


# DeepSpeed's tests of FastGen's blocked attention, at a tenth of their lengths, heads in the same proportions.
DEEPSPEED = {
    "prompts": (((2, 2), (51, 51), (203, 203)), (2, 2)),
    "a batch of two, 40 heads over 8": (((51, 51), (71, 71)), (5, 1)),
    "continuation, 32 heads over 8": (((1, 29), (33, 63), (51, 71)), (4, 1)),
}


@pytest.mark.parametrize("name", with_slow(DEEPSPEED, ["prompts", "a batch of two, 40 heads over 8"]))
def test_deepspeed_cases(name: str) -> None:
    lengths, heads = DEEPSPEED[name]
    check(make_batch(lengths, heads=heads, dtype=jnp.float16, page=16), FORM)


@pytest.mark.gpu
@pytest.mark.parametrize("page", [16, 64, 128, 256])
@pytest.mark.parametrize(
    ("lengths", "heads"),
    [
        (((2, 2),), (32, 32)),
        (((2037, 2037),), (32, 32)),
        (((514, 514), (713, 713)), (32, 8)),
        (((332, 628),), (64, 16)),
        (((1, 293), (332, 628), (514, 714)), (40, 8)),
        (((1, 30000), (700, 9000), *((1, 100 + 61 * i) for i in range(64))), (32, 8)),
    ],
)
def test_full_size(lengths: tuple[tuple[int, int], ...], heads: tuple[int, int], page: int) -> None:
    batch = make_batch(lengths, heads=heads, dim=128, page=page, padding=7)
    call = partial(RAGGED_PAGED_ATTENTION, form=FORM, return_lse=True)
    out, lse = jax.jit(partial(call, implementation="pallas"))(*map(jnp.asarray, batch.arrays))
    expected, expected_lse = jax.jit(partial(call, implementation="xla"))(*map(jnp.asarray, batch.arrays))
    assert relative_error(out, expected) < RELATIVE["bfloat16"]
    np.testing.assert_allclose(lse, expected_lse, atol=1e-3)


def rearranged(batch: Batch, order: Sequence[int]) -> Batch:
    """The sequences `order` alone, in the same shapes: the others have no tokens."""
    rest = [b for b in range(len(batch.lengths)) if b not in order]
    lengths = tuple(batch.lengths[b] for b in order) + tuple((0, batch.lengths[b][1]) for b in rest)
    rows = np.concatenate([np.arange(batch.q_offsets[b], batch.q_offsets[b + 1]) for b in order])
    tables = batch.block_tables[[*order, *rest]]
    offsets = np.cumsum([0, *(tokens for tokens, _ in lengths)]).astype(np.int32)
    q = batch.q[np.resize(rows, len(batch.q))]
    return dataclasses.replace(
        batch,
        q=q,
        block_tables=tables,
        q_offsets=offsets,
        k_lengths=np.array([k for _, k in lengths], np.int32),
        lengths=lengths,
    )


def test_a_sequence_does_not_depend_on_the_others() -> None:
    batch = make_batch(((1, 150), (20, 70), (2, 90)), heads=(2, 1), seed=6)
    with kernels_run(3):
        function = jax.jit(partial(pallas.run, form=FORM, return_lse=True, device=current_device(), config=SPLIT))
        whole = [np.asarray(x) for x in function(*map(jnp.asarray, batch.arrays))]
        for order in ([0], [2, 1]):
            other = rearranged(batch, order)
            parts = [np.asarray(x) for x in function(*map(jnp.asarray, other.arrays))]
            for i, b in enumerate(order):
                here, there = (slice(x.q_offsets[j], x.q_offsets[j + 1]) for x, j in ((other, i), (batch, b)))
                for part, all_ in zip(parts, whole, strict=True):
                    np.testing.assert_array_equal(part[here], all_[there])


def test_chunks_of_a_prompt_add_up_to_the_prompt() -> None:
    prompt = make_batch(((90, 90),), heads=(2, 1), seed=7)
    ends = (13, 40, 41, 90)
    both = dataclasses.replace(  # the prompt in one piece, then in four
        prompt,
        q=jnp.concatenate([prompt.q, prompt.q]),
        block_tables=np.repeat(prompt.block_tables, 1 + len(ends), axis=0),
        q_offsets=np.array([0, 90, *(90 + end for end in ends)], np.int32),
        k_lengths=np.array([90, *ends], np.int32),
    )
    for result in run(both, FORM):
        assert relative_error(result[90:], result[:90]) < 1e-3


def test_batching_and_sharding() -> None:
    batch = make_batch(((1, 20), (3, 8)), heads=(2, 2), seed=8)
    arrays = tuple(map(jnp.asarray, batch.arrays))
    expected, _ = exact(batch, FORM)
    call = partial(RAGGED_PAGED_ATTENTION, form=FORM, implementation="pallas")
    mesh = Mesh(np.array(jax.devices()[:1]), ("tensor",))
    heads, pages, whole = PartitionSpec(None, "tensor"), PartitionSpec(None, "tensor"), PartitionSpec()
    specs = (heads, pages, pages, whole, whole, whole)
    with kernels_run():
        sharded = jax.jit(jax.shard_map(call, mesh=mesh, in_specs=specs, out_specs=heads))(*arrays)
        mapped = jax.jit(jax.vmap(call, (0, None, None, None, None, None)))(arrays[0][None].repeat(2, 0), *arrays[1:])
    for out in (sharded, *mapped):
        assert relative_error(out, expected) < RELATIVE["bfloat16"]


# The lengths are not known when compiling, so the mixes of a model are much the same program.
AOT = {spec.name: spec for spec in argument_specs() if " prefill " not in spec.name and " chunk" not in spec.name}


@pytest.mark.aot
@pytest.mark.parametrize(
    "name", with_slow(AOT, ["llama-70b 256 decodes bfloat16", "llama-8b 4 decodes at 131k bfloat16"])
)
def test_compiles_for_the_h200_without_spills(name: str) -> None:
    spec = AOT[name]
    compiled = compile_for_h200(
        partial(RAGGED_PAGED_ATTENTION, implementation="pallas", **spec.static), *spec.abstract()
    )
    assert compiled.registers > 0
    assert compiled.spills == 0


@pytest.mark.aot
def test_a_layer_takes_two_launches_and_the_schedule_is_made_once() -> None:
    spec = next(spec for spec in argument_specs() if spec.name.startswith("llama-8b 256 decodes"))
    q, k, v, *lengths = spec.abstract()
    attend = partial(RAGGED_PAGED_ATTENTION, implementation="pallas", **spec.static)

    def launches(layers: int) -> int:
        def model(q: jax.Array, memory: list[Any], *lengths: jax.Array) -> jax.Array:
            for k, v in memory:
                q = attend(q, k, v, *lengths)
            return q

        text = compile_for_h200(model, q, [(k, v)] * layers, *lengths).text
        entry = text[text.index("\nENTRY ") :]
        return len(re.findall(r" (?:custom-call|fusion|copy|transpose|reduce|slice|pad|convert)\(", entry))

    assert launches(3) - launches(2) == 2


VARIANTS = {
    "dim 64, page 16": (64, 16, FORM),
    "dim 80": (80, 32, FORM),
    "both ways": (64, 128, dataclasses.replace(FORM, causal=False)),
    "both ways, ALiBi": (64, 8, dataclasses.replace(FORM, causal=False, alibi=slopes(8))),
    "dim 96, ALiBi": (96, 64, dataclasses.replace(FORM, alibi=slopes(8))),
    "dim 128, ALiBi": (128, 256, dataclasses.replace(FORM, alibi=slopes(8))),
    "dim 256, softcap and window": (256, 64, dataclasses.replace(FORM, softcap=50.0, window=4096)),
}


@pytest.mark.aot
@pytest.mark.parametrize(("dim", "page", "form"), VARIANTS.values(), ids=VARIANTS)
def test_variants_compile_without_spills(dim: int, page: int, form: AttentionForm) -> None:
    def shape(*sizes: int, dtype: Any = jnp.float16) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(sizes, dtype)

    tables, offsets, lengths = (shape(*sizes, dtype=jnp.int32) for sizes in ((4, 4096 // page), (5,), (4,)))
    arrays = shape(64, 8, dim), shape(99, 2, page, dim), shape(99, 2, page, dim), tables, offsets, lengths
    compiled = compile_for_h200(partial(RAGGED_PAGED_ATTENTION, implementation="pallas", form=form), *arrays)
    assert compiled.registers > 0
    assert compiled.spills == 0


def test_what_the_kernel_cannot_take_is_named() -> None:
    batch = make_batch(((2, 3),), heads=(4, 2))

    def call(form: AttentionForm = FORM, *, batch: Batch = batch, device: Any = H200) -> None:
        with target(device):
            ragged_paged_attention(
                *batch.arrays[:4],
                form,
                q_offsets=batch.q_offsets,
                k_lengths=batch.k_lengths,
                implementation="pallas",
            )

    mixed = dataclasses.replace(batch, q=batch.q.astype(jnp.float16))
    for arguments, message in [
        ({"device": dataclasses.replace(H200, capability=(8, 0))}, "for Hopper GPUs"),
        ({"batch": make_batch(((2, 3),), dtype=jnp.float32)}, "all be bfloat16 or all float16, not float32"),
        ({"batch": mixed}, "not bfloat16, float16"),
        ({"batch": make_batch(((0, 3),))}, "nothing to compute"),
        ({"batch": make_batch(((2, 3),), dim=24)}, "multiples of 16 up to 256, not 24"),
        ({"batch": make_batch(((2, 3),), dim=272)}, "multiples of 16 up to 256, not 272"),
        ({"batch": make_batch(((2, 3),), page=24)}, "multiple of 64 keys, not 24"),
        ({"device": dataclasses.replace(H200, shared_memory=2**15)}, "bytes of shared memory, there are 32768"),
        ({"form": dataclasses.replace(FORM, alibi=slopes(3))}, "3 ALiBi slopes for 4 query heads"),
        ({"form": dataclasses.replace(FORM, alibi=RoundedAlibi((1.0,) * 4))}, "rounded ALiBi"),
    ]:
        with pytest.raises(UnsupportedError, match=message):
            call(**arguments)
