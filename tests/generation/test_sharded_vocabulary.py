"""Sampling and beam search over a vocabulary divided among devices equal those over an undivided one."""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, PartitionSpec

from jdsi.generation import (
    FinishCode,
    SamplerFeatures,
    SamplingParams,
    beam,
    init_state,
    sample,
    truncation,
    vocabulary,
)
from sampling_cases import EVERYTHING

pytestmark = pytest.mark.usefixtures("quick_compilation")

EOS = (5, 60)


@pytest.fixture(autouse=True)
def _devices() -> None:
    if len(jax.devices()) < 4:
        pytest.skip("needs 4 devices; on a CPU, set JAX_NUM_CPU_DEVICES=8")


@functools.cache
def jitted(function: Callable, features: Any, ranks: int) -> Any:
    """`function(logits, state, features)`; over `ranks` devices with every leaf of the result once for each of them."""
    if ranks == 1:
        return jax.jit(functools.partial(function, features=features))
    mesh = jax.make_mesh((ranks,), ("tensor",), axis_types=(AxisType.Auto,), devices=jax.devices()[:ranks])

    def on_rank(logits, state):
        return jax.tree.map(lambda leaf: leaf[None], function(logits, state, features))

    return jax.jit(
        jax.shard_map(
            on_rank,
            mesh=mesh,
            in_specs=(PartitionSpec(None, "tensor"), PartitionSpec()),
            out_specs=PartitionSpec("tensor"),
            check_vma=False,
        )
    )


def padded(logits: np.ndarray, ranks: int, share: int | None) -> np.ndarray:
    size = logits.shape[1]
    columns = ranks * (share or -(-size // ranks))
    return np.pad(logits, ((0, 0), (0, columns - size)), constant_values=-np.inf)


def on_ranks(function: Callable, logits: np.ndarray, state: Any, features: Any, ranks: int, share: int | None) -> Any:
    """What rank 0 returns; fails where another returns anything else."""
    found = jax.device_get(jitted(function, features, ranks)(padded(logits, ranks, share), state))
    jax.tree.map(lambda leaf: np.testing.assert_array_equal(leaf, np.broadcast_to(leaf[:1], leaf.shape)), found)
    return jax.tree.map(lambda leaf: leaf[0], found)


def assert_same(found: Any, expected: Any) -> None:
    """Equal integers; floats within 1e-6."""
    for (path, a), b in zip(jax.tree.leaves_with_path(found), jax.tree.leaves(expected), strict=True):
        name = jax.tree_util.keystr(path)
        if name.endswith(("top_ids", "top_logprobs")):
            a = a[:, : b.shape[1]]  # the padding, which is -inf, comes last
        if jnp.issubdtype(b.dtype, jnp.floating):
            np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6, err_msg=name)
        else:
            np.testing.assert_array_equal(a, b, err_msg=name)


def run(
    params: Sequence[SamplingParams | None],
    prompts: Sequence[Sequence[int]],
    steps: Sequence[np.ndarray],
    ranks: int,
    share: int | None = None,
    features: SamplerFeatures | None = None,
) -> list[Any]:
    """The undivided sampler's result of every step, after comparing all and the state with the divided one's."""
    features = SamplerFeatures.of(params) | (features or SamplerFeatures())
    size = steps[0].shape[1]
    eos = [token for token in EOS if token < size]
    whole = init_state(params, prompts, vocab_size=size, eos_token_ids=eos, pad_token_id=1, features=features)
    divided, results = whole, []
    for logits in steps:
        expected, whole = jitted(sample, features, 1)(logits, whole)
        found, divided = on_ranks(sample, logits, divided, features, ranks, share)
        assert_same((found, divided), (expected, whole))
        results.append(expected)
    return results


def noise(seed: int, steps: int, rows: int, size: int, scale: float = 2.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, scale, (steps, rows, size)).astype(np.float32)


def only_neighbours(tokens, lengths):
    last = jnp.take_along_axis(tokens, jnp.maximum(lengths, 1)[:, None] - 1, axis=1)
    return jnp.abs(jnp.arange(97)[None] - last) <= 20


def towards_the_last(tokens, lengths, logits):
    assert logits.shape[1] == 97  # the whole vocabulary, without padding
    last = jnp.take_along_axis(tokens, jnp.maximum(lengths, 1)[:, None] - 1, axis=1)
    return logits - 0.05 * jnp.abs(jnp.arange(97)[None] - last)


CYCLE = np.full((3, 97), -1)
CYCLE[0, :30], CYCLE[1, 30:60], CYCLE[2, 60:] = 1, 2, 0

CASES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "temperature": {"temperature": 1.3},
    "top_k": {"temperature": 1.0, "top_k": 7},
    "top_p": {"temperature": 1.0, "top_p": 0.8},
    "min_p": {"temperature": 1.0, "min_p": 0.1},
    "truncation": {"temperature": 1.5, "top_k": 30, "top_p": 0.9, "min_p": 0.02},
    "repetition": {"repetition_penalty": 3.0},
    "counts": {"presence_penalty": 1.5, "frequency_penalty": 0.7},
    "ngrams": {"no_repeat_ngram": 1},
    "bigrams": {"no_repeat_ngram": 2, "temperature": 0.5},
    "min_new_tokens": {"min_new_tokens": 4, "stop_token_ids": (24, 25, 96)},
    "typical_p": {"temperature": 1.0, "typical_p": 0.4},
    "epsilon and eta": {"temperature": 1.4, "epsilon_cutoff": 0.02, "eta_cutoff": 0.1},
    "min_tokens_to_keep": {"temperature": 2.0, "top_p": 0.1, "typical_p": 0.3, "min_p": 0.9, "min_tokens_to_keep": 9},
    "logit_bias": {"logit_bias": {24: -3.0, (24, 25): 9.0, (96,): 2.0, (96, 96): -20.0, 0: -math.inf}},
    "bad_words": {"bad_words_ids": [[24, 25], [50], [96, 96], [0, 0, 0]]},
    "suppress": {"suppress_tokens": [25, 50, 96], "begin_suppress_tokens": [24, 75]},
    "forced": {"forced_bos_token_id": 75, "forced_eos_token_id": [96, 25], "max_new_tokens": 5},
    "decay": {"exponential_decay_length_penalty": (1, 1.6), "stop_token_ids": (0, 25, 96)},
    "allowed_tokens": {"allowed_tokens": only_neighbours},
    "automaton": {"allowed_tokens": CYCLE, "temperature": 1.0},
    "logits_processor": {"logits_processor": towards_the_last, "temperature": 0.7, "top_k": 12},
    "logprobs": {"logprobs": 0},
    "top_logprobs": {"temperature": 1.0, "logprobs": 13},
}


