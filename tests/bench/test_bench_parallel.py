"""The parallel benchmark at a tiny size: that its figures are what it says they are, never how fast anything was."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from typer.testing import CliRunner

from jdsi.bench.pipeline import Case, schedule_of, slowed
from jdsi.bench.scaling import CONTEXT, LARGE, PROMPT, large_spec, scaling
from jdsi.cli.app import app
from jdsi.planning import make_plan
from jdsi.sharding import Parallelism

# Two layers of width 48; uneven over four devices, with fewer KV heads than those.
OPTIONS = ("--shape", "llama-tiny", "--pipeline-shape", "llama-tiny", "--rounds", "1", "--deep-layers", "0")
WIDTH, LAYERS, ROWS, PROMPT_TOKENS = 48, 2, 8, 16


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    degrees = ("--tensor-parallel", "4", "--pipeline-parallel", "2", "--data-parallel", "")
    command = ["bench", "parallel", *OPTIONS, *degrees, "--micro-batches", "1,2", "--topology", "h200:8", "--json"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # see compilation
        result = CliRunner().invoke(app, command, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def section(report: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    return [record for record in report["results"] if record["section"] == name]


def test_host_times_stand_beside_those_of_one_device(found: dict[str, Any]) -> None:
    records = section(found, "host")
    assert [tuple(record["parallelism"].values()) for record in records] == [
        (1, 1, 1),
        (4, 1, 1),
        (1, 2, 1),
    ]
    assert found["settings"]["devices"] == ["cpu"] * 4
    one = records[0]
    for record in records:
        assert 0 < record["issue"]["median"] <= record["waited"]["median"]
        assert record["issue_over_one"]["median"] == record["issue"]["median"] / one["issue"]["median"]
        assert record["queued_over_one"]["median"] == record["queued"]["median"] / one["queued"]["median"]


def test_programs_exchange_what_the_formula_says(found: dict[str, Any]) -> None:
    records = section(found, "exchanges")
    assert len(records) == 2 * (1 + 2)  # two phases of a program of one stage, and of one of two
    for record in records:
        tokens = ROWS * (PROMPT_TOKENS if record["phase"] == "prompt" else 1)
        assert record["tokens"] == tokens
        assert record["hidden_bytes"] == tokens * WIDTH * 4
        assert record["bytes"] == record["counted_bytes"]
        if record["parallelism"]["pipeline"] == 2:
            assert record["collectives"] == []
            assert record["passed_on"] == (tokens * WIDTH if record["stage"] == 0 else ROWS) * 4
            continue
        assert record["of_hidden_states"] == record["expected"] == 2 * LAYERS + 1
        others = record["bytes"] - (2 * LAYERS + 1) * tokens * WIDTH * 4
        assert others == 2 * ROWS * 4  # the sampler's: of each row the largest logit, and who has it
        assert {one["axis"] for one in record["collectives"]} == {"tensor"}


def test_bubbles_follow_from_the_stages_alone(found: dict[str, Any]) -> None:
    alone = {
        record["work"]: tuple(stage["rounds"][0] for stage in record["seconds"]) for record in section(found, "stage")
    }
    assert alone.keys() == {"generation", "prompt", "piece"}
    slowdown = max(1.0, section(found, "at once")[0]["over_slowest_alone"]["median"])
    records = section(found, "bubble")
    cases = [Case(**{name: record[name] for name in Case.__dataclass_fields__}) for record in records]
    assert cases == [
        *(Case("prompt", count, pieces) for count in (1, 2) for pieces in (1, 2)),
        *(Case("generation", count, flush=flush) for count in (1, 2) for flush in (False, True)),
    ]
    for case, record in zip(cases, records, strict=True):
        costs = alone["piece" if case.pieces == 2 else case.phase]
        passes = 8 if case.phase == "generation" else case.pieces
        busy = case.micro_batches * passes * sum(costs)
        assert record["bubble"]["median"] == pytest.approx(1 - busy / (2 * record["seconds"]["median"]))
        schedule = schedule_of(case, costs, 8)
        assert schedule.busy == pytest.approx(busy)
        assert record["scheduled_bubble"]["median"] == pytest.approx(schedule.bubble_fraction)
        assert record["slowed_seconds"]["median"] == pytest.approx(slowed(schedule, slowdown))
    assert [record["speed_over_flushed"] is not None for record in records] == [False] * 4 + [True] * 4


def test_schedules_of_equal_stages() -> None:
    """Two stages: half of a lone micro-batch's time is bubble; two fill the pipeline but for its ends."""
    alone = (1.0, 1.0)
    assert schedule_of(Case("generation", 1), alone, 8).bubble_fraction == pytest.approx(1 / 2)
    assert schedule_of(Case("generation", 2), alone, 8).makespan == pytest.approx(17)
    assert schedule_of(Case("generation", 2, flush=True), alone, 8).makespan == pytest.approx(24)
    assert schedule_of(Case("prompt", 2, pieces=2), alone, 8).makespan == pytest.approx(5)


