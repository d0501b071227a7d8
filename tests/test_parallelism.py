"""Every family gives the same logits and tokens however it is spread over devices."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import jdsi
from test_families import CONFIGS, ENCODERS, PROMPTS, three_layers

# Heads (5), hidden units (56 or 160) and vocabulary (89) come out even for hardly any of these.
ALWAYS = (
    {"tensor_parallel": 2, "pipeline_parallel": 3},
    {"tensor_parallel": 4, "sequence_parallel": True},
)
THOROUGHLY = (
    {"tensor_parallel": 1, "data_parallel": 2},
    {"tensor_parallel": 2},
    {"tensor_parallel": 4},
    {"tensor_parallel": 8},
    {"pipeline_parallel": 2, "prompt_pieces": 2},
    {"pipeline_parallel": 3},
    {"tensor_parallel": 2, "pipeline_parallel": 2, "data_parallel": 2},
    {"tensor_parallel": 2, "pipeline_parallel": 3, "sequence_parallel": True},
)
GREEDY = jdsi.SamplingParams(max_new_tokens=8, ignore_eos=True)


def _name(degrees: dict) -> str:
    return " ".join(f"{key.partition('_')[0]}{value}" for key, value in degrees.items())


def _check(name: str, folder: Path, meshes: Sequence[dict]) -> None:
    """Logits and greedy tokens on each mesh are those of one device."""

    def run(**degrees: Any) -> tuple[np.ndarray, list[list[int]]]:
        engine = jdsi.init_inference(folder, dtype="float32", **degrees)
        logits = np.asarray(engine.forward(PROMPTS))
        if name in ENCODERS:
            return logits, []
        return logits, [c.token_ids for c in engine.generate(PROMPTS, GREEDY)]

    expected, tokens = run()
    for degrees in meshes:
        actual, generated = run(**degrees)
        for row, prompt in enumerate(PROMPTS):
            n = len(prompt)
            np.testing.assert_allclose(
                actual[row, :n], expected[row, :n], rtol=5e-4, atol=5e-5, err_msg=f"{_name(degrees)}, row {row}"
            )
        assert generated == tokens, _name(degrees)


@pytest.mark.parametrize("name", CONFIGS)
def test_families_do_not_depend_on_the_mesh(name: str, tmp_path: Path) -> None:
    _check(name, three_layers(name, tmp_path / name), ALWAYS)


def test_many_meshes(tmp_path: Path) -> None:
    _check("llama", three_layers("llama", tmp_path), THOROUGHLY)


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_every_family_on_every_mesh(name: str, tmp_path: Path) -> None:
    _check(name, three_layers(name, tmp_path / name), THOROUGHLY)


@pytest.fixture(scope="module")
def tiny() -> str:
    return "examples/tiny-python-lm"


@pytest.mark.parametrize("degrees", [{"tensor_parallel": 3}, {"pipeline_parallel": 2, "data_parallel": 2}], ids=_name)
def test_sampling_and_beams_do_not_depend_on_the_mesh(degrees: dict, tiny: str) -> None:
    prompts = ["def ", "class Foo", "import numpy as", "for i in"]
    sampled = jdsi.SamplingParams(
        temperature=0.8, top_p=0.9, top_k=40, repetition_penalty=1.1, seed=6, max_new_tokens=12, logprobs=2
    )
    beams = jdsi.SamplingParams(max_new_tokens=8, num_beams=3)
    one, spread = jdsi.init_inference(tiny), jdsi.init_inference(tiny, **degrees)
    for params in (sampled, beams):
        expected, actual = one.generate(prompts, params), spread.generate(prompts, params)
        assert [c.token_ids for c in expected] == [c.token_ids for c in actual]
        assert [c.text for c in expected] == [c.text for c in actual]
    for a, b in zip(one.generate(prompts, sampled), spread.generate(prompts, sampled), strict=True):
        np.testing.assert_allclose(
            [step.logprob for step in a.logprobs], [step.logprob for step in b.logprobs], atol=1e-4
        )
        assert [[i for i, _ in step.top] for step in a.logprobs] == [[i for i, _ in step.top] for step in b.logprobs]


def test_what_a_request_is_batched_with_does_not_matter_on_a_mesh(tiny: str) -> None:
    engine = jdsi.init_inference(tiny, pipeline_parallel=2, tensor_parallel=2, max_batch_size=4)
    prompts = ["def ", "class Foo(object):\n    def", "x = ", "import os\nimport sys\n", "return", "while True:"]
    params = jdsi.SamplingParams(max_new_tokens=10, ignore_eos=True)
    together = [c.token_ids for c in engine.generate(prompts, params)]
    assert together == [engine.generate(prompt, params)[0].token_ids for prompt in prompts]


def test_a_model_in_memory_is_spread_as_well(tiny: str) -> None:
    model = jdsi.load_model(tiny)
    expected = jdsi.init_inference(model).forward([[5, 9, 2, 7]])
    np.testing.assert_allclose(
        jdsi.init_inference(model, tensor_parallel=4).forward([[5, 9, 2, 7]]), expected, rtol=5e-4, atol=5e-5
    )


def test_degrees_that_do_not_fit_are_named(tiny: str) -> None:
    devices = len(jax.devices())
    with pytest.raises(jdsi.ConfigError, match=rf"tensor {2 * devices} takes {2 * devices} devices.*there are"):
        jdsi.init_inference(tiny, tensor_parallel=2 * devices)
    with pytest.raises(jdsi.ConfigError, match="pipeline_parallel=8 exceeds the 4 layers"):
        jdsi.init_inference(tiny, pipeline_parallel=8)