@pytest.mark.parametrize("name", CASES)
def test_every_option_equals_the_undivided_sampler(name):
    params = [SamplingParams(seed=row, **CASES[name]) for row in range(6)]
    prompts = [[24, 25, 24], [], [96], [0, 0, 0], [50, 74, 75], [1, 2, 3]]
    # The same logits in every step and a few clear favourites, so that penalties and bans decide.
    logits = noise(3, 1, 6, 97)[0]
    logits[:, [0, 24, 25, 49, 50, 74, 75, 96]] += 4
    results = run(params, prompts, [logits] * 6, 4)
    if name in ("repetition", "counts", "ngrams"):
        assert (results[0].tokens != results[-1].tokens).any()


REQUESTS = [
    SamplingParams(),
    SamplingParams(temperature=1.0, seed=7, logprobs=2),
    SamplingParams(temperature=0.8, top_k=5, top_p=0.9, min_p=0.02, seed=7, logprobs=0),
    SamplingParams(temperature=1.3, repetition_penalty=1.3, no_repeat_ngram=2, seed=2**40 + 1),
    SamplingParams(presence_penalty=0.5, frequency_penalty=0.3, min_new_tokens=3, stop_token_ids=(4, 8)),
    SamplingParams(temperature=0.9, top_p=1e-50, max_new_tokens=3, seed=1),
    None,
]
PROMPTS = [[1, 2], [3], [4, 5, 6, 7, 8, 5], [1, 1, 2, 1, 1], [7, 8], [], []]


@pytest.mark.parametrize(
    ("size", "ranks", "share"),
    [(89, 2, None), (89, 4, None), (96, 4, None), (9, 4, None), (9, 4, 16), (10, 2, 16)],
)
def test_mixed_batch(size, ranks, share):
    run(REQUESTS, PROMPTS, noise(size, 6, len(REQUESTS), size, 1.0), ranks, share, EVERYTHING)


