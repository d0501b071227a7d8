"""Tables that map a checkpoint's tensors to ours, as data that runs in both directions.

One of our parameters is the concatenation, along axis 0, of one or more checkpoint tensors, each first passed through
an invertible `Op`. Import runs the table forwards, export runs the same table backwards, so a round trip holds by
construction.
"""

import dataclasses
import itertools
import re
from collections.abc import Iterable, Iterator
from typing import Protocol

import numpy as np

from .spec import NormSpec, RmsNormSpec

Shape = tuple[int, ...]
Box = tuple[slice, ...]
"""Part of an array: along every dimension, its first index and the one after its last."""


class Op(Protocol):
    """An invertible, element-preserving change of layout of one NumPy array."""

    def forward(self, array: np.ndarray) -> np.ndarray:
        """Checkpoint layout to ours."""
        ...

    def inverse(self, array: np.ndarray) -> np.ndarray:
        """Our layout to the checkpoint's."""
        ...

    def inverse_shape(self, shape: Shape) -> Shape:
        """The checkpoint's shape of a tensor that has `shape` in our layout."""
        ...

    def stored_boxes(self, box: Box, out: np.ndarray) -> Iterator[tuple[Box, np.ndarray]]:
        """Where a part of a tensor lies in the checkpoint, so that it can be read without the rest.

        Args:
            box: the part, in our layout.
            out: array of its shape that it is to be read into.

        Yields:
            Boxes of the stored tensor, each with the view of `out`, in the stored order of axes, that it fills.
        """
        ...


@dataclasses.dataclass(frozen=True)
class Identity:
    """The checkpoint's layout is ours."""

    def forward(self, array: np.ndarray) -> np.ndarray:
        return array

    def inverse(self, array: np.ndarray) -> np.ndarray:
        return array

    def inverse_shape(self, shape: Shape) -> Shape:
        return shape

    def stored_boxes(self, box: Box, out: np.ndarray) -> Iterator[tuple[Box, np.ndarray]]:
        yield box, out


@dataclasses.dataclass(frozen=True)
class Transpose:
    """A matrix stored `[in, out]` (GPT-2's Conv1D) that we hold `[out, in]`."""

    def forward(self, array: np.ndarray) -> np.ndarray:
        return array.T

    def inverse(self, array: np.ndarray) -> np.ndarray:
        return array.T

    def inverse_shape(self, shape: Shape) -> Shape:
        return shape[::-1]

    def stored_boxes(self, box: Box, out: np.ndarray) -> Iterator[tuple[Box, np.ndarray]]:
        yield box[::-1], out.T


@dataclasses.dataclass(frozen=True)
class Rows:
    """Row `i` of ours is row `order[i]` of the checkpoint's; `order` is a permutation of the rows."""

    order: tuple[int, ...]

    def forward(self, array: np.ndarray) -> np.ndarray:
        return array[np.asarray(self.order)]

    def inverse(self, array: np.ndarray) -> np.ndarray:
        return array[np.argsort(self.order)]

    def inverse_shape(self, shape: Shape) -> Shape:
        return shape

    def stored_boxes(self, box: Box, out: np.ndarray) -> Iterator[tuple[Box, np.ndarray]]:
        rows = np.asarray(self.order[box[0]])
        # Rows that follow one another in both layouts are one box.
        bounds = [0, *(np.flatnonzero(np.diff(rows) != 1) + 1).tolist(), len(rows)]
        for first, last in itertools.pairwise(bounds):
            if last > first:
                start = int(rows[first])
                yield (slice(start, start + last - first), *box[1:]), out[first:last]


def split_heads_last(num_heads: int, parts: int, head_dim: int) -> Rows:
    """Rows stored `[head, part, dim]` (BLOOM, GPT-NeoX: q, k, v of a head side by side), held `[part, head, dim]`."""
    rows = np.arange(num_heads * parts * head_dim).reshape(num_heads, parts, head_dim)
    return Rows(tuple(rows.transpose(1, 0, 2).ravel().tolist()))


def split_query_groups(num_heads: int, num_kv_heads: int, head_dim: int) -> Rows:
    """Rows stored per KV head as `[its query heads, key, value]` (Falcon), held `[all q, all k, all v]`."""
    group = num_heads // num_kv_heads
    rows = np.arange(num_kv_heads * (group + 2) * head_dim).reshape(num_kv_heads, group + 2, head_dim)
    pieces = (rows[:, :group], rows[:, group], rows[:, group + 1])
    return Rows(tuple(np.concatenate([piece.ravel() for piece in pieces]).tolist()))


