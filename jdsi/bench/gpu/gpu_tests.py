"""The GPU tests of a checkout as a stage: what failed is in the report, however far they came."""

import os
from pathlib import Path
from typing import Any

from jdsi.errors import ConfigError

from .stage_worker import Task


class Listener:
    """A plugin of pytest that says what happens.

    Attributes:
        passed, failed, skipped: tests so far.
        collected: how many there are.
    """

    def __init__(self, task: Task) -> None:
        self._task = task
        self.passed = self.failed = self.skipped = self.collected = 0

    def pytest_collection_finish(self, session: Any) -> None:
        """Notes how many tests there are."""
        self.collected = len(session.items)

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        """Notes which test begins."""
        so_far = f"{self.passed} passed, {self.failed} failed, {self.skipped} skipped of {self.collected}"
        self._task.doing(f"{nodeid} ({so_far})")

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Counts a test, and names it if it failed."""
        if report.failed:
            self.failed += 1
            lines = [line for line in report.longreprtext.splitlines() if line.strip()]
            self._task.emit(report.nodeid, failed=lines[-1][:300] if lines else "no reason was given")
        elif report.skipped:
            self.skipped += 1
        elif report.when == "call":
            self.passed += 1

    def pytest_collectreport(self, report: Any) -> None:
        """Names what could not even be collected."""
        if report.failed:
            self.failed += 1
            self._task.emit(report.nodeid, failed=report.longreprtext.splitlines()[-1][:300])


def run(task: Task, folder: str) -> None:
    """Runs the tests marked `gpu` in this process; in a rehearsal they are only collected.

    Raises:
        ConfigError: pytest is not installed, or there are no such tests.
    """
    try:
        import pytest
    except ImportError:
        raise ConfigError("the GPU tests need pytest, which is not installed: pip install 'jdsi[test]'") from None
    if not task.rehearsal:
        os.environ["JDSI_TEST_GPU"] = "1"
    listener = Listener(task)
    os.chdir(Path(folder).parent)
    arguments = [folder, "-m", "gpu", "-q", "-p", "no:cacheprovider", *(["--collect-only"] if task.rehearsal else [])]
    # Importing jdsi has imported plugins of pytest before it, which is no matter to these tests.
    arguments += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]
    status = pytest.main(arguments, plugins=[listener])
    if not listener.collected:
        raise ConfigError(f"pytest found no GPU tests in {folder}; it ended with status {int(status)}")
    facts = {name: getattr(listener, name) for name in ("collected", "passed", "failed", "skipped")}
    task.emit("tests", facts=facts)