@pytest.mark.parametrize("ranks", [2, 4])
def test_ties_across_shares(ranks):
    """Of equals the lowest id is first, and all that are tied at a threshold stay."""
    size, share = 16, 16 // ranks
    logits = np.full((size, size), -2.0, np.float32)
    for row in range(size):
        logits[row, row:] = 1.0
        logits[row, share:] += row % 3 == 0
    greedy = run([SamplingParams(logprobs=9)] * size, [[]] * size, [logits], ranks)[0]
    assert greedy.tokens.tolist() == [max(row, share) if row % 3 == 0 else row for row in range(size)]
    params = [SamplingParams(temperature=1.0, top_k=1 + row % 5, seed=row) for row in range(size)]
    tokens = [r.tokens for r in run(params, [[]] * size, [logits] * 4, ranks)]
    assert (np.max(tokens, axis=0) - np.min(tokens, axis=0)).max() > share


def count_kept(logits, k, features):
    return vocabulary.total(jnp.isfinite(truncation.keep_top_k(logits, k)).astype(jnp.float32))


@pytest.mark.parametrize("start", [1.2e-38, 1.0, 255.99998, 3.4e38])
def test_thresholds_are_exact_to_the_last_bit(start):
    """Neighbouring numbers of either sign, of which top-k keeps each number there is."""
    near = np.float32(start).view(np.int32) + np.arange(20, dtype=np.int32)
    row = np.random.default_rng(0).permutation(np.concatenate([near.view(np.float32), -near.view(np.float32)]))
    assert np.isfinite(row).all()
    k = np.arange(1, 41, dtype=np.int32)
    assert on_ranks(count_kept, np.tile(row, (40, 1)), k, None, 4, None).tolist() == k.tolist()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_are_reported_by_all_ranks(temperature):
    size = 10
    logits = noise(0, 1, 8, size)[0]
    logits[0, 0] = np.nan
    logits[1, 9] = np.nan
    logits[2, 4] = -np.float32(np.nan)
    logits[3] = np.nan
    logits[4, 7] = np.inf
    logits[5] = -np.inf
    logits[6, 3:] = -np.inf
    assert np.signbit(logits[2, 4])
    params = [SamplingParams(temperature=temperature, seed=row, logprobs=2) for row in range(8)]
    for features in (SamplerFeatures(), EVERYTHING if temperature else SamplerFeatures(counts=True)):
        first, second = run(params, [[]] * 8, [logits, np.zeros_like(logits)], 4, features=features)
        assert first.finish.tolist() == [FinishCode.ERROR] * 6 + [FinishCode.RUNNING] * 2
        assert first.tokens[:6].tolist() == [1] * 6
        assert second.valid.tolist() == [False] * 6 + [True] * 2


tokens = st.integers(0, 10)
levels = st.sampled_from([-3.0, -1.0, -0.0, 0.0, 0.5, 0.75, 2.0, -math.inf])


@st.composite
def requests(draw: st.DrawFn) -> SamplingParams:
    options: dict[str, Any] = {
        "repetition_penalty": draw(st.sampled_from([1.0, 0.5, 2.0])),
        "presence_penalty": draw(st.sampled_from([0.0, 1.0, -0.5])),
        "frequency_penalty": draw(st.sampled_from([0.0, 0.25])),
        "no_repeat_ngram": draw(st.integers(0, 3)),
        "min_new_tokens": draw(st.integers(0, 2)),
        "stop_token_ids": draw(st.lists(st.integers(0, 10), max_size=3)),
        # Always as many, for their number is compiled in.
        "logit_bias": {draw(tokens): draw(levels), (draw(tokens), draw(tokens)): draw(levels)},
        "bad_words_ids": [[draw(tokens)], [draw(tokens), draw(tokens)]],
        "suppress_tokens": [draw(tokens), draw(tokens)],
        "logprobs": draw(st.none() | st.integers(0, 4)),
    }
    if draw(st.booleans()):
        options |= {
            "temperature": draw(st.sampled_from([1e-3, 0.7, 1.0, 3.0])),
            "top_k": draw(st.integers(0, 12)),
            "top_p": draw(st.sampled_from([1e-50, 0.1, 0.3, 0.6, 0.95, 1.0])),
            "min_p": draw(st.sampled_from([0.0, 0.05, 0.4, 1.0])),
            "typical_p": draw(st.sampled_from([0.23, 0.71, 1.0])),
            "epsilon_cutoff": draw(st.sampled_from([0.0, 0.13])),
            "eta_cutoff": draw(st.sampled_from([0.0, 0.23])),
            "min_tokens_to_keep": draw(st.integers(1, 4)),
            "seed": draw(st.integers(0, 2**64 - 1)),
        }
    return SamplingParams(**options)


