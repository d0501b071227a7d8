"""Who takes part in a collective: XLA's notations for it, and the mesh axes that they come from."""

import functools
import itertools
import math
import re
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

Groups = tuple[tuple[int, ...], ...]
"""Device numbers, counted through the mesh with the last axis fastest."""

Mesh = tuple[tuple[str, int], ...]
"""Axes and their devices, outermost first."""


def groups_of(attributes: str, devices: int) -> Groups:
    """The groups of a collective's `replica_groups`, of `devices` in all.

    Raises:
        ValueError: they are written in a way unknown here.
    """
    if match := re.search(r"replica_groups=\{(\{[\d,{} ]*\})?\}", attributes):
        if match[1] is None:  # all
            return (tuple(range(devices)),)
        return tuple(tuple(map(int, group.split(","))) for group in re.findall(r"\{([\d, ]+)\}", match[0]))
    if match := re.search(r"replica_groups=(\[[\d,]+\]<=\[[\d,]+\](?:T\([\d,]+\))?)", attributes):
        return _as_groups(_iota(match[1]))
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(([^{]*)\))? \{([^}]*)\}", attributes):
        return _mesh_groups(*match.groups())
    raise ValueError(f"replica groups written in an unknown way: {attributes[:200]}")


def pairs_of(attributes: str) -> tuple[tuple[int, int], ...]:
    """Source and target of what a collective permute passes on to another device.

    Raises:
        ValueError: there are none.
    """
    match = re.search(r"source_target_pairs=\{((?:\{\d+, ?\d+\},? ?)*)\}", attributes)
    if match is None:
        raise ValueError(f"no source and target pairs: {attributes[:200]}")
    pairs = ((int(a), int(b)) for a, b in re.findall(r"\{(\d+), ?(\d+)\}", match[1]))
    return tuple((a, b) for a, b in pairs if a != b)


def longest_chain(pairs: Iterable[tuple[int, int]]) -> int:
    """Devices of the longest ring or chain that the pairs make."""
    after = dict(pairs)
    longest, seen = 0, set[int]()
    # Chains first, from where they start: what is left are rings, which may be counted from anywhere.
    for start in [*(after.keys() - set(after.values())), *after]:
        chain: set[int] = set()
        at: int | None = start
        while at is not None and at not in seen | chain:
            chain.add(at)
            at = after.get(at)
        seen |= chain
        longest = max(longest, len(chain))
    return longest


def axis_of_groups(groups: Groups, mesh: Mesh) -> str | None:
    """The axis of a mesh over which they are, or several joined by "+"; `None` if it is over no combination of axes."""
    return _known_groups(mesh).get(frozenset(map(frozenset, groups)))


def axis_of_pairs(pairs: Sequence[tuple[int, int]], mesh: Mesh) -> str | None:
    """The axis of a mesh along which sources and targets differ, or several joined by "+"."""
    shape = [size for _, size in mesh]
    if not mesh or max(map(max, pairs)) >= math.prod(shape):
        return None
    sources, targets = (np.array(np.unravel_index(ids, shape)) for ids in np.array(pairs).T)
    return "+".join(mesh[i][0] for i in np.flatnonzero((sources != targets).any(axis=1)))


def along(ids: np.ndarray, axes: Sequence[int]) -> np.ndarray:
    """One row of device numbers for each group over `axes` of the array of all."""
    members = math.prod(ids.shape[axis] for axis in axes)
    last = range(ids.ndim - len(axes), ids.ndim)
    return np.moveaxis(ids, axes, list(last)).reshape(-1, members)


def _iota(text: str) -> np.ndarray:
    """`[2,4]<=[4,2]T(1,0)`: counted up in the shape behind the arrow, transposed, then in the shape before it."""
    match = re.fullmatch(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    if match is None:
        raise ValueError(f"device numbers written in an unknown way: {text!r}")
    shape, counted = ([int(n) for n in part.split(",")] for part in match.group(1, 2))
    order = [int(n) for n in match[3].split(",")] if match[3] else None
    return np.arange(math.prod(counted)).reshape(counted).transpose(order).reshape(shape)


def _mesh_groups(axes: str, order: str | None, grouped: str) -> Groups:
    """`mesh['data'=2,'tensor'=4] {'tensor'}`, with the devices where they are not in order."""
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", axes)}
    names = re.findall(r"'([^']+)'", grouped)
    if ":" in grouped or not sizes.keys() >= set(names):
        raise ValueError(f"replica groups over parts of axes: {{{grouped}}}")
    count = math.prod(sizes.values())
    if order is None:
        ids = np.arange(count)
    elif iota := re.fullmatch(r"(\[[\d,]+\])(T\([\d,]+\))?", order):
        ids = _iota(f"[{count}]<={iota[1]}{iota[2] or ''}")
    else:
        ids = np.array([int(n) for n in order.split(",")])
    at = [list(sizes).index(name) for name in names]
    return _as_groups(along(ids.reshape(list(sizes.values())), at))


def _as_groups(rows: np.ndarray) -> Groups:
    return tuple(tuple(map(int, row)) for row in rows.reshape(-1, rows.shape[-1]))


@functools.lru_cache(maxsize=16)
def _known_groups(mesh: Mesh) -> Mapping[frozenset[frozenset[int]], str]:
    """The axes that make each set of groups."""
    ids = np.arange(math.prod(size for _, size in mesh)).reshape([size for _, size in mesh])
    wide = [i for i, (_, size) in enumerate(mesh) if size > 1]
    known = {}
    for count in range(1, len(wide) + 1):
        for axes in itertools.combinations(wide, count):
            groups = frozenset(frozenset(map(int, row)) for row in along(ids, axes))
            known[groups] = "+".join(mesh[i][0] for i in axes)
    return known
