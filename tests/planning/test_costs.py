"""Work and memory counted from specs: against known models, against XLA's own count, and against themselves."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jaxtyping import Array

from jdsi.errors import ConfigError
from jdsi.kv_cache import ContiguousContext
from jdsi.models import Transformer, TransformerSpec, parameters_of
from jdsi.models.spec import AttentionSpec
from jdsi.planning import Workload, even_stages, parameter_count, stage_costs, stage_memory
from jdsi.planning.shares import elements, share_of
from jdsi.sharding import Parallelism
from planning_cases import FAMILIES, large, small


@pytest.mark.parametrize(
    ("name", "parameters", "kv_per_token"),
    [
        # Parameters as their checkpoints have them; keys and values of every layer and KV head in bfloat16.
        ("llama-2-70b", 68_976_648_192, 2 * 80 * 8 * 128 * 2),
        ("llama-3-70b", 70_553_706_496, 2 * 80 * 8 * 128 * 2),
        ("llama-3-405b", 405_853_388_800, 2 * 126 * 8 * 128 * 2),
        # 105 layers of 12 E^2, the vocabulary twice; MT-NLG ties the two.
        ("lm-530b", pytest.approx(530e9, rel=0.003), 2 * 105 * 20480 * 2),
    ],
)
def test_known_models(name: str, parameters: int, kv_per_token: int) -> None:
    spec, one = large(name), Parallelism()
    assert parameter_count(spec) == parameters
    (memory,) = stage_memory(spec, one, Workload.prefill(3, 100), rows=3, capacity=1000)
    assert memory.weights == 2 * parameter_count(spec)
    assert memory.kv == 3 * 1024 * kv_per_token  # rows have room for a multiple of 128 tokens
    (costs,) = stage_costs(spec, one, Workload.decode(1, 1000))
    # Each weight but those of the embedding and the norms is read, and multiplied with once.
    matrices = parameter_count(spec) - spec.vocab_size * spec.width
    assert costs.total("weight_bytes") == pytest.approx(2 * matrices, rel=1e-3)
    attention = sum(4 * 1000 * layer.of(AttentionSpec).qkv_rows[0] for layer in spec.layers)
    assert costs.total("flops") == pytest.approx(2 * matrices + attention, rel=1e-3)
    assert costs.total("kv_bytes") == (1000 + 1) * kv_per_token


def test_prompts_take_two_operations_a_weight_and_token() -> None:
    spec = large("llama-3-70b")
    (costs,) = stage_costs(spec, Parallelism(), Workload.prefill(2, 512))
    layers = parameter_count(spec) - 2 * spec.vocab_size * spec.width
    attention = sum(4 * 512 * 513 // 2 * layer.of(AttentionSpec).qkv_rows[0] for layer in spec.layers)
    head = 2 * spec.vocab_size * spec.width
    assert costs.total("flops") == pytest.approx(2 * (512 * 2 * layers + attention + head), rel=1e-3)


@pytest.mark.parametrize(("window", "new", "context"), [(None, 1, 9), (None, 9, 9), (4, 1, 9), (4, 9, 9), (4, 3, 9)])
@pytest.mark.parametrize("causal", [True, False])
def test_pairs_and_slots_are_those_of_the_mask(window: int | None, new: int, context: int, causal: bool) -> None:
    seen = [
        [not causal or (k <= q and (window is None or q - k < window)) for k in range(context)]
        for q in range(context - new, context)
    ]
    work = Workload(5, new, context)
    assert work.pairs(causal=causal, window=window if causal else None) == 5 * sum(map(sum, seen))
    assert work.slots(causal=causal, window=window if causal else None) == 5 * sum(map(any, zip(*seen, strict=True)))


WIDE = {
    "num_hidden_layers": 1,
    "n_layer": 1,
    "hidden_size": 512,
    "n_embd": 512,
    "intermediate_size": 1280,
    "n_inner": 1280,
    "ffn_dim": 1280,
}


def wide(family: str) -> TransformerSpec:
    """A model whose products outweigh what XLA counts besides them: exponentials, sums of norms."""
    return small(family, **(WIDE | ({"head_dim": 128} if family in ("gemma2", "qwen3") else {})))


DECODE, PREFILL = Workload.decode(4, 64), Workload.prefill(2, 32)


# Every family's layers once, Llama's in both phases.
@pytest.mark.parametrize(
    ("family", "work"),
    [
        ("llama", DECODE),
        ("llama", PREFILL),
        ("gpt2", DECODE),
        ("gptj", PREFILL),
        ("falcon", DECODE),
        ("gemma2", PREFILL),
        *(
            pytest.param(family, work, marks=pytest.mark.slow)
            for family, work in (("gpt2", PREFILL), ("gptj", DECODE), ("falcon", PREFILL), ("gemma2", DECODE))
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else f"{value.new_tokens}-new",
)
def test_operations_and_bytes_are_those_that_xla_counts(family: str, work: Workload) -> None:
    spec = wide(family)
    graph, state = nnx.split(nnx.eval_shape(lambda: Transformer(spec)))
    leaves, structure = jax.tree.flatten(state)
    context = jax.eval_shape(
        lambda: ContiguousContext.create(spec.kv_shapes, work.rows, work.context, jnp.float32).begin(
            jnp.ones(work.rows, jnp.int32), work.new_tokens
        )
    )
    context = dataclasses.replace(context, empty=work.new_tokens > 1)

    def step(leaves: list[Array], tokens: Array, context: ContiguousContext, last: Array) -> tuple[Array, object]:
        model = nnx.merge(graph, jax.tree.unflatten(structure, leaves))
        hidden, context = model.forward(tokens, context)
        return model.logits(hidden[last]), context

    ids, last = (jax.ShapeDtypeStruct((n,), jnp.int32) for n in (work.tokens, work.rows))
    counted = jax.jit(step, donate_argnums=2).lower(leaves, ids, context, last).compile().cost_analysis()
    (costs,) = stage_costs(spec, Parallelism(), work, dtype="float32")
    assert 0.96 <= costs.total("flops") / counted["flops"] <= 1.0
    # XLA counts what lies between its fusions, and the copies of its own; ours is what it takes at least.
    assert (0.7 if work.new_tokens == 1 else 0.5) <= costs.total("bytes") / counted["bytes accessed"] <= 1.0


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8])
def test_shares_are_those_that_are_loaded(family: str, ranks: int) -> None:
    spec = small(family)
    share = share_of(spec, ranks)
    sizes = []
    for leaf in parameters_of(spec).values():
        split = leaf.split(ranks)
        sizes.append(math.prod(leaf.shape if split is None else split.local_shape(leaf.shape)))
    assert elements(share.stage(range(3))) == sum(sizes)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("pipeline", [1, 2, 3])
def test_stages_are_the_whole_model(family: str, pipeline: int) -> None:
    spec, work = small(family), Workload.decode(2, 32)
    layers = even_stages(spec, pipeline)
    assert [i for part in layers for i in part] == list(range(3))
    whole, parts = (stage_costs(spec, Parallelism(pipeline=stages), work) for stages in (1, pipeline))
    for attribute in ("flops", "bytes", "kernels"):
        assert sum(part.total(attribute) for part in parts) == whole[0].total(attribute)
    single, split = (
        stage_memory(spec, Parallelism(pipeline=stages), work, rows=2, capacity=32) for stages in (1, pipeline)
    )
    tied = spec.head is not None and spec.head.tied and pipeline > 1
    again = 2 * spec.vocab_size * (spec.embedding.width or spec.width) if tied else 0
    assert sum(part.weights for part in split) == single[0].weights + again
    assert sum(part.kv for part in split) == single[0].kv
    assert [part.transfer is not None for part in parts] == [pipeline > 1] * pipeline


def test_too_many_stages() -> None:
    with pytest.raises(ConfigError, match="exceeds the 3 layers"):
        stage_costs(small("llama"), Parallelism(pipeline=4), Workload.decode(1, 8))


@pytest.mark.parametrize(
    ("family", "sums", "gathers"), [("llama", 2, 2), ("gptj", 1, 1), ("gpt_neox", 1, 1), ("gemma2", 2, 2)]
)
def test_exchanges_of_tensor_parallelism(family: str, sums: int, gathers: int) -> None:
    spec, degrees, work = small(family), Parallelism(tensor=4), Workload.prefill(2, 16)
    counts = {}
    for divided in (False, True):
        (costs,) = stage_costs(spec, degrees, work, sequence_parallel=divided)
        exchanges = [one for one in costs.collectives if one.dtype == "bf16"]
        last = [one for one in exchanges if divided and one.shape == (2, 128)]  # what the head needs
        assert [(one.kind, one.bytes, one.count) for one in last] == [("all-reduce", 2 * 128 * 2, 1)] * divided
        exchanges = [one for one in exchanges if one not in last]
        assert {(one.shape, one.bytes, one.group_size, one.axis) for one in exchanges} == {
            ((32, 128), 32 * 128 * 2, 4, "tensor")
        }
        counts[divided] = {one.kind: one.count for one in exchanges}
    assert counts[False] == {"all-reduce": 3 * sums + 1}  # one for the embedding
    assert counts[True] == {"all-reduce": 1, "reduce-scatter": 3 * sums, "all-gather": 3 * gathers}


def test_sequence_parallelism_where_tokens_are_many_and_come_out_even() -> None:
    spec, degrees = small("llama"), Parallelism(tensor=4)

    def divided(rows: int, prompt: int) -> bool:
        (costs,) = stage_costs(spec, degrees, Workload.prefill(rows, prompt))
        return any(one.kind == "reduce-scatter" for one in costs.collectives)

    assert divided(16, 64)
    assert not divided(15, 64)
    assert not divided(1, 1025)


@pytest.mark.parametrize("family", FAMILIES)
def test_more_ranks_hold_less_and_exchange_more_often(family: str) -> None:
    spec, work = small(family), Workload.decode(2, 32)
    memory = [stage_memory(spec, Parallelism(n), work, rows=2, capacity=32)[0] for n in (1, 2, 4)]
    assert memory[0].weights > memory[1].weights > memory[2].weights
    assert memory[0].kv >= memory[1].kv >= memory[2].kv
    assert memory[0].total > memory[1].total > memory[2].total
    flops = [stage_costs(spec, Parallelism(n), work)[0].total("flops") for n in (1, 2, 4)]
    assert flops[0] > flops[1] > flops[2]
    assert flops[0] <= 2 * flops[1] <= 4 * flops[2]  # padding and replicated KV heads only add


def test_kv_heads_are_held_by_several_ranks() -> None:
    spec = large("llama-3-70b")
    kv = [stage_memory(spec, Parallelism(n), Workload.decode(1, 8), rows=1, capacity=4096)[0].kv for n in (1, 8, 16)]
    assert kv == [kv[0], kv[0] // 8, kv[0] // 8]
