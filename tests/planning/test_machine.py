"""The machines that can be planned for."""

import pytest

from jdsi.errors import ConfigError
from jdsi.pallas_kernels.device import H200, Device
from jdsi.planning import machine_for
from jdsi.sharding.topology import Topology

GPUS = ("h200", "h100", "a100")


def test_h200_as_measured() -> None:
    machine = machine_for(Topology.parse("h200:8"))
    assert machine.device == H200
    assert machine.bandwidth == pytest.approx(4.3e12, rel=0.02)
    assert machine.matmul_rate("bfloat16") == pytest.approx(790e12, rel=0.02)


@pytest.mark.aot
@pytest.mark.parametrize("name", GPUS)
def test_kernels_are_chosen_as_on_the_device_that_is_compiled_for(name: str) -> None:
    topology = Topology(name)
    assert Device.of(topology.devices()[0]) == machine_for(topology).device


@pytest.mark.parametrize("name", GPUS)
def test_figures_have_an_order(name: str) -> None:
    machine = machine_for(Topology(name))
    assert machine.matmul_rate("float32") < machine.matmul_rate("bfloat16") < machine.matmul_rate("int8")
    assert machine.between.rate < machine.inside.rate < machine.bandwidth
    assert machine.inside.latency < machine.between.latency
    assert 0.9 * machine.memory < machine.usable < machine.memory


def test_virtual_devices_share_the_machine() -> None:
    one, eight = (machine_for(Topology("cpu", 1, count)) for count in (1, 8))
    assert one.memory == pytest.approx(8 * eight.memory, rel=1e-6)
    assert one.bandwidth == pytest.approx(8 * eight.bandwidth)
    assert one.matmul_rate("float32") == pytest.approx(8 * eight.matmul_rate("float32"))


def test_unknown_dtype() -> None:
    with pytest.raises(ConfigError, match=r"float64.*bfloat16"):
        machine_for(Topology("h200")).matmul_rate("float64")
