"""Measurements, and other programs, that need a process of their own."""

import contextlib
import json
import select
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
        waits: until it is ready; else `answer` has to be called before anything is asked.

    Attributes:
        ready: what it said first, once it has.

    Raises:
        ConfigError: it failed.
        OSError: there is no such program.
    """

    def __init__(self, name: str, command: Sequence[str], *, waits: bool = True) -> None:
        self._name = name
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.ready: dict[str, Any] = {}
        try:
            if waits:
                self.ready = self._read()
        except BaseException:
            self.close()
            raise

    def ask(self, **request: Any) -> dict[str, Any]:
        """Its answer.

        Raises:
            ConfigError: it failed, or answered that it cannot.
        """
        self.begin(**request)
        return self._read()

    def begin(self, **request: Any) -> None:
        """Asks without waiting for what `answer` then gives.

        Raises:
            ConfigError: it has ended.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise ConfigError(self._ended()) from None

    def answer(self, within: float) -> dict[str, Any] | None:
        """What it says next, be it that it is ready; `None` if that takes longer than `within` seconds.

        Raises:
            ConfigError: it failed, or answered that it cannot.
        """
        assert self._process.stdout is not None
        # Nothing of an answer can have been read ahead: it is one line, and comes after it was asked for.
        if not select.select([self._process.stdout], [], [], max(0.0, within))[0]:
            return None
        answer = self._read()
        self.ready = self.ready or answer
        return answer

    def close(self, patience: float = 30) -> None:
        """Ends it, by force if it takes longer than so many seconds."""
        if self._process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()
        try:
            self._process.wait(timeout=patience)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise ConfigError(self._ended())
        answer = json.loads(line)
        if "error" in answer:
            raise ConfigError(f"peer {self._name!r}: {answer['error']}")
        return answer

    def _ended(self) -> str:
        return f"peer {self._name!r} ended with status {self._process.wait()}; see its messages above"
