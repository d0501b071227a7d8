"""How long exchanges between devices take, and over which links they go.

The formulas are those by which NCCL predicts its own algorithms (`src/tuning/cost_model.cc` of NVIDIA/nccl): a fixed
cost, a latency for each hop, and bytes over bandwidth. An all-reduce goes round a ring or up and down a tree, with the
protocol for small messages (LL, a quarter of the bandwidth) or the one for large ones; whichever is fastest is taken.
NVLink SHARP, which adds up inside the switch, and XLA's own one-shot kernels are left out.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence

import numpy as np

from jdsi.sharding import AXES, DATA, PIPE, TENSOR, Parallelism
from jdsi.sharding.topology import Topology

from .collectives import Collective
from .machine import Machine
from .replica_groups import along

_START = {"ring": (6.6e-6, 8.4e-6), "tree": (6.8e-6, 8.4e-6)}  # seconds, with either protocol: NCCL's baseLatencies
_SMALL_MESSAGE_FRACTION = 0.25  # of the bandwidth that LL gets, for half of its words are flags
_TREE_FRACTION = 0.92  # of the bandwidth that a tree gets, against a ring


@dataclasses.dataclass(frozen=True)
class Span:
    """Where the devices of a group lie.

    Attributes:
        devices: of the group.
        hosts: that they are on, with about as many devices on each.
    """

    devices: int
    hosts: int = 1


def span_of(axis: str, parallelism: Parallelism, topology: Topology) -> Span:
    """Where groups over a mesh axis lie, or over several joined by "+"; of groups that differ, the most spread one.

    Devices are laid out as `jdsi.sharding.make_mesh` does it, neighbours on the axis "tensor", stages far apart.
    """
    hosts, names = _hosts(parallelism, topology), axis.split("+")
    rows = along(hosts, [i for i, name in enumerate(AXES) if name in names])
    return Span(rows.shape[1], max(len(set(row)) for row in rows.tolist()))


def transfer_spans(parallelism: Parallelism, topology: Topology) -> list[Span]:
    """For every stage where its devices and those that it sends to lie; the last one sends to the first."""
    hosts = _hosts(parallelism, topology)
    crosses = (hosts != np.roll(hosts, -1, axis=0)).reshape(parallelism.pipeline, -1).any(axis=1)
    return [Span(2, 2 if far else 1) for far in crosses]


def _hosts(parallelism: Parallelism, topology: Topology) -> np.ndarray:
    """The host of every device, an array with an axis for each of `AXES`."""
    sizes = {PIPE: parallelism.pipeline, DATA: parallelism.data, TENSOR: parallelism.tensor}
    hosts = np.arange(parallelism.devices) // topology.devices_per_host
    return hosts.reshape([sizes.get(axis, 1) for axis in AXES])


def collective_seconds(collective: Collective, machine: Machine, span: Span) -> float:
    """How long one of `collective` takes, by itself; a loop's once."""
    n, hosts = span.devices, span.hosts
    if n == 1:
        return 0.0
    if collective.kind == "all-reduce":
        return min(_all_reduces(collective.bytes, machine, span))
    share = (n - 1) / n
    if collective.kind in ("all-gather", "reduce-scatter", "collective-broadcast"):
        hops, rate = [(n - hosts, hosts - 1)], _ring_rate(machine, span)
    elif collective.kind == "collective-permute":
        hops, rate, share = [(0, 1) if hosts > 1 else (1, 0)], _pair_rate(machine, span), 1.0
    else:  # each sends to each at once, most of it to other hosts if there are any
        hops, rate = [(0, 1) if hosts > 1 else (1, 0)], _pair_rate(machine, span)
    return min(_protocols("ring", collective.bytes * share / rate, hops, machine))


def _all_reduces(size: float, machine: Machine, span: Span) -> Iterator[float]:
    n, hosts, rate = span.devices, span.hosts, _ring_rate(machine, span)
    yield from _protocols("ring", 2 * (n - 1) / n * size / rate, [(n - hosts, hosts - 1)] * 2, machine)
    # Along the devices of a host, then up a tree of hosts; and back.
    tree = [(n / hosts - 1, math.ceil(math.log2(hosts)))] * 2
    yield from _protocols("tree", 2 * size / (rate * _TREE_FRACTION), tree, machine)


def _protocols(
    algorithm: str, transmission: float, passes: Sequence[tuple[float, float]], machine: Machine
) -> Iterator[float]:
    """Seconds with the protocol for small messages, and with that for large ones.

    Args:
        algorithm: "ring" or "tree".
        transmission: bytes over bandwidth.
        passes: hops within hosts and between hosts, that follow each other.
        machine: for its links.
    """
    small, bulk = _START[algorithm]
    inside, between = (sum(hops) for hops in zip(*passes, strict=True))
    yield (
        small
        + inside * machine.inside.latency
        + between * machine.between.latency
        + (transmission / _SMALL_MESSAGE_FRACTION)
    )
    yield bulk + inside * machine.inside.bulk_latency + between * machine.between.bulk_latency + transmission


def _ring_rate(machine: Machine, span: Span) -> float:
    """Bytes a second around rings, of which there are as many between hosts as each has devices, and so ports."""
    if span.hosts == 1:
        return machine.inside.rate
    return min(machine.inside.rate, machine.between.rate * span.devices / span.hosts)


def _pair_rate(machine: Machine, span: Span) -> float:
    return machine.between.rate if span.hosts > 1 else machine.inside.rate
