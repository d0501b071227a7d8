"""Which implementation and configuration of each operator is the fastest here, written to the tuning table.

Tuning is about speed only: nothing whose results differ from the reference's by more than rounding is ever written.
"""

import collections
import dataclasses
import json
import math
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from jdsi.errors import ConfigError, UnsupportedError
from jdsi.pallas_kernels import tuning
from jdsi.pallas_kernels.device import Device, current_device
from jdsi.pallas_kernels.operator import ArgumentSpec, Config, Implementation, Operator

from .contest import Function, Outcome, contest, reason
from .kernels import Selection, memory_budget, too_large
from .report import warn, warn_if_busy
from .rounds import Ratio

_WORTH = 1.02  # a gain below this is noise, for which the table is left as it is


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
    selection: Selection | None = None,
    *,
    rounds: int = 5,
    output: Path | None = None,
    run: Contest = contest,
) -> Iterator[Change | Failure]:
    """Times every implementation and configuration; writes the fastest of each bucket as soon as it is known.

    Args:
        selection: by default all arguments of all operators.
        rounds: of measuring.
        output: the tuning table to write; by default the user's.
        run: takes the place of `contest`.

    Raises:
        ConfigError: there is no NVIDIA GPU, the rounds are not positive, nothing is selected, or the table cannot be
            written.
    """
    device = current_device()
    if device.platform != "cuda":
        raise ConfigError(f"tuning chooses between kernels for NVIDIA GPUs; here is only {device.kind}")
    if rounds < 1:
        raise ConfigError(f"{rounds=} must be at least 1")
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
            one = partial(run, rounds=rounds, max_bytes=max_bytes)
            change, entry = _tune(operator, bucket, fitting, device, one)
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


def choices(operator: Operator, bucket: str, spec: ArgumentSpec, device: Device) -> tuple[list[Choice], dict[str, str]]:
    """All ways to run the operator on these arguments, what runs now first, and why some kernels are not among them."""
    arrays = spec.abstract()
    found: list[Choice] = []
    left_out: dict[str, str] = {}
    for kernel in operator.kernels:
        if why := operator.why_not(kernel, *arrays, device=device, **spec.static):
            left_out[kernel] = why
            continue
        configs = operator.module(kernel).candidates(*arrays, device=device, **spec.static)
        found += [Choice(kernel), *(Choice.of(kernel, config) for config in configs)]
    found.append(Choice("xla"))
    tuned = tuning.lookup(device.kind, operator.name, bucket)
    if tuned is not None and any(choice.implementation == tuned["implementation"] for choice in found):
        found.insert(0, Choice.of(tuned["implementation"], tuned["config"]))
    return list(dict.fromkeys(found)), left_out


def _tune(
    operator: Operator, bucket: str, specs: Sequence[ArgumentSpec], device: Device, run: Contest
) -> tuple[Change, dict[str, Any]]:
    """The best choice for all `specs` together, which share a bucket, and the table's entry for it."""
    before: list[Choice] = []
    figures: dict[Choice, list[list[float]]] = collections.defaultdict(list)
    left_out: dict[str, str] = {}
    for spec in specs:
        found, reasons = choices(operator, bucket, spec, device)
        before.append(found[0])
        functions = {str(choice): choice.function(operator, spec, device) for choice in found}
        outcome = run(spec, functions["xla"], functions)
        left_out |= reasons | outcome.left_out
        for choice in found:
            if str(choice) in outcome.seconds:
                figures[choice].append(outcome.seconds[str(choice)])
        if "xla" not in outcome.seconds:
            raise UnsupportedError(f"XLA's result for {spec.name} cannot be compared with: {outcome.left_out['xla']}")
    # What fails on one of the arguments is no choice for the bucket.
    together = {choice: _means(times) for choice, times in figures.items() if len(times) == len(specs)}
    present = before[0] if len(set(before)) == 1 and before[0] in together else None
    best = min(together, key=lambda choice: statistics.median(together[choice]))
    if present is not None and Ratio.of(together[present], together[best]).median < _WORTH:
        best = present
    microseconds = 1e6 * statistics.fmean(statistics.median(times) for times in figures[best])
    change = Change(
        operator.name,
        bucket,
        tuple(spec.name for spec in specs),
        " or ".join(dict.fromkeys(map(str, before))),
        str(best),
        microseconds,
        None if present is None else Ratio.of(together[present], together[best]),
        Ratio.of(together[Choice("xla")], together[best]),
        left_out,
    )
    config = json.loads(best.config)
    return change, {"implementation": best.implementation, "config": config, "microseconds": round(microseconds, 3)}


def _means(figures: Sequence[Sequence[float]]) -> list[float]:
    """The geometric mean over the arguments, round by round."""
    return [math.exp(statistics.fmean(map(math.log, one))) for one in zip(*figures, strict=True)]
