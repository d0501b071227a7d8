"""Choosing the degrees of parallelism for a model, a machine and a goal.

DeepSpeed Inference advises tensor parallelism inside a host and the pipeline between hosts (arXiv:2207.00032, section
IV). Here all degrees are tried on the cost model.
"""

import dataclasses
from collections.abc import Iterator
from typing import get_args

from jax.typing import DTypeLike

from jdsi.errors import CapacityError, ConfigError, nearest
from jdsi.models import TransformerSpec
from jdsi.models.work import Workload
from jdsi.sharding import Parallelism
from jdsi.sharding.topology import Topology

from .candidate import TIE, Candidate, Goal, Request, describe_memory, gib, padded_lengths
from .cost_model import predict
from .explain import explain
from .machine import machine_for
from .memory import Memory, stage_memory

_MOST_ROWS = 1 << 16  # of a data-parallel group


@dataclasses.dataclass(frozen=True)
class Choice:
    """The outcome of a search.

    Attributes:
        request: what was asked.
        ranked: candidates that fit, the best first.
        rejected: the others, each with its reason.
    """

    request: Request
    ranked: tuple[Candidate, ...]
    rejected: tuple[Candidate, ...]

    @property
    def best(self) -> Candidate:
        """The chosen one."""
        return self.ranked[0]

    @property
    def parallelism(self) -> Parallelism:
        """The chosen degrees."""
        return self.best.parallelism

    def explain(self, rows: int = 8) -> str:
        """The best `rows` candidates as a table, why the first of them was chosen, and why obvious others were not."""
        return explain(self.request, self.ranked, self.rejected, rows)


def choose(
    spec: TransformerSpec,
    topology: Topology | str,
    *,
    batch: int | None = None,
    context: int,
    prompt: int | None = None,
    goal: Goal = "latency",
    memory_limit: int | None = None,
    dtype: DTypeLike = "bfloat16",
    multiple: int = 1,
) -> Choice:
    """The degrees of parallelism that serve a goal best, by the cost model.

    For latency one copy of the model takes as many devices as help it, of those that divide them all; times within 2%
    count as equal, and then fewer devices win. For throughput all devices are used.

    Args:
        spec: the model's.
        topology: the machines, such as "h200:8".
        batch: sequences at a time; by default 1 for latency, and for throughput as many as fit.
        context: tokens that a sequence has in the end.
        prompt: tokens that it starts with, by default all but one.
        goal: "latency" or "throughput".
        memory_limit: bytes of each device, by default all but what the driver and libraries take.
        dtype: of weights, activations and KV cache.
        multiple: the number of devices must be one of this, such as that of the processes, which all take part.

    Raises:
        CapacityError: nothing fits; the message names the least memory that it takes.
        ConfigError: the model cannot generate, an argument is out of range, or there are more devices than it can use.
    """
    topology = Topology.parse(topology) if isinstance(topology, str) else topology
    prompt = max(1, context - 1) if prompt is None else prompt
    check_request(spec, goal, batch, context, prompt)
    if batch is None and goal == "latency":
        batch = 1
    limit = machine_for(topology).usable if memory_limit is None else memory_limit
    request = Request(spec, topology, goal, batch, context, prompt, limit, dtype)
    candidates = [_candidate(request, parallelism) for parallelism in _degrees(request, multiple)]
    fitting = [one for one in candidates if not one.rejected]
    rejected = tuple(one for one in candidates if one.rejected)
    if not fitting:
        raise _nothing_fits(request, rejected)
    return Choice(request, tuple(_ranked(goal, fitting)), rejected)