@dataclasses.dataclass(frozen=True)
class Source:
    """One checkpoint tensor inside an `Entry`.

    `rows` is how many rows of our parameter it fills; it may stay `None` when the entry has a single source.
    """

    name: str
    op: Op = Identity()
    rows: int | None = None


@dataclasses.dataclass(frozen=True)
class Entry:
    """Our parameter `ours` (dotted path) is the concatenation along axis 0 of `sources`."""

    ours: str
    sources: tuple[Source, ...]

    def source_shapes(self, shape: Shape) -> list[Shape]:
        """The shape each source must have on disk for our parameter to have `shape`."""
        if len(self.sources) == 1:
            return [self.sources[0].op.inverse_shape(shape)]
        return [s.op.inverse_shape((s.rows or 0, *shape[1:])) for s in self.sources]

    def row_ranges(self, shape: Shape) -> list[tuple[int, int]]:
        """Start and stop row of each source inside our parameter of `shape`."""
        if len(self.sources) == 1:
            return [(0, shape[0] if shape else 0)]
        stops = np.cumsum([s.rows or 0 for s in self.sources]).tolist()
        return list(zip([0, *stops[:-1]], stops, strict=True))


@dataclasses.dataclass(frozen=True)
class WeightMap:
    """The whole table of one model.

    Attributes:
        entries: one per parameter of ours.
        prefix: stands before most checkpoint names (`"model."`) and is absent when the bare backbone was saved; a
            reader accepts a checkpoint in which every prefixed name appears without it.
        ignored: regular expressions, full match, of checkpoint tensors that carry no weights (masks, rotary tables).
        renamed: regular expressions, full match, of names that older checkpoints use, each with the name that replaces
            it (as in `re.sub`).
        tied: pairs (copy, original) of tensors that are one in this model, the weight of the vocabulary projection
            first. The table has the original; a checkpoint may hold either, or both.
        idle: pairs (name, stands_for) of tensors that their class has and computes nothing with. They are not read;
            what is written under their name is the other tensor.
    """

    entries: tuple[Entry, ...]
    prefix: str = ""
    ignored: tuple[str, ...] = ()
    renamed: tuple[tuple[str, str], ...] = ()
    tied: tuple[tuple[str, str], ...] = ()
    idle: tuple[tuple[str, str], ...] = ()

    def current_name(self, name: str) -> str:
        """What `name`, as stored, is called in this table."""
        for pattern, replacement in self.renamed:
            if (match := re.fullmatch(pattern, name)) is not None:
                return match.expand(replacement)
        return name


def tensor(ours: str, theirs: str, op: Op = Identity()) -> Entry:
    """One tensor of ours from one of theirs."""
    return Entry(ours, (Source(theirs, op),))


def fused(ours: str, theirs: Iterable[str], rows: Iterable[int], op: Op = Identity()) -> Entry:
    """One tensor of ours from several of theirs, stacked along axis 0 with `rows` rows each."""
    return Entry(ours, tuple(Source(name, op, n) for name, n in zip(theirs, rows, strict=True)))


def linear(ours: str, theirs: str, *, bias: bool, op: Op = Identity(), bias_op: Op = Identity()) -> list[Entry]:
    """`weight` and, if there is one, `bias` of a linear layer or a norm."""
    entries = [tensor(f"{ours}.weight", f"{theirs}.weight", op)]
    if bias:
        entries.append(tensor(f"{ours}.bias", f"{theirs}.bias", bias_op))
    return entries


def fused_linear(
    ours: str, theirs: Iterable[str], rows: Iterable[int], *, bias: bool, op: Op = Identity()
) -> list[Entry]:
    """Several linear layers with the same input, held as one with their rows stacked."""
    names, rows = list(theirs), list(rows)
    entries = [fused(f"{ours}.weight", [f"{n}.weight" for n in names], rows, op)]
    if bias:
        entries.append(fused(f"{ours}.bias", [f"{n}.bias" for n in names], rows))
    return entries


def norm(ours: str, theirs: str, spec: NormSpec) -> list[Entry]:
    """`weight` and `bias` of a norm, as far as its spec has them."""
    weight, bias = (True, False) if isinstance(spec, RmsNormSpec) else (spec.weight, spec.bias)
    parts = [name for name, present in (("weight", weight), ("bias", bias)) if present]
    return [tensor(f"{ours}.{part}", f"{theirs}.{part}") for part in parts]
