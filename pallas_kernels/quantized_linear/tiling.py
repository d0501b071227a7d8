"""How a product with packed weights is cut into blocks.

Unlike with plain weights, unpacking needs many warps at once, and a tile of the activations can outweigh the packed
weights it meets; `linear.partition` knows neither.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any, Self

from ..device import Device
from ..linear.form import LinearForm
from ..linear.partition import aligned
from .weight import QuantizedWeight

MAX_TOKENS = 64
CHUNK = 128  # inputs one warpgroup takes at a step: the largest group, and the width of a block
ROWS = 64  # rows of the tensor core's operand A
_RESERVED = 4 * 1024  # shared memory for barriers, alignment and Mosaic itself
_MAX_STAGES = 8
# A second launch takes about two microseconds, in which a multiprocessor loads about this many bytes.
_LAUNCH = 64 * 1024


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of a call.

    Attributes:
        tokens: rows of `x`.
        inputs: the contracted dimension.
        out: columns of the result.
        parts: weight rows per output: 2 where gate and up are computed together.
        itemsize: bytes of an activation.
        result: bytes of a number of the result.
        weight: the weight, or its shapes.
    """

    tokens: int
    inputs: int
    out: int
    parts: int
    itemsize: int
    result: int
    weight: QuantizedWeight

    @classmethod
    def of(cls, x: Any, weight: QuantizedWeight, form: LinearForm) -> Self:
        """The sizes of `x` and `weight`, arrays or their shapes."""
        result = form.result_dtype(x.dtype).itemsize
        tokens, inputs = x.shape
        return cls(tokens, inputs, weight.shape[0] // form.operands, form.operands, x.dtype.itemsize, result, weight)

    @property
    def columns(self) -> int:
        """Columns of the tensor core's operand B: tokens rounded up to 8."""
        return _ceil(self.tokens, 8) * 8


@dataclasses.dataclass(frozen=True)
class Tiling:
    """One way to cut a product.

    Attributes:
        rows: warpgroups side by side over rows; they share the tile of activations.
        blocks: blocks of 64 rows of one warpgroup (twice that where gate and up are computed together).
        inputs: warpgroups side by side over inputs; their sums meet in shared memory.
        splits: parts of the inputs computed by different thread blocks and summed by a second pass.
        stages: pipeline steps in shared memory.
    """

    rows: int
    blocks: int
    inputs: int
    splits: int
    stages: int

    @property
    def warpgroups(self) -> int:
        """Warpgroups of a thread block; the first also starts the copies."""
        return self.rows * self.inputs

    @property
    def height(self) -> int:
        """Output rows of a thread block."""
        return self.rows * self.blocks * ROWS

    def steps(self, shape: Shape) -> int:
        """Pipeline steps of each thread block; those past the end of the inputs bring zeros."""
        return _ceil(_ceil(shape.inputs, self.inputs * CHUNK), self.splits)

    def fit(self, shape: Shape, device: Device) -> Self:
        """The same with as many stages as there is room for: tuned ones were measured on a call much like this one."""
        return dataclasses.replace(self, stages=min(self.stages, stages_that_fit(shape, self, device.shared_memory)))


def tilings(shape: Shape, device: Device) -> Iterator[Tiling]:
    """All sensible ways to cut a product, with pipelines as deep as they can be."""
    # Four warpgroups have 128 registers a thread, two have 255. Sums take columns / 2 of each block of rows.
    four, two = ((1, 1, 4), (2, 1, 2), (4, 1, 1)), ((1, 1, 2), (2, 1, 1), (2, 2, 1))
    sums = shape.parts * shape.columns
    for rows, blocks, inputs in four if sums <= 32 else two:
        if sums * blocks > 128 or (inputs > 1 and inputs * CHUNK > shape.inputs):
            continue
        steps = _ceil(shape.inputs, inputs * CHUNK)
        for splits in range(1, 17):
            # Four steps fill a pipeline; no split is left without any.
            if splits == 1 or (4 * splits <= steps and _ceil(steps, _ceil(steps, splits)) == splits):
                tiling = Tiling(rows, blocks, inputs, splits, max(2, min(_MAX_STAGES, _ceil(steps, splits))))
                tiling = tiling.fit(shape, device)
                if tiling.stages >= 2:
                    yield tiling


def best(shape: Shape, device: Device, count: int = 1) -> tuple[Tiling, ...]:
    """The `count` tilings that should load fastest, the best first; none where shared memory is too small."""
    return tuple(sorted(tilings(shape, device), key=lambda tiling: load_per_core(shape, tiling, device))[:count])


def load_per_core(shape: Shape, tiling: Tiling, device: Device) -> float:
    """Bytes that the busiest multiprocessor loads, and what a second pass costs in the same currency."""
    stored, rows = shape.weight.format, shape.parts * tiling.height
    waves = _ceil(_ceil(shape.out, tiling.height) * tiling.splits, device.cores)
    inputs = min(tiling.steps(shape) * tiling.inputs * CHUNK, shape.inputs)
    # The activations come from the second-level cache, at about twice the speed.
    load = (
        waves * inputs * (rows * shape.weight.values.dtype.itemsize / stored.words + shape.tokens * shape.itemsize / 2)
    )
    if tiling.splits > 1:  # float32 partial sums are written and read once
        load += _LAUNCH + 8 * tiling.splits * shape.tokens * shape.parts * shape.out / device.cores
    return load


def stages_that_fit(shape: Shape, tiling: Tiling, shared_memory: int) -> int:
    """Pipeline stages that `shared_memory` bytes hold beside the results and the operands of the epilogue."""
    stored = shape.weight.format
    height, inputs = shape.parts * tiling.height, tiling.inputs * CHUNK
    values = height * inputs * shape.weight.values.dtype.itemsize // stored.words
    groups = 0 if stored.group is None else inputs // stored.group
    scales, zeros = groups * height * shape.weight.scales.dtype.itemsize, groups * height * stored.zero_points
    stage = sum(map(aligned, (values, shape.columns * inputs * shape.itemsize, scales, zeros)))
    tile = tiling.height * shape.columns
    results = tile * (4 * shape.parts if tiling.splits > 1 else shape.result)
    sums = (tiling.inputs - 1) * shape.parts * tile * 4
    last = (tile * shape.result, height * 4, height * 4)  # residual, scales and bias
    return (shared_memory - _RESERVED - sum(map(aligned, (results, sums, *last)))) // stage


def _ceil(n: int, unit: int) -> int:
    return -(-n // unit)
