"""How long a step takes, predicted from its work and the machine.

An operation takes the longer of its bytes over the memory bandwidth and its operations over the matrix rate, each at
the part of the peak that kernels reach, and the launch of its kernels. Operations and exchanges follow one another.
Stages of a pipeline work at the same time on different micro-batches; what they send goes out beside their work, and
only the micro-batch that waits for it loses the time. This is `jdsi.sharding.schedule.PipelineSchedule` in closed form,
for stages that differ.

Left out: overlap of communication with computation, efficiency of skewed or small products, of which some reach less
than a large one, the host's part, which a queue that runs ahead hides, contention of groups for the same links, and any
imbalance between sequences: all are as long as the longest.
"""

import dataclasses
from collections.abc import Iterable, Sequence

from jax.typing import DTypeLike

from jdsi.models import TransformerSpec
from jdsi.models.work import Workload
from jdsi.sharding import Parallelism
from jdsi.sharding.topology import Topology

from .collectives import Collective
from .costs import Operation, StageCosts, stage_costs
from .links import collective_seconds, span_of, transfer_spans
from .machine import Machine, machine_for


@dataclasses.dataclass(frozen=True)
class StageTime:
    """Seconds that a stage takes for one micro-batch.

    Attributes:
        operations: reading, writing and computing.
        launches: between kernels.
        collectives: exchanges within the stage.
        transfer: until what it sends has arrived at the next stage.
    """

    operations: float
    launches: float
    collectives: float
    transfer: float

    @property
    def busy(self) -> float:
        """How long it is taken up; sending goes on beside the next micro-batch."""
        return self.operations + self.launches + self.collectives


@dataclasses.dataclass(frozen=True)
class StepTime:
    """The predicted time of a step of the whole batch.

    Attributes:
        stages: for one micro-batch.
        micro_batches: of a data-parallel group.
        tokens: of the whole batch, in a step.
        repeated: the step is one of many, each micro-batch's next one queued as soon as its last is done; otherwise the
            pipeline starts and ends empty.
    """

    stages: tuple[StageTime, ...]
    micro_batches: int
    tokens: int
    repeated: bool

    @property
    def latency(self) -> float:
        """Seconds of one micro-batch through all stages, alone."""
        return sum(stage.busy + stage.transfer for stage in self.stages)

    @property
    def seconds(self) -> float:
        """Of a step; of a repeated one until all micro-batches had their turn on the slowest stage, or one is round."""
        slowest = max(stage.busy for stage in self.stages)
        if self.repeated:
            return max(self.latency, self.micro_batches * slowest)
        return self.latency + (self.micro_batches - 1) * slowest

    @property
    def tokens_per_second(self) -> float:
        """Of the whole batch."""
        return self.tokens / self.seconds

    @property
    def bubble(self) -> float:
        """The part of the stages' time in which they do nothing."""
        busy = self.micro_batches * sum(stage.busy for stage in self.stages)
        return 1 - busy / (len(self.stages) * self.seconds)

    @property
    def communication(self) -> float:
        """The part of a micro-batch's way through the stages that is exchanges between devices."""
        return sum(stage.collectives + stage.transfer for stage in self.stages) / self.latency


def predict(
    spec: TransformerSpec,
    topology: Topology,
    parallelism: Parallelism,
    work: Workload,
    *,
    micro_batches: int | None = None,
    dtype: DTypeLike = "bfloat16",
    stages: Sequence[range] | None = None,
    sequence_parallel: bool | None = None,
) -> StepTime:
    """The time of a step: of a decode step in a long generation, or of a prompt from its start to its first token.

    Args:
        spec: the model's.
        topology: the machines.
        parallelism: degrees.
        work: the whole batch, over all data-parallel groups.
        micro_batches: into how many a group's rows are cut; by default one for each stage, if there are as many rows.
        dtype: of weights, activations and KV cache.
        stages: layers of each, by default `even_stages`.
        sequence_parallel: see `stage_costs`.

    Raises:
        ConfigError: there are more stages than layers, or no rate is known for products of `dtype`.
    """
    group = work.divided(parallelism.data)
    micro_batches = min(micro_batches or parallelism.pipeline, group.rows)
    costs = stage_costs(
        spec,
        parallelism,
        group.divided(micro_batches),
        dtype=dtype,
        stages=stages,
        sequence_parallel=sequence_parallel,
    )
    repeated = work.new_tokens == 1
    return step_time(
        costs, topology, parallelism, micro_batches=micro_batches, tokens=work.tokens, repeated=repeated, dtype=dtype
    )


def step_time(
    costs: Sequence[StageCosts],
    topology: Topology,
    parallelism: Parallelism,
    *,
    micro_batches: int,
    tokens: int,
    repeated: bool,
    dtype: DTypeLike = "bfloat16",
) -> StepTime:
    """The time of a step whose stages do this work; see `StepTime` for what the arguments mean."""
    machine, spans = machine_for(topology), transfer_spans(parallelism, topology)
    times = []
    for stage, span in zip(costs, spans, strict=True):
        times.append(
            StageTime(
                operations=sum(operation_seconds(one, machine, dtype) * one.count for one in stage.operations),
                launches=stage.total("kernels") * machine.launch,
                collectives=collectives_seconds(stage.collectives, topology, parallelism),
                transfer=0.0 if stage.transfer is None else collective_seconds(stage.transfer, machine, span),
            )
        )
    return StepTime(tuple(times), micro_batches, tokens, repeated)


def operation_seconds(operation: Operation, machine: Machine, dtype: DTypeLike) -> float:
    """How long one of `operation` takes, without its launches."""
    return max(operation.bytes / machine.bandwidth, operation.flops / machine.matmul_rate(dtype))


def collectives_seconds(collectives: Iterable[Collective], topology: Topology, parallelism: Parallelism) -> float:
    """How long exchanges take one after another, predicted or read from a compiled program; a loop's body once.

    Args:
        collectives: each over axes of our meshes; one over none of them is taken to be as spread as can be.
        topology: the machines.
        parallelism: degrees.
    """
    machine, everywhere = machine_for(topology), "+".join(("pipe", "data", "tensor"))
    return sum(
        collective_seconds(one, machine, span_of(one.axis or everywhere, parallelism, topology)) * one.count
        for one in collectives
    )