def test_stages_that_slow_each_other_down() -> None:
    """Of 17 units both stages work in 15, and four stages in turns never do."""
    assert slowed(schedule_of(Case("generation", 2), (1.0, 1.0), 8), 1.2) == pytest.approx(2 + 15 * 1.2)
    assert slowed(schedule_of(Case("generation", 1), (1.0,) * 4, 8), 1.2) == pytest.approx(32)
    # Three stages and two micro-batches: both at work for half of the time, at half of the slowdown.
    assert slowed(schedule_of(Case("prompt", 2), (1.0,) * 3, 1), 1.2) == pytest.approx(2 + 2 * 1.1)


def predicted(records: Sequence[Mapping[str, Any]]) -> None:
    for record in records:
        assert record["source"] == "predicted by the cost model, not measured"
        degrees = Parallelism(**record["parallelism"])
        plan = make_plan(
            large_spec(record["model"]),
            record["topology"],
            degrees,
            batch=record["batch"],
            context=CONTEXT,
            prompt=PROMPT,
            compiled=False,
        )
        assert record["seconds_per_token"] == plan.decode.seconds
        assert record["tokens_per_second"] == plan.decode.tokens_per_second
        assert record["bytes_per_device"] == max(stage.total for stage in plan.stages)
        assert record["communication"] == plan.decode.communication
        assert plan.fits


def test_predictions_are_the_planners(found: dict[str, Any]) -> None:
    records = section(found, "scaling")
    assert {(record["model"], record["goal"]) for record in records} == {
        (model, goal) for model in LARGE for goal in ("latency", "throughput")
    }
    assert {record["topology"] for record in records} == {"h200:8"}
    predicted(records)


def test_a_model_that_does_not_fit_is_named() -> None:
    records = [record for record in scaling(["a100:1", "a100:64"]) if record["model"] == "llama-3.1-405b"]
    assert [record["fits"] for record in records] == [False, True, False, True]
    assert "does not fit a100:1" in records[0]["why"]
    assert records[1]["speed_over_first"] == 1
    predicted([record for record in records if record["fits"]])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--shape", "llama-huge"), "llama-huge"),
        (("--topology", "h2000:8"), "h2000"),
        (("--tokens", "40"), "multiple"),
        (("--stages", "3"), "exceeds the 2 layers"),
        (("--pipeline-parallel", "4"), "exceeds the 2 layers"),
        (("--data-parallel", "3"), "multiple of every data-parallel degree"),
        (("--tensor-parallel", "2,x"), "numbers with commas"),
        (("--rounds", "0"), "at least 1"),
    ],
)
def test_bad_input_is_named_before_anything_is_measured(arguments: tuple[str, ...], message: str) -> None:
    from jdsi.errors import ConfigError

    options = dict(zip(OPTIONS[::2], OPTIONS[1::2], strict=True)) | {"--pipeline-parallel": "2"}
    options |= {arguments[0]: arguments[1]}
    command = ["bench", "parallel", *(part for option in options.items() for part in option)]
    with pytest.raises(ConfigError, match=message):
        CliRunner().invoke(app, command, catch_exceptions=False)
