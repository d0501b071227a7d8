"""How an operator chooses among its implementations, on an operator made up here."""

import json
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdsi.errors import ConfigError, UnsupportedError
from jdsi.pallas_kernels import tuning
from jdsi.pallas_kernels.device import H200, Device, current_device, target
from jdsi.pallas_kernels.operator import Operator, default_implementation
from kernels import interpreted


def reference(x: jax.Array, scale: jax.Array | None, *, power: int) -> jax.Array:
    y = x**power
    return y if scale is None else y * scale


def fake_kernel(name: str, offset: float, limit: int) -> types.ModuleType:
    """A kernel whose results betray it: the reference's plus `offset` (plus what its configuration says)."""
    module = types.ModuleType(name)

    def why_not(x: jax.Array, scale: jax.Array | None, *, device: Device, power: int) -> str | None:
        return None if x.size <= limit else f"at most {limit} numbers, not {x.size}"

    def run(x: jax.Array, scale: jax.Array | None, *, device: Device, config: dict | None, power: int) -> jax.Array:
        return reference(x, scale, power=power) + offset + (config or {}).get("extra", 0)

    module.__dict__.update(why_not=why_not, run=run)
    return module


@pytest.fixture
def operator(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Operator]:
    monkeypatch.setitem(sys.modules, "made_up.pallas", fake_kernel("made_up.pallas", 100, limit=4))
    monkeypatch.setitem(sys.modules, "made_up.triton", fake_kernel("made_up.triton", 1000, limit=8))
    monkeypatch.setenv("JDSI_TUNING", str(tmp_path / "tuning.json"))
    return Operator("cube", "made_up", reference, lambda x, scale, *, power: f"n={x.size}", ("pallas", "triton"))


def ones(n: int) -> jax.Array:
    return jnp.ones(n)


def test_the_cpu_gets_the_reference(operator: Operator) -> None:
    np.testing.assert_array_equal(operator(ones(2), None, power=3), [1, 1])


def test_a_gpu_gets_the_first_kernel_that_takes_the_arguments(operator: Operator) -> None:
    with target(H200):
        values = [float(operator(ones(n), None, power=3)[0]) for n in (4, 8, 9)]
    assert values == [101, 1001, 1]


def test_a_kernel_that_is_expected_to_gain_nothing_runs_where_it_was_named_or_tuned(operator: Operator) -> None:
    sys.modules["made_up.pallas"].__dict__["rather_xla"] = lambda x, *_, **__: "few" if x.size <= 2 else None
    with target(H200):
        assert [float(operator(ones(n), None, power=3)[0]) for n in (2, 3)] == [1, 101]
        assert operator(ones(2), None, power=3, implementation="pallas")[0] == 101
        tuning.record(tuning.user_table(), H200.kind, "cube", "n=2", {"implementation": "pallas", "config": {}})
        assert operator(ones(2), None, power=3)[0] == 101


def test_naming_one_never_falls_back(operator: Operator) -> None:
    with target(H200):
        assert operator(ones(2), None, power=3, implementation="triton")[0] == 1001
        assert operator(ones(2), None, power=3, implementation="xla")[0] == 1
        with pytest.raises(UnsupportedError, match="cube: implementation='pallas' cannot take this: at most 4 numbers"):
            operator(ones(5), None, power=3, implementation="pallas")
        with pytest.raises(UnsupportedError, match="no implementation 'cuda'; there are xla, pallas, triton"):
            operator(ones(5), None, power=3, implementation="cuda")
    with pytest.raises(UnsupportedError, match="needs an NVIDIA GPU, not cpu"):
        operator(ones(2), None, power=3, implementation="pallas")


