"""What must, may and must not be generated, through the engine: against transformers' `generate`, and by its effect."""

from typing import Any

import numpy as np
import pytest
import torch

import jdsi
from jdsi import ConfigError, JdsiError, SamplingParams
from transformers_chain import generation_options

pytestmark = pytest.mark.usefixtures("quick_compilation")

PROMPTS = [[5, 9, 2, 7, 7, 1], [40, 8], [3], [250] * 9, [11, 12, 13]]


def test_greedy_search_under_constraints_equals_transformers(torch_model: Any, engine: jdsi.InferenceEngine) -> None:
    plain = [c.token_ids for c in engine.generate(PROMPTS, SamplingParams(max_new_tokens=12))]
    options: list[dict[str, Any]] = [
        {"bad_words_ids": [[plain[0][0]], plain[0][2:4]], "no_repeat_ngram": 2},
        {"suppress_tokens": plain[1][1:4], "begin_suppress_tokens": plain[1][:1], "repetition_penalty": 1.2},
        {"forced_bos_token_id": 77, "begin_suppress_tokens": [77, plain[2][0]], "forced_eos_token_id": [0, 9]},
        {"logit_bias": {plain[3][0]: -50.0, (plain[3][1], plain[3][2]): -9.0, 5: 2.0}, "min_new_tokens": 9},
        {"exponential_decay_length_penalty": (4, 1.7)},
    ]
    params = [SamplingParams(max_new_tokens=12, **own) for own in options]
    for prompt, own, before, completion in zip(PROMPTS, params, plain, engine.generate(PROMPTS, params), strict=True):
        with torch.no_grad():
            out = torch_model.generate(torch.tensor([prompt]), pad_token_id=0, **generation_options(own.filled()))
        assert completion.token_ids == out[0, len(prompt) :].tolist(), own
        assert completion.token_ids != before, own


def test_bad_words_do_not_occur(engine: jdsi.InferenceEngine) -> None:
    free = engine.generate(PROMPTS, SamplingParams(max_new_tokens=12, temperature=1.0, seed=4))
    words = [" def", "fox", "x"]
    for one in free:
        words += [engine.tokenizer.decode([token]) for token in one.token_ids[:3]]
    words = [word for word in words if word.strip() and "\ufffd" not in word]
    assert len(words) > 4
    bound = engine.generate(PROMPTS, SamplingParams(max_new_tokens=12, temperature=1.0, seed=4, bad_words=words))
    banned = {engine.tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in words if len(word) < 2}
    assert banned
    assert not any(banned & set(one.token_ids) for one in bound)
    assert any(banned & set(one.token_ids) for one in free)
    for one in bound:
        for token in one.token_ids:
            assert engine.tokenizer.decode([token]).strip() not in [word.strip() for word in words]


def test_a_table_and_the_function_that_says_the_same_give_the_same(engine: jdsi.InferenceEngine) -> None:
    def even_or_end(tokens, lengths):
        return np.arange(300)[None] % 2 == np.zeros((tokens.shape[0], 1))

    table = np.full((1, 300), -1)
    table[0, ::2] = 0
    params = {"max_new_tokens": 9, "temperature": 1.0, "seed": 2}
    by_table = engine.generate(PROMPTS, SamplingParams(allowed_tokens=table, **params))
    by_function = engine.generate(PROMPTS, SamplingParams(allowed_tokens=even_or_end, **params))
    assert by_table == by_function
    assert all(token % 2 == 0 for one in by_table for token in one.token_ids)


def test_what_cannot_be_is_named_before_it_is_begun(engine: jdsi.InferenceEngine) -> None:
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"forced_bos_token_id": 5}, "is for prompts of one token, as in transformers; prompt 0 has 6"),
        ({"allowed_tokens": np.zeros((1, 299), int)}, "must be a table of the 300 tokens there are"),
        ({"logits_processor": lambda tokens, lengths, logits: logits[:, 1:]}, r"returns shape \(2, 299\)"),
        ({"logits_processor": lambda tokens, lengths, logits: float(logits[0, 0])}, "cannot be traced by JAX"),
        ({"allowed_tokens": lambda tokens: tokens}, "cannot be traced by JAX"),
        ({"suppress_tokens": [300]}, "suppress_tokens has 300; the vocabulary ends at 299"),
    ]
    for options, message in wrong:
        with pytest.raises(ConfigError, match=message):
            engine.generate(PROMPTS, SamplingParams(**options))
    without = jdsi.InferenceEngine(engine.executor, engine.config)
    with pytest.raises(ConfigError, match=r"bad_words=\('x',\) needs a tokenizer; give bad_words_ids"):
        without.generate(PROMPTS, SamplingParams(bad_words="x"))


def test_a_table_without_a_way_on_is_an_error(engine: jdsi.InferenceEngine) -> None:
    table = np.full((2, 300), -1)
    table[0, 5] = 1
    with pytest.raises(JdsiError, match=r"token 1 of prompt 2 could not be chosen: .*constraints and functions of the"):
        engine.generate(PROMPTS, SamplingParams(max_new_tokens=4, allowed_tokens=table))
    with pytest.raises(JdsiError, match=r"the beam search of prompt 2, prompt 1, .* came to no end"):
        engine.generate(PROMPTS, SamplingParams(max_new_tokens=4, allowed_tokens=table, num_beams=2))
