"""`jdsi bench gpu`: everything that can be measured of this project on a GPU, in one command and a few minutes."""

import contextlib
import datetime
import os
import signal
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from jdsi.errors import ConfigError

from ..report import processors
from ..shapes import scratch
from .goals import goals_of
from .journal import Journal
from .runner import Runner
from .shortfall import fell_short
from .stage import Stage, Wave, allot, chosen
from .stage_worker import plain
from .stages import STAGES, gpu_tests, tuning

_LEAST_SECONDS = 8.0  # what starting JAX and compiling anything takes
_REHEARSAL_MINUTES, _MINUTES = 30.0, 8.0


def bench_gpu(
    output: Path,
    *,
    minutes: float | None = None,
    rehearse: bool = False,
    stages: Sequence[str] = (),
    tests: Path | None = None,
    tune: float = 0.0,
    overwrite: bool = False,
    catalogue: Sequence[Stage] = STAGES,
) -> dict[str, Any]:
    """Measures what the stages say, each in a process of its own within its part of the minutes, and writes a report.

    The report is on disk, whole, from the beginning and after every finding. Ctrl-C ends the stage that runs and the
    report with it. What the stages' processes print is kept beside it, in a file that ends in `.log`.

    Args:
        output: the report, a JSON file.
        minutes: of everything but `tune`; by default 8, in a rehearsal 30.
        rehearse: no GPU is needed: tiny sizes on the CPU, kernels interpreted, programs compiled for an H200.
        stages: names of those to run; by default all.
        tests: a folder whose GPU tests run first, within the same minutes.
        tune: so many minutes more go into tuning the arguments at which kernels fell short.
        overwrite: an existing report may be replaced.
        catalogue: the stages there are.

    Returns:
        The report.

    Raises:
        ConfigError: a number is not positive, a stage unknown, the report exists or cannot be written.
    """
    minutes = (_REHEARSAL_MINUTES if rehearse else _MINUTES) if minutes is None else minutes
    if minutes <= 0 or tune < 0:
        raise ConfigError(f"{minutes=} must be positive and {tune=} not negative")
    if output.exists() and not overwrite:
        raise ConfigError(f"report {output} exists; name another, or say --overwrite")
    wanted = _stages(catalogue, stages, tests)
    width = max(1, processors() * 2 // 3)
    waves, no_room = allot(wanted, 60 * minutes, width=width, least=0.0 if rehearse else _LEAST_SECONDS)
    settings = {"minutes": minutes, "tune": tune, "stages": stages, "tests": tests}
    journal = Journal(output, plain(_about(settings, rehearse=rehearse)))
    journal.plan([(stage, seconds) for wave in waves for stage, seconds in zip(wave.stages, wave.seconds, strict=True)])
    journal.plan([(stage, 0.0) for stage in no_room])
    for stage in no_room:
        journal.note(stage, state="skipped", why=f"{minutes:g} minutes are too few for all stages")
    with scratch() as folder, _stopped_by_signals():
        environment = partial(_environment, folder=folder, rehearse=rehearse)
        runner = Runner(journal, width=width, scratch=folder, task={"rehearsal": rehearse}, environment=environment)
        interrupted = False
        try:
            runner.run(waves, 60 * minutes)
            if tune and (cases := fell_short(journal.report)):
                stage = tuning(cases, str(output.with_suffix(".tuning.json").resolve()))
                journal.plan([(stage, 60 * tune)])
                until = runner.now + 60 * tune
                runner.run([Wave((stage,), (60 * tune,), until)], until)
        except KeyboardInterrupt:
            interrupted = True
        goals = goals_of(journal.report)
        journal.close(interrupted=interrupted, seconds=runner.now, goals=goals)
    return journal.report


def _stages(catalogue: Sequence[Stage], names: Sequence[str], tests: Path | None) -> list[Stage]:
    """Those asked for, the GPU tests behind what is vital."""
    wanted = list(chosen(catalogue, names))
    if tests is not None:
        if not tests.is_dir():
            raise ConfigError(f"tests={str(tests)!r} is no folder of tests")
        wanted.insert(sum(stage.vital for stage in wanted), gpu_tests(str(tests.resolve())))
    return wanted


def _about(settings: Mapping[str, Any], *, rehearse: bool) -> dict[str, Any]:
    return {
        "benchmark": "gpu",
        "rehearsal": rehearse,
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "settings": settings,
    }


@contextlib.contextmanager
def _stopped_by_signals() -> Iterator[None]:
    """Has SIGTERM, as `timeout` sends it, do what Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():  # where Python allows no handlers
        yield
        return

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _environment(stage: Stage, folder: Path, rehearse: bool) -> Mapping[str, str]:
    """Variables of a stage's process: one GPU, its part of the memory, and where compiled programs are kept."""
    common = {
        "JAX_COMPILATION_CACHE_DIR": str(folder / "programs"),
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
        "TRITON_CACHE_DIR": str(folder / "triton"),
        "HF_HUB_OFFLINE": "1",
    }
    if rehearse:
        # A kernel's warpgroups are threads in the interpreter, which wait for each other.
        return common | {"JAX_PLATFORMS": "cpu", "NPROC": "8"}
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0]
    share = {"XLA_CLIENT_MEM_FRACTION": f"{stage.memory:.2f}", "XLA_PYTHON_CLIENT_MEM_FRACTION": ""}  # its old name
    return common | share | {"CUDA_VISIBLE_DEVICES": visible}
