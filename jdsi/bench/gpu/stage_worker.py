"""What runs a stage: `python stage_worker.py SETTINGS`, a process of its own, told what to do as JSON.

A script that needs nothing but Python, so that a stage that loads little starts quickly. What it finds goes to the file
descriptor it is given, one line of JSON each, at once.
"""

import ctypes
import dataclasses
import faulthandler
import importlib
import json
import math
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

_MARGIN = 3.0  # seconds of a stage's end that it does not plan to use
_PR_SET_PDEATHSIG = 1


@dataclasses.dataclass
class Task:
    """What a stage's function is given: how it is to run, and where its findings go.

    Attributes:
        say: sends one message.
        seconds: from the start of its process to its end, by whatever means.
        rehearsal: tiny sizes on a CPU, kernels interpreted, programs of real sizes compiled for an H200.
        scratch: a folder for files, which the report deletes.
        left_out: kernels that were not proven right, by operator and name, and why.
        short: in a rehearsal, only the first case of each kind and no compiling, as the tests do.
    """

    say: Callable[[Mapping[str, Any]], None]
    seconds: float
    rehearsal: bool = False
    scratch: str = ""
    left_out: Mapping[str, Mapping[str, str]] = dataclasses.field(default_factory=dict)
    short: bool = False
    _started: float = dataclasses.field(default_factory=time.monotonic)

    @property
    def left(self) -> float:
        """Seconds that the stage may still plan with."""
        return self.seconds - min(_MARGIN, 0.1 * self.seconds) - (time.monotonic() - self._started)

    def emit(self, what: str, by: str = "", **found: Any) -> None:
        """Adds a finding to the report.

        Args:
            what: the case.
            by: who or what it was measured of, where there are several.
            found: `seconds` (see `spread`), `bytes` and `flops` of what took them, `rate`, `share`, `over` (a ratio for
                each of the others), `error`, `tokens_per_second`, `facts` (anything else, by name); or why there is
                nothing: `skipped`, `failed`, `wrong`.
        """
        self.say({"what": what, "by": by, **found})

    def doing(self, text: str, kernel: str | None = None) -> None:
        """Notes what comes next: what the report names if nothing is heard of the stage any more.

        Args:
            text: for people.
            kernel: the one that is about to be proven; it is left out of what follows if nothing is heard.
        """
        self.say({"doing": text, "kernel": kernel})

    def cases[Case](
        self, cases: Sequence[Case], name: Callable[[Case], str] = str, need: float | None = None
    ) -> Iterator[Case]:
        """The cases, while there is time for one; those left are named in the report.

        Args:
            cases: in order of value.
            name: what a case is called.
            need: seconds that one takes; by default as many as the longest so far.
        """
        longest = 0.0
        for i, case in enumerate(cases[:1] if self.short else cases):
            if self.left < (longest if need is None else need):
                rest = [name(one) for one in cases[i:]]
                self.emit(", ".join(rest), skipped=f"{len(rest)} cases: no time is left")
                return
            begun = time.monotonic()
            self.doing(name(case))
            yield case
            longest = max(longest, time.monotonic() - begun)


def plain(value: Any) -> Any:
    """What JSON holds: dataclasses as objects, numbers that are not finite and anything unknown as text."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return plain({field.name: getattr(value, field.name) for field in dataclasses.fields(value)})
    if isinstance(value, Mapping):
        return {str(key): plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    return value if value is None or isinstance(value, str | int) else str(value)


def end_with_parent(parent: int) -> None:
    """Has the kernel kill this process when process `parent`, which started it, is gone."""
    try:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    except (OSError, AttributeError):  # no Linux: it runs until its work is done
        return
    if os.getppid() != parent:
        os._exit(1)


def main() -> None:
    """Runs the stage that the argument describes."""
    settings = json.loads(sys.argv[1])
    end_with_parent(settings["parent"])
    os.set_inheritable(settings["descriptor"], False)
    with os.fdopen(settings["descriptor"], "w", buffering=1) as pipe:

        def say(message: Mapping[str, Any]) -> None:
            pipe.write(json.dumps(plain(message)) + "\n")

        task = Task(say, **settings["task"])
        faulthandler.enable()
        faulthandler.dump_traceback_later(max(0.1, task.seconds - 1))  # so that the log tells where it hung
        status = 0
        try:
            module, _, function = settings["function"].partition(":")
            getattr(importlib.import_module(module), function)(task, **settings["settings"])
            say({"done": True})
        except BaseException as error:
            traceback.print_exc()
            first = next(iter(str(error).splitlines()), "")
            say({"failed": f"{type(error).__name__}: {first[:500]}"})
            status = 1
        sys.stdout.flush()
        sys.stderr.flush()
        # What libraries do at the end of a process has nothing to do with the stage, and may hang.
        os._exit(status)


if __name__ == "__main__":
    main()
