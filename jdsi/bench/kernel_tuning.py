"""Which implementation and configuration of each operator is the fastest here, written to the tuning table.

Tuning is about speed only: nothing whose results differ from the reference's by more than rounding is ever written.
"""

import collections
import dataclasses
import json
import math
import statistics
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from jdsi.errors import ConfigError, UnsupportedError
from jdsi.pallas_kernels import tuning
from jdsi.pallas_kernels.device import Device, current_device
from jdsi.pallas_kernels.operator import IMPLEMENTATIONS, ArgumentSpec, Config, Implementation, Operator

from .contest import Function, Outcome, contest, reason
from .kernel_results import memory_budget, too_large
from .kernels import Selection, check_implementations
from .report import warn, warn_if_busy
from .rounds import Ratio

_WORTH = 1.02  # a gain below this is noise, for which the table is left as it is
_ALL = 16  # up to so many configurations are all tried, of more only some: see `_search`
_FINALISTS = 4  # of each kernel; these are measured in all rounds


@dataclasses.dataclass(frozen=True)
class Choice:
    """One way to run an operator.

    Attributes:
        implementation: its name.
        config: what is not the kernel's own choice, as JSON.
    """

    implementation: Implementation
    config: str = "{}"

    @classmethod
    def of(cls, implementation: Implementation, config: Config | None) -> "Choice":
        """From an implementation and what the kernel calls a configuration."""
        return cls(implementation, json.dumps(dict(config or {}), sort_keys=True))

    def __str__(self) -> str:
        return self.implementation if self.config == "{}" else f"{self.implementation} {self.config}"

    def function(self, operator: Operator, spec: ArgumentSpec, device: Device) -> Function:
        """The operator run so."""
        if self.implementation == "xla":
            return partial(operator.reference, **spec.static)
        run = operator.module(self.implementation).run
        return partial(run, device=device, config=json.loads(self.config) or None, **spec.static)


@dataclasses.dataclass(frozen=True)
class Change:
    """What tuning found for the arguments of one bucket.

    Attributes:
        operator: its name.
        bucket: key of the tuning table.
        arguments: names of the argument specs in it that were measured.
        before: what ran so far.
        after: what will run.
        microseconds: of a call of `after`, the mean over the arguments.
        speed: of `after` over `before`, within rounds; one figure per round, the geometric mean over the arguments.
        speed_over_xla: likewise.
        left_out: why others had no chance.
    """

    operator: str
    bucket: str
    arguments: tuple[str, ...]
    before: str
    after: str
    microseconds: float
    speed: Ratio | None
    speed_over_xla: Ratio
    left_out: Mapping[str, str]


@dataclasses.dataclass(frozen=True)
class Failure:
    """A bucket that could not be tuned, or arguments that were skipped, and why."""

    operator: str
    bucket: str
    arguments: tuple[str, ...]
    reason: str


Contest = Callable[..., Outcome]


def tune_kernels(
    selection: Iterable[tuple[Operator, ArgumentSpec]] | None = None,
    *,
    implementations: Sequence[str] = (),
    rounds: int = 5,
    output: Path | None = None,
    run: Contest = contest,
) -> Iterator[Change | Failure]:
    """Times every implementation and configuration; writes the fastest of each bucket as soon as it is known.

    Args:
        selection: operators and their arguments, as a `Selection` gives them; by default all.
        implementations: names of the kernels whose configurations are tried; by default all. What runs so far and XLA
            are always measured beside them.
        rounds: of measuring.
        output: the tuning table to write; by default the user's.
        run: takes the place of `contest`.

    Raises:
        ConfigError: there is no NVIDIA GPU, the rounds are not positive, an operator or an implementation is unknown,
            nothing is selected, or the table cannot be written.
    """
    device = current_device()
    if device.platform != "cuda":
        raise ConfigError(f"tuning chooses between kernels for NVIDIA GPUs; here is only {device.kind}")
    if rounds < 1:
        raise ConfigError(f"{rounds=} must be at least 1")
    check_implementations(implementations, IMPLEMENTATIONS)
    buckets: dict[tuple[str, str], tuple[Operator, list[ArgumentSpec]]] = {}
    for operator, spec in selection or Selection():
        key = operator.name, operator.bucket(*spec.abstract(), **spec.static)
        buckets.setdefault(key, (operator, []))[1].append(spec)
    table = output or tuning.user_table()
    _check_writable(table)
    warn_if_busy()
    max_bytes = memory_budget(device)
    for i, ((name, bucket), (operator, specs)) in enumerate(buckets.items()):
        warn(f"tune: {name}, {bucket} ({i + 1} of {len(buckets)})")
        fitting = []
        for spec in specs:
            if why := too_large(operator, spec, device, max_bytes):
                yield Failure(name, bucket, (spec.name,), why)
            else:
                fitting.append(spec)
        if not fitting:
            continue
        try:
            asked: list[Implementation] = [k for k in operator.kernels if not implementations or k in implementations]
            one = partial(run, max_bytes=max_bytes)
            change, entry = _tune(operator, bucket, fitting, device, asked, rounds, one)
        except ConfigError:  # a damaged tuning table
            raise
        except Exception as error:  # the next one may do better
            yield Failure(name, bucket, tuple(spec.name for spec in fitting), reason(error))
            continue
        tuning.record(table, device.kind, name, bucket, entry)
        yield change


