"""Degrees chosen by the cost model."""

import dataclasses
import math

import pytest

from jdsi.errors import CapacityError, ConfigError
from jdsi.planning import Choice, Workload, choose, machine_for, predict, stage_memory
from jdsi.sharding import Parallelism
from jdsi.sharding.topology import Topology
from planning_cases import large, small

CASES = [
    ("llama-3-70b", "h200:8", {"context": 4096}),
    ("llama-3-70b", "h100:8", {"context": 4096, "batch": 16}),
    ("llama-3-70b", "h200:8", {"context": 4096, "prompt": 512, "goal": "throughput"}),
    ("llama-3-70b", "h200:16", {"context": 4096, "batch": 64, "goal": "throughput"}),
    ("llama-3-405b", "h200:16", {"context": 8192}),
    ("lm-530b", "h200:256", {"context": 2048, "prompt": 512, "goal": "throughput"}),
]


@pytest.mark.parametrize(("name", "topology", "options"), CASES)
def test_what_is_chosen_fits_and_is_best(name: str, topology: str, options: dict) -> None:
    choice = choose(large(name), topology, **options)
    count = Topology.parse(topology).count
    latency = choice.request.goal == "latency"
    for one in choice.ranked:
        assert one.memory is not None
        assert one.decode is not None
        assert one.memory.total <= choice.request.limit
        devices = one.parallelism.devices
        assert count % devices == 0 if latency else devices == count
        assert not (latency and one.parallelism.data > 1)
    costs = [
        1 / one.decode.tokens_per_second if not latency else one.decode.seconds for one in choice.ranked if one.decode
    ]
    assert costs[0] <= 1.02 * min(costs)
    assert costs[1:] == sorted(costs[1:])
    assert all(one.rejected for one in choice.rejected)
    everything = {one.parallelism for one in (*choice.ranked, *choice.rejected)}
    assert len(everything) == len(choice.ranked) + len(choice.rejected)
    # All ways to write the number of devices, or its divisors, as a product.
    exponent = int(math.log2(count))
    assert len(everything) == (exponent + 1) * (exponent + 2) // 2


def test_memory_of_a_candidate_is_that_of_its_fullest_stage() -> None:
    spec = large("llama-3-70b")
    choice = choose(spec, "h200:8", context=4096, prompt=1024, batch=8, goal="throughput")
    (one,) = [c for c in choice.ranked if c.parallelism == Parallelism(2, 2, 2)]
    work = Workload.prefill(2, 1024)  # 8 sequences over 2 groups of 2 micro-batches
    stages = stage_memory(spec, one.parallelism, work, rows=4, capacity=4096)
    assert one.memory == max(stages, key=lambda memory: memory.total)
    assert one.decode == predict(spec, choice.request.topology, one.parallelism, Workload.decode(8, 4096))


@pytest.mark.parametrize("limit", [40, 60, 100, 140])
def test_a_memory_limit_is_kept(limit: int) -> None:
    spec = large("llama-3-70b")
    for goal, batch in (("latency", 4), ("throughput", None), ("throughput", 32)):
        choice = choose(spec, "h200:8", context=2048, batch=batch, goal=goal, memory_limit=limit << 30)
        assert all(one.memory.total <= limit << 30 for one in choice.ranked if one.memory)


def test_the_batch_is_the_largest_that_fits() -> None:
    spec = large("llama-3-70b")
    choice = choose(spec, "h200:8", context=4096, prompt=512, goal="throughput")
    for one in choice.ranked:
        rows, rest = divmod(one.batch, one.parallelism.data)
        assert rest == 0
        for more, fits in ((0, True), (1, False)):
            work = Workload.prefill(rows + more, 512).divided(one.parallelism.pipeline)
            stages = stage_memory(spec, one.parallelism, work, rows=rows + more, capacity=4096)
            assert (max(stage.total for stage in stages) <= choice.request.limit) == fits


def test_a_small_model_stays_on_one_device() -> None:
    choice = choose(small("llama"), "h200:8", context=128)
    assert choice.parallelism == Parallelism()
    assert "one device" in choice.explain()


def test_a_large_model_takes_all_fast_links() -> None:
    assert choose(large("llama-3-70b"), "h200:8", context=4096).parallelism == Parallelism(tensor=8)


