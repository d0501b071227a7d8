"""What a stage compiles to: the collectives of tensor parallelism, no more and no larger than they must be."""

from collections import Counter

import jax
import jax.numpy as jnp
import pytest
import transformers

from jdsi.generation import SamplerFeatures, SamplingParams, init_state
from jdsi.models import TransformerSpec
from jdsi.models.families import family_for
from jdsi.pallas_kernels.device import H200, target
from jdsi.planning import Collective, collectives_of
from jdsi.runtime.decoding import SampleEpilogue
from jdsi.runtime.stage_program import StageProgram
from jdsi.sharding import make_mesh, stage_meshes
from jdsi.sharding.topology import topology_devices

ROWS = 4
SETTINGS = {
    "llama": {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8, "num_key_value_heads": 4},
    "gptj": {"n_embd": 256, "n_head": 8, "n_inner": 512, "rotary_dim": 16},
    "gemma2": {
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 32,
    },
}
ONCE = (("llama", 2), ("llama", 8), ("gptj", 8), ("gemma2", 4))  # in `make test`
PER_LAYER = {"llama": 2, "gptj": 1, "gemma2": 2}


def spec_of(family: str, layers: int = 3) -> TransformerSpec:
    depth = {"n_layer": layers} if family == "gptj" else {"num_hidden_layers": layers}
    config = transformers.AutoConfig.for_model(family, vocab_size=1000, **SETTINGS[family], **depth)
    return family_for(family).spec(config)


def compiled(program: StageProgram, new_tokens: int = 1) -> list[Collective]:
    params = [SamplingParams(max_new_tokens=4)] * ROWS
    features = SamplerFeatures.of(params)
    vocabulary = program.spec.vocab_size
    carry = jax.eval_shape(lambda: init_state(params, [[1]] * ROWS, vocab_size=vocabulary, features=features))
    text = program.lower(ROWS, new_tokens, 128, SampleEpilogue(features), carry).compile().as_text()
    return collectives_of(text, dict(program.mesh.shape))


def stages(spec: TransformerSpec, dtype: type = jnp.float32, **degrees: int) -> list[StageProgram]:
    meshes = stage_meshes(make_mesh(**degrees))
    share = len(spec.layers) // len(meshes)
    return [StageProgram(spec, range(i * share, (i + 1) * share), mesh, dtype) for i, mesh in enumerate(meshes)]


# More devices than KV heads in Llama, as many in GPT-J; the count depends on the layers alone.
@pytest.mark.parametrize(
    ("family", "tensor"),
    [
        pytest.param(family, tensor, marks=() if (family, tensor) in ONCE else pytest.mark.slow)
        for tensor in (2, 4, 8)
        for family in SETTINGS
    ],
)
def test_layers_cost_as_many_all_reduces_as_they_must(family: str, tensor: int) -> None:
    spec = spec_of(family)
    (program,) = stages(spec, tensor=tensor)
    found = compiled(program)
    assert {c.kind for c in found} == {"all-reduce"}
    assert {c.axis for c in found} == {"tensor"}
    by_shape = Counter()
    for c in found:
        by_shape[c.shape] += c.count
    # One more for the embedding, and the sampler's, of a number or two per row.
    assert by_shape.pop((ROWS, spec.width)) == PER_LAYER[family] * len(spec.layers) + 1
    assert all(c.bytes == ROWS * spec.width * 4 for c in found if c.shape == (ROWS, spec.width))
    assert all(shape in {(ROWS,), (ROWS, 1)} for shape in by_shape)


def test_data_parallel_groups_exchange_nothing_but_tokens() -> None:
    (program,) = stages(spec_of("llama"), tensor=2, data=2)
    assert {c.axis for c in compiled(program) if c.bytes > ROWS * 8} == {"tensor"}


def test_a_sequence_parallel_stage_scatters_and_gathers() -> None:
    spec, length = spec_of("gptj"), 16
    mesh = stage_meshes(make_mesh(tensor=4))[0]
    program = StageProgram(spec, range(3), mesh, jnp.float32, sequence_parallel=True)
    by_kind = Counter()
    for c in compiled(program, length):
        if c.bytes == ROWS * length * spec.width * 4:
            by_kind[c.kind] += c.count
    # Per layer one of each, and one all-reduce for the embedding. The head gets no more than the rows it needs.
    assert by_kind == {"reduce-scatter": 3, "all-gather": 3, "all-reduce": 1}


def test_inner_stages_send_nothing_by_themselves() -> None:
    first, last = stages(spec_of("gemma2", 4), tensor=2, pipe=2)
    assert sum(c.count for c in compiled(first)) == 2 * 2 + 1
    assert first.names[0].startswith("embedding")
    assert {name.split(".")[0] for name in last.names} >= {"layers", "norm"}


@pytest.mark.aot
@pytest.mark.parametrize("tensor", [8, *(pytest.param(tensor, marks=pytest.mark.slow) for tensor in (2, 4))])
def test_a_step_for_h200s_has_two_all_reduces_a_layer_and_runs_on_kernels(tensor: int) -> None:
    config = transformers.AutoConfig.for_model(
        "llama",
        hidden_size=8192,
        intermediate_size=28672,
        num_attention_heads=64,
        num_key_value_heads=8,
        vocab_size=128256,
        num_hidden_layers=2,
    )
    spec = family_for("llama").spec(config)
    mesh = stage_meshes(make_mesh(tensor=tensor, devices=topology_devices("h200", 1, 8)))[0]
    program = StageProgram(spec, range(2), mesh, jnp.bfloat16)
    with target(H200):
        lowered = program.lower(8, 1, 2048, SampleEpilogue(SamplerFeatures()), _greedy_state(spec))
    text = lowered.compile().as_text()
    wide = [c for c in collectives_of(text, dict(mesh.shape)) if c.shape == (8, 8192)]
    assert sum(c.count for c in wide) == 2 * 2 + 1
    assert {(c.kind, c.axis, c.bytes) for c in wide} == {("all-reduce", "tensor", 8 * 8192 * 2)}
    # Per layer four products, the write into the cache and attention, in two or more launches.
    assert text.count('custom_call_target="mosaic_gpu') >= 2 * 7


def _greedy_state(spec: TransformerSpec) -> object:
    params = [SamplingParams(max_new_tokens=4)] * 8
    return jax.eval_shape(lambda: init_state(params, [[1]] * 8, vocab_size=spec.vocab_size))
