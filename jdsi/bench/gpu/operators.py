"""How fast operators are at sizes of real models: every implementation, XLA's and the peers', beside the limits."""

import itertools
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from jdsi.pallas_kernels import registry
from jdsi.pallas_kernels.device import H200, current_device

from ..contest import footprint
from ..device_limits import DeviceLimits
from ..kernel_results import Case, Measuring, memory_budget
from ..report import spread
from ..rounds import Ratio
from .backend import start
from .operator_cases import TIMED, specs_of
from .stage_worker import Task
from .tiny_operators import tiny_spec

_ROUNDS = 5
_AT_A_TIME = 6  # cases that are compiled side by side


def measure(task: Task, operators: Sequence[str]) -> None:
    """Measures operators at the arguments of `TIMED`.

    Args:
        task: the stage's.
        operators: their names, in order of value: the first cases of each go before the second ones.
    """
    device = start(task)
    known = registry.operators()
    by_operator = [[(known[name].operator, spec) for spec in specs_of(name, TIMED[name])] for name in operators]
    if task.rehearsal:
        _rehearse(task, by_operator)
        return
    measuring = Measuring(device, DeviceLimits.of(device.platform), rounds=_ROUNDS, max_bytes=memory_budget(device))
    pieces = [list(itertools.batched(cases, _AT_A_TIME)) for cases in by_operator]
    turns = [piece for turn in itertools.zip_longest(*pieces) for piece in turn if piece]
    for cases in task.cases(turns, _names):
        for result in measuring.results(cases):
            report(task, result)


def _names(cases: Sequence[Case]) -> str:
    return f"{cases[0][0].name}: {', '.join(spec.name for _, spec in cases)}"


def report(task: Task, result: Mapping[str, Any]) -> None:
    """Adds a record of `Measuring` to the report, one finding for each contender."""
    emit = partial(task.emit, result["arguments"], operator=result["operator"])
    for what in ("skipped", "failed"):
        if what in result:
            emit(**{what: result[what]})
    contenders = result.get("contenders", {})
    seconds = {name: [us * 1e-6 for us in entry["microseconds"]["rounds"]] for name, entry in contenders.items()}
    for name, entry in contenders.items():
        emit(
            name,
            seconds=spread(seconds[name]),
            bytes=result["bytes"],
            flops=result["flops"],
            share=entry["share_of_limit"],
            over={other: Ratio.of(theirs, seconds[name]) for other, theirs in seconds.items() if other != name},
            error=entry["error"],
        )
    for name, why in result.get("left_out", {}).items():
        emit(name, **{"failed" if name in result["faults"] else "skipped": why})


def _rehearse(task: Task, by_operator: Sequence[Sequence[Case]]) -> None:
    """Every operator's kernel interpreted against XLA at a tiny size, and compiled for an H200 at the real ones."""
    from .rehearsal import compile_seconds, interpreted, why_not_compiled

    limits = DeviceLimits(2**12, 16, "float32")
    for cases in by_operator:
        operator = cases[0][0]
        spec = tiny_spec(operator.name)
        task.doing(spec.name)
        enough = 2 * footprint(spec, partial(operator.reference, **spec.static))
        with interpreted(operator.name):
            measuring = Measuring(
                current_device(), limits, rounds=1, max_bytes=enough, implementations=("xla", "pallas")
            )
            for result in measuring.results([(operator, spec)]):
                report(task, result)
        if task.short:
            return
    if why := why_not_compiled():
        task.emit("programs for an H200", skipped=why)
        return
    for operator, spec in task.cases(list(itertools.chain(*by_operator)), lambda case: case[1].name):
        if "pallas" not in operator.kernels or operator.why_not("pallas", *spec.abstract(), device=H200, **spec.static):
            continue
        call = partial(operator, implementation="pallas", **spec.static)
        seconds = compile_seconds(call, *spec.abstract())
        task.emit(spec.name, "pallas", operator=operator.name, facts={"seconds to compile": round(seconds, 1)})
