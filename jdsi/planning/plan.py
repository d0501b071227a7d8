"""A plan: what running a model on given machines takes, predicted and compiled."""

import dataclasses
from collections.abc import Iterator
from typing import Any

from jdsi.errors import ConfigError
from jdsi.models import TransformerSpec
from jdsi.models.work import Workload
from jdsi.sharding import Parallelism
from jdsi.sharding.topology import Topology

from .candidate import gib, padded_lengths
from .collectives import Collective
from .compile import CompiledStage, compile_step
from .cost_model import StepTime, predict
from .costs import StageCosts, stage_costs
from .machine import machine_for
from .memory import Memory, stage_memory
from .search import Choice, Goal, check_request, choose
from .shares import even_stages, parameter_count


@dataclasses.dataclass(frozen=True)
class PlannedStage:
    """One pipeline stage, on each of its devices.

    Attributes:
        layers: of the stage.
        memory: counted from the model's spec, for all micro-batches.
        work: of a decode step of one micro-batch.
        decode, prefill: the compiled programs of one micro-batch; `None` where nothing was compiled.
    """

    layers: range
    memory: Memory
    work: StageCosts
    decode: CompiledStage | None
    prefill: CompiledStage | None

    @property
    def total(self) -> int:
        """Bytes that a device needs: weights and KV memory as counted, the rest as compiled where it was."""
        programs = [one for one in (self.decode, self.prefill) if one is not None]
        if not programs:
            return self.memory.total
        return self.memory.weights + self.memory.kv + max(one.temporaries + one.results for one in programs)


@dataclasses.dataclass(frozen=True)
class Plan:
    """See `make_plan`.

    Attributes:
        spec, topology, parallelism: what runs where.
        batch, micro_batch: sequences at a time, and of one micro-batch of all data-parallel groups.
        context, prompt: tokens that a sequence has in the end, and starts with.
        dtype: of weights, activations and KV memory.
        limit: bytes that a device has.
        stages: of the pipeline.
        decode, prefill: predicted times of the whole batch.
        choice: how the degrees were found, if they were not given.
    """

    spec: TransformerSpec
    topology: Topology
    parallelism: Parallelism
    batch: int
    micro_batch: int
    context: int
    prompt: int
    dtype: str
    limit: int
    stages: tuple[PlannedStage, ...]
    decode: StepTime
    prefill: StepTime
    choice: Choice | None

    @property
    def fits(self) -> bool:
        """Whether every stage has the memory it needs."""
        return all(stage.total <= self.limit for stage in self.stages)

    def as_dict(self) -> dict[str, Any]:
        """Everything as plain values: bytes, seconds, operations."""
        return {
            "family": self.spec.family,
            "parameters": parameter_count(self.spec),
            "topology": str(self.topology),
            "parallelism": dataclasses.asdict(self.parallelism),
            "batch": self.batch,
            "micro_batch": self.micro_batch,
            "context": self.context,
            "prompt": self.prompt,
            "dtype": self.dtype,
            "memory_limit": self.limit,
            "fits": self.fits,
            "decode": _time_as_dict(self.decode),
            "prefill": _time_as_dict(self.prefill),
            "stages": [_stage_as_dict(stage) for stage in self.stages],
            "explanation": None if self.choice is None else self.choice.explain(),
        }

    def text(self) -> str:
        """For people."""
        return "\n".join(_lines(self))