def test_ties_go_to_fewer_devices() -> None:
    spec, topology = large("llama-3-70b"), Topology.parse("h200:8")
    choice = choose(spec, topology, context=1024, batch=1)
    assert choice.best.decode is not None
    # Two stages are no faster for one sequence.
    stages = predict(spec, topology, Parallelism(4, 2), Workload.decode(1, 1024)).seconds
    alone = predict(spec, topology, Parallelism(4, 1), Workload.decode(1, 1024)).seconds
    assert alone <= stages <= 1.02 * alone
    ranked = [one.parallelism for one in choice.ranked]
    assert ranked.index(Parallelism(4, 1)) < ranked.index(Parallelism(4, 2))


def test_nothing_fits() -> None:
    spec = large("llama-3-405b")
    with pytest.raises(CapacityError, match=r"at least (\d+\.\d) GiB a device, with tensor 8 x") as failure:
        choose(spec, "a100:8", context=8192)
    # The engine pads the prompt of 8191 tokens to 8192, and makes room for one more.
    memory = stage_memory(spec, Parallelism(8), Workload.prefill(1, 8192), rows=1, capacity=8192 + 128)[0]
    assert f"{memory.total / 2**30:.1f} GiB a device" in str(failure.value)
    assert f"{machine_for(Topology('a100')).usable / 2**30:.1f} GiB" in str(failure.value)
    # With what it asks for, it fits.
    assert choose(spec, "a100:8", context=8192, memory_limit=memory.total).parallelism == Parallelism(8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"goal": "latncy"}, "did you mean 'latency'"),
        ({"batch": 0}, "batch=0"),
        ({"context": 0}, "context=0"),
        ({"context": 16, "prompt": 17}, "prompt=17 exceeds context=16"),
        ({"context": 2.5}, "context=2.5"),
    ],
)
def test_bad_arguments(options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        choose(small("llama"), "h200:8", **({"context": 64} | options))


def test_models_and_machines_that_do_not_go_together() -> None:
    with pytest.raises(ConfigError, match="256 positions of the learned table"):
        choose(small("gpt2"), "h200:8", context=257)
    with pytest.raises(ConfigError, match="no degrees use h200:64"):
        choose(small("llama"), "h200:64", context=64, batch=1, goal="throughput")
    encoder = dataclasses.replace(small("llama"), head=None)
    with pytest.raises(ConfigError, match="does not generate"):
        choose(encoder, "h200:8", context=64)


def chosen_and_others(choice: Choice) -> tuple[str, list[str]]:
    lines = choice.explain().splitlines()
    (chosen,) = [line for line in lines if line.startswith("Chosen: ")]
    return chosen, [line for line in lines if line.startswith("- ")]


def test_explanations() -> None:
    choice = choose(large("llama-3-70b"), "h200:8", context=4096, batch=1)
    text = choice.explain(rows=3)
    assert "70.55 billion parameters, for latency on h200:8" in text
    assert f"(and {len(choice.ranked) - 3} more that fit)" in text
    header, first = text.splitlines()[1:3]
    assert header.split()[:3] == ["tensor", "pipeline", "data"]
    assert first.split()[:4] == ["8", "1", "1", "8"]
    chosen, others = chosen_and_others(choice)
    assert "tensor 8 x pipeline 1 x data 1" in chosen
    assert any("tensor 1 x pipeline 8" in line and "times as long" in line for line in others)

    choice = choose(large("llama-3-70b"), "h100:8", context=4096, batch=8, goal="throughput")
    _, others = chosen_and_others(choice)
    (alone,) = [line for line in others if "tensor 1 x pipeline 1 x data 8" in line]
    assert "does not fit: 131.4 GiB weights" in alone
    assert "there are 76.6 GiB" in alone


def test_explanations_of_throughput_tell_memory_from_exchanges() -> None:
    _, others = chosen_and_others(choose(large("llama-3-70b"), "h200:8", context=4096, prompt=512, goal="throughput"))
    assert any("data 8: " in line and "there is memory for" in line for line in others)
    assert any("tensor 8 x" in line and "exchange data for longer" in line for line in others)
