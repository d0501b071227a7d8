"""What is counted from a spec against the executor's programs, compiled for GPUs that are not here."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import pytest

from jdsi.pallas_kernels.device import target
from jdsi.planning import Collective, Workload, collectives_of, machine_for, stage_costs, stage_memory
from jdsi.runtime.stage_program import StageProgram
from jdsi.sharding import Parallelism, make_mesh, stage_meshes
from jdsi.sharding.topology import Topology
from planning_cases import spec_of

WIDTHS = {
    "hidden_size": 1024,
    "n_embd": 1024,
    "intermediate_size": 2816,
    "num_attention_heads": 8,
    "n_head": 8,
    "vocab_size": 4096,
    "num_hidden_layers": 2,
    "n_layer": 2,
    "max_position_embeddings": 2048,
    "n_positions": 2048,
}


def greedy(logits: Any, carry: Any) -> tuple[Any, Any]:
    """No sampling: what that exchanges is for the sampler's tests."""
    return jnp.max(logits, axis=1), carry


def amounts(collectives: Sequence[Collective]) -> dict[str, tuple[int, int]]:
    """By kind how many arrays, of which XLA may exchange some together, and how many bytes."""
    found = {}
    for one in collectives:
        arrays, size = found.get(one.kind, (0, 0))
        found[one.kind] = (arrays + one.arrays * one.count, size + one.bytes * one.count)
    return found


@pytest.mark.aot
@pytest.mark.parametrize(
    ("family", "degrees", "work"),
    [
        ("llama", Parallelism(8), Workload.decode(4, 2048)),
        ("llama", Parallelism(4, data=2), Workload.decode(4, 2048)),
        ("llama", Parallelism(2), Workload.prefill(2, 1024)),
        ("gptj", Parallelism(4), Workload.prefill(1, 512)),
        ("gpt_neox", Parallelism(4), Workload.prefill(2, 512)),
    ],
)
def test_exchanges_and_memory_are_those_that_are_compiled(family: str, degrees: Parallelism, work: Workload) -> None:
    spec = spec_of(family, **WIDTHS, **({"rotary_dim": 64} if family == "gptj" else {"num_key_value_heads": 8}))
    topology = Topology.parse("h200:8")
    (mesh,) = stage_meshes(make_mesh(tensor=degrees.tensor, data=degrees.data, devices=topology.devices()))
    program = StageProgram(spec, range(2), mesh, jnp.bfloat16)
    with target(machine_for(topology).device):
        compiled = program.lower(work.rows * degrees.data, work.new_tokens, 2048, greedy).compile()
    (costs,) = stage_costs(spec, degrees, work)
    found = collectives_of(compiled.as_text(), dict(mesh.shape))
    # The sampler's are in whole numbers, and not here; the result's go to all groups.
    expected = [one for one in costs.collectives if one.dtype == "bf16"]
    assert amounts([one for one in found if one.axis == "tensor"]) == amounts(expected)

    (memory,) = stage_memory(spec, degrees, work, rows=work.rows, capacity=2048)
    stats = compiled.memory_analysis()
    assert stats.argument_size_in_bytes == pytest.approx(memory.weights + memory.kv, rel=1e-3)
    if family != "llama":  # products this small XLA may split into float32 parts, larger than all that is estimated
        return
    temporary = memory.activations + memory.logits
    assert stats.temp_size_in_bytes <= 1.1 * temporary + (1 << 20)
    if work.new_tokens > 1:
        assert stats.temp_size_in_bytes >= 0.5 * temporary