def _check_writable(path: Path) -> None:
    """Raises `ConfigError` before minutes of measuring go to waste."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise ConfigError(f"tuning table {path} cannot be written: {error}") from error


def _tune(
    operator: Operator,
    bucket: str,
    specs: Sequence[ArgumentSpec],
    device: Device,
    kernels: Sequence[Implementation],
    rounds: int,
    run: Contest,
) -> tuple[Change, dict[str, Any]]:
    """The best choice for all `specs` together, which share a bucket, and the table's entry for it."""
    before = list(dict.fromkeys(_present(operator, bucket, spec, device) for spec in specs))
    found = [*before, Choice("xla")]
    left_out: dict[str, str] = {}
    for kernel in kernels:
        if why := operator.why_not(kernel, *specs[0].abstract(), device=device, **specs[0].static):
            left_out[kernel] = why
        else:
            finalists, reasons = _search(operator, specs[0], device, kernel, run)
            found += [Choice(kernel), *finalists]
            left_out |= reasons
    figures: dict[Choice, list[list[float]]] = collections.defaultdict(list)
    for spec in specs:
        outcome = _measure(operator, spec, device, found, rounds, run)
        left_out |= outcome.left_out
        for choice in dict.fromkeys(found):
            if str(choice) in outcome.seconds:
                figures[choice].append(outcome.seconds[str(choice)])
    # What fails on one of the arguments is no choice for the bucket.
    together = {choice: _means(times) for choice, times in figures.items() if len(times) == len(specs)}
    present = before[0] if len(before) == 1 and before[0] in together else None
    best = min(together, key=lambda choice: statistics.median(together[choice]))
    if present is not None and Ratio.of(together[present], together[best]).median < _WORTH:
        best = present
    microseconds = 1e6 * statistics.fmean(statistics.median(times) for times in figures[best])
    change = Change(
        operator.name,
        bucket,
        tuple(spec.name for spec in specs),
        " or ".join(map(str, before)),
        str(best),
        microseconds,
        None if present is None else Ratio.of(together[present], together[best]),
        Ratio.of(together[Choice("xla")], together[best]),
        left_out,
    )
    config = json.loads(best.config)
    return change, {"implementation": best.implementation, "config": config, "microseconds": round(microseconds, 3)}


def _present(operator: Operator, bucket: str, spec: ArgumentSpec, device: Device) -> Choice:
    """What runs so far if no implementation is named."""
    tuned = tuning.lookup(device.kind, operator.name, bucket) or {"implementation": None, "config": {}}
    first = tuned["implementation"]
    for name in () if first == "xla" else sorted(operator.kernels, key=lambda name: name != first):
        if operator.why_not(name, *spec.abstract(), device=device, **spec.static) is None:
            return Choice.of(name, tuned["config"] if name == first else None)
    return Choice("xla")


def _search(
    operator: Operator, spec: ArgumentSpec, device: Device, kernel: Implementation, run: Contest
) -> tuple[list[Choice], dict[str, str]]:
    """The fastest configurations of a kernel, each measured in one round, and why others have no time.

    Of many, only some are tried: the first and those that differ from it in one value; then those that differ in one
    value from the best so far, until there are none left to try.
    """
    configs = operator.module(kernel).candidates(*spec.abstract(), device=device, **spec.static)
    candidates = list(dict.fromkeys(Choice.of(kernel, config) for config in configs))
    seconds: dict[Choice, float] = {}
    left_out: dict[str, str] = {}
    front = candidates if len(candidates) <= _ALL else candidates[:1] + _neighbours(candidates[0], candidates)
    while front:
        outcome = _measure(operator, spec, device, [Choice("xla"), *front], 1, run)
        left_out |= outcome.left_out
        seconds |= {choice: outcome.seconds.get(str(choice), [math.inf])[0] for choice in front}
        best = min(seconds, key=lambda choice: seconds[choice])
        front = [choice for choice in _neighbours(best, candidates) if choice not in seconds]
    ranked = sorted(seconds, key=lambda choice: seconds[choice])
    return [choice for choice in ranked if seconds[choice] < math.inf][:_FINALISTS], left_out


def _neighbours(choice: Choice, among: Sequence[Choice]) -> list[Choice]:
    """Those whose configuration differs in one value."""
    config = json.loads(choice.config)

    def distance(other: Choice) -> int:
        theirs = json.loads(other.config)
        return sum(config.get(key) != theirs.get(key) for key in config.keys() | theirs.keys())

    return [other for other in among if distance(other) == 1]


def _measure(
    operator: Operator, spec: ArgumentSpec, device: Device, choices: Sequence[Choice], rounds: int, run: Contest
) -> Outcome:
    """A contest of the choices, XLA among them."""
    functions = {str(choice): choice.function(operator, spec, device) for choice in choices}
    outcome = run(spec, functions["xla"], functions, rounds=rounds)
    if "xla" not in outcome.seconds:
        raise UnsupportedError(f"XLA's result for {spec.name} cannot be compared with: {outcome.left_out['xla']}")
    return outcome


def _means(figures: Sequence[Sequence[float]]) -> list[float]:
    """The geometric mean over the arguments, round by round."""
    return [math.exp(statistics.fmean(map(math.log, one))) for one in zip(*figures, strict=True)]
