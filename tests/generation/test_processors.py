"""Every processor, and all together, against transformers' on the same logits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from scipy.special import softmax
from transformers import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from jdsi.generation import SamplerFeatures, SamplingParams, bans, init_state, process, sample, truncation

VOCAB = 61
EOS = (3, 40)


@functools.partial(jax.jit, static_argnums=2)
def jitted_process(logits, state, features):
    return process(logits, state, features)


def oracle(params: SamplingParams, prompt: list[int], logits: np.ndarray) -> np.ndarray:
    chain, params = LogitsProcessorList(), params.filled()
    if params.repetition_penalty != 1:
        chain.append(RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
    if params.no_repeat_ngram:
        chain.append(NoRepeatNGramLogitsProcessor(params.no_repeat_ngram))
    if params.min_new_tokens:
        chain.append(MinNewTokensLengthLogitsProcessor(len(prompt), params.min_new_tokens, list(EOS)))
    if params.temperature not in (0.0, 1.0):
        chain.append(TemperatureLogitsWarper(params.temperature))
    if params.top_k:
        chain.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        chain.append(TopPLogitsWarper(params.top_p))
    if params.min_p:
        chain.append(MinPLogitsWarper(params.min_p))
    return chain(torch.LongTensor([prompt]), torch.FloatTensor(logits[None]))[0].numpy()


def assert_same_distribution(ours: np.ndarray, theirs: np.ndarray) -> None:
    np.testing.assert_array_equal(np.isfinite(ours), np.isfinite(theirs))
    np.testing.assert_allclose(softmax(ours), softmax(theirs), rtol=1e-5, atol=1e-12)


OPTIONS = [
    {"repetition_penalty": 1.7},
    {"repetition_penalty": 0.6},
    {"no_repeat_ngram": 1},
    {"no_repeat_ngram": 2},
    {"no_repeat_ngram": 4},
    {"min_new_tokens": 2},
    {"temperature": 0.3},
    {"temperature": 2.5},
    {"temperature": 1.0, "top_k": 1},
    {"temperature": 1.0, "top_k": 7},
    {"temperature": 0.7, "top_k": 500},
    {"temperature": 1.0, "top_p": 0.02},
    {"temperature": 1.0, "top_p": 0.8},
    {"temperature": 1.4, "top_p": 0.999},
    {"temperature": 1.0, "min_p": 0.1},
    {"temperature": 1.0, "min_p": 1.0},
    {"temperature": 0.9, "top_k": 20, "top_p": 0.7},
    {"temperature": 1.5, "top_k": 30, "top_p": 0.9, "min_p": 0.2},
    {
        "temperature": 1.5,
        "top_k": 40,
        "top_p": 0.95,
        "min_p": 0.02,
        "repetition_penalty": 1.3,
        "no_repeat_ngram": 2,
        "min_new_tokens": 1,
    },
]


@pytest.mark.parity
@pytest.mark.parametrize("seed", range(2))
def test_every_option_equals_transformers_in_one_batch(seed):
    rng = np.random.default_rng(seed)
    params = [SamplingParams(**o) for o in OPTIONS]
    # Few different tokens, so that n-grams and repetitions occur.
    prompts = [rng.integers(0, 4, rng.integers(3, 20)).tolist() for _ in params]
    logits = rng.normal(0, 3, (len(params), VOCAB)).astype(np.float32)
    state = init_state(params, prompts, vocab_size=VOCAB, eos_token_ids=EOS)
    together = np.asarray(jitted_process(logits, state, SamplerFeatures.of(params)))
    for row, (p, prompt) in enumerate(zip(params, prompts, strict=True)):
        assert_same_distribution(together[row], oracle(p, prompt, logits[row]))


@pytest.mark.parity
@pytest.mark.parametrize("size", [1000, 32003])
def test_truncation_of_a_large_vocabulary_equals_transformers(size):
    logits = np.random.default_rng(size).normal(0, 2, (2, size)).astype(np.float32)
    got = truncation.keep_top_p(truncation.keep_top_k(jnp.asarray(logits), jnp.array([0, 50])), jnp.array([0.9, 0.6]))
    for row, (k, p) in enumerate([(0, 0.9), (50, 0.6)]):
        params = SamplingParams(temperature=1.0, top_k=k, top_p=p)
        assert_same_distribution(np.asarray(got[row]), oracle(params, [0], logits[row]))


def test_neutral_rows_come_out_as_they_went_in():
    logits = np.random.default_rng(0).normal(0, 3, (1, VOCAB)).astype(np.float32)
    logits[0, :3] = -np.inf, 0.0, -0.0
    everything = SamplerFeatures.of([SamplingParams(**OPTIONS[-1], presence_penalty=1.0)])
    state = init_state([SamplingParams()], [[1, 2, 1, 2]], vocab_size=VOCAB, eos_token_ids=EOS, features=everything)
    np.testing.assert_array_equal(jitted_process(logits, state, everything), logits)


def test_an_ngram_longer_than_the_history_costs_nothing(monkeypatch):
    rounds, loop = [], jax.lax.fori_loop

    def counted(low, high, *rest):
        rounds.append(int(high) - low)
        assert rounds[-1] < 4, "longer than the history"  # and not after years
        return loop(low, high, *rest)

    monkeypatch.setattr(jax.lax, "fori_loop", counted)
    history = jnp.array([[1, 2, 1, 0], [1, 2, 1, 0], [1, 1, 1, 1]])
    out = bans.ban_ngrams(jnp.zeros((3, 4)), history, jnp.array([3, 3, 4]), jnp.array([2**31 - 1, 2, 4]))
    assert rounds == [3]
    np.testing.assert_array_equal(np.isfinite(out), [[True] * 4, [True, True, False, True], [True, False, True, True]])
    bans.ban_ngrams(jnp.zeros((1, 4)), history[:1], jnp.array([3]), jnp.array([2**31 - 1]))
    assert rounds[1] <= 0


def test_ties_at_the_threshold_are_all_kept():
    logits = jnp.array([[2.0, 1.0, 1.0, 0.0, -0.0, -1.0]])
    kept = [np.isfinite(truncation.keep_top_k(logits, jnp.array([k])))[0].sum() for k in range(1, 7)]
    assert kept == [1, 3, 3, 5, 5, 6]
    assert np.isfinite(truncation.keep_top_p(logits, jnp.array([0.5])))[0].sum() == 3


def test_at_least_one_token_survives_extreme_settings():
    logits = jnp.array([[1e30, -1e30, 5.0, 1e30], [0.0, -300.0, 1e-38, 0.0]])
    scaled = truncation.scale_temperature(logits, jnp.array([1e-30, 1e-30], jnp.float32))
    assert not np.isnan(scaled).any()
    assert (np.max(scaled, axis=1) == 0).all()
    tiny = jnp.full(2, 1e-30, jnp.float32)
    assert np.isfinite(truncation.keep_top_p(scaled, tiny)).any(axis=1).all()
    assert np.isfinite(truncation.keep_min_p(scaled, jnp.ones(2))).any(axis=1).all()


@pytest.mark.parametrize("seed", range(2))
def test_penalty_counts_equal_brute_force(seed):
    """Ten steps of four rows with different prompts; counts, seen tokens and penalties recomputed from the tokens."""
    rng = np.random.default_rng(seed)
    size = 11
    params = [
        SamplingParams(presence_penalty=0.7, frequency_penalty=0.4, repetition_penalty=1.2),
        SamplingParams(frequency_penalty=-0.3, max_new_tokens=4),
        SamplingParams(),
        SamplingParams(presence_penalty=-1.0, temperature=1.0, seed=3),
    ]
    prompts = [[1, 2, 3], [], [4], [9, 9, 9, 9, 9]]
    features = SamplerFeatures.of(params)
    state = init_state(params, prompts, vocab_size=size, features=features)
    outputs: list[list[int]] = [[], [], [], []]
    step = jax.jit(sample, static_argnums=2, donate_argnums=1)
    params = [p.filled() for p in params]
    for _ in range(10):
        logits = rng.normal(0, 0.5, (4, size)).astype(np.float32)
        scores = np.asarray(jitted_process(logits, state, features))
        for row, p in enumerate(params):
            expected = logits[row].copy()
            for t in set(prompts[row]) | set(outputs[row]):
                expected[t] *= p.repetition_penalty if expected[t] < 0 else 1 / p.repetition_penalty
            for t in set(outputs[row]):
                expected[t] -= p.presence_penalty + p.frequency_penalty * outputs[row].count(t)
            if p.greedy:
                np.testing.assert_allclose(scores[row], expected, rtol=1e-5, atol=1e-6)
            else:
                np.testing.assert_allclose(softmax(scores[row]), softmax(expected), rtol=1e-5)
        out, state = step(logits, state, features)
        for row in range(4):
            if out.valid[row]:
                outputs[row].append(int(out.tokens[row]))
    assert [len(o) for o in outputs] == [10, 4, 10, 10]
    np.testing.assert_array_equal(state.written.counts, [np.bincount(o, minlength=size) for o in outputs])
