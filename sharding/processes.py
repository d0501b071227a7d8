"""Several processes that run one model together: how they find each other, and that they were told the same."""

import atexit
import itertools
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax

# JAX has no public name for the key-value store of its coordination service, and what it has (`multihost_utils`)
# compares values with collectives on the devices, which hang when a process died or came with something else. No other
# file uses it.
from jax._src import distributed
from jax.errors import JaxRuntimeError

from jdsi.errors import ConfigError, PeerError

_HEARTBEATS = 40  # seconds; our own watch (jdsi.runtime.peers) notices earlier, this is for before it has started
_FOR_EVER = 10**6  # seconds, for waits that we end ourselves
_rounds = itertools.count()
_when_connected: list[Callable[[], object]] = []


def place() -> tuple[int, int]:
    """Which process this is, and of how many; like `jax.process_index` and `jax.process_count`, which start JAX."""
    return distributed.global_state.process_id, distributed.global_state.num_processes


def when_connected(call: Callable[[], object]) -> None:
    """Has `initialize` call this at its end."""
    _when_connected.append(call)


def initialize(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    patience: float = 60,
) -> None:
    """Makes this process one of several whose devices JAX sees as one; a thin layer over `jax.distributed.initialize`.

    Call it before JAX is first used. Without arguments JAX finds out by itself where it can: SLURM, Open MPI,
    Kubernetes, Cloud TPU.

    Args:
        coordinator: address and port of process 0, such as `10.0.0.1:1234`; it listens there, the others call.
        num_processes: how many there are.
        process_id: which one this is, from 0 on.
        patience: seconds to wait for the others.

    Raises:
        ConfigError: some arguments are missing, the id is out of range, nothing was detected, the port is taken, or JAX
            was already used.
        PeerError: the others did not come in time.
    """
    given = {"coordinator": coordinator, "num_processes": num_processes, "process_id": process_id}
    missing = [name for name, value in given.items() if value is None]
    if missing and len(missing) < len(given):
        raise ConfigError(f"{', '.join(missing)} must be given too: all of {', '.join(given)}, or none")
    if coordinator is not None and num_processes is not None and process_id is not None:
        _check_place(coordinator, num_processes, process_id)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")  # JAX's default, which a variable could override
    name = "this process" if process_id is None else f"process {process_id} of {num_processes}"
    try:
        came = _within(patience, lambda: _connect(coordinator, num_processes, process_id))
    except JaxRuntimeError as error:
        raise ConfigError(f"{name} cannot listen at coordinator={coordinator!r}: {_first_line(error)}") from error
    except ValueError as error:
        raise ConfigError(
            f"no cluster was detected ({_first_line(error)}); give coordinator, num_processes and process_id"
        ) from error
    except RuntimeError as error:
        raise ConfigError(f"initialize must be called once, and before JAX is used: {_first_line(error)}") from error
    if not came:
        atexit.register(end_abruptly)
        address = distributed.global_state.coordinator_address
        raise PeerError(f"{name} waited {patience:g} s for all others to come to {address}; are they running?")
    for call in _when_connected:
        call()


def _check_place(coordinator: str, num_processes: int, process_id: int) -> None:
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise ConfigError(f"coordinator={coordinator!r} must be a host and a port, such as 10.0.0.1:1234")
    if num_processes < 1:
        raise ConfigError(f"num_processes={num_processes} must be at least 1")
    if not 0 <= process_id < num_processes:
        raise ConfigError(f"process_id={process_id} must be from 0 to {num_processes - 1}, one less than num_processes")


def _connect(coordinator: str | None, num_processes: int | None, process_id: int | None) -> None:
    jax.distributed.initialize(
        coordinator,
        num_processes,
        process_id,
        initialization_timeout=_FOR_EVER,
        heartbeat_timeout_seconds=_HEARTBEATS,
        # Who ends early waits for the others, however long they take; jaxlib would abort them all.
        shutdown_timeout_seconds=_FOR_EVER,
    )


