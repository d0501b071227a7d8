"""Predicted times: the formulas' limits, the pipeline against its schedule, and what has to grow with what."""

import dataclasses

import pytest

from jdsi.planning import Collective, Workload, collectives_seconds, machine_for, predict, step_time
from jdsi.planning.cost_model import operation_seconds
from jdsi.planning.costs import Operation, StageCosts
from jdsi.planning.links import Span, collective_seconds, span_of, transfer_spans
from jdsi.sharding import Parallelism
from jdsi.sharding.schedule import PipelineSchedule
from jdsi.sharding.topology import Topology
from planning_cases import large, small

H200 = machine_for(Topology("h200"))


def exchange(kind: str, size: int) -> Collective:
    return Collective(kind, "bf16", (size // 2,), size, 8, "tensor")


@pytest.mark.parametrize(
    ("axis", "degrees", "expected"),
    [
        ("tensor", Parallelism(8, 2, 2), Span(8, 1)),
        ("data", Parallelism(8, 2, 2), Span(2, 2)),
        ("pipe", Parallelism(8, 2, 2), Span(2, 2)),
        ("tensor", Parallelism(4, 2, 4), Span(4, 1)),
        ("data", Parallelism(4, 2, 4), Span(4, 2)),
        ("tensor", Parallelism(16, 2, 1), Span(16, 2)),
        ("tensor", Parallelism(32, 1, 1), Span(32, 4)),
        ("data+tensor", Parallelism(4, 4, 2), Span(8, 1)),
        ("tensor", Parallelism(3, 3, 1), Span(3, 2)),  # the third group lies on both sides
        ("tensor", Parallelism(1, 8, 1), Span(1, 1)),
    ],
)
def test_where_groups_lie(axis: str, degrees: Parallelism, expected: Span) -> None:
    assert span_of(axis, degrees, Topology.parse("h200:32")) == expected


def test_where_stages_lie() -> None:
    topology = Topology.parse("h200:16")
    hosts = [span.hosts for span in transfer_spans(Parallelism(2, 8), topology)]
    assert hosts == [1, 1, 1, 2, 1, 1, 1, 2]  # the last sends to the first
    assert [span.hosts for span in transfer_spans(Parallelism(8, 1), topology)] == [1]


@pytest.mark.parametrize("devices", [2, 4, 8])
def test_large_exchanges_go_at_the_speed_of_the_link(devices: int) -> None:
    size, span = 1 << 33, Span(devices)
    part = (devices - 1) / devices * size / H200.inside.rate
    assert collective_seconds(exchange("all-reduce", size), H200, span) == pytest.approx(2 * part, rel=0.01)
    for kind in ("all-gather", "reduce-scatter", "all-to-all"):
        assert collective_seconds(exchange(kind, size), H200, span) == pytest.approx(part, rel=0.01)
    sent = collective_seconds(exchange("collective-permute", size), H200, span)
    assert sent == pytest.approx(size / H200.inside.rate, rel=0.01)


def test_small_exchanges_take_their_latency() -> None:
    """A 16 KiB all-reduce of 8 H100s takes NCCL 10 to 20 microseconds; between hosts it takes several times that."""
    inside = collective_seconds(exchange("all-reduce", 16384), H200, Span(8))
    assert 8e-6 < inside < 20e-6
    assert inside == pytest.approx(collective_seconds(exchange("all-reduce", 4), H200, Span(8)), rel=0.1)
    assert 1.5 * inside < collective_seconds(exchange("all-reduce", 16384), H200, Span(64, 8)) < 10 * inside
    assert collective_seconds(exchange("all-reduce", 16384), H200, Span(1)) == 0


def test_between_hosts_every_device_has_a_port() -> None:
    size = 1 << 33
    times = [collective_seconds(exchange("all-reduce", size), H200, Span(8, hosts)) for hosts in (1, 2, 4, 8)]
    assert times == sorted(times)
    assert times[3] == pytest.approx(2 * 7 / 8 * size / H200.between.rate, rel=0.01)
    assert times[1] == pytest.approx(times[3] / 4, rel=0.01)


@pytest.mark.parametrize("kind", ["all-reduce", "all-gather", "reduce-scatter", "collective-permute", "all-to-all"])
def test_more_bytes_take_longer(kind: str) -> None:
    for span in (Span(2), Span(8), Span(16, 2), Span(64, 8)):
        times = [collective_seconds(exchange(kind, 1 << n), H200, span) for n in range(4, 32)]
        assert times == sorted(times)


def test_an_operation_takes_the_longer_of_reading_and_computing() -> None:
    reading = Operation("product", flops=10, weight_bytes=1 << 30, kv_bytes=1 << 20, activation_bytes=1 << 20)
    assert operation_seconds(reading, H200, "bfloat16") == reading.bytes / H200.bandwidth
    computing = dataclasses.replace(reading, flops=10**15)
    assert operation_seconds(computing, H200, "bfloat16") == 10**15 / H200.matmul_rate("bfloat16")
    assert operation_seconds(computing, H200, "float32") > operation_seconds(computing, H200, "bfloat16")


def test_decoding_reads_the_weights() -> None:
    """No step is faster than its bytes over the peak bandwidth, and a large model's not much slower."""
    spec = large("llama-3-70b")
    step = predict(spec, Topology.parse("h200:1"), Parallelism(), Workload.decode(1, 1024))
    assert 1.0 < step.seconds / (139e9 / 4.8e12) < 1.2
    prompt = predict(spec, Topology.parse("h200:1"), Parallelism(), Workload.prefill(1, 4096))
    assert prompt.tokens_per_second * 2 * 68.5e9 == pytest.approx(H200.matmul_rate("bfloat16"), rel=0.1)


@pytest.mark.parametrize("name", ["llama-3-70b", "lm-530b"])
def test_more_ranks_share_the_work_and_exchange_longer(name: str) -> None:
    topology = Topology.parse("h200:8")
    stages = [predict(large(name), topology, Parallelism(n), Workload.decode(4, 2048)).stages[0] for n in (1, 2, 4, 8)]
    assert [s.operations for s in stages] == sorted((s.operations for s in stages), reverse=True)
    assert [s.collectives for s in stages] == sorted(s.collectives for s in stages)
    assert stages[0].collectives == 0 < stages[1].collectives


def test_a_larger_batch_takes_longer_and_gives_more() -> None:
    spec, topology = large("llama-3-70b"), Topology.parse("h200:8")
    for degrees in (Parallelism(8), Parallelism(4, 2), Parallelism(2, 2, 2)):
        steps = [predict(spec, topology, degrees, Workload.decode(batch, 2048)) for batch in (8, 16, 32, 64)]
        assert [s.seconds for s in steps] == sorted(s.seconds for s in steps)
        assert [s.tokens_per_second for s in steps] == sorted(s.tokens_per_second for s in steps)
        assert all(0 <= s.bubble < 1 for s in steps)
        assert all(0 < s.communication < 1 for s in steps)


def stage_of(seconds: float) -> StageCosts:
    """A stage that is busy for so long, on an H200, and sends nothing."""
    operation = Operation("work", weight_bytes=round(seconds * H200.bandwidth), kernels=0)
    return StageCosts(range(1), (operation,), (), None)


@pytest.mark.parametrize("costs", [(1.0, 1.0, 1.0), (1.0, 2.0, 0.5), (3.0, 1.0, 1.0, 1.0), (1.0,)])
@pytest.mark.parametrize("micro_batches", [1, 2, 4, 8])
def test_a_pipeline_takes_as_long_as_its_schedule(costs: tuple[float, ...], micro_batches: int) -> None:
    stages, topology = len(costs), Topology.parse("h200:8")

    def step(repeated: bool) -> float:
        return step_time(
            [stage_of(cost) for cost in costs],
            topology,
            Parallelism(pipeline=stages),
            micro_batches=micro_batches,
            tokens=1,
            repeated=repeated,
        ).seconds

    def makespan(new_tokens: int) -> float:
        return PipelineSchedule(
            stages, micro_batches, micro_batches, new_tokens, prompt_cost=costs, generation_cost=costs
        ).makespan

    assert step(repeated=False) == pytest.approx(makespan(1))
    # In the middle of a long generation.
    assert step(repeated=True) == pytest.approx((makespan(40) - makespan(20)) / 20)


def test_idle_stages_are_the_bubble() -> None:
    degrees, topology = Parallelism(pipeline=4), Topology.parse("h200:8")
    for micro_batches in (1, 2, 4):
        step = step_time([stage_of(1.0)] * 4, topology, degrees, micro_batches=micro_batches, tokens=1, repeated=True)
        assert step.bubble == pytest.approx(1 - micro_batches / 4)
    prompt = step_time([stage_of(1.0)] * 4, topology, degrees, micro_batches=4, tokens=1, repeated=False)
    assert prompt.bubble == pytest.approx(3 / 7)


def test_micro_batches_are_no_more_than_rows() -> None:
    spec, topology, degrees = small("llama"), Topology.parse("h200:8"), Parallelism(1, 3, 2)
    counts = [predict(spec, topology, degrees, Workload.decode(batch, 32)).micro_batches for batch in (1, 2, 3, 5, 64)]
    assert counts == [1, 1, 2, 3, 3]
    assert predict(spec, topology, degrees, Workload.decode(64, 32), micro_batches=8).micro_batches == 8


def test_compiled_collectives_are_priced_alike() -> None:
    degrees, topology = Parallelism(4, 1, 2), Topology.parse("h200:8")
    one = dataclasses.replace(exchange("all-reduce", 4096), count=3)
    assert collectives_seconds([one], topology, degrees) == 3 * collective_seconds(one, H200, Span(4))
    everywhere, unknown = (dataclasses.replace(one, axis=axis) for axis in ("pipe+data+tensor", None))
    assert collectives_seconds([everywhere], topology, degrees) == collectives_seconds([unknown], topology, degrees)
