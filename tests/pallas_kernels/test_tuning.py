"""How tuning chooses, with times that are made up: the fastest wins, unless it is wrong."""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import pytest

import fake_operator as fake
from jdsi.bench import Change, Failure, Selection, calls, contest, tune_kernels
from jdsi.bench.contest import Outcome
from jdsi.bench.kernel_tuning import Choice
from jdsi.errors import ConfigError
from jdsi.pallas_kernels import tuning
from jdsi.pallas_kernels.device import H200, target
from jdsi.pallas_kernels.operator import ArgumentSpec

pytestmark = pytest.mark.usefixtures("quick_compilation")

SLOW = {"xla": 8.0, "pallas": 4.0, 'pallas {"block": 8}': 2.0, 'pallas {"block": 16}': 3.0}


@pytest.fixture(autouse=True)
def table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    path = tmp_path / "new" / "tuning.json"
    monkeypatch.setenv("JDSI_TUNING", str(path))
    monkeypatch.setattr(calls, "_FIGURE_SECONDS", 1e-5)
    return path


@pytest.fixture(autouse=True)
def gpu() -> Iterator[None]:
    with target(H200):
        yield


def timer(times: Mapping[str, float] | Callable[[ArgumentSpec, str], float]) -> Callable[..., Outcome]:
    """A contest whose checks are real and whose times are made up."""
    look_up = (lambda spec, name: times[name]) if isinstance(times, Mapping) else times

    def run(spec: ArgumentSpec, reference: Any, contenders: Mapping[str, Any], *, rounds: int, max_bytes: int) -> Any:
        real = contest.contest(spec, reference, contenders, rounds=1, max_bytes=max_bytes)
        seconds = {name: [look_up(spec, name)] * rounds for name in real.seconds}
        return Outcome(seconds, real.errors, real.left_out, real.calls)

    return run


def tune(times: Any, **options: Any) -> list[Change | Failure]:
    return list(tune_kernels(rounds=2, run=timer(times), **options))


def entry(path: Path, bucket: str = "small") -> dict[str, Any]:
    return json.loads(path.read_text())[H200.kind]["cube"][bucket]


def test_the_fastest_right_one_wins_and_is_used(monkeypatch: pytest.MonkeyPatch, table: Path) -> None:
    operator = fake.register(monkeypatch, fake.specs(sizes=(4,)), pallas=fake.kernel())
    wrong = 'pallas {"block": 16, "wrong": 1}'
    (change,) = tune({**SLOW, wrong: 1.0})
    assert isinstance(change, Change)
    assert (change.before, change.after) == ("pallas", 'pallas {"block": 8}')
    assert change.speed is not None
    assert (change.speed.median, change.speed_over_xla.median) == pytest.approx((2, 4))
    assert "differ" in change.left_out[wrong]
    assert entry(table) == {"implementation": "pallas", "config": {"block": 8}, "microseconds": 2e6}
    assert tuning.lookup(H200.kind, operator.name, "small") == entry(table)


def test_a_bucket_gets_what_is_best_for_all_its_arguments(monkeypatch: pytest.MonkeyPatch, table: Path) -> None:
    fake.register(monkeypatch, fake.specs(sizes=(4, 6, 8)), pallas=fake.kernel())

    def times(spec: ArgumentSpec, name: str) -> float:
        if name == 'pallas {"block": 8}':  # good for the first alone
            return 1.0 if "n=4" in spec.name else 16.0
        return SLOW[name]

    small, large = tune(times)
    assert isinstance(small, Change)
    assert small.arguments == ("toy n=4 float32", "toy n=6 float32")
    assert small.after == large.after == 'pallas {"block": 16}'
    assert entry(table) == {**entry(table, "large"), "microseconds": 3e6}


def test_of_many_configurations_only_some_are_tried(monkeypatch: pytest.MonkeyPatch, table: Path) -> None:
    """A valley in two dimensions, from its rim to its floor."""
    module = fake.kernel()
    module.candidates = lambda *_, **__: [{"a": a, "b": b} for a in range(7) for b in range(7)]
    fake.register(monkeypatch, fake.specs(sizes=(4,)), pallas=module)
    tried = set()

    def times(spec: ArgumentSpec, name: str) -> float:
        tried.add(name)
        config = json.loads(name.partition(" ")[2] or "{}")
        return 1.0 + abs(config["a"] - 4) + abs(config["b"] - 2) if config else 100.0

    (change,) = tune(times)
    assert isinstance(change, Change)
    assert entry(table)["config"] == {"a": 4, "b": 2}
    assert len(tried) < 30


def test_kernels_can_be_chosen(monkeypatch: pytest.MonkeyPatch, table: Path) -> None:
    fake.register(monkeypatch, fake.specs(sizes=(4,)), pallas=fake.kernel(), triton=fake.kernel())
    times = {"xla": 9.0, "pallas": 5.0, "triton": 4.0, 'triton {"block": 8}': 6.0, 'triton {"block": 16}': 3.0}
    (change,) = tune(times, implementations=["triton"])
    assert isinstance(change, Change)
    assert (change.before, change.after) == ("pallas", 'triton {"block": 16}')
    with pytest.raises(ConfigError, match="did you mean 'triton'"):
        tune(times, implementations=["tritn"])


