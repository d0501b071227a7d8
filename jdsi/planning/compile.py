"""What the real program of a step takes, from compiling it for devices that need not be there."""

import contextlib
import dataclasses
import time
from collections.abc import Sequence

import jax
from jax.typing import DTypeLike

from jdsi.generation import SamplerFeatures, SamplingParams, init_state
from jdsi.models import TransformerSpec
from jdsi.models.spec import LayerSpec
from jdsi.models.work import Workload
from jdsi.pallas_kernels.device import target
from jdsi.runtime.decoding import SampleEpilogue
from jdsi.runtime.stage_program import StageProgram
from jdsi.sharding import Parallelism, make_mesh, stage_meshes
from jdsi.sharding.topology import Topology

from .collectives import Collective, collectives_of
from .machine import machine_for
from .shares import even_stages


@dataclasses.dataclass(frozen=True)
class CompiledStage:
    """A pipeline stage's program for one micro-batch, on each of its devices.

    Attributes:
        arguments: bytes of what it is given: weights, KV memory, tokens.
        temporaries: bytes of what it holds besides while it runs.
        results: bytes of what it returns that does not lie in the memory of an argument.
        collectives: all its exchanges, equal ones together.
        flops: of XLA's own operations; those inside of hand-written kernels are not in it.
        kernels: hand-written kernels it calls.
        seconds: tracing, lowering and compiling; 0 where the program is another stage's.
    """

    arguments: int
    temporaries: int
    results: int
    collectives: tuple[Collective, ...]
    flops: float
    kernels: int
    seconds: float


def compile_step(
    spec: TransformerSpec,
    topology: Topology,
    parallelism: Parallelism,
    work: Workload,
    *,
    capacity: int,
    dtype: DTypeLike = "bfloat16",
    stages: Sequence[range] | None = None,
    sequence_parallel: bool | None = None,
) -> list[CompiledStage]:
    """Compiles every stage's step for one micro-batch, greedy sampling included.

    Args:
        spec: the model's; no weights are needed.
        topology: the machines.
        parallelism: degrees.
        work: the micro-batch, of all data-parallel groups together.
        capacity: tokens that the KV memory of each sequence has room for.
        dtype: of weights, activations and KV memory.
        stages: layers of each, by default `even_stages`.
        sequence_parallel: as in `MeshExecutor`.

    Raises:
        ConfigError: there is no compiler for the topology, too few devices, or more stages than layers.
    """
    mesh = make_mesh(
        tensor=parallelism.tensor, pipe=parallelism.pipeline, data=parallelism.data, devices=topology.devices()
    )
    params = [SamplingParams(max_new_tokens=1)] * work.rows
    features = SamplerFeatures.of(params)
    state = jax.eval_shape(lambda: init_state(params, [()] * work.rows, vocab_size=spec.vocab_size, features=features))
    found: dict[tuple[tuple[LayerSpec, ...], bool, bool], CompiledStage] = {}
    compiled = []
    for layers, part in zip(stages or even_stages(spec, parallelism.pipeline), stage_meshes(mesh), strict=True):
        program = StageProgram(spec, layers, part, dtype, sequence_parallel=sequence_parallel)
        kind = (spec.layers[layers.start : layers.stop], program.first, program.last)
        if kind in found:
            compiled.append(dataclasses.replace(found[kind], seconds=0.0))
            continue
        began = time.perf_counter()
        # Without a device of the kind at hand, kernels have to be told what they are chosen for.
        with contextlib.nullcontext() if topology.name == "cpu" else target(machine_for(topology).device):
            lowered = program.lower(work.rows, work.new_tokens, capacity, SampleEpilogue(features), state)
        executable = lowered.compile()
        found[kind] = _read(executable, dict(part.shape), time.perf_counter() - began)
        compiled.append(found[kind])
    return compiled


def _read(executable: jax.stages.Compiled, mesh: dict[str, int], seconds: float) -> CompiledStage:
    memory, text = executable.memory_analysis(), executable.as_text() or ""
    costs = executable.cost_analysis() or {}
    assert memory is not None
    return CompiledStage(
        arguments=memory.argument_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        results=memory.output_size_in_bytes - memory.alias_size_in_bytes,
        collectives=tuple(collectives_of(text, mesh)),
        flops=float(costs.get("flops", 0.0)),
        kernels=text.count('custom_call_target="mosaic_gpu'),
        seconds=seconds,
    )
