"""A stage's process, from outside: it is started, listened to, and ended with everything that it started."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from .stage import Stage

_WORKER = Path(__file__).with_name("stage_worker.py")
_MARK = "JDSI_BENCH_STAGE"  # in the environment of the process and of all that it starts
_ENDING_SECONDS = 5.0  # a process that the driver holds on to may not end at all


class StageProcess:
    """Runs a stage.

    Args:
        stage: it.
        task: what `Task` is made of, but for how it speaks.
        environment: variables to add to ours.
        log: where its output goes.

    Attributes:
        stage: as given.
        started: `time.monotonic()` of its start.
        open: whether messages can still come.
        done: whether the stage's function said that it has come to its end.
    """

    def __init__(self, stage: Stage, task: Mapping[str, Any], environment: Mapping[str, str], log: Path) -> None:
        self.stage, self._log = stage, log
        self._token = uuid.uuid4().hex
        self._rest, self._closed, self.open, self.done = b"", False, True, False
        self._reader, writer = os.pipe()
        os.set_blocking(self._reader, False)
        settings = {
            "function": stage.function,
            "settings": dict(stage.settings),
            "task": dict(task),
            "descriptor": writer,
            "parent": os.getpid(),
        }
        # -P: the worker's folder must not be where its imports are looked for first.
        command = [sys.executable, "-P", str(_WORKER), json.dumps(settings)]
        try:
            with log.open("wb") as output:
                self._process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    pass_fds=(writer,),
                    env={**os.environ, **environment, _MARK: self._token, "PYTHONUNBUFFERED": "1"},
                    start_new_session=True,
                )
        except BaseException:
            os.close(self._reader)
            raise
        finally:
            os.close(writer)
        self.started = time.monotonic()

    @property
    def descriptor(self) -> int:
        """What to wait on for messages."""
        return self._reader

    @property
    def status(self) -> int | None:
        """How the process ended, as `Popen.poll` says it."""
        return self._process.poll()

    def messages(self) -> Iterator[dict[str, Any]]:
        """Those that have come since the last time; a line that was cut off by the end of the process is left out."""
        while self.open and not self._closed:
            try:
                data = os.read(self._reader, 1 << 16)
            except BlockingIOError:
                return
            self.open = bool(data)
            *lines, self._rest = (self._rest + data).split(b"\n")
            for line in lines:
                try:
                    message = json.loads(line)
                except ValueError:  # something else wrote to the descriptor
                    continue
                self.done |= "done" in message
                yield message

    def end(self) -> str | None:
        """Kills what is left of the process and of all that it started, and says what could not be killed.

        There are no messages afterwards. The second time does nothing.
        """
        if self.status is None:  # else the number may be another's by now
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)
        until = time.monotonic() + _ENDING_SECONDS
        while left := _marked(self._token):
            for process in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
            if time.monotonic() > until:
                break
            time.sleep(0.02)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(max(0.0, until - time.monotonic()))
        if not self._closed:
            self._closed = True
            os.close(self._reader)
        return f"processes {', '.join(map(str, left))} do not end" if left else None

    def last_words(self, most: int = 3000) -> str:
        """The end of its output."""
        try:
            return self._log.read_bytes()[-most:].decode("utf-8", "replace")
        except OSError:
            return ""


def _marked(token: str) -> list[int]:
    """The processes that have the mark in their environment, which is handed down to children and theirs."""
    mark = f"{_MARK}={token}".encode()
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # gone already, or somebody else's
            if mark in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
    return found