def check_request(spec: TransformerSpec, goal: str, batch: int | None, context: int, prompt: int) -> None:
    """Raises `ConfigError` for what no degrees can run."""
    if goal not in get_args(Goal):
        raise ConfigError(f"goal={goal!r}{nearest(goal, get_args(Goal))} must be one of {get_args(Goal)}")
    if not spec.causal or spec.head is None:
        raise ConfigError(f"this {spec.family} model does not generate, and plans are for generation")
    for name, value in (("batch", 1 if batch is None else batch), ("context", context), ("prompt", prompt)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigError(f"{name}={value!r} must be an integer of at least 1")
    if prompt > context:
        raise ConfigError(f"prompt={prompt} exceeds context={context}, which it is part of")
    if spec.position_table is not None and context > spec.position_table:
        raise ConfigError(f"context={context} exceeds the {spec.position_table} positions of the learned table")


def _degrees(request: Request, multiple: int) -> Iterator[Parallelism]:
    """All that come into question, whether they fit or not."""
    count = request.topology.count
    for tensor in _divisors(count):
        for pipeline in _divisors(count // tensor):
            data = 1 if request.goal == "latency" else count // tensor // pipeline
            if tensor * pipeline * data % multiple == 0:
                yield Parallelism(tensor, pipeline, data)


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def _candidate(request: Request, parallelism: Parallelism) -> Candidate:
    layers, batch = len(request.spec.layers), request.batch or parallelism.data
    heads = max(one.most_ranks or 1 for layer in request.spec.layers for one in layer.sublayers)
    if parallelism.pipeline > layers:
        return Candidate(parallelism, batch, rejected=f"{parallelism.pipeline} stages exceed the {layers} layers")
    if parallelism.tensor > heads:
        return Candidate(parallelism, batch, rejected=f"{parallelism.tensor} ranks exceed the {heads} heads")
    if parallelism.data > batch:
        return Candidate(parallelism, batch, rejected=f"{parallelism.data} groups exceed the batch of {batch}")
    if request.batch is None and _memory(request, parallelism, 1).total <= request.limit:
        batch = parallelism.data * _most_rows(request, parallelism)
    memory = _memory(request, parallelism, -(-batch // parallelism.data))
    if memory.total > request.limit:
        return Candidate(parallelism, batch, memory, rejected=f"does not fit: {describe_memory(memory, request.limit)}")
    passes = (Workload.decode(batch, request.context), Workload.prefill(batch, request.prompt))
    decode, prefill = (
        predict(request.spec, request.topology, parallelism, work, dtype=request.dtype) for work in passes
    )
    return Candidate(parallelism, batch, memory, decode, prefill)


def _memory(request: Request, parallelism: Parallelism, rows: int) -> Memory:
    """Of the stage that needs most, with `rows` sequences in each data-parallel group."""
    width, capacity = padded_lengths(request.prompt, request.context)
    work = Workload.prefill(rows, width).divided(min(parallelism.pipeline, rows))
    stages = stage_memory(request.spec, parallelism, work, rows=rows, capacity=capacity, dtype=request.dtype)
    return max(stages, key=lambda memory: memory.total)


def _most_rows(request: Request, parallelism: Parallelism) -> int:
    """How many sequences each group has memory for, at least 1."""
    low, high = 1, _MOST_ROWS
    while low < high:
        middle = (low + high + 1) // 2
        if _memory(request, parallelism, middle).total <= request.limit:
            low = middle
        else:
            high = middle - 1
    return low


def _ranked(goal: Goal, fitting: list[Candidate]) -> list[Candidate]:
    """The best first."""

    def cost(one: Candidate) -> float:
        assert one.decode is not None
        return one.decode.seconds if goal == "latency" else 1 / one.decode.tokens_per_second

    def among_equals(one: Candidate) -> tuple[float, ...]:
        assert one.decode is not None
        return one.parallelism.devices, one.decode.seconds, cost(one)

    ranked = sorted(fitting, key=cost)
    equal = [one for one in ranked if cost(one) <= cost(ranked[0]) * TIE]
    best = min(equal, key=among_equals)
    return [best, *(one for one in ranked if one is not best)]


def _nothing_fits(request: Request, rejected: tuple[Candidate, ...]) -> Exception:
    tried = [(one.memory.total, one) for one in rejected if one.memory is not None]
    if not tried:
        reasons = "; ".join(f"{one.parallelism}: {one.rejected}" for one in rejected[:4])
        return ConfigError(f"no degrees use {request.topology} for this {request.spec.family} model: {reasons}")
    least, one = min(tried, key=lambda pair: pair[0])
    assert one.memory is not None
    return CapacityError(
        f"this {request.spec.family} model does not fit {request.topology} with batch {one.batch} and context"
        f" {request.context}: it takes at least {gib(least)} a device, with {one.parallelism}"
        f" ({describe_memory(one.memory, request.limit)})"
    )
