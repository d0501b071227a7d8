"""Runs several processes of `peer_worker` on this machine as one run."""

import json
import os
import pickle
import socket
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import transformers

import peer_worker
from jdsi.models import abstract_parameters
from jdsi.models.families import family_for
from zoo import CONFIGS


def pickled_model(family: str, path: Path) -> Path:
    """A random model in one file, see `peer_worker.model_at`."""
    spec = family_for(family).spec(transformers.AutoConfig.for_model(family, **CONFIGS[family]))
    random = np.random.default_rng(0)
    parameters = {
        name: random.normal(leaf.ndim == 1, 0.2, leaf.shape).astype(np.float32)
        for name, leaf in abstract_parameters(spec).items()
    }
    path.write_bytes(pickle.dumps((spec, parameters)))
    return path


class Run:
    """Processes that run one scenario; use as a context manager, whose end kills what is left of them.

    Args:
        scenario: of `peer_worker`.
        folder: where the scenario reads and writes.
        count: how many processes.
        devices: of each.
        start: how many of them are started; the others never come.
        environment: variables to add.
    """

    def __init__(
        self, scenario: str, folder: Path, count: int, devices: int, *, start: int | None = None, **environment: str
    ) -> None:
        self._folder, self._count = folder, count if start is None else start
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        variables = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)} | environment
        # All but process 0 compile every time: on CPUs, JAX's cache does not find what another process wrote.
        variables["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
        self._logs = [folder / f"{process}.log" for process in range(self._count)]
        self._processes = []
        for process, log in enumerate(self._logs):
            command = [sys.executable, peer_worker.__file__, scenario, str(folder), str(process), str(count), str(port)]
            with log.open("w") as file:
                self._processes.append(subprocess.Popen(command, stdout=file, stderr=file, env=variables))

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.kill()
            process.wait()

    def ended(self, processes: Iterable[int] | None = None, *, within: float) -> dict[int, int]:
        """Exit codes of the given processes, by default all; fails with everybody's output if they take longer."""
        wanted = range(self._count) if processes is None else processes
        end = time.monotonic() + within
        codes = {}
        for process in wanted:
            try:
                codes[process] = self._processes[process].wait(max(0.0, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                raise AssertionError(f"process {process} did not end within {within} s\n{self.output()}") from None
        return codes

    def ended_at(self, process: int) -> float:
        """When a process last printed something, as one that ends with an error does; seconds since the epoch."""
        return self._logs[process].stat().st_mtime

    def found(self, *, within: float) -> list[dict[str, Any]]:
        """What every process wrote, after all ended well."""
        codes = self.ended(within=within)
        assert not any(codes.values()), f"exit codes {codes}\n{self.output()}"
        return [json.loads((self._folder / f"{process}.json").read_text()) for process in range(self._count)]

    def output(self, process: int | None = None) -> str:
        """What a process printed, or all of them."""
        if process is not None:
            return self._logs[process].read_text()
        return "\n".join(f"--- process {p}\n{self.output(p)}" for p in range(self._count))
