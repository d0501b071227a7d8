"""Names of machines that are not here, and their devices."""

import jax
import pytest

from jdsi.errors import ConfigError
from jdsi.sharding.topology import Topology, topology_devices


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("h200", Topology("h200", 1, 1)),
        ("h200:1", Topology("h200", 1, 1)),
        ("h200:8", Topology("h200", 1, 8)),
        (" H100:4 ", Topology("h100", 1, 4)),
        ("a100:16", Topology("a100", 2, 8)),
        ("h200:256", Topology("h200", 32, 8)),
        ("cpu:12", Topology("cpu", 1, 12)),
    ],
)
def test_names(text: str, expected: Topology) -> None:
    topology = Topology.parse(text)
    assert topology == expected
    assert topology.count == expected.hosts * expected.devices_per_host
    assert Topology.parse(str(topology)) == topology


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("h2000:8", "did you mean 'h200'"),
        ("tpu:8", "known: h200, h100, a100, cpu"),
        ("h200:0", "at least one"),
        ("h200:12", "h200:8 or h200:16"),
        ("h200:-8", "must look like"),
        ("h200:8:8", "must look like"),
        ("", "must look like"),
    ],
)
def test_bad_names(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Topology.parse(text)


def test_devices_of_this_machine() -> None:
    count = len(jax.devices("cpu"))
    assert list(Topology("cpu", 1, count).devices()) == jax.devices("cpu")
    with pytest.raises(ConfigError, match=f"JAX_NUM_CPU_DEVICES={count + 1}"):
        Topology("cpu", 1, count + 1).devices()


def test_unknown_devices() -> None:
    with pytest.raises(ConfigError, match="known"):
        topology_devices("b300")


@pytest.mark.aot
def test_devices_of_a_host_stand_together() -> None:
    devices = Topology.parse("h200:32").devices()
    assert [device.process_index for device in devices] == [i // 8 for i in range(32)]
    assert [device.id for device in devices] == list(range(32))