def test_the_tuning_table_chooses_and_configures(operator: Operator, tmp_path: Path) -> None:
    path = tuning.user_table()
    tuning.record(path, H200.kind, "cube", "n=2", {"implementation": "triton", "config": {"extra": 7}})
    tuning.record(path, H200.kind, "cube", "n=3", {"implementation": "xla", "config": {}})
    tuning.record(path, "another GPU", "cube", "n=4", {"implementation": "xla", "config": {}})
    with target(H200):
        values = [float(operator(ones(n), None, power=3)[0]) for n in (2, 3, 4)]
    assert values == [1008, 1, 101]
    assert json.loads(path.read_text())[H200.kind]["cube"]["n=2"]["config"] == {"extra": 7}


def test_a_damaged_tuning_table_is_named(operator: Operator, tmp_path: Path) -> None:
    tuning.user_table().write_text("{")
    with target(H200), pytest.raises(ConfigError, match=r"tuning\.json"):
        operator(ones(2), None, power=3)


def test_under_differentiation_the_reference_runs(operator: Operator) -> None:
    x, scale = jnp.array([1.0, 2.0]), jnp.array([3, 4])
    with target(H200):
        value, gradient = jax.value_and_grad(lambda x: operator(x, scale, power=3).sum())(x)
        second = jax.hessian(lambda x: operator(x, scale, power=3).sum())(x)
    assert value == 3 + 32
    np.testing.assert_allclose(gradient, [9, 48])
    np.testing.assert_allclose(second, [[18, 0], [0, 48]])


def test_batching_maps_the_kernel(operator: Operator) -> None:
    with target(H200):
        y = jax.vmap(lambda x: operator(x, None, power=2))(jnp.ones((3, 4)))
    np.testing.assert_array_equal(y, np.full((3, 4), 101))


def test_a_jitted_function_follows_the_target(operator: Operator) -> None:
    run = jax.jit(lambda x: operator(x, None, power=3))
    assert run(ones(2))[0] == 1
    with target(H200):
        assert run(ones(2))[0] == 101
    assert run(ones(2))[0] == 1


def test_the_default_can_be_set(operator: Operator) -> None:
    run = jax.jit(lambda x: operator(x, None, power=3))
    with target(H200):
        assert run(ones(2))[0] == 101
        with default_implementation("xla"):
            assert run(ones(2))[0] == 1
            assert operator(ones(2), None, power=3, implementation="triton")[0] == 1001
        with pytest.raises(ConfigError, match="did you mean 'triton'"), default_implementation("tritton"):
            pass


def test_device_follows_target_and_interpreter() -> None:
    assert current_device().platform == "cpu"
    with interpreted(cores=3):
        assert current_device() == Device(H200.kind, "cuda", (9, 0), 3, H200.shared_memory)
    with jax.default_device(jax.devices("cpu")[0]):
        assert current_device().platform == "cpu"


def test_shard_map_knows_that_results_differ(operator: Operator) -> None:
    """With its default check, which the plain reference passes too, however the kernel was chosen."""
    mesh = jax.make_mesh((1,), ("t",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("t")
    for name in (None, "pallas"):
        run = jax.shard_map(
            lambda x, name=name: operator(x, None, power=3, implementation=name),
            mesh=mesh,
            in_specs=spec,
            out_specs=spec,
        )
        with target(H200):
            np.testing.assert_array_equal(jax.jit(run)(ones(2)), [101, 101])


def test_kernels_count_in_32_bits(operator: Operator) -> None:
    with jax.enable_x64(True), target(H200):
        assert operator(jnp.ones(2, jnp.float32), None, power=3)[0] == 101


def test_entries_without_a_config_or_of_another_kind_are_named_or_ignored(operator: Operator) -> None:
    path = tuning.user_table()
    for entry, message in (
        ({"implementation": "pallas"}, None),
        ("pallas", "n=2"),
        ({"implementation": "pallas", "config": [1]}, "n=2"),
    ):
        path.write_text(json.dumps({H200.kind: {"cube": {"n=2": entry}}}))
        tuning._read.cache_clear()
        with target(H200):
            if message is None:
                assert operator(ones(2), None, power=3)[0] == 101
            else:
                with pytest.raises(ConfigError, match=message):
                    operator(ones(2), None, power=3)
