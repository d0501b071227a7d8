"""Contexts against each other: whatever way tokens arrive, the hidden states are the same."""

import functools
import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdsi.kv_cache import AttentionContext, ContiguousContext, PackedContext, RecordingContext
from jdsi.models import Transformer, TransformerSpec
from jdsi.models.spec import AttentionSpec, EmbeddingSpec, HeadSpec, LayerSpec, MlpSpec, PreNorm, RmsNormSpec
from jdsi.pallas_kernels import AttentionForm, Rotary
from kernels import compile_for_h200

pytestmark = pytest.mark.usefixtures("quick_compilation")

LENGTHS = (5, 11, 1)


@pytest.fixture(scope="module")
def model() -> Transformer:
    attention = AttentionSpec(num_heads=4, num_kv_heads=2, head_dim=6, scale=0.5, rotary=Rotary(6))
    layer = LayerSpec((attention, MlpSpec(20, "silu", gated=True)), PreNorm(RmsNormSpec(1e-6)))
    spec = TransformerSpec(
        family="test",
        vocab_size=31,
        width=16,
        max_positions=64,
        embedding=EmbeddingSpec(),
        layers=(layer,) * 2,
        norm=RmsNormSpec(1e-6),
        head=HeadSpec(tied=True),
    )
    return Transformer(spec)


@pytest.fixture(scope="module")
def sequences() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 31, n) for n in LENGTHS]


@pytest.fixture(scope="module")
def alone(model: Transformer, sequences: list[np.ndarray]) -> list[np.ndarray]:
    out = []
    for tokens in sequences:
        context = PackedContext.from_lengths(jnp.array([len(tokens)]), len(tokens))
        out.append(np.asarray(compiled(model)(jnp.asarray(tokens), context)[0]))
    return out


@functools.cache
def compiled(model: Transformer) -> Callable[..., tuple[jax.Array, AttentionContext]]:
    """The forward pass as one program for each shape; operation by operation it would be a hundred."""
    return jax.jit(model.forward)


def close(a: jax.Array | np.ndarray, b: np.ndarray) -> None:
    np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5)


def test_packed_with_padding(model: Transformer, sequences: list[np.ndarray], alone: list[np.ndarray]) -> None:
    tokens = np.concatenate([*sequences, np.full(6, 30)])
    hidden, _ = compiled(model)(jnp.asarray(tokens), PackedContext.from_lengths(jnp.array(LENGTHS), len(tokens)))
    for got, expected in zip(np.split(np.asarray(hidden), np.cumsum(LENGTHS))[:3], alone, strict=True):
        close(got, expected)


def test_dense_ignores_what_is_in_the_padding(
    model: Transformer, sequences: list[np.ndarray], alone: list[np.ndarray]
) -> None:
    tokens = np.full((3, 13), 29)
    for row, sequence in zip(tokens, sequences, strict=True):
        row[: len(sequence)] = sequence
    hidden, _ = compiled(model)(jnp.asarray(tokens).reshape(-1), PackedContext.from_dense(3, 13, jnp.array(LENGTHS)))
    for got, expected, length in zip(np.asarray(hidden).reshape(3, 13, -1), alone, LENGTHS, strict=True):
        close(got[:length], expected)


@pytest.mark.parametrize("chunk", [1, 3, 4, 11])
def test_any_chunking_through_the_cache(
    model: Transformer, sequences: list[np.ndarray], alone: list[np.ndarray], chunk: int
) -> None:
    context = ContiguousContext.create(model.spec.kv_shapes, 3, 12)
    step = compiled(model)
    found: list[list[np.ndarray]] = [[], [], []]
    for start in range(0, max(LENGTHS), chunk):
        pieces = [sequence[start : start + chunk] for sequence in sequences]
        tokens = np.full((3, chunk), 28)
        for row, piece in zip(tokens, pieces, strict=True):
            row[: len(piece)] = piece
        counts = jnp.array([len(piece) for piece in pieces], jnp.int32)
        hidden, context = step(jnp.asarray(tokens).reshape(-1), context.begin(counts, chunk))
        for row, piece, rows in zip(np.asarray(hidden).reshape(3, chunk, -1), pieces, found, strict=True):
            rows.append(row[: len(piece)])
    assert context.lengths.tolist() == list(LENGTHS)
    for rows, expected in zip(found, alone, strict=True):
        close(np.concatenate(rows), expected)


def test_select_copies_rows(model: Transformer, sequences: list[np.ndarray], alone: list[np.ndarray]) -> None:
    longest = sequences[1]
    context = ContiguousContext.create(model.spec.kv_shapes, 2, 12)
    tokens = np.stack([longest[:10], longest[::-1][:10]])
    _, context = compiled(model)(jnp.asarray(tokens).reshape(-1), context.begin(jnp.array([10, 10]), 10))
    context = context.select(jnp.array([1, 0, 0])).begin(jnp.ones(3, jnp.int32), 1)
    hidden, _ = compiled(model)(jnp.full(3, longest[10]), context)
    close(hidden[1], alone[1][10])
    close(hidden[2], alone[1][10])
    assert not np.allclose(hidden[0], alone[1][10], atol=1e-3)


def test_recorded_weights_are_a_causal_softmax(model: Transformer, sequences: list[np.ndarray]) -> None:
    tokens = jnp.asarray(sequences[1])
    plain, _ = compiled(model)(tokens, PackedContext.from_dense(1, len(tokens)))
    hidden, context = compiled(model)(tokens, RecordingContext.from_dense(1, len(tokens)))
    close(hidden, np.asarray(plain))
    assert [w.shape for w in context.weights] == [(1, 4, 11, 11)] * 2
    np.testing.assert_allclose(np.sum(context.weights[0], axis=-1), 1, rtol=1e-5)
    assert np.all(np.triu(context.weights[1][0, 0], 1) == 0)


def test_encoders_do_not_run_on_a_kv_cache(model: Transformer) -> None:
    context = ContiguousContext.create([(1, 2, 2)], 1, 4).begin(jnp.array([1]), 1)
    with pytest.raises(ValueError, match="causal"):
        context.attend(
            0, jnp.ones((1, 1, 2)), jnp.ones((1, 1, 2)), jnp.ones((1, 1, 2)), AttentionForm(1.0, causal=False)
        )


@pytest.mark.aot
def test_a_prompt_attends_to_the_memory_in_place() -> None:
    """Memory with room for more than the prompt goes into the kernels as it is, without a copy."""
    tokens, capacity = 256, 1024
    context = jax.eval_shape(lambda: ContiguousContext.create([(4, 128, 128)], 2, capacity, jnp.bfloat16))
    context = context.begin(jax.ShapeDtypeStruct((2,), jnp.int32), tokens)
    assert context.empty
    heads = (jax.ShapeDtypeStruct((2 * tokens, n, 128), jnp.bfloat16) for n in (8, 4, 4))

    def prompt(context: ContiguousContext, *heads: jax.Array) -> tuple[jax.Array, ContiguousContext]:
        return context.attend(0, *heads, AttentionForm(0.1, rotary=Rotary(128)))

    text = compile_for_h200(prompt, context, *heads, donate=(0,)).text
    assert text.count('custom_call_target="mosaic_gpu') == 2  # the write and the attention
    assert not re.findall(r"= bf16\[2,4,\d+,128\]\S* (?:copy|fusion|slice)\(", text)