def test_a_gain_that_may_be_noise_changes_nothing(monkeypatch: pytest.MonkeyPatch, table: Path) -> None:
    fake.register(monkeypatch, fake.specs(sizes=(4,)), pallas=fake.kernel())
    (change,) = tune({**SLOW, "pallas": 2.01})
    assert isinstance(change, Change)
    assert change.before == change.after == "pallas"
    assert entry(table)["config"] == {}


def test_what_was_tuned_before_is_measured_again(monkeypatch: pytest.MonkeyPatch, table: Path) -> None:
    tuning.record(table, H200.kind, "cube", "small", {"implementation": "pallas", "config": {"block": 32}})
    fake.register(monkeypatch, fake.specs(sizes=(4,)), pallas=fake.kernel())
    (change,) = tune({**SLOW, 'pallas {"block": 32}': 1.0})
    assert isinstance(change, Change)
    assert change.before == change.after == 'pallas {"block": 32}'


def test_xla_wins_where_it_is_faster_and_where_kernels_break(monkeypatch: pytest.MonkeyPatch, table: Path) -> None:
    fake.register(monkeypatch, fake.specs(sizes=(4,)), pallas=fake.kernel())
    (change,) = tune({**SLOW, "xla": 1.0})
    assert (change.after, entry(table)["implementation"]) == ("xla", "xla")  # pyright: ignore
    broken, refusing = fake.kernel(fails="no registers"), fake.kernel(why_not="too wide")
    fake.register(monkeypatch, fake.specs(sizes=(4,)), pallas=broken, triton=refusing)
    (change,) = tune({"xla": 1.0})
    assert isinstance(change, Change)
    assert change.after == "xla"
    assert change.left_out["triton"] == "too wide"
    assert "no registers" in change.left_out["pallas"]


def test_a_bucket_that_fails_is_reported_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch, table: Path) -> None:
    first, second = fake.specs(sizes=(4, 8))
    nan = ArgumentSpec(
        "nan", lambda key: jax.tree.map(lambda x: x * float("nan"), first.make(key)), 1, 1, first.static, (1,)
    )
    fake.register(monkeypatch, [nan, second], pallas=fake.kernel())
    failure, change = tune(SLOW)
    assert isinstance(failure, Failure)
    assert "XLA's result for nan cannot be compared" in failure.reason
    assert isinstance(change, Change)
    assert json.loads(table.read_text())[H200.kind]["cube"].keys() == {"large"}


def test_every_finding_is_written_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake.register(monkeypatch, fake.specs(sizes=(4, 8)), pallas=fake.kernel())
    output = tmp_path / "other.json"
    findings = tune_kernels(Selection(match="n="), rounds=1, run=timer(SLOW), output=output)
    next(findings)
    assert json.loads(output.read_text())[H200.kind]["cube"].keys() == {"small"}
    next(findings)
    assert json.loads(output.read_text())[H200.kind]["cube"].keys() == {"small", "large"}


def test_real_times_decide_too(monkeypatch: pytest.MonkeyPatch, table: Path) -> None:
    fake.register(monkeypatch, fake.specs(sizes=(4,)), pallas=fake.kernel())
    (change,) = tune_kernels(rounds=1)
    assert isinstance(change, Change)
    assert entry(table)["microseconds"] > 0
    assert str(Choice.of(entry(table)["implementation"], entry(table)["config"])) == change.after


@pytest.mark.parametrize("path", ["/proc/nothing/tuning.json", "FILE/tuning.json"])
def test_a_table_that_cannot_be_written_is_named_first(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, path: str
) -> None:
    (tmp_path / "FILE").write_text("")
    fake.register(monkeypatch, fake.specs(), pallas=fake.kernel())
    with pytest.raises(ConfigError, match=r"tuning\.json cannot be written"):
        next(tune_kernels(output=Path(path.replace("FILE", str(tmp_path / "FILE"))), run=lambda *_, **__: None))  # pyright: ignore


def test_a_damaged_table_ends_the_run(monkeypatch: pytest.MonkeyPatch, table: Path) -> None:
    fake.register(monkeypatch, fake.specs(), pallas=fake.kernel())
    table.parent.mkdir()
    table.write_text("[")
    with pytest.raises(ConfigError, match=r"tuning\.json"):
        tune(SLOW)


def test_tuning_needs_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    fake.register(monkeypatch, fake.specs(), pallas=fake.kernel())
    with target(None), pytest.raises(ConfigError, match="NVIDIA GPU"):  # pyright: ignore
        tune(SLOW)
    with pytest.raises(ConfigError, match="rounds=0"):
        next(tune_kernels(rounds=0))
