"""Several results for a prompt, and guidance, which takes two rows for one: against transformers, and everywhere."""

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch

import jdsi
from jdsi import ConfigError, SamplingParams
from jdsi.generation.sampler_state import seed_of_choice

pytestmark = pytest.mark.usefixtures("quick_compilation")

PROMPTS = [[5, 9, 2, 7, 7, 1], [40, 8], [3], [250] * 9, [11, 12, 13]]
SAMPLED = SamplingParams(max_new_tokens=9, temperature=1.0, top_p=0.9, seed=5, n=3, repetition_penalty=1.2, logprobs=1)


def ids(completions: list[jdsi.Completion]) -> list[list[list[int]]]:
    return [[c.token_ids for c in (first, *first.alternatives)] for first in completions]


def test_every_choice_is_a_request_with_a_seed_of_its_own(engine: jdsi.InferenceEngine) -> None:
    found = engine.generate(PROMPTS, SAMPLED)
    for choice, seed in enumerate([5, seed_of_choice(5, 1), seed_of_choice(5, 2)]):
        alone = engine.generate(PROMPTS, SamplingParams(**{**SAMPLED.given, "n": 1, "seed": seed}))
        for several, one in zip(found, alone, strict=True):
            mine = [several, *several.alternatives][choice]
            assert mine.token_ids == one.token_ids
            assert mine.text == one.text
            assert mine.logprobs is not None
            assert [step.token_id for step in mine.logprobs] == one.token_ids
    assert [len(c.alternatives) for c in found] == [2] * len(PROMPTS)
    assert len({tuple(tokens) for tokens in ids(found)[0]}) == 3
    mixed = engine.generate(PROMPTS, [SAMPLED, *[SamplingParams(max_new_tokens=2)] * 4])
    assert ids(mixed)[0] == ids(found)[0]
    assert engine.stats.new_tokens == sum(map(len, ids(found)[0])) + 8


def test_streams_say_which_choice_goes_on(engine: jdsi.InferenceEngine) -> None:
    events = list(engine.stream(PROMPTS, SAMPLED))
    for index, first in enumerate(engine.generate(PROMPTS, SAMPLED)):
        for choice, completion in enumerate([first, *first.alternatives]):
            mine = [e for e in events if (e.index, e.choice) == (index, choice)]
            assert [e.token_id for e in mine] == completion.token_ids
            assert "".join(e.text for e in mine) == completion.text
            assert mine[-1].completion is not None
            assert mine[-1].completion.token_ids == completion.token_ids


GUIDED: list[dict[str, Any]] = [
    {"guidance_scale": 1.5},
    {"guidance_scale": 4.0, "negative_prompt": [8, 8, 9, 1, 2, 3, 4]},
    {"guidance_scale": 0.0, "negative_prompt": (250,)},
    {"guidance_scale": 2.0, "repetition_penalty": 1.3, "no_repeat_ngram": 2},
]


def test_guidance_equals_transformers(engine: jdsi.InferenceEngine, torch_model: Any) -> None:
    names = {"no_repeat_ngram": "no_repeat_ngram_size"}
    params = [SamplingParams(max_new_tokens=10, **options) for options in GUIDED]
    found = engine.generate(PROMPTS[:4], params)
    for prompt, options, completion in zip(PROMPTS, GUIDED, found, strict=False):
        negative = options.get("negative_prompt")
        theirs = {names.get(key, key): value for key, value in options.items() if key != "negative_prompt"}
        with torch.no_grad():
            out = torch_model.generate(
                torch.tensor([prompt]),
                negative_prompt_ids=None if negative is None else torch.tensor([list(negative)]),
                max_new_tokens=10,
                do_sample=False,
                pad_token_id=0,
                **theirs,
            )
        assert completion.token_ids == out[0, len(prompt) :].tolist(), options
        plain = engine.generate(prompt, SamplingParams(max_new_tokens=10))[0]
        assert completion.token_ids != plain.token_ids
    text = engine.tokenizer.decode([40, 41])
    as_text = SamplingParams(max_new_tokens=6, guidance_scale=3.0, negative_prompt=text)
    as_ids = SamplingParams(max_new_tokens=6, guidance_scale=3.0, negative_prompt=engine.tokenizer(text)["input_ids"])
    assert engine.generate(PROMPTS, as_text) == engine.generate(PROMPTS, as_ids)


THIRDS = np.full((3, 300), -1)  # a token of each third of the vocabulary in turn
for third in range(3):
    THIRDS[third, third * 100 : third * 100 + 100] = (third + 1) % 3


def towards_the_last(tokens, lengths, logits):
    last = jnp.take_along_axis(tokens, lengths[:, None] - 1, axis=1)
    return logits - 0.01 * jnp.abs(jnp.arange(300)[None] - last)


