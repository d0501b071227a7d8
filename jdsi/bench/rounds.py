"""Fair timing: every contender once per round, in an order that rotates."""

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Self

from jdsi.errors import ConfigError

_SETTLE_SECONDS = 0.02


@dataclasses.dataclass(frozen=True)
class Ratio:
    """How two contenders compare: `median`, `minimum` and `maximum` of the ratios within rounds.

    The ratio of two medians would mix rounds, and with them whatever else the machine was doing.
    """

    median: float
    minimum: float
    maximum: float
    rounds: tuple[float, ...]

    @classmethod
    def of(cls, numerator: Sequence[float], denominator: Sequence[float]) -> Self:
        """From two figures per round."""
        ratios = tuple(a / b for a, b in zip(numerator, denominator, strict=True))
        return cls(statistics.median(ratios), min(ratios), max(ratios), ratios)


def interleave[Figure](
    contenders: Mapping[str, Callable[[], Figure]], rounds: int, *, warmups: int = 1
) -> dict[str, list[Figure]]:
    """Runs every contender once per round and returns its figures by name, one per round.

    Round r starts with contender r, so that nobody always runs after the same neighbour. All are warmed up before the
    first round, in turn and `warmups` times; between two runs the machine gets a moment, because thread pools spin for
    a few milliseconds after their last work.

    Args:
        contenders: each returns its own figure, usually seconds.
        rounds: figures per contender.
        warmups: runs of each whose figures are thrown away.

    Raises:
        ConfigError: no rounds are asked for.
    """
    if rounds < 1:
        raise ConfigError(f"rounds={rounds} must be at least 1")
    names = list(contenders)
    for _ in range(warmups):
        for name in names:
            contenders[name]()
    figures: dict[str, list[Figure]] = {name: [] for name in names}
    for r in range(rounds):
        turn = r % len(names)
        for name in names[turn:] + names[:turn]:
            time.sleep(_SETTLE_SECONDS)
            figures[name].append(contenders[name]())
    return figures


def seconds(run: Callable[[], object]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start