def _within(seconds: float, call: Callable[[], None]) -> bool:
    """Whether `call` ended in time. It runs in a thread: at its own time-out jaxlib aborts the process."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            call()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if raised:
        raise raised[0]
    return not thread.is_alive()


def end_abruptly(message: str = "") -> None:
    """Ends the process with status 1 and without farewells, for those would wait for lost processes.

    JAX says goodbye to the coordinator, and its devices finish their work, which may wait for data that never comes.
    """
    try:
        sys.stdout.flush()
        print(message, end="\n" if message else "", file=sys.stderr, flush=True)
    finally:  # even if nobody reads that any more
        os._exit(1)


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0]


class KeyValues:
    """What the processes of a run tell each other: text by key, kept by process 0.

    Its calls are RPCs to process 0. They hang when that has died, until jaxlib aborts this process for it, and while it
    is suspended.
    """

    def __init__(self) -> None:
        client: Any = distributed.global_state.client
        if client is None:
            raise ConfigError("several processes need jdsi.sharding.initialize, or jax.distributed.initialize")
        self._client = client

    @property
    def open(self) -> bool:
        """Whether `jax.distributed.shutdown` has not been called."""
        return distributed.global_state.client is self._client

    @property
    def refused(self) -> bool:
        """Whether nobody listens where process 0 should: it has died, not merely gone quiet."""
        host, _, port = str(distributed.global_state.coordinator_address).rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=1).close()
        except ConnectionRefusedError:
            return True
        except OSError:
            pass
        return False

    def put(self, key: str, value: str) -> None:
        """Sets a value, new or not."""
        self._client.key_value_set(key, value, allow_overwrite=True)

    def under(self, folder: str) -> dict[int, str]:
        """All values with keys `folder/<process>`, by process."""
        return {int(key.rpartition("/")[2]): value for key, value in self._client.key_value_dir_get(f"{folder}/")}

    def wait(self, key: str, seconds: float) -> None:
        """Waits at most so long for a key to be there."""
        try:
            self._client.blocking_key_value_get(key, max(1, round(seconds * 1000)))
        except JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise

    def delete(self, key: str) -> None:
        """Removes a key."""
        self._client.key_value_delete(key)


def agree(
    settings: Mapping[str, str],
    *,
    offer: str = "",
    patience: float = 300,
    meanwhile: Callable[[], None] = lambda: None,
) -> str:
    """Compares settings with those of every other process; all must call this the same number of times, in order.

    No device is involved: where this passes, a computation across processes may start. In a single process it does
    nothing.

    Args:
        settings: what must be equal everywhere, by name.
        offer: something that process 0 tells the others.
        patience: seconds to wait for the others.
        meanwhile: called about once a second while waiting; may raise.

    Returns:
        The offer of process 0.

    Raises:
        ConfigError: there are differences; every process raises it, with all of them.
        PeerError: a process did not come in time.
    """
    own, processes = place()
    if processes == 1:
        return offer
    board, number = KeyValues(), next(_rounds)
    folder = f"jdsi/agree/{number}"
    board.put(f"{folder}/{own}", json.dumps([dict(settings), offer]))
    end = time.monotonic() + patience
    while len(heard := board.under(folder)) < processes:
        absent = [process for process in range(processes) if process not in heard]
        if time.monotonic() > end:
            raise PeerError(
                f"process {own} of {processes} waited {patience:g} s for {_named(absent)} to come to the same call"
                f" ({_shown(settings)})"
            )
        meanwhile()
        board.wait(f"{folder}/{absent[0]}", 1)
    if number:  # that all are here means that all have read the last round
        board.delete(f"jdsi/agree/{number - 1}/{own}")
    told = {process: json.loads(text) for process, text in heard.items()}
    _compare({process: values for process, (values, _) in told.items()})
    return told[0][1]


def _compare(told: Mapping[int, Mapping[str, str]]) -> None:
    names = dict.fromkeys(name for process in sorted(told) for name in told[process])
    differences = []
    for name in names:
        by_value: dict[str, list[int]] = {}
        for process in sorted(told):
            by_value.setdefault(told[process].get(name, "absent"), []).append(process)
        if len(by_value) > 1:
            told_by = " and ".join(f"{value} in {_named(processes)}" for value, processes in by_value.items())
            differences.append(f"{name} is {told_by}")
    if differences:
        raise ConfigError(f"all processes of a run must be told the same, but {'; '.join(differences)}")


def _named(processes: list[int]) -> str:
    shown = ", ".join(map(str, processes[:8])) + (" and more" if len(processes) > 8 else "")
    return f"process{'es' * (len(processes) > 1)} {shown}"


def _shown(settings: Mapping[str, str]) -> str:
    return ", ".join(f"{name}={value}" for name, value in list(settings.items())[:3])
