"""Beam search against transformers' on the same torch model."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessor,
    LogitsProcessorList,
)

from jdsi.errors import ConfigError, JdsiError
from jdsi.generation import SamplerFeatures, SamplingParams, beam
from transformers_chain import generation_options

pytestmark = pytest.mark.usefixtures("quick_compilation")

VOCAB = 23
EOS = 5


@functools.cache
def model(family: str, seed: int) -> Any:
    torch.manual_seed(seed)
    if family == "gpt2":
        config = GPT2Config(
            vocab_size=VOCAB,
            n_positions=64,
            n_embd=16,
            n_layer=1,
            n_head=2,
            bos_token_id=None,
            eos_token_id=EOS,
            initializer_range=0.5,
        )
        made = GPT2LMHeadModel(config)
    else:
        config = LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=64,
            bos_token_id=None,
            eos_token_id=EOS,
            initializer_range=0.5,
        )
        made = LlamaForCausalLM(config)
    head = torch.nn.Linear(16, VOCAB)
    with torch.no_grad():
        # Varied logits, and an end of sequence that is neither rare nor always best.
        head.weight.normal_(0, 0.45)
        head.bias.zero_()
        head.bias[EOS] = 1.5
    made.lm_head = head
    return made.eval()


@functools.partial(jax.jit, static_argnums=2)
def jitted_step(logits, state, features):
    return beam.step(logits, state, features)


def search(net: Any, prompts: list[list[int]], params: Sequence[SamplingParams | None]) -> list[list[beam.Hypothesis]]:
    """Recomputes every sequence from its tokens; `parents` reorder the outputs as they would a KV cache."""
    beams = next(p.num_beams for p in params if p is not None)
    features = SamplerFeatures.of(params)
    state = beam.init(params, prompts, vocab_size=VOCAB, eos_token_ids=[EOS])
    rows = [list(p) for p in prompts for _ in range(beams)]
    while not state.done.all():
        by_length: dict[int, list[int]] = {}
        for i, row in enumerate(rows):
            by_length.setdefault(len(row), []).append(i)
        logits = np.empty((len(rows), VOCAB), np.float32)
        for same in by_length.values():
            with torch.no_grad():
                logits[same] = net(torch.tensor([rows[i] for i in same])).logits[:, -1].numpy()
        tokens, parents, state = jitted_step(logits, state, features)
        rows = [[*rows[p], t] for p, t in zip(parents.tolist(), tokens.tolist(), strict=True)]
    return beam.finish(state)


def reference(
    net: Any, prompt: list[list[int]], params: SamplingParams, **more: Any
) -> tuple[list[list[int]], list[float]]:
    params = params.filled()
    out = net.generate(
        torch.tensor(prompt),
        attention_mask=torch.ones(len(prompt), len(prompt[0]), dtype=torch.long),
        **{**generation_options(params), "num_return_sequences": params.num_beams, "top_k": None},
        **more,
        eos_token_id=EOS,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_scores=True,
    )
    rows = []
    for row in out.sequences[:, len(prompt[0]) :].tolist():
        rows.append(row[: row.index(EOS) + 1] if EOS in row else row)
    return rows, out.sequences_scores.tolist()


def assert_equal(found: list[list[beam.Hypothesis]], net, prompts, params: SamplingParams, **more: Any) -> None:
    tokens, scores = reference(net, prompts, params, **more)
    flat = [h for row in found for h in row]
    assert [h.token_ids for h in flat] == tokens
    np.testing.assert_allclose([h.score for h in flat], scores, rtol=2e-5, atol=1e-5)
    assert all(h.finish_reason == ("stop" if h.token_ids[-1] == EOS else "length") for h in flat)


PROMPTS = [[1, 2, 3, 4], [9, 8, 2, 11]]


@pytest.mark.parity
@pytest.mark.parametrize("early_stopping", [True, False, "never"])
@pytest.mark.parametrize("length_penalty", [1.0, 2.0, -0.5])
@pytest.mark.parametrize(("family", "seed", "beams"), [("gpt2", 1, 3), ("llama", 2, 4)])
def test_equals_transformers(family, seed, beams, length_penalty, early_stopping):
    params = SamplingParams(
        max_new_tokens=9, num_beams=beams, length_penalty=length_penalty, early_stopping=early_stopping
    )
    net = model(family, seed)
    found = search(net, PROMPTS, [params] * 2)
    if length_penalty <= 1:
        assert any(h.finish_reason == "stop" for row in found for h in row)
    assert_equal(found, net, PROMPTS, params)


@pytest.mark.parity
def test_processors_equal_transformers():
    net = model("gpt2", 7)
    everything = [
        {"no_repeat_ngram": 2},
        {"repetition_penalty": 1.4},
        {"min_new_tokens": 5},
        {"logit_bias": {(2,): 1.5, (9, 11): -3.0, (4, 7, 7): 2.0}, "renormalize_logits": True},
        {"bad_words_ids": [[3], [11, 11], [EOS], [7, 2]], "suppress_tokens": [1, 9], "begin_suppress_tokens": [7, 2]},
        {"forced_eos_token_id": 8, "exponential_decay_length_penalty": (3, 1.2)},
        {"repetition_penalty": 1.2, "no_repeat_ngram": 3, "renormalize_logits": True, "suppress_tokens": [6]},
    ]
    for options in everything:
        params = SamplingParams(max_new_tokens=10, num_beams=3, **options)
        assert_equal(search(net, PROMPTS, [params] * 2), net, PROMPTS, params)


class Counted(LogitsProcessor):
    """Presence and frequency penalties."""

    def __call__(self, input_ids, scores):
        counts = torch.stack([torch.bincount(row[4:], minlength=VOCAB) for row in input_ids])
        return scores - 0.7 * (counts > 0) - 0.4 * counts


CYCLE = np.full((2, VOCAB), -1)
CYCLE[0, ::2], CYCLE[1, 1::2] = 1, 0


@pytest.mark.parity
def test_constraints_and_functions_equal_transformers():
    net = model("gpt2", 7)
    counted = SamplingParams(max_new_tokens=10, num_beams=3, presence_penalty=0.7, frequency_penalty=0.4)
    found = search(net, PROMPTS, [counted] * 2)
    assert_equal(found, net, PROMPTS, counted, logits_processor=LogitsProcessorList([Counted()]))
    bound = SamplingParams(max_new_tokens=9, num_beams=4, allowed_tokens=CYCLE, bad_words_ids=[[0], [1, 2]])
    found = search(net, PROMPTS, [bound] * 2)
    assert all(token % 2 == step % 2 for row in found for h in row for step, token in enumerate(h.token_ids))
    turns = [np.flatnonzero(row >= 0).tolist() for row in CYCLE]
    assert_equal(found, net, PROMPTS, bound, prefix_allowed_tokens_fn=lambda _, ids: turns[len(ids) % 2])


def test_a_search_without_a_way_on_is_an_error_and_others_go_on():
    net = model("gpt2", 7)
    nowhere = np.full((2, VOCAB), -1)
    nowhere[0, 3] = 1
    params = [SamplingParams(max_new_tokens=4, num_beams=2, allowed_tokens=table) for table in (CYCLE, nowhere)]
    with pytest.raises(JdsiError, match="the beam search of request 1 came to no end"):
        search(net, PROMPTS, params)


def test_a_search_does_not_depend_on_its_neighbours():
    net = model("llama", 5)
    prompts = [[1, 2, 3, 4], [9, 8], [3, 3, 3, 1, 7, 2]]
    params = [
        SamplingParams(max_new_tokens=4, num_beams=3),
        SamplingParams(max_new_tokens=12, num_beams=3, length_penalty=0.5, early_stopping=True, no_repeat_ngram=3),
        SamplingParams(max_new_tokens=8, num_beams=3, early_stopping="never", stop_token_ids=(7, 2), ignore_eos=True),
    ]
    together = search(net, prompts, params)
    padded = search(net, [*prompts, [1] * 200], [*params, None])
    assert padded[:3] == together
    assert padded[3] == []
    for row, (prompt, p) in enumerate(zip(prompts, params, strict=True)):
        alone = search(net, [prompt], [p])[0]
        assert [h.token_ids for h in alone] == [h.token_ids for h in together[row]]
        np.testing.assert_allclose([h.score for h in alone], [h.score for h in together[row]], rtol=1e-5)


def test_an_idle_search_is_done_from_the_start():
    state = beam.init([SamplingParams(num_beams=2), None], [[1], []], vocab_size=VOCAB, eos_token_ids=[EOS])
    assert state.done.tolist() == [False, True]
    with pytest.raises(JdsiError, match="of request 0 is not done"):
        beam.finish(state)


def test_few_shapes_are_compiled():
    params = [SamplingParams(max_new_tokens=4, num_beams=2), SamplingParams(max_new_tokens=90, num_beams=2)]
    shapes = [
        jax.tree.map(jnp.shape, beam.init(p, [[1] * n] * 2, vocab_size=VOCAB, eos_token_ids=eos))
        for p in ([params[0]] * 2, params, [params[1], None])
        for n in (1, 30)
        for eos in ([], [EOS], [5, 6, 7, 8])
    ]
    assert all(shape == shapes[0] for shape in shapes)
    assert beam.init(params, [[1]] * 2, vocab_size=VOCAB, eos_token_ids=range(5)).settings.stop_tokens.shape == (2, 8)


def test_parameters_that_do_not_fit_the_vocabulary_are_errors():
    with pytest.raises(ConfigError, match="stop_token_ids has 99"):
        beam.init([SamplingParams(num_beams=2, stop_token_ids=(99,))], [[1]], vocab_size=VOCAB)


def test_unfinished_broken_and_mixed_searches_are_errors():
    params = SamplingParams(max_new_tokens=2, num_beams=2)
    state = beam.init([params], [[1]], vocab_size=VOCAB, eos_token_ids=[EOS])
    with pytest.raises(JdsiError, match="not done"):
        beam.finish(state)
    for _ in range(2):
        _, _, state = jitted_step(jnp.full((2, VOCAB), jnp.nan), state, SamplerFeatures())
    with pytest.raises(JdsiError, match="NaN"):
        beam.finish(dataclasses.replace(state, done=jnp.ones_like(state.done)))
    with pytest.raises(JdsiError, match="the beam search of prompt 7 met"):
        beam.finish(dataclasses.replace(state, done=jnp.ones_like(state.done)), ["prompt 7"])
    with pytest.raises(ConfigError, match="num_beams"):
        beam.init([params, dataclasses.replace(params, num_beams=3)], [[1], [1]], vocab_size=VOCAB)