MIXED = [
    SamplingParams(max_new_tokens=7, temperature=1.0, seed=3, n=2, guidance_scale=2.5, negative_prompt=[7, 7, 7, 7, 7]),
    SamplingParams(max_new_tokens=5, temperature=0.8, seed=4, n=2, guidance_scale=1.5, logprobs=2),
    SamplingParams(max_new_tokens=6, temperature=1.2, seed=5, n=3, no_repeat_ngram=2),
    SamplingParams(max_new_tokens=6, allowed_tokens=THIRDS, logits_processor=towards_the_last),
    SamplingParams(max_new_tokens=6, num_beams=3, n=2, allowed_tokens=THIRDS),
]
MESHES: list[dict[str, Any]] = [
    {"data_parallel": 2, "pipeline_parallel": 2, "prompt_pieces": 2},
    {"offload": "nvme", "kv_offload": "host", "tensor_parallel": 2, "max_batch_size": 6},
]
MORE_MESHES: list[dict[str, Any]] = [{"max_batch_size": 4}, {"tensor_parallel": 3}, {"data_parallel": 3}]


@pytest.mark.parametrize("meshes", [MESHES, pytest.param(MORE_MESHES, marks=pytest.mark.slow)], ids=["some", "more"])
def test_what_results_are_does_not_depend_on_the_configuration(
    folder: Path, engine: jdsi.InferenceEngine, meshes: list[dict[str, Any]]
) -> None:
    expected = engine.generate(PROMPTS, MIXED)
    assert [len(c.alternatives) for c in expected] == [1, 1, 2, 0, 1]
    for found in ids(expected)[3:]:
        assert all(token // 100 == step % 3 for tokens in found for step, token in enumerate(tokens))
    for configuration in meshes:
        other = jdsi.init_inference(folder, **configuration)
        assert ids(other.generate(PROMPTS, MIXED)) == ids(expected), configuration
        other.close()
    alone = [engine.generate(p, s)[0] for p, s in zip(PROMPTS, MIXED, strict=True)]
    assert ids(alone) == ids(expected)


def test_the_best_beams_come_with_their_scores(engine: jdsi.InferenceEngine, torch_model: Any) -> None:
    params = SamplingParams(max_new_tokens=8, num_beams=4, n=3, length_penalty=0.7)
    for prompt, first in zip(PROMPTS, engine.generate(PROMPTS, params), strict=True):
        with torch.no_grad():
            out = torch_model.generate(
                torch.tensor([prompt]),
                num_beams=4,
                num_return_sequences=3,
                length_penalty=0.7,
                max_new_tokens=8,
                do_sample=False,
                pad_token_id=0,
                output_scores=True,
                return_dict_in_generate=True,
            )
        sequences = [row[len(prompt) :] for row in out.sequences.tolist()]
        expected = [row[: row.index(0) + 1] if 0 in row else row for row in sequences]
        assert [c.token_ids for c in (first, *first.alternatives)] == expected
        scores = [c.score for c in (first, *first.alternatives)]
        assert scores == pytest.approx(out.sequences_scores.tolist(), rel=1e-4)
    assert engine.generate(PROMPTS[0], SamplingParams(max_new_tokens=2))[0].score is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n": 2}, r"n=2 must be 1 with temperature=0: greedy search has one result"),
        ({"n": 3, "num_beams": 2}, r"n=3 must be at most num_beams=2"),
        ({"n": 65, "temperature": 1}, r"n=65 exceeds max_batch_size=64"),
        ({"n": 33, "temperature": 1, "guidance_scale": 2}, r"takes 66 rows, more than max_batch_size=64"),
        ({"guidance_scale": 2, "num_beams": 2}, r"guidance_scale=2.0 must be 1.0 with num_beams=2"),
        ({"negative_prompt": [3]}, r"negative_prompt=\(3,\) must be used with a guidance_scale"),
    ],
)
def test_what_cannot_be_is_named(engine: jdsi.InferenceEngine, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        engine.generate(PROMPTS, SamplingParams(**options))


def test_a_negative_prompt_is_checked_as_prompts_are(engine: jdsi.InferenceEngine) -> None:
    with pytest.raises(jdsi.PromptError, match="the negative prompt of prompt has token id 300"):
        engine.generate([5], SamplingParams(guidance_scale=2, negative_prompt=[300]))
    with pytest.raises(jdsi.CapacityError, match="the negative prompt of prompt has 250 tokens"):
        engine.generate([5], SamplingParams(guidance_scale=2, negative_prompt=[3] * 250, max_new_tokens=9))
