"""Every processor, and all together, against transformers' on the same logits."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import softmax

from jdsi.errors import ConfigError
from jdsi.generation import (
    SamplerFeatures,
    SamplerState,
    SamplingParams,
    TokenAutomaton,
    bans,
    init_state,
    process,
    sample,
    truncation,
)
from jdsi.generation.functions import check_functions
from sampling_cases import ALL_AT_ONCE, EVERYTHING
from transformers_chain import processed

pytestmark = pytest.mark.usefixtures("quick_compilation")

VOCAB = 61
EOS = (3, 40)


@functools.partial(jax.jit, static_argnums=2)
def jitted_process(logits, state, features):
    return process(logits, state, features)


@jax.jit
def _followed_by(state: SamplerState, tokens, running) -> SamplerState:
    return dataclasses.replace(state, written=state.written.followed_by(tokens, running, state.settings))


def state_after(
    params: Sequence[SamplingParams],
    prompts: Sequence[Sequence[int]],
    outputs: Sequence[Sequence[int]],
    features: SamplerFeatures,
    size: int = VOCAB,
    eos: Sequence[int] = EOS,
) -> SamplerState:
    """Of rows that have written so much."""
    state = init_state(params, prompts, vocab_size=size, eos_token_ids=eos, features=features)
    for step in range(max(map(len, outputs))):
        tokens = np.array([output[step] if step < len(output) else 0 for output in outputs], np.int32)
        state = _followed_by(state, tokens, np.array([step < len(output) for output in outputs]))
    return state


def ours(
    params: Sequence[SamplingParams],
    prompts: Sequence[Sequence[int]],
    outputs: Sequence[Sequence[int]],
    logits: np.ndarray,
    features: SamplerFeatures | None = None,
) -> np.ndarray:
    features = SamplerFeatures.of(params) | (features or SamplerFeatures())
    return np.asarray(
        jitted_process(logits, state_after(params, prompts, outputs, features, logits.shape[1]), features)
    )


def assert_same_distribution(ours: np.ndarray, theirs: np.ndarray, name: object = "") -> None:
    np.testing.assert_array_equal(np.isfinite(ours), np.isfinite(theirs), err_msg=str(name))
    np.testing.assert_allclose(softmax(ours), softmax(theirs), rtol=1e-5, atol=1e-12, err_msg=str(name))


OPTIONS: list[dict[str, Any]] = [
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
    {"temperature": 1.0, "typical_p": 0.1},
    {"temperature": 1.0, "typical_p": 0.5},
    {"temperature": 1.7, "typical_p": 0.95},
    {"temperature": 1.0, "epsilon_cutoff": 0.01},
    {"temperature": 3.0, "epsilon_cutoff": 0.9},
    {"temperature": 1.0, "eta_cutoff": 0.01},
    {"temperature": 2.0, "eta_cutoff": 0.6},
    {"temperature": 1.0, "top_k": 2, "min_tokens_to_keep": 5},
    {"temperature": 1.0, "top_p": 0.1, "min_tokens_to_keep": 4},
    {"temperature": 1.0, "min_p": 0.9, "min_tokens_to_keep": 3},
    {"temperature": 1.0, "typical_p": 0.05, "min_tokens_to_keep": 6},
    {"temperature": 1.0, "epsilon_cutoff": 0.5, "min_tokens_to_keep": 3},
    {"temperature": 1.0, "eta_cutoff": 0.5, "min_tokens_to_keep": 500},
    {"temperature": 1.5, "top_k": 40, "top_p": 0.97, "min_p": 0.01, "typical_p": 0.9, "epsilon_cutoff": 0.01},
    {"logit_bias": {5: 2.5, 60: -100.0, 0: -math.inf}},
    {"logit_bias": {(1, 2): 4.0, (2,): -1.5, (0, 1, 2): 0.3, (2, 2): 7.0, (9, 9, 9, 9, 9, 1): 3.0}},
    {"logit_bias": {(3, 1, 0): -math.inf, (1, 0): 1.0, 0: 0.7}, "repetition_penalty": 1.3},
    {"bad_words_ids": [[7], [1, 2], [0, 3], [3], [40], [2, 2, 2]]},
    {"suppress_tokens": [0, 1, 60]},
    {"begin_suppress_tokens": [2, 5]},
    {"forced_bos_token_id": 6, "begin_suppress_tokens": [6, 2]},
    {"forced_eos_token_id": 9, "max_new_tokens": 3},
    {"forced_eos_token_id": [40, 3], "max_new_tokens": 1, "no_repeat_ngram": 1},
    {"exponential_decay_length_penalty": (1, 1.5)},
    {"exponential_decay_length_penalty": [0, 0.5], "temperature": 1.0},
    {
        "temperature": 1.5,
        "top_k": 40,
        "top_p": 0.95,
        "min_p": 0.02,
        "repetition_penalty": 1.3,
        "no_repeat_ngram": 2,
        "min_new_tokens": 1,
        "logit_bias": {(1, 2): 1.0},
        "bad_words_ids": [[1, 1], [2]],
        "suppress_tokens": [4],
        "begin_suppress_tokens": [5],
        "exponential_decay_length_penalty": (2, 1.1),
        "eta_cutoff": 0.001,
    },
]


@pytest.mark.parity
@pytest.mark.parametrize("seed", range(2))
def test_every_option_equals_transformers_in_one_batch(seed):
    rng = np.random.default_rng(seed)
    params = [SamplingParams(**o) for o in OPTIONS] * 2
    # Few different tokens, so that n-grams and repetitions occur.
    prompts = [rng.integers(0, 4, rng.integers(1, 20)).tolist() for _ in OPTIONS]
    prompts += [[1] if row % 2 else [1, 2] for row in range(len(OPTIONS))]
    outputs = [rng.integers(0, 4, rng.integers(0, 3) if p.changes.get("max_new_tokens") != 1 else 0) for p in params]
    logits = rng.normal(0, 3, (len(params), VOCAB)).astype(np.float32)
    logits[::3, [1, 30]] = -np.inf
    together = ours(params, prompts, outputs, logits)
    for row, p in enumerate(params):
        expected = processed(p, prompts[row], outputs[row], logits[row], EOS)
        assert_same_distribution(together[row], expected, p)
        if p.filled().greedy:
            np.testing.assert_allclose(together[row], expected, rtol=1e-6, err_msg=str(p))


levels = st.sampled_from([-3.0, -1.0, -0.0, 0.0, 0.5, 0.75, 2.0, -math.inf])
tokens = st.integers(0, 6)
phrases = st.lists(tokens, min_size=1, max_size=3).map(tuple)
without_ties = st.fixed_dictionaries(
    {"temperature": st.sampled_from([0.3, 1.0, 4.0])},
    optional={
        "top_k": st.integers(0, 13),
        "top_p": st.sampled_from([0.05, 0.35, 0.9, 1.0]),
        "min_p": st.sampled_from([0.0, 0.03, 0.6]),
        "typical_p": st.sampled_from([0.1, 0.6, 0.95]),
        "epsilon_cutoff": st.sampled_from([0.001, 0.05, 0.5]),
        "eta_cutoff": st.sampled_from([0.003, 0.1, 0.9]),
        "min_tokens_to_keep": st.integers(1, 4),
    },
)
with_ties = st.fixed_dictionaries(
    {},
    optional={
        "repetition_penalty": st.sampled_from([0.5, 2.0]),
        "no_repeat_ngram": st.integers(1, 3),
        "min_new_tokens": st.integers(1, 3),
        "logit_bias": st.dictionaries(phrases, st.sampled_from([-1.5, 0.25, 3.0, -math.inf]), min_size=1, max_size=5),
        "bad_words_ids": st.lists(phrases, min_size=1, max_size=4),
        "suppress_tokens": st.lists(st.integers(0, 4), max_size=3),
        "begin_suppress_tokens": st.lists(tokens, max_size=3),
        "forced_bos_token_id": st.just(5),
        "forced_eos_token_id": st.sampled_from([[5], [6, 5]]),
        "exponential_decay_length_penalty": st.tuples(st.integers(0, 2), st.sampled_from([0.5, 1.2, 3.0])),
    },
)


@pytest.mark.parity
@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_requests_equal_transformers(data):
    rows, size = 4, 13
    sampled = data.draw(st.booleans())
    params, prompts, outputs = [], [], []
    for _ in range(rows):
        options = data.draw(without_ties if sampled else with_ties)
        params.append(SamplingParams(max_new_tokens=4, **options))
        prompts.append(data.draw(st.lists(tokens, min_size=1, max_size=5)))
        outputs.append(data.draw(st.lists(tokens, max_size=3)))
    if sampled:
        logits = np.random.default_rng(data.draw(st.integers(0, 2**32))).normal(0, 2, (rows, size)).astype(np.float32)
        logits[:, data.draw(st.lists(tokens, max_size=2))] = -np.inf
    else:
        logits = np.array(data.draw(st.lists(levels, min_size=rows * size, max_size=rows * size)), np.float32)
        logits = logits.reshape(rows, size)
    found = ours(params, prompts, outputs, logits, EVERYTHING)
    for row in range(rows):
        expected = processed(params[row], prompts[row], outputs[row], logits[row], [3])
        if sampled:
            assert_same_distribution(found[row], expected, params[row])
        else:
            np.testing.assert_allclose(found[row], expected, rtol=1e-6, err_msg=str(params[row]))


@pytest.mark.parity
@pytest.mark.parametrize("size", [1000, 32003])
def test_truncation_of_a_large_vocabulary_equals_transformers(size):
    logits = np.random.default_rng(size).normal(0, 2, (2, size)).astype(np.float32)
    got = truncation.keep_top_p(truncation.keep_top_k(jnp.asarray(logits), jnp.array([0, 50])), jnp.array([0.9, 0.6]))
    typical = truncation.keep_typical(jnp.asarray(logits), jnp.array([0.9, 0.2]))
    for row, (k, p) in enumerate([(0, 0.9), (50, 0.6)]):
        params = SamplingParams(temperature=1.0, top_k=k, top_p=p)
        assert_same_distribution(np.asarray(got[row]), processed(params, [0], [], logits[row]))
        params = SamplingParams(temperature=1.0, typical_p=[0.9, 0.2][row])
        assert_same_distribution(np.asarray(typical[row]), processed(params, [0], [], logits[row]))


def of_even_tokens(tokens, lengths):
    """Allows the even tokens behind an even one, and 1, 2 and 3 behind an odd one."""
    last = jnp.take_along_axis(tokens, lengths[:, None] - 1, axis=1)
    token = jnp.arange(VOCAB)[None]
    return jnp.where(last % 2 == 0, token % 2 == 0, (token >= 1) & (token <= 3))


def with_the_last_doubled(tokens, lengths, logits):
    last = jnp.take_along_axis(tokens, lengths[:, None] - 1, axis=1)
    return jnp.where(jnp.arange(VOCAB) == last, 2 * logits, logits)


def with_a_ramp(tokens, lengths, logits):
    return logits + 0.01 * jnp.arange(VOCAB)


TABLE = np.full((3, VOCAB), -1)
TABLE[0, [1, 2, 3]] = 0, 1, 2
TABLE[1, ::2] = 1
TABLE[2, [5, 40]] = 2, 0


@pytest.mark.parity
def test_constraints_and_functions_of_the_caller_equal_transformers():
    rng = np.random.default_rng(5)
    options = [
        {"allowed_tokens": of_even_tokens},
        {"allowed_tokens": of_even_tokens, "suppress_tokens": [2], "no_repeat_ngram": 1},
        {"allowed_tokens": TABLE},
        {"allowed_tokens": TABLE[[0, 0, 0, 1]][:, ::-1].clip(-1, 3), "temperature": 1.0, "top_k": 3},
        {"logits_processor": with_the_last_doubled, "repetition_penalty": 1.5},
        {"logits_processor": with_a_ramp, "temperature": 0.5, "top_p": 0.7},
        {},
        {"allowed_tokens": of_even_tokens, "bad_words_ids": [[i] for i in range(VOCAB) if i not in EOS]},
    ]
    params = [SamplingParams(**o) for o in options]
    prompts = [[9, 9, 1], [2], [4, 4], [7], [5, 6, 6], [1], [2], [1]]
    outputs = [[1, 2, 4], [2], [2, 8, 6], [VOCAB - 2, VOCAB - 4], [6, 9], [], [3, 3], []]
    logits = rng.normal(0, 3, (len(params), VOCAB)).astype(np.float32)
    found = ours(params, prompts, outputs, logits)
    for row, own in enumerate(params):
        constraint, function = (own.changes.get(name) for name in ("allowed_tokens", "logits_processor"))
        output, more = outputs[row], {}
        if isinstance(constraint, TokenAutomaton):
            state = 0
            for token in output:
                state = constraint.next_state[state, token]
            more["prefix_allowed_tokens_fn"] = lambda _, __, s=state, c=constraint: np.flatnonzero(c.next_state[s] >= 0)
        elif constraint:
            more["prefix_allowed_tokens_fn"] = lambda _, ids: np.flatnonzero(
                of_even_tokens(np.array([ids]), np.array([len(ids)]))[0]
            )
        if function:
            more["logits_processor"] = [
                lambda ids, scores, f=function: torch.tensor(
                    np.array(f(ids.numpy(), np.array([ids.shape[1]]), scores.numpy()))
                )
            ]
        expected = processed(own, prompts[row], output, logits[row], EOS, **more)
        assert_same_distribution(found[row], expected, own)
        if own.filled().greedy:
            np.testing.assert_allclose(found[row], expected, rtol=1e-6, err_msg=str(own))
    np.testing.assert_array_equal(found[6], logits[6])


def test_functions_are_tried_before_they_are_compiled_in():
    check_functions(SamplingParams(allowed_tokens=of_even_tokens, logits_processor=with_a_ramp).filled(), VOCAB)
    wrong = {
        "returns shape \\(2, 3\\) for 2 rows and 61 tokens": {"logits_processor": lambda t, n, x: x[:, :3]},
        "returns shape \\(2, 61\\) for 2 rows and 60 tokens": {"allowed_tokens": of_even_tokens},
        "test_processors.* cannot be traced by JAX: ": {"logits_processor": lambda t, n: t},
        "cannot be traced by JAX: Attempted boolean": {"allowed_tokens": lambda t, n: t if t[0, 0] else n},
    }
    for message, options in wrong.items():
        size = 60 if "60" in message else VOCAB
        with pytest.raises(ConfigError, match=f"sampling parameter {next(iter(options))}: .*{message}"):
            check_functions(SamplingParams(**options).filled(), size)


def test_neutral_rows_come_out_as_they_went_in():
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 3, (2, VOCAB)).astype(np.float32)
    logits[:, :3] = -np.inf, 0.0, -0.0
    with_functions = SamplingParams(
        allowed_tokens=of_even_tokens, logits_processor=with_a_ramp, num_beams=2, renormalize_logits=True
    )
    full = [ALL_AT_ONCE, SamplingParams(allowed_tokens=TABLE, guidance_scale=2.0), with_functions]
    everything = SamplerFeatures.of(full)
    flags = [field.name for field in dataclasses.fields(everything) if not getattr(everything, field.name)]
    assert not flags
    state = state_after([SamplingParams()] * 2, [[1, 2, 1, 2], [1]], [[1, 2], []], everything)
    beside_others = np.stack([logits, rng.permuted(logits)], axis=1).reshape(4, VOCAB)
    assert np.asarray(jitted_process(beside_others, state, everything)).tobytes() == logits.tobytes()


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
