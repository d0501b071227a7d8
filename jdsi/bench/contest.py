"""Implementations of one operator against each other on the same arguments: first whether they agree, then how fast."""

import dataclasses
import itertools
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax

from jdsi.errors import UnsupportedError
from jdsi.pallas_kernels.operator import ArgumentSpec

from .calls import Calls, Operands, call_count, difference, tolerance, tree_bytes
from .rounds import interleave

Function = Callable[..., Any]
_NOBODY: Mapping[str, Callable[[], float]] = MappingProxyType({})


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What came of a contest.

    Attributes:
        seconds: per call, one figure a round, of those that agreed with the reference, and of those beside them.
        errors: difference of each from the reference, see `difference`.
        left_out: why a contender has no time.
        calls: made by each program, on so many sets of operands.
    """

    seconds: dict[str, list[float]]
    errors: dict[str, float]
    left_out: dict[str, str]
    calls: int


def footprint(spec: ArgumentSpec, reference: Function) -> int:
    """Bytes of the operands and results of one call, results twice: they are compared with those expected."""
    operands = spec.abstract()
    return tree_bytes(operands) + 2 * tree_bytes(jax.eval_shape(reference, *operands))


@dataclasses.dataclass(frozen=True)
class Contest:
    """Contenders that were compared with the reference, those that agreed with it compiled and ready to be timed.

    Attributes:
        agreed: their programs.
        errors, left_out, calls: see `Outcome`.
    """

    agreed: Mapping[str, Calls]
    errors: dict[str, float]
    left_out: dict[str, str]
    calls: int

    def measure(self, rounds: int, beside: Mapping[str, Callable[[], float]] = _NOBODY) -> Outcome:
        """Times them in turn.

        Args:
            rounds: figures for each.
            beside: timed in the same rounds; each returns seconds.
        """
        runs = {**{name: mine.seconds for name, mine in self.agreed.items()}, **beside}
        return Outcome(interleave(runs, rounds) if runs else {}, self.errors, self.left_out, self.calls)


def prepare(spec: ArgumentSpec, reference: Function, contenders: Mapping[str, Function], max_bytes: int) -> Contest:
    """Compares contenders with the reference; several threads may do so at a time, for most of it is compiling.

    Args:
        spec: makes the arguments.
        reference: gives the results expected; takes the arrays alone.
        contenders: the same, by name.
        max_bytes: of all operands and results together; one call is always made.
    """
    calls = max(1, call_count(spec, footprint(spec, reference), max_bytes))
    errors: dict[str, float] = {}
    left_out: dict[str, str] = {}
    agreed: dict[str, Calls] = {}
    operands = Operands(spec, calls)
    baseline = Calls(reference, operands)
    expected = baseline.run()
    for name, function in contenders.items():
        try:
            mine = baseline if function is reference else Calls(function, operands)
            if spec.in_place:  # those of the baseline hold the results already
                mine.operands = Operands(spec, calls)
            errors[name] = difference(mine.run(), expected)
        except Exception as error:  # one that fails must not end the others' run
            left_out[name] = reason(error)
            continue
        if errors[name] <= tolerance(expected):
            mine.operands = operands
            agreed[name] = mine
        else:
            left_out[name] = f"its results differ from the reference's by {errors[name]:.1e}"
    return Contest(agreed, errors, left_out, calls)


def contest(
    spec: ArgumentSpec,
    reference: Function,
    contenders: Mapping[str, Function],
    *,
    rounds: int,
    max_bytes: int,
    beside: Mapping[str, Callable[[], float]] = _NOBODY,
) -> Outcome:
    """Compares contenders with the reference, then times in turn those that agree; see `prepare` and `Contest`."""
    return prepare(spec, reference, contenders, max_bytes).measure(rounds, beside)


def reason(error: Exception) -> str:
    """The error in one line."""
    if isinstance(error, UnsupportedError):
        return str(error)
    first = next(itertools.chain(str(error).splitlines(), [""]))
    return f"{type(error).__name__}: {first[:300]}"
