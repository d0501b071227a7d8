"""What a run of the tests costs: its dearest modules, and the programs that were compiled for it."""

from collections import Counter
from typing import Any

import pytest

_COMPILED, _READ = "/jax/core/compile/backend_compile_duration", "/jax/compilation_cache/cache_hits"
_MODULES = 10  # named at the end


class Costs:
    """A plugin of pytest, in every process of a run: counts programs where tests run, and reports where they end.

    Processes that tests start are not looked into: of those only the time is in the report.
    """

    def __init__(self) -> None:
        self.programs: Counter[str] = Counter()

    def pytest_collection_finish(self) -> None:
        """Listens to JAX; under xdist it is the workers that collect."""
        import jax

        jax.monitoring.register_event_duration_secs_listener(self._count)
        jax.monitoring.register_event_listener(self._count)

    def _count(self, event: str, *_: object, **__: object) -> None:
        if event in (_COMPILED, _READ):
            self.programs[event] += 1

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Hands a worker's numbers to the process that reports."""
        if hasattr(session.config, "workeroutput"):
            session.config.workeroutput["programs"] = dict(self.programs)

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        """Takes them; a worker that crashed has none."""
        self.programs.update(getattr(node, "workeroutput", {}).get("programs", {}))

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        """Names the dearest modules, fixtures included, and the number of programs."""
        seconds: Counter[str] = Counter()
        for reports in terminalreporter.stats.values():
            for report in reports:
                if isinstance(report, pytest.TestReport):
                    seconds[report.nodeid.partition("::")[0]] += report.duration
        if not seconds:
            return
        total, read = sum(seconds.values()), self.programs[_READ]
        terminalreporter.section(f"dearest {_MODULES} modules")
        for name, spent in seconds.most_common(_MODULES):
            terminalreporter.line(f"{spent:7.1f} s {spent / total:5.1%}  {name}")
        compiled = self.programs[_COMPILED] - read  # JAX calls both compiling
        terminalreporter.line(f"{total:7.1f} s in all; {compiled} programs compiled, {read} read from the cache")
