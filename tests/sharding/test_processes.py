"""What processes are told is compared, and bad arguments are named. Runs of several: tests/multiprocess."""

import dataclasses
from typing import Any

import jax
import pytest

import jdsi
from jdsi.errors import PeerError
from jdsi.sharding import make_mesh, processes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("localhost:1234", 2, None), "process_id must be given too"),
        ((None, None, 1), "coordinator, num_processes must be given too"),
        (("localhost:1234", 2, 2), "process_id=2 must be from 0 to 1"),
        (("localhost:1234", 0, 0), "num_processes=0 must be at least 1"),
        (("localhost", 2, 0), "must be a host and a port"),
    ],
)
def test_bad_arguments(arguments: tuple, message: str) -> None:
    with pytest.raises(jdsi.ConfigError, match=message):
        jdsi.sharding.initialize(*arguments)


def test_late() -> None:
    jax.devices()
    with pytest.raises(jdsi.ConfigError, match="before JAX is used"):
        jdsi.sharding.initialize("localhost:1234", 1, 0)


class _Board:
    """A key-value store in which the other processes have already put their settings."""

    def __init__(self, others: dict[int, str]) -> None:
        self.values = dict(others)

    def put(self, key: str, value: str) -> None:
        self.values[int(key.rpartition("/")[2])] = value

    def under(self, folder: str) -> dict[int, str]:
        return self.values

    def wait(self, key: str, seconds: float) -> None: ...

    def delete(self, key: str) -> None: ...


def _among(monkeypatch: pytest.MonkeyPatch, count: int, others: dict[int, str]) -> None:
    monkeypatch.setattr(processes, "place", lambda: (0, count))
    monkeypatch.setattr(processes, "KeyValues", lambda: _Board(others))


def test_alone_everybody_agrees() -> None:
    assert processes.agree({"a": "1"}, offer="mine") == "mine"


def test_differences_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    _among(monkeypatch, 4, {1: '[{"a": "1", "b": "2"}, ""]', 2: '[{"a": "7", "b": "2"}, ""]', 3: '[{"a": "1"}, ""]'})
    with pytest.raises(jdsi.ConfigError) as raised:
        processes.agree({"a": "1", "b": "2"})
    assert str(raised.value).endswith(
        "but a is 1 in processes 0, 1, 3 and 7 in process 2; b is 2 in processes 0, 1, 2 and absent in process 3"
    )


def test_who_did_not_come_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    _among(monkeypatch, 3, {1: "[{}, null]"})
    calls = []
    with pytest.raises(PeerError, match=r"process 0 of 3 waited 0.01 s for process 2 to come .* \(call=forward\)"):
        processes.agree({"call": "forward"}, patience=0.01, meanwhile=lambda: calls.append(1))
    assert calls


@dataclasses.dataclass(frozen=True)
class _Device:
    id: int
    process_index: int


@pytest.fixture
def six_devices_of_two_processes(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    devices = [_Device(10 * process + i, process) for process in (0, 1) for i in range(3)]
    monkeypatch.setattr(jax, "devices", lambda: devices)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    return devices


def test_mesh_takes_equally_many_devices_of_each_process(six_devices_of_two_processes: list[Any]) -> None:
    mesh = make_mesh(tensor=2, pipe=2)
    assert [device.id for device in mesh.devices.flat] == [0, 1, 10, 11]
    with pytest.raises(jdsi.ConfigError, match="take a multiple of 2, up to 6"):
        make_mesh(tensor=3)
    with pytest.raises(jdsi.ConfigError, match="take a multiple of 2, up to 6"):
        make_mesh(tensor=1)
