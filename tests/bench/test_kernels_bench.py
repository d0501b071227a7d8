"""The benchmark of the operators: what it compares, counts and reports, never how fast anything was."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from typer.testing import CliRunner

import fake_operator as fake
from jdsi.bench import calls, kernels
from jdsi.bench.calls import Calls, Operands, call_count, difference, tolerance
from jdsi.bench.device_limits import DeviceLimits
from jdsi.bench.kernel_peers import jax_attention
from jdsi.bench.kernel_results import Measuring
from jdsi.cli.app import app
from jdsi.errors import ConfigError, UnsupportedError
from jdsi.pallas_kernels import AttentionForm
from jdsi.pallas_kernels.device import H200, current_device, target
from jdsi.pallas_kernels.operator import ArgumentSpec
from jdsi.pallas_kernels.prefill_attention.api import PREFILL_ATTENTION
from jdsi.sharding.topology import topology_devices


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(calls, "_FIGURE_SECONDS", 1e-5)
    monkeypatch.setattr(calls, "_MOST", 3)
    monkeypatch.setattr(DeviceLimits, "of", lambda platform: DeviceLimits(2**12, 16, "float32"))
    monkeypatch.setenv("JDSI_TUNING", str(tmp_path / "tuning.json"))


@pytest.fixture
def gpu() -> Iterator[None]:
    with target(H200):
        yield


def run(*arguments: str, code: int = 0) -> str:
    result = CliRunner().invoke(app, ["bench", "kernels", "--rounds", "2", *arguments], catch_exceptions=False)
    assert result.exit_code == code, result.output
    return result.stdout


def report(*arguments: str, code: int = 0) -> dict[str, Any]:
    return json.loads(run(*arguments, "--json", code=code))


def test_every_implementation_is_measured_beside_the_limits(monkeypatch: pytest.MonkeyPatch, gpu: None) -> None:
    fake.register(monkeypatch, fake.specs(), pallas=fake.kernel(), triton=fake.kernel())
    found = report()
    assert [result["arguments"] for result in found["results"]] == ["toy n=4 float32", "toy n=6 float32"]
    result = found["results"][1]
    assert result["bytes"] == 72
    assert result["calls"] == 3
    assert result["bound"] in ("memory", "arithmetic")
    assert result["contenders"].keys() == {"xla", "pallas", "triton"}
    pallas, xla = result["contenders"]["pallas"], result["contenders"]["xla"]
    assert pallas["error"] == 0
    for r in range(2):
        microseconds = pallas["microseconds"]["rounds"][r]
        copy, rate = (result[key]["rounds"][r] for key in ("copy_gigabytes_per_second", "matmul_teraflops_per_second"))
        least = max(72 / copy / 1e3, 12 / rate / 1e6)
        assert math.isclose(pallas["share_of_limit"]["rounds"][r], least / microseconds)
        assert math.isclose(pallas["gigabytes_per_second"]["rounds"][r], 72 / microseconds / 1e3)
        assert math.isclose(pallas["teraflops_per_second"]["rounds"][r], 12 / microseconds / 1e6)
        assert math.isclose(pallas["speed_over_xla"]["rounds"][r], xla["microseconds"]["rounds"][r] / microseconds)
    for word in ("share of the limit", "speed over XLA", "toy n=4 float32", "triton"):
        assert word in run()


def test_one_that_fails_is_reported_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch, gpu: None) -> None:
    broken, refusing = fake.kernel(fails="out of registers\nmore"), fake.kernel(why_not="only on Sundays")
    fake.register(monkeypatch, fake.specs(), pallas=broken, triton=refusing)
    for result in report()["results"]:
        assert result["left_out"] == {"pallas": "RuntimeError: out of registers", "triton": "only on Sundays"}
        assert list(result["contenders"]) == ["xla"]
    assert "cube, triton: only on Sundays (all measured)" in " ".join(run().split())


@pytest.mark.parametrize("module", [fake.kernel(0.1), fake.kernel(math.nan), fake.kernel(skips_write=True)])
def test_wrong_results_have_no_speed(monkeypatch: pytest.MonkeyPatch, gpu: None, module: Any) -> None:
    """Also one that leaves out a write which is small beside the whole cache."""
    fake.register(monkeypatch, fake.specs(sizes=(4,)), pallas=module)
    (result,) = report()["results"]
    assert "differ from the reference's" in result["left_out"]["pallas"]


def test_a_reference_that_fails_does_not_end_the_run(monkeypatch: pytest.MonkeyPatch, gpu: None) -> None:
    bad = ArgumentSpec("bad", lambda key: (jnp.ones(3), jnp.ones(3)), 1, 1, {"power": 2})
    fake.register(monkeypatch, [bad, *fake.specs()], pallas=fake.kernel())
    first, *others = report()["results"]
    assert "Error" in first["failed"]
    assert all("contenders" in result for result in others)


def test_ctrl_c_shows_what_was_measured(monkeypatch: pytest.MonkeyPatch, gpu: None) -> None:
    def interrupted(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    first, second = fake.specs()
    stops = ArgumentSpec("stops", interrupted, 1, 1)
    fake.register(monkeypatch, [first, stops, second], pallas=fake.kernel())
    found = report(code=130)
    assert found["settings"]["interrupted"]
    assert [result["arguments"] for result in found["results"]] == [first.name]
    assert first.name in run(code=130)


def test_a_cpu_measures_xla_and_says_why_not_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    long = ArgumentSpec("long", fake.specs()[0].make, 10, 10**13, {"power": 2})
    fake.register(monkeypatch, [*fake.specs(sizes=(4, 10_000)), long], pallas=fake.kernel())
    small, large, slow = report("--max-bytes", "10000")["results"]
    assert list(small["contenders"]) == ["xla"]
    assert "needs an NVIDIA GPU" in small["left_out"]["pallas"]
    assert "MB allowed" in large["skipped"]
    assert "too long on a CPU" in slow["skipped"]


def test_arguments_and_implementations_can_be_chosen(monkeypatch: pytest.MonkeyPatch, gpu: None) -> None:
    arguments = [*fake.specs(), *fake.specs("bfloat16")]
    fake.register(monkeypatch, arguments, pallas=fake.kernel(), triton=fake.kernel())
    (result,) = report("--op", "cube", "--match", "n=4", "--dtype", "bfloat16", "--implementation", "pallas")["results"]
    assert result["arguments"] == "toy n=4 bfloat16"
    assert list(result["contenders"]) == ["pallas"]
    assert result["contenders"]["pallas"]["speed_over_xla"] is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--op", "cubes"), "did you mean 'cube'"),
        (("--match", "n=5"), "no arguments match 'n=5'"),
        (("--dtype", "int8"), "int8"),
        (("--implementation", "palas"), "did you mean 'pallas'"),
        (("--max-bytes", "0"), "positive"),
    ],
)
def test_mistakes_are_named(monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], message: str) -> None:
    fake.register(monkeypatch, fake.specs(), pallas=fake.kernel())
    with pytest.raises(ConfigError, match=message):
        run(*arguments)


def test_no_call_of_a_program_is_left_out_or_shared() -> None:
    """Every set of operands gives its own result, and what is updated in place is handed on."""
    (spec,) = fake.specs(sizes=(4,))
    operands = Operands(spec, 3)
    before = [np.asarray(cache) for (cache,) in operands.updated]
    program = Calls(lambda x, cache: (x * 2, cache + x), operands)
    text = program.program.lower(operands.updated, operands.kept).compile().as_text()
    assert text.count("input_output_alias") == 1
    program.run()
    program.run()
    for (x, _), (after,), old in zip(operands.kept, operands.updated, before, strict=True):
        np.testing.assert_allclose(after, old + 2 * np.asarray(x), rtol=1e-5, atol=1e-6)
    assert len({float(x[0]) for x, _ in operands.kept}) == 3


@pytest.mark.aot
def test_on_a_gpu_calls_stay_apart_and_in_place() -> None:
    """One kernel for each result of each call, no copy of a cache, and XLA has not merged calls that look alike."""
    (spec,) = fake.specs(sizes=(1024,))
    operands = Operands(spec, 4)
    everywhere = NamedSharding(Mesh(np.array(topology_devices("h200")), ("device",)), PartitionSpec())
    arrays = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere), (operands.updated, operands.kept)
    )
    with target(H200):
        compiled = Calls(lambda x, cache: (x * 2, jnp.tanh(cache) + x), operands).program.lower(*arrays).compile()
    entry = compiled.as_text().partition("ENTRY")[2]
    assert entry.count(" fusion(") == 2 * 4
    assert " copy(" not in entry
    memory = compiled.memory_analysis()
    assert memory.temp_size_in_bytes == 0
    assert memory.alias_size_in_bytes == 4 * 50 * 1024 * 4


def test_a_function_is_traced_once_for_all_calls() -> None:
    traces = []

    def function(x: jax.Array, cache: jax.Array) -> tuple[jax.Array, jax.Array]:
        traces.append(1)
        return x, cache

    Calls(function, Operands(fake.specs()[0], 5)).run()
    assert len(traces) == 1


def test_operands_that_are_reused_are_more_than_a_cache_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert call_count(fake.specs(bytes=1)[0], 1, 2**40) == 8
    with target(H200):
        check_call_counts()


def check_call_counts() -> None:
    spec = fake.specs(bytes=2**24)[0]
    assert call_count(spec, 2**24, 2**40) == 16
    assert call_count(spec, 2**24, 2**26) == 4
    assert call_count(spec, 2**24, 2**20) == 0
    assert call_count(fake.specs(bytes=2**40)[0], 2**40, 2**50) == 2
    assert call_count(fake.specs(bytes=1)[0], 1, 2**40) == 64


def test_differences() -> None:
    ones = jnp.ones((100, 100), jnp.bfloat16)
    assert difference((ones, None), (ones, None)) == 0
    assert math.isclose(difference(ones.at[3, 4].set(2), ones), 1)
    assert math.isnan(difference(ones.at[3, 4].set(jnp.nan), ones))
    assert math.isinf(difference(ones[:3], ones))
    assert difference(jnp.array([-jnp.inf, 2.0]), jnp.array([-jnp.inf, 2.0])) == 0
    assert not difference(jnp.array([1.0, 2.0]), jnp.array([-jnp.inf, 2.0])) < 1
    assert 2**-7 < tolerance((ones, jnp.ones(2, jnp.float32))) < 0.03
    assert tolerance(jnp.ones(2, jnp.float32)) < 2e-4


def test_limits_of_this_machine() -> None:
    limits = DeviceLimits(2**12, 16, "float32")
    contenders = limits.contenders()
    assert all(run() > 0 for run in contenders.values())
    assert limits.bandwidths([2.0]) == [2**12]
    assert limits.rates([2.0]) == [16**3]
    assert kernels.memory_budget(H200) > 0


@pytest.mark.parametrize(
    "form",
    [AttentionForm(0.3), AttentionForm(0.3, window=5), AttentionForm(0.3, causal=False)],
    ids=["causal", "window", "full"],
)
def test_the_peer_for_attention_computes_the_same(form: AttentionForm) -> None:
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = ((2, 16, 4, 8), (2, 2, 16, 8), (2, 2, 16, 8))
    q, k, v = (jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True))
    lengths = None if form.causal else jnp.array([16, 9], jnp.int32)
    arrays = (q, k, v, None, lengths, None, None)
    found = jax_attention(*arrays, form=form, implementation="xla")
    expected = PREFILL_ATTENTION.reference(*arrays, form=form)
    assert difference(found, expected) < 1e-5


def test_the_peer_for_attention_says_what_it_lacks() -> None:
    q, k, v = jnp.ones((1, 4, 2, 8)), jnp.ones((1, 2, 4, 8)), jnp.ones((1, 2, 4, 6))
    with pytest.raises(UnsupportedError, match="a soft cap, values of another width"):
        jax_attention(q, k, v, None, None, None, None, form=AttentionForm(1.0, softcap=30.0))


def test_cases_that_are_compiled_side_by_side_keep_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    bad = ArgumentSpec("bad", lambda key: (jnp.ones(3), jnp.ones(3)), 1, 1, {"power": 2})
    large = ArgumentSpec("large", fake.specs()[0].make, 1, 10**13, {"power": 2})
    operator = fake.register(monkeypatch, [], pallas=fake.kernel())
    measuring = Measuring(current_device(), DeviceLimits(2**12, 16, "float32"), rounds=2, max_bytes=2**20)
    first, second = fake.specs()
    found = list(measuring.results([(operator, spec) for spec in (first, bad, large, second)]))
    assert [result["arguments"] for result in found] == [first.name, "bad", "large", second.name]
    assert [next(key for key in ("contenders", "failed", "skipped") if key in result) for result in found] == [
        "contenders",
        "failed",
        "skipped",
        "contenders",
    ]
    assert found[0]["contenders"].keys() == {"xla"}
    assert found[0]["faults"] == []  # that there is no GPU is no fault
    assert "needs an NVIDIA GPU" in found[0]["left_out"]["pallas"]
