"""Sampling: distribution, independence of the batch, ends of requests, log-probabilities."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from jdsi.errors import ConfigError
from jdsi.generation import (
    FinishCode,
    SampledTokens,
    SamplerFeatures,
    SamplerState,
    SamplingParams,
    check_vocabulary,
    init_state,
    sample,
)
from sampling_cases import EVERYTHING

VOCAB = 37


@functools.partial(jax.jit, static_argnums=2)
def jitted_sample(logits, state, features) -> tuple[SampledTokens, SamplerState]:
    return sample(logits, state, features)


def model(tokens: list[int]) -> np.ndarray:
    """Logits that depend on the whole sequence."""
    return np.random.default_rng([len(tokens), *tokens]).normal(0, 2, VOCAB).astype(np.float32)


def generate(params, prompts, steps, features=None, eos=(), pad=0) -> list[list[int]]:
    features = SamplerFeatures.of(params) | (features or SamplerFeatures())
    state = init_state(params, prompts, vocab_size=VOCAB, eos_token_ids=eos, pad_token_id=pad, features=features)
    outputs: list[list[int]] = [[] for _ in params]
    for _ in range(steps):
        logits = np.stack([model([*p, *o]) for p, o in zip(prompts, outputs, strict=True)])
        out, state = jitted_sample(logits, state, features)
        for row in np.flatnonzero(out.valid):
            outputs[row].append(int(out.tokens[row]))
    return outputs


REQUESTS = [
    SamplingParams(),
    SamplingParams(temperature=1.0, seed=7),
    SamplingParams(temperature=0.8, top_k=9, top_p=0.9, min_p=0.02, seed=7),
    SamplingParams(temperature=1.3, repetition_penalty=1.3, no_repeat_ngram=2, seed=2**40 + 1),
    SamplingParams(presence_penalty=0.5, frequency_penalty=0.3, min_new_tokens=3, stop_token_ids=(4, 8, 15, 16, 23)),
]
PROMPTS = [[1, 2], [3], [4, 5, 6, 7, 8, 9, 10], [1, 1, 2, 1, 1], [30, 31]]


def test_tokens_do_not_depend_on_batch_row_or_features():
    steps = 12
    together = generate(REQUESTS, PROMPTS, steps)
    order = [3, 0, 4, 2, 1]
    shuffled = generate([REQUESTS[i] for i in order], [PROMPTS[i] for i in order], steps, EVERYTHING)
    for row, (params, prompt) in enumerate(zip(REQUESTS, PROMPTS, strict=True)):
        alone = generate([params], [prompt], steps)[0]
        assert alone == together[row] == shuffled[order.index(row)]


def test_noise_does_not_depend_on_padding_of_the_vocabulary():
    params = [SamplingParams(temperature=1.0, seed=s) for s in range(16)]
    logits = np.random.default_rng(0).normal(size=(16, VOCAB)).astype(np.float32)
    padded = np.pad(logits, ((0, 0), (0, 27)), constant_values=-np.inf)
    tokens = []
    for x in (logits, padded):
        state = init_state(params, [[]] * 16, vocab_size=x.shape[1])
        tokens.append(jitted_sample(x, state, SamplerFeatures.of(params))[0].tokens)
    np.testing.assert_array_equal(*tokens)


def test_requests_without_a_seed_differ():
    params = [SamplingParams(temperature=1.0)] * 4
    outputs = generate(params, [[1]] * 4, 12)
    assert len({tuple(o) for o in outputs}) == 4


@pytest.mark.parametrize("options", [{}, {"top_k": 5}, {"top_p": 0.8}, {"min_p": 0.2}], ids=str)
def test_frequencies_follow_the_distribution(options):
    draws, size = 20000, 8
    logits = np.random.default_rng(1).normal(0, 1.2, size).astype(np.float32)
    params = SamplingParams(temperature=1.3, seed=11, **options)
    features = SamplerFeatures.of([params])
    state = init_state([params], [[]], vocab_size=size)
    # The draws of one request: its seed with `draws` different token indices.
    many = jax.tree.map(lambda leaf: jnp.repeat(leaf, draws, axis=0), state)
    many = dataclasses.replace(many, written=dataclasses.replace(many.written, generated=jnp.arange(draws)))
    out, _ = jitted_sample(np.tile(logits, (draws, 1)), many, features)
    order = np.argsort(-logits)
    p = np.exp(logits.astype(np.float64) / 1.3)
    p /= p.sum()
    kept = np.zeros(size, bool)
    if "top_k" in options:
        kept[order[:5]] = True
    elif "top_p" in options:
        kept[order[: np.searchsorted(np.cumsum(p[order]), 0.8) + 1]] = True
    else:
        kept = p >= options.get("min_p", 0.0) * p.max()
    counts = np.bincount(out.tokens, minlength=size)
    assert counts[~kept].sum() == 0
    expected = np.where(kept, p, 0) / p[kept].sum() * draws
    assert stats.chisquare(counts[kept], expected[kept]).pvalue > 1e-3


def test_greedy_takes_the_lowest_of_equals():
    params = [SamplingParams()]
    logits = np.zeros((1, VOCAB), np.float32)
    logits[0, [9, 20]] = 1.0
    out, _ = jitted_sample(logits, init_state(params, [[]], vocab_size=VOCAB), SamplerFeatures())
    assert out.tokens.tolist() == [9]


def test_extreme_values_are_not_lost_in_float32():
    """A temperature above 0 stays one, and no penalty takes a logit out of the numbers there are."""
    params = [
        SamplingParams(temperature=1e-50, seed=1),
        SamplingParams(temperature=3.4e38, seed=1),
        SamplingParams(repetition_penalty=1e-30),
        SamplingParams(repetition_penalty=1e30, temperature=1e-50),
    ]
    logits = np.stack([model([row]) for row in range(4)])
    logits[2, 7] = 1e-3
    features = SamplerFeatures.of(params)
    state = init_state(params, [[], [], [7], [int(logits[3].argmax())]], vocab_size=VOCAB, features=features)
    out, _ = jitted_sample(logits, state, features)
    assert out.finish.tolist() == [FinishCode.RUNNING] * 4
    assert out.tokens[0] == logits[0].argmax()
    assert out.tokens[2] == 7
    assert out.tokens[3] == np.argsort(logits[3])[-2]


def test_ends_and_padding():
    params = [
        SamplingParams(max_new_tokens=1),
        SamplingParams(),
        SamplingParams(ignore_eos=True),
        SamplingParams(stop_token_ids=(6,), ignore_eos=True),
        None,
        SamplingParams(min_new_tokens=2),
    ]
    features = SamplerFeatures.of(params)
    state = init_state(params, [[]] * 6, vocab_size=VOCAB, eos_token_ids=[5], pad_token_id=33, features=features)
    tokens, valid = [], []
    for token in (7, 5, 6):
        logits = np.zeros((6, VOCAB), np.float32)
        logits[:, token] = 1
        out, state = jitted_sample(logits, state, features)
        tokens.append(out.tokens.tolist())
        valid.append(out.valid.tolist())
    assert tokens == [[7, 7, 7, 7, 33, 7], [33, 5, 5, 5, 33, 0], [33, 33, 6, 6, 33, 6]]
    assert valid == [
        [True] * 4 + [False, True],
        [False] + [True] * 3 + [False, True],
        [False, False, True, True, False, True],
    ]
    codes = [
        FinishCode.LENGTH,
        FinishCode.STOP,
        FinishCode.RUNNING,
        FinishCode.STOP,
        FinishCode.STOP,
        FinishCode.RUNNING,
    ]
    assert state.finish.tolist() == codes
    assert state.written.generated.tolist() == [1, 2, 3, 3, 0, 3]


def test_end_of_sequence_wins_over_length():
    params = [SamplingParams(max_new_tokens=1)]
    logits = np.eye(1, VOCAB, 5, dtype=np.float32)
    out, _ = jitted_sample(logits, init_state(params, [[]], vocab_size=VOCAB, eos_token_ids=[5]), SamplerFeatures())
    assert out.finish.tolist() == [FinishCode.STOP]


def test_finished_rows_keep_their_state():
    params = [*REQUESTS[2:], REQUESTS[2]]
    features = SamplerFeatures.of(params)
    before = init_state(params, [*PROMPTS[2:], [1]], vocab_size=VOCAB, features=features)
    before = dataclasses.replace(before, finish=jnp.array([0, *[int(FinishCode.STOP)] * 3]))
    logits = np.stack([model([i]) for i in range(4)])
    out, after = jitted_sample(logits, before, features)
    assert out.valid.tolist() == [True, False, False, False]
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        np.testing.assert_array_equal(np.asarray(old)[1:], np.asarray(new)[1:])
    assert after.written.generated[0] == 1


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_are_reported(bad, temperature):
    params = [SamplingParams(temperature=temperature), SamplingParams()]
    logits = np.zeros((2, VOCAB), np.float32)
    logits[0, :] = bad if bad < 0 else 0
    logits[0, 3] = bad
    state = init_state(params, [[]] * 2, vocab_size=VOCAB, pad_token_id=1)
    out, _ = jitted_sample(logits, state, SamplerFeatures.of(params))
    assert out.finish.tolist() == [FinishCode.ERROR, FinishCode.RUNNING]
    assert out.tokens.tolist() == [1, 0]


def test_logprobs_are_of_the_unprocessed_logits():
    params = [SamplingParams(temperature=0.5, top_k=1, logprobs=3), SamplingParams(repetition_penalty=5.0, logprobs=0)]
    features = SamplerFeatures.of(params)
    assert features.top_logprobs == 4
    logits = np.stack([model([1]), model([2])])
    state = init_state(params, [[], list(range(VOCAB))], vocab_size=VOCAB)
    out, _ = jitted_sample(logits, state, features)
    assert out.logprob is not None
    assert out.top_ids is not None
    expected = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    np.testing.assert_allclose(out.logprob, expected[np.arange(2), out.tokens], rtol=1e-5)
    order = np.argsort(-logits, axis=1)[:, :4]
    np.testing.assert_array_equal(out.top_ids, order)
    np.testing.assert_allclose(out.top_logprobs, np.take_along_axis(expected, order, 1), rtol=1e-5)


def test_parameters_that_do_not_fit_the_vocabulary_are_errors():
    with pytest.raises(ConfigError, match="stop_token_ids has 99"):
        init_state([SamplingParams(stop_token_ids=(99,))], [[]], vocab_size=VOCAB)
    with pytest.raises(ConfigError, match="logprobs=99"):
        check_vocabulary(SamplingParams(logprobs=99), VOCAB)
    check_vocabulary(SamplingParams(logprobs=VOCAB, stop_token_ids=[VOCAB - 1]), VOCAB)
    with pytest.raises(ConfigError, match="1 sampling parameters for 2 prompts"):
        init_state([SamplingParams()], [[], []], vocab_size=VOCAB)
