"""What the GPU report is made of, as data: stages, and how the minutes are divided among them."""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from jdsi.errors import ConfigError, nearest

RESERVE = 0.2
"""Part of the minutes that belongs to no stage: what starting and ending processes takes, and what went wrong."""

_STRETCH = 2.0  # a stage may take so many times its own seconds of what earlier ones left


@dataclasses.dataclass(frozen=True)
class Stage:
    """One part of the report, run in a process of its own.

    Attributes:
        name: unique; "right/linear" is one of the stages that "right" stands for.
        title: what it does, for people.
        function: "module:function", called with a `Task` and the settings.
        weight: seconds it is worth beside the others, about what it takes of eight minutes on an H200.
        settings: further arguments of the function, as JSON can hold them.
        memory: share of the GPU's memory that JAX takes in its process.
        group: stages of one group that follow each other run at the same time. Nothing that is timed may be in one.
        operator: whose kernels it proves right; those it does not are left out of what follows.
        vital: where it fails there is nothing to measure, and the report ends.
    """

    name: str
    title: str
    function: str
    weight: float
    settings: Mapping[str, Any] = MappingProxyType({})
    memory: float = 0.75
    group: str | None = None
    operator: str | None = None
    vital: bool = False


@dataclasses.dataclass(frozen=True)
class Wave:
    """Stages that run at the same time, usually one.

    Attributes:
        stages: themselves.
        seconds: that each has from its own start, in the same order.
        due: seconds after the report's start by which all must have ended.
    """

    stages: tuple[Stage, ...]
    seconds: tuple[float, ...]
    due: float

    def limit(self, index: int, now: float) -> float:
        """Seconds that a stage has if it starts `now`, seconds after the report's start.

        Its own are never less for what others took; what they left is added, up to as much again.
        """
        own = self.seconds[index]
        return max(own, min(_STRETCH * own, self.due - now))


def allot(
    stages: Sequence[Stage], seconds: float, *, width: int, least: float
) -> tuple[tuple[Wave, ...], tuple[Stage, ...]]:
    """Divides all but `RESERVE` of the time by weight, and says who has no part of it.

    Args:
        stages: in order of value.
        seconds: of the whole report.
        width: how many stages of a group run at the same time.
        least: seconds that a stage needs to be of any use; those of least value go until the others have so much.

    Returns:
        The waves in order, whose seconds together are (1 - RESERVE) of the whole, and the stages left out.
    """
    groups = [tuple(members) for _, members in itertools.groupby(stages, key=lambda s: s.group or s.name)]
    for count in range(len(groups), 0, -1):
        kept = groups[:count]
        scale = (1 - RESERVE) * seconds / sum(_weight(members, width) for members in kept)
        if count == 1 or min(stage.weight for members in kept for stage in members) * scale >= least:
            break
    else:
        return (), ()
    waves, due = [], 0.0
    for members in kept:
        due += _weight(members, width) * scale
        waves.append(Wave(members, tuple(stage.weight * scale for stage in members), due))
    return tuple(waves), tuple(stage for members in groups[count:] for stage in members)


def _weight(members: Sequence[Stage], width: int) -> float:
    """Seconds that stages take which run `width` at a time, each as long as the longest."""
    return max(stage.weight for stage in members) * -(-len(members) // width)


def chosen(stages: Sequence[Stage], names: Sequence[str]) -> tuple[Stage, ...]:
    """The stages named ("right" stands for all whose names begin "right/"), by default all. Vital ones always stay.

    Raises:
        ConfigError: there is no such stage.
    """
    known = {stage.name for stage in stages} | {stage.name.partition("/")[0] for stage in stages}
    for name in names:
        if name not in known:
            raise ConfigError(
                f"stage {name!r} is not known{nearest(name, known)}; known are {', '.join(sorted(known))}"
            )
    wanted = set(names) or known
    return tuple(
        stage for stage in stages if stage.vital or stage.name in wanted or stage.name.partition("/")[0] in wanted
    )
