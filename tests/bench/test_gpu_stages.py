"""Every stage of the GPU report at a tiny size on the CPU, and what stages make of wrong kernels and odd machines."""

import importlib
import inspect
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fake_operator as fake
from jdsi.bench import calls
from jdsi.bench.gpu import machine, operator_cases, proofs, tune
from jdsi.bench.gpu.backend import leave_out
from jdsi.bench.gpu.contenders import prepared, take_turns
from jdsi.bench.gpu.operators import report as report_operator
from jdsi.bench.gpu.stage import Stage
from jdsi.bench.gpu.stage_worker import Task, plain
from jdsi.bench.gpu.stages import STAGES, gpu_tests, tuning
from jdsi.bench.gpu.step_profile import compile_for_h200, thunk_facts
from jdsi.bench.gpu.step_trace import device_events, event_facts
from jdsi.errors import ConfigError, UnsupportedError
from jdsi.pallas_kernels import linear, registry
from jdsi.pallas_kernels.device import H200, target
from jdsi.pallas_kernels.linear import api
from jdsi.pallas_kernels.quantized_linear import WeightFormat, quantize
from jdsi.pallas_kernels.quantized_linear import api as quantized_api

# One of each kind of function, and of each kernel's way to be interpreted; all others are slow.
QUICK = (
    "machine",
    "limits",
    "right/add_norm",
    "right/linear",
    "speed/linear",
    "quantized",
    "streaming",
    "profile",
    "decode/gpt-2-xl",
    "prefill/llama-8b",
)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "_FIGURE_SECONDS", 1e-5)


def collect(**settings: Any) -> tuple[Task, list[dict[str, Any]]]:
    """A task, and the list that its findings go to, as they come out of the report."""
    found: list[dict[str, Any]] = []

    def say(message: Any) -> None:
        if "what" in message:
            found.append(json.loads(json.dumps(plain(message), allow_nan=False)))

    return Task(say, seconds=1000, **settings), found


def run(stage: Stage, scratch: Path) -> list[dict[str, Any]]:
    """What a stage finds in a short rehearsal."""
    module, _, function = stage.function.partition(":")
    task, found = collect(rehearsal=True, short=True, scratch=str(scratch))
    getattr(importlib.import_module(module), function)(task, **json.loads(json.dumps(dict(stage.settings))))
    return found


def check(stage: Stage, found: list[dict[str, Any]]) -> None:
    assert found, stage.name
    bad = [result for result in found if result.get("failed") or result.get("wrong")]
    assert not bad, (stage.name, bad)
    skipped = {result["skipped"] for result in found if result.get("skipped")}
    assert skipped <= {"a short rehearsal"}, (stage.name, skipped)


def test_stages_run_on_a_cpu(tmp_path: Path, quick_compilation: None) -> None:
    by_name = {stage.name: stage for stage in STAGES}
    found = {name: run(by_name[name], tmp_path) for name in QUICK}
    for name, results in found.items():
        check(by_name[name], results)

    def timed(name: str) -> set[str]:
        return {result["by"] for result in found[name] if "seconds" in result}

    assert timed("speed/linear") == {"xla", "pallas"}
    assert timed("decode/gpt-2-xl") == {"kernels", "xla", "kernels, steps alone"}
    assert timed("prefill/llama-8b") == {"kernels", "xla"}
    assert timed("quantized") == {"bfloat16", "bfloat16, xla", "int8", "int4"}
    assert timed("streaming") == {"kernels", "kernels, 8 batches"}
    assert timed("profile") == {"graphs", "no graphs"}
    assert {result["what"] for result in found["limits"]} >= {"copy", "matmul", "host's part of a call"}
    (proof,) = found["right/linear"]
    assert proof["error"] < 1e-2
    assert proof["facts"] == {"runs of equal bits": 2}
    streamed = next(result["facts"] for result in found["streaming"] if result["what"] == "memory")
    assert 0 < streamed["bytes of them that every pass streams"] < streamed["bytes of weights"]


@pytest.mark.slow
def test_all_other_stages_run_on_a_cpu(tmp_path: Path) -> None:
    for stage in STAGES:
        if stage.name not in QUICK:
            check(stage, run(stage, tmp_path))


def test_stages_are_sound_data() -> None:
    """Their functions exist and take their settings, which JSON holds."""
    for stage in (*STAGES, gpu_tests("tests"), tuning({"linear": ["a"]}, "table")):
        module, _, name = stage.function.partition(":")
        function = getattr(importlib.import_module(module), name)
        inspect.signature(function).bind(None, **json.loads(json.dumps(dict(stage.settings))))
        assert 0 < stage.memory < 1
    assert sum(stage.vital for stage in STAGES) == 1
    assert STAGES[0].vital


def test_every_operator_is_proven_and_timed_at_arguments_that_exist() -> None:
    assert set(operator_cases.PROVEN) == set(operator_cases.TIMED) == set(registry.NAMES)
    for table in (operator_cases.PROVEN, operator_cases.TIMED):
        for operator, names in table.items():
            assert len(operator_cases.specs_of(operator, names)) == len(set(names))
    with pytest.raises(ConfigError, match="no arguments named 'a horse'"):
        operator_cases.specs_of("linear", ["a horse"])


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv("JDSI_TUNING", str(tmp_path / "tuning.json"))
    with target(H200):
        yield


