"""Programs that take turns in a stage: one that fails is named, and the others go on."""

import concurrent.futures
import math
from collections.abc import Callable, Mapping
from typing import Any

from ..contest import reason
from ..rounds import Ratio, interleave
from .stage_worker import Task


def take_turns(task: Task, what: str, runs: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Figures of all that do not fail, one for each round; the others are in the report.

    Args:
        task: of the stage.
        what: the case.
        runs: by name; each returns seconds. Of the first time, which may compile, they are not kept.
        rounds: figures of each.
    """
    failed: dict[str, str] = {}

    def guarded(name: str, run: Callable[[], float]) -> float:
        if name in failed:
            return math.nan
        try:
            return run()
        except Exception as error:  # one that fails must not end the others' run
            failed[name] = reason(error)
            return math.nan

    figures = interleave({name: lambda n=name, r=run: guarded(n, r) for name, run in runs.items()}, rounds)
    for name, why in failed.items():
        task.emit(what, name, failed=why)
    return {name: seconds for name, seconds in figures.items() if name not in failed}


def prepared(
    task: Task, what: str, preparations: Mapping[str, Callable[[], Any]], *, threads: int = 8
) -> dict[str, Any]:
    """What calls give that mostly compile, made side by side; those that fail are in the report, and not in here.

    Args:
        task: of the stage.
        what: the case.
        preparations: by name.
        threads: how many at a time.
    """
    found: dict[str, Any] = {}
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        under_way = {name: pool.submit(prepare) for name, prepare in preparations.items()}
        for name, future in under_way.items():
            try:
                found[name] = future.result()
            except Exception as error:  # the next one may do better
                task.emit(what, name, failed=reason(error))
    return found


def ratios(figures: Mapping[str, list[float]], name: str) -> dict[str, Ratio]:
    """How many times as fast one is as each of the others, within rounds."""
    return {other: Ratio.of(seconds, figures[name]) for other, seconds in figures.items() if other != name}
