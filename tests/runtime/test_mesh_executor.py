"""The executor over a mesh: what it is built from, and what it gives for narrow types and odd batches."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, Mesh

import jdsi
from jdsi.converters import from_arrays
from jdsi.models import Transformer, parameters
from jdsi.models.families import family_for
from jdsi.planning import even_stages
from jdsi.runtime.mesh_executor import MeshExecutor
from jdsi.sharding import make_mesh

PROMPTS = [[5, 9, 2, 7], [11, 4, 4, 60, 33, 21, 8, 9, 10, 70, 71, 72], [3], [8, 8, 8]]


@pytest.fixture(scope="module")
def model() -> Transformer:
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=97,
        hidden_size=96,
        intermediate_size=120,
        num_attention_heads=6,
        num_key_value_heads=3,
        head_dim=16,
        num_hidden_layers=3,
        max_position_embeddings=64,
    )
    model = Transformer(family_for("llama").spec(config), rngs=nnx.Rngs(0))
    noisy = {n: a + 0.1 * jax.random.normal(jax.random.key(1), a.shape) for n, a in parameters(model).items()}
    return Transformer.from_parameters(model.spec, noisy)


def executor(model: Transformer, mesh: Mesh, stages: Any = None, **options: Any) -> MeshExecutor:
    arrays = parameters(model)
    stages = even_stages(model.spec, mesh.shape.get("pipe", 1)) if stages is None else stages
    load = partial(from_arrays, arrays, model.spec)
    return MeshExecutor(model.spec, mesh, load, dtype=jnp.float32, stages=stages, **options)


def test_any_contiguous_stages_give_the_same(model: Transformer) -> None:
    expected = jdsi.init_inference(model).forward(PROMPTS)
    for stages in ([range(1), range(1, 3)], [range(2), range(2, 3)]):
        engine = jdsi.InferenceEngine(executor(model, make_mesh(pipe=2, tensor=3), stages), jdsi.InferenceConfig())
        np.testing.assert_allclose(engine.forward(PROMPTS), expected, rtol=5e-4, atol=5e-5)


def test_micro_batches_and_pieces_change_nothing(model: Transformer) -> None:
    params = jdsi.SamplingParams(max_new_tokens=9, temperature=0.9, seed=3, ignore_eos=True)
    expected = [c.token_ids for c in jdsi.init_inference(model).generate(PROMPTS, params)]
    for micro_batches, pieces in ((1, 4), (3, 2)):
        spread = executor(model, make_mesh(pipe=3), micro_batches=micro_batches, prompt_pieces=pieces)
        engine = jdsi.InferenceEngine(spread, jdsi.InferenceConfig())
        assert [c.token_ids for c in engine.generate(PROMPTS, params)] == expected, (micro_batches, pieces)


def test_bfloat16_stays_as_close_to_float32_as_on_one_device(model: Transformer) -> None:
    def logits(**options: Any) -> np.ndarray:
        out = jdsi.init_inference(model, **options).forward(PROMPTS)
        return np.concatenate([np.asarray(row[: len(p)], np.float64) for row, p in zip(out, PROMPTS, strict=True)])

    exact = logits(dtype="float32")
    for degrees in ({}, {"tensor_parallel": 3}, {"tensor_parallel": 2, "sequence_parallel": True}):
        narrow = logits(dtype="bfloat16", **degrees)
        assert np.linalg.norm(narrow - exact) / np.linalg.norm(exact) < 2e-2
        p, q = (np.asarray(jax.nn.log_softmax(jnp.asarray(x))) for x in (exact, narrow))
        assert (np.exp(p) * (p - q)).sum(axis=1).max() < 2e-2


def test_a_stream_that_is_left_does_no_harm(model: Transformer) -> None:
    engine = jdsi.init_inference(model, tensor_parallel=2, pipeline_parallel=2)
    params = jdsi.SamplingParams(max_new_tokens=20, ignore_eos=True)
    expected = [c.token_ids for c in engine.generate(PROMPTS, params)]
    for _ in zip(range(3), engine.stream(PROMPTS, params), strict=False):
        pass
    assert [c.token_ids for c in engine.generate(PROMPTS, params)] == expected


def test_meshes_and_stages_that_do_not_fit_are_named(model: Transformer) -> None:
    def mesh(shape: tuple[int, ...], *names: str) -> Mesh:
        devices = np.array(jax.devices()[: int(np.prod(shape))]).reshape(shape)
        return Mesh(devices, names, axis_types=(AxisType.Auto,) * len(names))

    with pytest.raises(jdsi.ConfigError, match=r"axes data, tensor and lacks pipe, expert; .*make_mesh"):
        executor(model, mesh((2, 2), "data", "tensor"))
    with pytest.raises(jdsi.ConfigError, match="2 devices on the axis 'expert'; this model has no experts"):
        executor(model, make_mesh(expert=2))
    with pytest.raises(jdsi.ConfigError, match="1 stages for the 2 devices on the axis 'pipe'"):
        executor(model, make_mesh(pipe=2), [range(3)])
    with pytest.raises(jdsi.ConfigError, match="layers 0 to 1, 1 to 2 are not the model's 3 layers"):
        executor(model, make_mesh(pipe=2), [range(2), range(1, 3)])
