"""Measurements, and other programs, that need a process of their own."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jdsi.errors import ConfigError, JdsiError

_WORKER = Path(__file__).with_name("worker.py")


def ask(job: str, **settings: Any) -> dict[str, Any]:
    """Runs a job of `worker.py` in a fresh process and returns its answer.

    Raises:
        JdsiError: the process failed; the message holds its last words.
    """
    # -P: the worker's folder, with names as common as `start`, must not be where its imports are looked for first.
    command = [sys.executable, "-P", str(_WORKER), json.dumps({"job": job, **settings}, default=str)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise JdsiError(f"the process measuring {job!r} ended with status {done.returncode}:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


class PeerProcess:
    """Another program, which says a line of JSON when it is ready, and answers every line with another.

    It ends with `close`, or when this process does, for its input ends then.

    Args:
        name: of the peer, for messages.
        command: that starts it.

    Attributes:
        ready: what it said first.

    Raises:
        ConfigError: it failed.
        OSError: there is no such program.
    """

    def __init__(self, name: str, command: Sequence[str]) -> None:
        self._name = name
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        try:
            self.ready = self._read()
        except BaseException:
            self.close()
            raise

    def ask(self, **request: Any) -> dict[str, Any]:
        """Its answer.

        Raises:
            ConfigError: it failed, or answered that it cannot.
        """
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return self._read()

    def close(self) -> None:
        """Ends it."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise ConfigError(f"peer {self._name!r} ended with status {self._process.wait()}; see its messages above")
        answer = json.loads(line)
        if "error" in answer:
            raise ConfigError(f"peer {self._name!r}: {answer['error']}")
        return answer