def prove(monkeypatch: pytest.MonkeyPatch, **kernels: Any) -> list[dict[str, Any]]:
    arguments = fake.specs()
    fake.register(monkeypatch, arguments, **kernels)
    monkeypatch.setattr(proofs, "PROVEN", {"cube": [spec.name for spec in arguments]})
    monkeypatch.setattr(proofs, "_REPEATS", 3)
    task, found = collect()
    proofs.prove(task, "cube")
    return found


def test_a_proof_tells_right_kernels_from_others(monkeypatch: pytest.MonkeyPatch, on_gpu: None) -> None:
    found = prove(monkeypatch, pallas=fake.kernel(), triton=fake.kernel(0.1))
    assert [(result["what"], result["by"]) for result in found] == [
        (f"toy n={n} float32", kernel) for n in (4, 6) for kernel in ("pallas", "triton")
    ]
    for right, wrong in zip(found[::2], found[1::2], strict=True):
        assert right["error"] == 0
        assert right["facts"] == {"runs of equal bits": 3}
        assert "differ from the reference's by" in wrong["wrong"]
    found = prove(monkeypatch, pallas=fake.kernel(fails="out of registers"), triton=fake.kernel(why_not="on Sundays"))
    assert [result.get("failed") for result in found[::2]] == ["RuntimeError: out of registers"] * 2
    assert [result.get("skipped") for result in found[1::2]] == ["on Sundays"] * 2


def test_a_kernel_whose_bits_change_is_wrong(monkeypatch: pytest.MonkeyPatch, on_gpu: None) -> None:
    """Within rounding every time, and another rounding every time: a race."""
    drawn = iter(np.arange(100) * 1e-6)
    module = fake.kernel()
    usual = module.run

    def races(x: jax.Array, cache: jax.Array, **how: Any) -> Any:
        y, written = usual(x, cache, **how)
        off = jax.pure_callback(lambda: np.float32(next(drawn)), jax.ShapeDtypeStruct((), jnp.float32))
        return y + off, written

    module.run = races
    found = prove(monkeypatch, pallas=module)
    assert found[0]["wrong"] == "3 of 3 runs on the same values give other bits"


def test_kernels_left_out_are_not_found_any_more(monkeypatch: pytest.MonkeyPatch, on_gpu: None) -> None:
    monkeypatch.setattr(api, "LINEAR", api.LINEAR)  # to have it back
    x, weight = jnp.ones((1, 256), jnp.bfloat16), jnp.ones((64, 256), jnp.bfloat16)

    def kernels() -> str:
        return str(jax.make_jaxpr(lambda x, w: linear(x, w))(x, weight))

    assert "linear_pallas" in kernels()
    leave_out({"linear": {"pallas": "wrong", "triton": "wrong"}})
    assert "linear_pallas" not in kernels()
    # Products with quantised weights are another operator behind the same function.
    assert quantized_api.QUANTIZED_LINEAR.kernels
    monkeypatch.setattr(quantized_api, "QUANTIZED_LINEAR", quantized_api.QUANTIZED_LINEAR)
    leave_out({"quantized_linear": {"pallas": "wrong"}})
    with pytest.raises(UnsupportedError, match="no implementation 'pallas'"):
        linear(x, quantize(weight, WeightFormat("int8")), implementation="pallas")
    assert registry.operators()["linear"].operator.kernels == ()
    assert registry.operators()["add_norm"].operator.kernels == ("pallas",)
    with pytest.raises(UnsupportedError, match="no implementation 'pallas'"):
        linear(x, weight, implementation="pallas")


def test_a_contender_that_fails_is_named_and_the_others_go_on() -> None:
    task, found = collect()
    tired = iter([1.0, 2.0])
    runs = {"good": lambda: 3.0, "bad": lambda: 1 / 0, "tires": lambda: next(tired)}
    assert take_turns(task, "a case", runs, 2) == {"good": [3.0, 3.0]}
    assert {result["by"]: result["failed"].partition(":")[0] for result in found} == {
        "bad": "ZeroDivisionError",
        "tires": "StopIteration",
    }
    task, found = collect()
    assert prepared(task, "a case", {"good": lambda: 5, "bad": lambda: 1 / 0}) == {"good": 5}
    assert [result["by"] for result in found] == ["bad"]


def test_what_an_operator_fails_at_is_told_from_what_it_does_not_offer() -> None:
    task, found = collect()
    result = {"operator": "linear", "arguments": "some", "bytes": 1, "flops": 1}
    report_operator(task, result | {"left_out": {"triton": "no GPU", "pallas": "it broke"}, "faults": ["pallas"]})
    report_operator(task, result | {"skipped": "too large"})
    assert [(one["by"], one.get("skipped"), one.get("failed")) for one in found] == [
        ("triton", "no GPU", None),
        ("pallas", None, "it broke"),
        ("", "too large", None),
    ]