def make_plan(
    spec: TransformerSpec,
    topology: Topology | str,
    parallelism: Parallelism | None = None,
    *,
    batch: int | None = None,
    context: int,
    prompt: int | None = None,
    goal: Goal = "latency",
    memory_limit: int | None = None,
    dtype: str = "bfloat16",
    sequence_parallel: bool | None = None,
    compiled: bool = True,
) -> Plan:
    """What it takes to run a model on machines that need not be there; no weights are needed.

    Args:
        spec: the model's.
        topology: the machines, such as "h200:8"; "cpu:8" stands for virtual devices here.
        parallelism: degrees; by default those that `choose` finds for `goal`.
        batch: sequences at a time; by default 1, and where degrees are chosen for throughput as many as fit.
        context, prompt: tokens that a sequence has in the end, and starts with (by default all but one of those).
        goal: "latency" or "throughput", for the choice of degrees.
        memory_limit: bytes of each device, by default all but what driver and libraries take.
        dtype: of weights, activations and KV memory.
        sequence_parallel: as in `MeshExecutor`.
        compiled: compile the step's programs for that machine and read memory and collectives from them; otherwise all
            is counted and predicted.

    Raises:
        ConfigError: the degrees do not fit the model or the machines, or there is no compiler for them.
        CapacityError: degrees are to be chosen and none fits.
    """
    topology = Topology.parse(topology) if isinstance(topology, str) else topology
    prompt = max(1, context - 1) if prompt is None else prompt
    check_request(spec, goal, batch, context, prompt)
    choice = None
    if parallelism is None:
        choice = choose(
            spec,
            topology,
            batch=batch,
            context=context,
            prompt=prompt,
            goal=goal,
            memory_limit=memory_limit,
            dtype=dtype,
        )
        parallelism, batch = choice.parallelism, choice.best.batch
    if parallelism.devices > topology.count:
        raise ConfigError(f"{parallelism} takes {parallelism.devices} devices, and {topology} has {topology.count}")
    batch = parallelism.data if batch is None else batch
    width, capacity = padded_lengths(prompt, context)
    limit = machine_for(topology).usable if memory_limit is None else memory_limit
    group = -(-batch // parallelism.data)
    micro = -(-group // min(parallelism.pipeline, group))
    layers = even_stages(spec, parallelism.pipeline)
    memories = stage_memory(
        spec, parallelism, Workload.prefill(micro, width), rows=group, capacity=capacity, dtype=dtype, stages=layers
    )
    costs = stage_costs(
        spec,
        parallelism,
        Workload.decode(micro, context),
        dtype=dtype,
        stages=layers,
        sequence_parallel=sequence_parallel,
    )
    programs: list[list[CompiledStage | None]] = [[None, None] for _ in layers]
    if compiled:
        for at, work in enumerate((Workload.decode(micro, context), Workload.prefill(micro, width))):
            whole = dataclasses.replace(work, rows=work.rows * parallelism.data)
            steps = compile_step(
                spec,
                topology,
                parallelism,
                whole,
                capacity=capacity,
                dtype=dtype,
                stages=layers,
                sequence_parallel=sequence_parallel,
            )
            for found, step in zip(programs, steps, strict=True):
                found[at] = step
    decode, prefill = (
        predict(spec, topology, parallelism, work, dtype=dtype, stages=layers, sequence_parallel=sequence_parallel)
        for work in (Workload.decode(batch, context), Workload.prefill(batch, width))
    )
    stages = tuple(
        PlannedStage(part, memory, work, *found)
        for part, memory, work, found in zip(layers, memories, costs, programs, strict=True)
    )
    return Plan(
        spec,
        topology,
        parallelism,
        batch,
        micro * parallelism.data,
        context,
        prompt,
        dtype,
        limit,
        stages,
        decode,
        prefill,
        choice,
    )


def _time_as_dict(time: StepTime) -> dict[str, Any]:
    return {
        "seconds": time.seconds,
        "tokens_per_second": time.tokens_per_second,
        "communication": time.communication,
        "bubble": time.bubble,
        "stages": [dataclasses.asdict(stage) for stage in time.stages],
    }


def _stage_as_dict(stage: PlannedStage) -> dict[str, Any]:
    return {
        "layers": [stage.layers.start, stage.layers.stop],
        "memory": dataclasses.asdict(stage.memory) | {"total": stage.total},
        "flops": stage.work.total("flops"),
        "bytes": stage.work.total("bytes"),
        "collectives": [dataclasses.asdict(one) for one in stage.work.collectives],
        "transfer": None if stage.work.transfer is None else dataclasses.asdict(stage.work.transfer),
        "decode": None if stage.decode is None else dataclasses.asdict(stage.decode),
        "prefill": None if stage.prefill is None else dataclasses.asdict(stage.prefill),
    }


def _lines(found: Plan) -> Iterator[str]:
    if found.choice is not None:
        yield found.choice.explain()
        yield ""
    yield (
        f"{found.spec.family}, {parameter_count(found.spec) / 1e9:.4g} billion parameters, {found.dtype}, on"
        f" {found.topology}: {found.parallelism}; batch {found.batch}, context {found.context}, prompt {found.prompt}"
    )
    width, capacity = padded_lengths(found.prompt, found.context)
    if (width, capacity) != (found.prompt, found.context):
        yield f"as the engine pads them: prompts to {width} tokens, KV memory to {capacity}"
    if found.micro_batch != found.batch:
        yield f"in micro-batches of {found.micro_batch}"
    for stage, count in _alike(found.stages):
        yield ""
        yield from _stage_lines(stage, count)
    yield ""
    decode, prefill = found.decode, found.prefill
    yield (
        f"predicted: {decode.seconds * 1e3:.2f} ms a token, {decode.tokens_per_second:,.0f} tokens/s; first token after"
        f" {prefill.seconds * 1e3:.1f} ms; {decode.communication:.0%} of a token's way is communication, bubble"
        f" {decode.bubble:.0%}"
    )
    most = max(stage.total for stage in found.stages)
    verdict = "fits" if found.fits else "DOES NOT FIT"
    yield f"{verdict}: {gib(most)} of {gib(found.limit)} a device"
    seconds = sum(one.seconds for s in found.stages for one in (s.decode, s.prefill) if one is not None)
    if seconds:
        yield f"compiled for {found.topology} in {seconds:.0f} s"


def _alike(stages: tuple[PlannedStage, ...]) -> Iterator[tuple[PlannedStage, int]]:
    """Stages that need the same, as the first of them and how many there are one behind another."""
    start = 0
    for at in range(1, len(stages) + 1):
        if at == len(stages) or not _equal(stages[start], stages[at]):
            yield stages[start], at - start
            start = at


def _equal(a: PlannedStage, b: PlannedStage) -> bool:
    same = (a.memory, len(a.layers), a.work.collectives) == (b.memory, len(b.layers), b.work.collectives)
    return same and a.work.total("flops") == b.work.total("flops")


def _stage_lines(stage: PlannedStage, count: int) -> Iterator[str]:
    first, last = stage.layers.start, stage.layers.stop + (count - 1) * len(stage.layers) - 1
    alike = f", {count} stages alike" if count > 1 else ""
    memory = stage.memory
    yield f"layers {first} to {last}{alike}; on each device:"
    programs = {"decode": stage.decode, "prompt": stage.prefill}
    temporaries = ", ".join(f"{gib(one.temporaries)} {name}" for name, one in programs.items() if one is not None)
    counted = gib(memory.activations + memory.logits) + " (counted)"
    yield (
        f"  memory       {gib(stage.total)}: weights {gib(memory.weights)}, KV {gib(memory.kv)}, temporaries"
        f" {temporaries or counted}"
    )
    work = stage.work
    yield f"  a step       {work.total('flops') / 1e9:.4g} GFLOP, {gib(work.total('bytes'))} read and written"
    for name, one in programs.items():
        if one is not None:
            for collective in one.collectives:
                yield f"  {name:<12} {_collective_text(collective)}"
    if stage.decode is None:
        for collective in work.collectives:
            yield f"  {'decode':<12} {_collective_text(collective)} (counted)"
    if work.transfer is not None:
        yield f"  {'to the next':<12} {work.transfer.bytes:,} bytes over pipe"
    if stage.decode is not None and stage.decode.kernels:
        yield f"  kernels      {stage.decode.kernels} hand-written ones in a decode step"


def _collective_text(one: Collective) -> str:
    trip = " each time round a loop" if one.per_trip else ""
    over = f"{one.axis or 'other groups'} ({one.group_size})"
    return f"{one.count} x {one.kind} of {one.dtype}{list(one.shape)}, {one.bytes:,} bytes, over {over}{trip}"