@settings(max_examples=60, deadline=None)
@given(
    params=st.lists(requests(), min_size=3, max_size=3),
    prompts=st.lists(st.lists(st.integers(0, 10), max_size=6), min_size=3, max_size=3),
    logits=st.lists(levels, min_size=99, max_size=99),
)
def test_any_request_equals_the_undivided_sampler(params, prompts, logits):
    run(params, prompts, np.array(logits, np.float32).reshape(3, 3, 11), 4, features=EVERYTHING)


def test_noise_is_a_function_of_the_token():
    """A rank's part of the noise is the same wherever its share ends."""
    params = [SamplingParams(temperature=1.0, seed=seed) for seed in range(40)]
    flat = np.zeros((40, 23), np.float32)
    for ranks, share in [(2, None), (2, 16), (4, None), (4, 16)]:
        run(params, [[]] * 40, [flat] * 2, ranks, share)


@pytest.mark.parametrize(
    ("options", "reductions"), [({}, 2), ({"temperature": 1.0, "top_k": 5}, 4), ({"temperature": 1.0, "top_p": 0.9}, 6)]
)
def test_what_is_exchanged_is_small(options, reductions):
    """Nothing is gathered, and no exchange grows with the vocabulary."""
    rows, size = 3, 4096
    params = [SamplingParams(seed=1, **options)] * rows
    features = SamplerFeatures.of(params)
    state = init_state(params, [[]] * rows, vocab_size=size)
    program = jitted(sample, features, 4).lower(jax.ShapeDtypeStruct((rows, size), jnp.float32), state).compile()
    operations = r"all-reduce|all-gather|all-to-all|reduce-scatter|collective-\w+"
    found = re.findall(rf"= (\S+) ({operations})(?:-start)?\(", program.as_text())
    assert [operation for _, operation in found] == ["all-reduce"] * reductions
    for shape, _ in found:
        dimensions = re.fullmatch(r"\w+\[([\d,]+)\]\S*", shape)
        assert dimensions is not None, shape
        assert math.prod(map(int, dimensions[1].split(","))) <= 15 * rows


def test_vocabulary_is_the_plain_one_where_the_axis_is_absent():
    logits = jnp.asarray(noise(1, 1, 2, 7)[0])
    assert vocabulary.first_token(logits) == 0
    assert vocabulary.own_columns(logits, logits) is logits
    np.testing.assert_array_equal(vocabulary.largest(logits), jnp.max(logits, axis=1))
    np.testing.assert_array_equal(vocabulary.logsumexp(logits), jax.nn.logsumexp(logits, axis=1))


BEAM_CASES = {
    "plain": ({}, 23, None),
    "padded": ({"length_penalty": 0.5, "early_stopping": True}, 22, 16),
    "processors": ({"no_repeat_ngram": 2, "repetition_penalty": 1.4, "min_new_tokens": 3}, 21, None),
    "constraints": ({"allowed_tokens": CYCLE[:, ::4], "presence_penalty": 1.0, "renormalize_logits": True}, 25, None),
    "few tokens": ({"stop_token_ids": (0, 1, 2)}, 3, 16),
    # There are fewer tokens than beams, so that banned ones are taken too; padding must not take their place.
    "all banned": ({"no_repeat_ngram": 1}, 2, None),
}


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("name", BEAM_CASES)
def test_beam_search(name, ties):
    options, size, share = BEAM_CASES[name]
    beams = 3
    params = [SamplingParams(max_new_tokens=n, num_beams=beams, **options) for n in (9, 6)]
    features = SamplerFeatures.of(params)
    whole = beam.init([*params, None], [[1, 0, 1], [0], []], vocab_size=size, eos_token_ids=[size - 1])
    divided = whole
    for logits in noise(11, 9, 3 * beams, size, 1.5):
        logits = np.round(logits) if ties else logits
        *expected, whole = jitted(beam.step, features, 1)(logits, whole)
        *found, divided = on_ranks(beam.step, logits, divided, features, 4, share)
        assert_same((found, divided), (expected, whole))
    done = dataclasses.replace(whole, done=jnp.ones_like(whole.done))
    if name != "all banned":
        assert [len(row) for row in beam.finish(done)] == [beams, beams, 0]
