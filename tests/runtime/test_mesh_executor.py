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
from jdsi.kv_cache import rows as rows_module
from jdsi.models import Transformer, parameters
from jdsi.models.families import family_for
from jdsi.planning import collectives_of, even_stages
from jdsi.runtime.mesh_executor import MeshExecutor
from jdsi.runtime.stage_program import StageProgram
from jdsi.sharding import PipelineSchedule, make_mesh, wavefront

pytestmark = pytest.mark.usefixtures("quick_compilation")

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


def test_the_order_of_issue_is_the_schedules(model: Transformer, monkeypatch: pytest.MonkeyPatch) -> None:
    spread = executor(model, make_mesh(pipe=3), prompt_pieces=2)
    issued: list[tuple[int, int, int]] = []
    step = StageProgram.step

    def recorded(program: StageProgram, leaves: Any, given: Any, epilogue: Any, **options: Any) -> Any:
        rows, new_tokens = given.context.rows, given.context.new_tokens
        issued.append((spread.programs.index(program), rows, new_tokens))
        return step(program, leaves, given, epilogue, **options)

    monkeypatch.setattr(StageProgram, "step", recorded)
    params = jdsi.SamplingParams(max_new_tokens=4, ignore_eos=True)
    jdsi.InferenceEngine(spread, jdsi.InferenceConfig()).generate(PROMPTS * 3, params)
    # Twelve prompts: three micro-batches of four rows, whose prompts are read in two pieces of two.
    schedule = PipelineSchedule(stages=3, prompt_micro_batches=6, generation_micro_batches=3, new_tokens=4)
    wanted = []
    for token in range(4):
        tasks = [task for task in schedule if task.token == token]
        for stage, micro_batch in wavefront(3, 3 if token else 6):
            assert any((task.stage, task.micro_batch) == (stage, micro_batch) for task in tasks)
            wanted.append((stage, 4 if token else 2))
    assert [(stage, rows) for stage, rows, _ in issued] == wanted
    assert [new_tokens == 1 for _, _, new_tokens in issued] == [False] * 18 + [True] * 27


def test_micro_batches_have_the_batch_size_together(model: Transformer, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []
    steps = MeshExecutor.steps

    def recorded(spread: MeshExecutor, batches: Any) -> Any:
        rows.append(sum(one.context.rows for one in batches))
        return steps(spread, batches)

    monkeypatch.setattr(MeshExecutor, "steps", recorded)
    params = jdsi.SamplingParams(max_new_tokens=3, ignore_eos=True)
    beams = jdsi.SamplingParams(max_new_tokens=3, num_beams=2, ignore_eos=True)
    for degrees, size, most in (({"pipe": 3}, 2, 2), ({"pipe": 3}, 6, 6), ({"pipe": 2, "data": 2}, 4, 4)):
        engine = jdsi.InferenceEngine(executor(model, make_mesh(**degrees)), jdsi.InferenceConfig(max_batch_size=size))
        rows.clear()
        engine.generate(PROMPTS * 2, params)
        assert max(rows) == most
    rows.clear()
    engine.generate(PROMPTS, beams)
    assert len(rows) == 2 * 3  # two batches of two prompts, not cut any further


def test_beams_stay_in_their_group(model: Transformer) -> None:
    """Following beams moves no cache between groups of the axis "data"."""
    context = executor(model, make_mesh(data=2, tensor=2)).new_cache(8, 128)
    program = rows_module._select(context.lengths.sharding.mesh, True)
    text = program.lower(context, jnp.arange(8)).compile().as_text()
    assert not collectives_of(text, dict(context.lengths.sharding.mesh.shape))
