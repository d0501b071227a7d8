"""Tuning, as a stage, where the report found kernels to fall short."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from jdsi.pallas_kernels import registry

from ..kernel_tuning import Change, tune_kernels
from .backend import start
from .operator_cases import specs_of
from .stage_worker import Task

_ROUNDS = 3


def tune(task: Task, cases: Mapping[str, Sequence[str]], table: str) -> None:
    """Tunes operators at some arguments until the time is over; each finding is in the table at once.

    Args:
        task: the stage's.
        cases: by operator, names of argument specs, in order of what is to be gained.
        table: the tuning table to write.
    """
    start(task)
    known = registry.operators()
    selection = [(known[name].operator, spec) for name, names in cases.items() for spec in specs_of(name, names)]
    longest, began = 0.0, time.monotonic()
    task.doing("tuning")
    for outcome in tune_kernels(selection, rounds=_ROUNDS, output=Path(table)):
        what = f"{outcome.operator}, {', '.join(outcome.arguments)}"
        if isinstance(outcome, Change):
            facts = {"before": outcome.before, "after": outcome.after, "us": round(outcome.microseconds, 1)}
            over = {"xla": outcome.speed_over_xla} | ({"before": outcome.speed} if outcome.speed else {})
            task.emit(what, "tuned", over=over, facts=facts)
        else:
            task.emit(what, "tuned", failed=outcome.reason)
        longest, began = max(longest, time.monotonic() - began), time.monotonic()
        if task.left < longest:
            task.emit("what is left to tune", skipped="no time is left")
            return
