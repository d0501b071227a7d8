"""Samples, beams and batches of requests do not depend on the mesh, and what cannot be spread is named."""

import jax
import numpy as np
import pytest

import jdsi

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def tiny() -> str:
    return "examples/tiny-python-lm"


@pytest.mark.parametrize(
    "degrees",
    [{"tensor_parallel": 3}, {"pipeline_parallel": 2, "data_parallel": 2}],
    ids=["tensor", "pipeline and data"],
)
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