def test_tuning_stops_in_time_and_says_what_it_found(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, on_gpu: None
) -> None:
    arguments = fake.specs(sizes=(4, 8))
    fake.register(monkeypatch, arguments, pallas=fake.kernel())
    task, found = collect()
    names = [spec.name for spec in arguments]
    tune.tune(task, {"cube": names}, str(tmp_path / "table.json"))
    assert [result["what"] for result in found] == [f"cube, {name}" for name in names]
    assert json.loads((tmp_path / "table.json").read_text())[H200.kind]["cube"].keys() == {"small", "large"}
    task, found = collect()
    task.seconds = 0
    tune.tune(task, {"cube": names}, str(tmp_path / "table.json"))
    assert [result["what"] for result in found] == [f"cube, {names[0]}", "what is left to tune"]


SMI = """#!/bin/sh
case "$1" in
*query-gpu*) echo "NVIDIA H200, {driver}, 143771, 0, 345, 1980, 3201, 700.00, 30, 5, 16, Disabled";;
*) echo "{others}";;
esac
"""


def test_the_driver_and_neighbours_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    smi = tmp_path / "nvidia-smi"
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    smi.write_text(SMI.format(driver="570.1", others="4711, 1024"))
    smi.chmod(0o755)
    task, found = collect()
    with pytest.raises(ConfigError, match=r"JAX finds no NVIDIA GPU here, only cpu.*--rehearse"):
        machine.look(task)
    gpu, driver, others = found
    assert gpu["facts"]["name"] == "NVIDIA H200"
    assert gpu["facts"]["pcie.link.width.max"] == "16"
    assert "driver 570.1 is older than 580" in driver["failed"]
    assert others["failed"].startswith("4711, 1024")
    assert machine.driver_fault("580.159.04") is None
    assert "no NVIDIA driver" in str(machine.driver_fault(None))
    smi.write_text("#!/bin/sh\nexit 9\n")
    assert machine.gpu_facts() == {}


THUNKS = """000: kCommandBuffer [source | sink]
    001: kCustomCall [source | next=002 (1)] custom_call
    002: kCopy [prev=001 (1) | sink] copy
003: kGemm [source | sink] gemm
004: kCommandBuffer [source | sink]
    005: kCustomCall [source | sink] custom_call
"""


def test_thunks_are_counted_inside_and_outside_of_graphs() -> None:
    assert thunk_facts(THUNKS) == {
        "CUDA graphs": 2,
        "launches inside them": 3,
        "launches outside": 1,
        "outside: Gemm": 1,
        "inside: CustomCall": 2,
        "inside: Copy": 1,
    }
    plain_list = THUNKS.replace("    ", "").replace("kCommandBuffer", "kCopy")
    assert thunk_facts(plain_list)["launches outside"] == 6


@pytest.mark.aot
def test_a_whole_model_s_step_compiles_for_an_h200(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """GPT-J's, cut to two layers: our kernels are in it, and in CUDA graphs."""
    from jdsi.bench.gpu import model_shapes

    usual = model_shapes.model_config

    def two_layers(name: str, *, tiny: bool = False) -> Any:
        config = usual(name, tiny=tiny)
        config.n_layer = 2
        return config

    monkeypatch.setattr(model_shapes, "model_config", two_layers)
    task, found = collect(rehearsal=True, scratch=str(tmp_path))
    compile_for_h200(task, "gpt-j")
    facts = found[0]["facts"]
    assert facts["kernels of ours"] >= 2 * 6
    assert facts["CUDA graphs"] >= 1
    assert facts["launches inside them"] >= facts["kernels of ours"]


class Data:
    """Something with attributes, as the profiler's types."""

    def __init__(self, **attributes: Any) -> None:
        self.__dict__.update(attributes)


def test_a_trace_tells_work_from_gaps() -> None:
    def event(name: str, start: float, duration: float) -> Data:
        return Data(name=name, start_ns=start, duration_ns=duration)

    compute = [event("gemm", 0, 4000), event("gemm", 10_000, 4000)]
    copies = [event("MemcpyD2D", 3000, 3000)]
    planes = [
        Data(name="/host:CPU", lines=[Data(name="Stream of thoughts", events=[event("x", 0, 9e9)])]),
        Data(
            name="/device:GPU:0",
            lines=[
                Data(name="Stream #1(Compute)", events=compute),
                Data(name="Stream #2(MemcpyD2D)", events=copies),
                Data(name="XLA Ops", events=[event("derived", 0, 9e9)]),
            ],
        ),
    ]
    facts = event_facts(device_events(Data(planes=planes)), steps=2)
    assert facts["us from first to last"] == 7.0
    assert facts["us at work"] == 5.0
    assert facts["us idle in between"] == 2.0
    assert facts["launches"] == 1.5
    assert facts["copies and fills"] == 0.5
    assert facts["us of gemm (x1.0)"] == 4.0
    assert facts["us idle behind MemcpyD2D"] == 4.0
    assert event_facts([], 2) == {"trace": "nothing ran on a GPU"}
