"""Runs the stages, one wave after another, each within its time, and writes down at once what they find."""

import collections
import selectors
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..report import warn
from .journal import Journal
from .stage import Stage, Wave
from .stage_process import StageProcess

_TICK = 0.1  # seconds between looks at processes that say nothing
_VITAL = 40.0  # seconds that a vital stage has at least, if need be of the reserve: on its success hangs all else
_HANGS = 10.0  # seconds after which a kernel that is being proven should have come back, compiled or not


class Runner:
    """Runs waves of stages.

    Args:
        journal: where findings go.
        width: stages that run at the same time where a wave has several.
        scratch: a folder for the stages' files.
        task: what every stage is told, see `Task`.
        environment: variables for a stage's process.

    Attributes:
        left_out: kernels that were not right, by operator and name, and why.
    """

    def __init__(
        self,
        journal: Journal,
        *,
        width: int,
        scratch: Path,
        task: Mapping[str, Any],
        environment: Callable[[Stage], Mapping[str, str]],
    ) -> None:
        self._journal, self._width = journal, width
        self._scratch, self._task, self._environment = scratch, task, environment
        self._log = journal.path.with_suffix(".log")
        self._log.write_bytes(b"")
        self._began = time.monotonic()
        self.left_out: dict[str, dict[str, str]] = {}
        journal.report["left_out"] = self.left_out  # written with whatever is written next

    @property
    def now(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._began

    def run(self, waves: Sequence[Wave], until: float) -> None:
        """Runs them in order; where a vital stage fails, the others are skipped.

        Args:
            waves: planned in the journal.
            until: seconds after the start past which no stage runs on.
        """
        ended = ""
        for wave in waves:
            if ended:
                for stage in wave.stages:
                    self._journal.note(stage, state="skipped", why=ended)
                continue
            self._run_wave(wave, until)
            for stage in wave.stages:
                entry = self._journal.entry(stage)
                if stage.operator is not None:
                    self._judge(stage.operator, entry)
                if stage.vital and entry["state"] != "done":
                    ended = f"{stage.name} {entry['state']}, without which nothing can be measured"

    def _run_wave(self, wave: Wave, until: float) -> None:
        waiting = collections.deque(enumerate(wave.stages))
        running: dict[StageProcess, float] = {}
        with selectors.DefaultSelector() as selector:
            try:
                while waiting or running:
                    while waiting and len(running) < self._width:
                        index, stage = waiting.popleft()
                        limit = max(wave.limit(index, self.now), _VITAL if stage.vital else 0)
                        limit = min(limit, until - self.now)
                        if (process := self._start(stage, limit)) is not None:
                            running[process] = limit
                            selector.register(process.descriptor, selectors.EVENT_READ, process)
                    for key, _ in selector.select(_TICK):
                        self._listen(key.data)
                        if not key.data.open:  # else it would be found ready for ever
                            selector.unregister(key.fd)
                    for process, limit in list(running.items()):
                        if (why := _over(process, limit)) is not None:
                            if process.open:
                                selector.unregister(process.descriptor)
                            self._finish(process, *why)
                            del running[process]
            finally:  # an interrupt
                for process in running:
                    self._finish(process, "interrupted", "the report was interrupted")

    def _start(self, stage: Stage, limit: float) -> StageProcess | None:
        if limit <= 0:
            self._journal.note(stage, state="skipped", why="no time is left of the report's minutes")
            return None
        warn(f"gpu: {stage.name}: {stage.title} (up to {limit:.0f} s)")
        self._journal.note(stage, state="running", limit=round(limit, 1), began=round(self.now, 1))
        task = {**self._task, "seconds": limit, "scratch": str(self._scratch), "left_out": self.left_out}
        log = self._scratch / f"{stage.name.replace('/', '-')}.log"
        try:
            return StageProcess(stage, task, self._environment(stage), log)
        except OSError as error:
            self._journal.note(stage, state="failed", why=f"no process can be started: {error}")
            return None

    def _listen(self, process: StageProcess) -> None:
        """Takes down what a stage has said."""
        for message in process.messages():
            if "what" in message:
                self._journal.add(process.stage, message)
            elif "kernel" in message:
                self._journal.note(process.stage, **message, since=round(self.now, 1))
            else:
                self._journal.note(process.stage, **message)

    def _finish(self, process: StageProcess, state: str, why: str | None) -> None:
        self._listen(process)
        stage, entry = process.stage, self._journal.entry(process.stage)
        left = process.end()
        doing, failed = entry.get("doing"), entry.pop("failed", None)
        if state == "done" and not process.done:
            state, why = "failed", "its process ended before its work was done"
        found: dict[str, Any] = {"state": state, "seconds": round(time.monotonic() - process.started, 1)}
        if state == "done":
            for name in ("doing", "kernel", "since"):
                entry.pop(name, None)
            found |= {"why": left} if left else {}
        else:
            reasons = [failed if state == "failed" and failed else why, f"it was at: {doing}" if doing else None, left]
            found |= {"why": "; ".join(filter(None, reasons)), "output": process.last_words()}
            warn(f"gpu: {stage.name}: {state}: {found['why']}")
        entry.pop("done", None)
        self._journal.note(stage, **found)
        with self._log.open("a", encoding="utf-8") as log:
            log.write(f"=== {stage.name}: {state}\n{process.last_words(1 << 20)}\n")

    def _judge(self, operator: str, entry: Mapping[str, Any]) -> None:
        """Leaves out the kernels of an operator that gave a wrong result, failed, or did not come back."""
        bad: dict[str, str] = {}
        if entry["state"] != "done" and (kernel := entry.get("kernel")):
            took = entry["began"] + entry["seconds"] - entry["since"]
            # What was only begun when the time was over may have done nothing wrong.
            if entry["state"] == "failed" or took > min(_HANGS, entry["limit"] / 3):
                bad[kernel] = f"{entry['state']}: {entry['why']}"
        for result in entry["results"]:
            if (what := result.get("wrong") or result.get("failed")) and result["by"]:
                bad.setdefault(result["by"], f"{result['what']}: {what}")
        if bad:
            self.left_out[operator] = bad
            for kernel, why in bad.items():
                warn(f"gpu: {operator}, {kernel} is left out of what follows: {why}")


def _over(process: StageProcess, limit: float) -> tuple[str, str | None] | None:
    """State of a stage that has ended or must, and why; `None` while it may run on."""
    status = process.status
    if status == 0:
        return "done", None
    if status is not None:
        return "failed", f"its process ended with {f'signal {-status}' if status < 0 else f'status {status}'}"
    if time.monotonic() - process.started > limit:
        return "ended", f"it took more than its {limit:.0f} s"
    return None
