"""Where the shares of a split parameter lie in the plain one, and the plain one in its shares."""

from collections.abc import Iterable, Sequence

import numpy as np

from jdsi.models.weight_map import Shape
from jdsi.sharding import Split

from .boxes import Piece, along
from .buffers import aligned_zeros, cast


def share_pieces(split: Split, rank: int, shape: Shape, share: np.ndarray) -> list[Piece]:
    """The boxes of a plain array of `shape` that a rank's share is made of, each with its place in `share`."""
    return [
        (
            along(shape, split.dim, run.start, run.stop),
            share[along(share.shape, split.dim, run.target, run.target + len(run))],
        )
        for run in split.runs[rank]
    ]


def cut(plain: np.ndarray, split: Split, rank: int) -> np.ndarray:
    """A rank's share of a plain array: a view where it is one stretch without padding, else a copy."""
    local = split.local_shape(plain.shape)
    if len(split.runs[rank]) == 1 and len(split.runs[rank][0]) == split.size:
        run = split.runs[rank][0]
        return plain[along(plain.shape, split.dim, run.start, run.stop)]
    share = aligned_zeros(local, plain.dtype)
    for box, target in share_pieces(split, rank, plain.shape, share):
        cast(target, plain[box])
    return share


def pieces_in_shares(
    split: Split, pieces: Sequence[Piece], ranks: Iterable[int]
) -> tuple[dict[int, list[Piece]], list[tuple[int, int]]]:
    """Boxes of the plain array as boxes of the shares of `ranks`, every entry from one of the shares that hold it.

    Returns:
        The boxes of each rank's share with their targets, and what no share of `ranks` holds: stretches along
        `split.dim`, first and last-plus-one entry.
    """
    dim = split.dim
    runs = sorted(((run, rank) for rank in ranks for run in split.runs[rank]), key=lambda held: held[0].start)
    found: dict[int, list[Piece]] = {}
    missing: list[tuple[int, int]] = []
    for box, target in pieces:
        start, stop = box[dim].start, box[dim].stop
        at = start
        for run, rank in runs:
            first, last = max(at, run.start), min(stop, run.stop)
            if first >= last:
                continue
            if first > at:
                missing.append((at, first))
            inside = slice(run.target + first - run.start, run.target + last - run.start)
            part = target[along(target.shape, dim, first - start, last - start)]
            found.setdefault(rank, []).append(((*box[:dim], inside, *box[dim + 1 :]), part))
            at = last
        if at < stop:
            missing.append((at, stop))
    return found, missing
