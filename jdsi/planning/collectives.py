"""The collectives of a compiled program, read from its text."""

import dataclasses
from collections.abc import Mapping

from .hlo import Instruction, instructions_of, nbytes, partitions_of
from .replica_groups import axis_of_groups, axis_of_pairs, groups_of, longest_chain, pairs_of

KINDS = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "collective-permute",
    "all-to-all",
    "ragged-all-to-all",
    "collective-broadcast",
)
"""What XLA calls them."""


@dataclasses.dataclass(frozen=True)
class Collective:
    """An exchange between devices that a program makes.

    Attributes:
        kind: one of `KINDS`.
        dtype: XLA's name, of the first array where several were combined.
        shape: of the first array, as one device has it: before or after, whichever is larger. So it is what is reduced
            or passed on, what an all-gather gives, and what a reduce-scatter takes.
        bytes: of all arrays of that size.
        group_size: devices that take part in one; of a permute those of its longest ring or chain.
        axis: the mesh axis over which, or several joined by "+"; `None` if it is over no combination of axes.
        arrays: how many were combined into one.
        count: how often, of equal ones.
        per_trip: it is in the body of a loop, and `count` is for each time round.
    """

    kind: str
    dtype: str
    shape: tuple[int, ...]
    bytes: int
    group_size: int
    axis: str | None
    arrays: int = 1
    count: int = 1
    per_trip: bool = False


def collectives_of(text: str, mesh: Mapping[str, int] | None = None) -> list[Collective]:
    """The collectives that a program makes, equal ones together, in the order of their first.

    Those of the entry computation and of all that it calls are counted, each as often as it is called, and an
    asynchronous one once. Those within one device are left out.

    Args:
        text: HLO after optimisation, from `jax.stages.Compiled.as_text`.
        mesh: devices on each axis, outermost first, of the mesh it was compiled for.

    Raises:
        ValueError: there is no entry computation, or a collective is written in a way unknown here.
    """
    axes, devices = tuple((mesh or {}).items()), partitions_of(text)
    found: dict[Collective, int] = {}
    for line, in_loop in instructions_of(text, KINDS):
        collective = _permute(line, axes) if line.kind == "collective-permute" else _exchange(line, axes, devices)
        if collective.group_size > 1:
            collective = dataclasses.replace(collective, per_trip=in_loop)
            found[collective] = found.get(collective, 0) + 1
    return [dataclasses.replace(collective, count=count) for collective, count in found.items()]


def _permute(line: Instruction, mesh: tuple[tuple[str, int], ...]) -> Collective:
    pairs = pairs_of(line.rest)
    axis = axis_of_pairs(pairs, mesh) if pairs else None
    return _collective(line, line.result, longest_chain(pairs), axis)


def _exchange(line: Instruction, mesh: tuple[tuple[str, int], ...], devices: int) -> Collective:
    groups = groups_of(line.rest, devices)
    members = max(map(len, groups))
    arrays = line.result
    if line.kind == "all-to-all" and len(arrays) == members:  # an array for each device, not several exchanges
        arrays = ((arrays[0][0], (members, *arrays[0][1])),)
    if line.kind == "reduce-scatter":
        arrays = tuple((dtype, _all_parts(line, shape, members)) for dtype, shape in arrays)
    return _collective(line, arrays, members, axis_of_groups(groups, mesh))


def _all_parts(line: Instruction, shape: tuple[int, ...], members: int) -> tuple[int, ...]:
    """The shape that a reduce-scatter takes."""
    dim = int(line.rest.split("dimensions={", 1)[1].split("}", 1)[0])
    return (*shape[:dim], shape[dim] * members, *shape[dim + 1 :])


def _collective(
    line: Instruction, arrays: tuple[tuple[str, tuple[int, ...]], ...], members: int, axis: str | None
) -> Collective:
    size = sum(nbytes(dtype, shape) for dtype, shape in arrays)
    return Collective(line.kind, *arrays[0], size, members, axis, len(arrays))
