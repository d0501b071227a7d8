"""How a product with packed weights is cut into blocks.

Unlike with plain weights, unpacking needs many warps at once, and a tile of the activations can outweigh the packed
weights it meets; `linear.partition` knows neither.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Self

from ..device import Device
from ..linear.form import LinearForm
from ..operator import Config
from .weight import QuantizedWeight

MAX_TOKENS = 64
CHUNK = 128  # inputs one warpgroup takes at a step: the largest group, and the width of a block
ROWS = 64  # rows of the tensor core's operand A
_RESERVED = 4 * 1024  # shared memory for barriers, alignment and Mosaic itself
_MAX_STAGES = 8


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
        return cls(*x.shape, weight.shape[0] // form.operands, form.operands, x.dtype.itemsize, result, weight)

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

    @classmethod
    def choose(cls, shape: Shape, device: Device) -> Self | None:
        """The default, or `None` where shared memory is too small.

        Few tokens: four warpgroups share rows, which keeps the tiles of rows many and the partial sums few. More
        tokens: two warpgroups, for their sums need the registers, of many rows each, for all share the activations.
        """
        wide = shape.tokens > 16
        rows, blocks, inputs = (2, 2 // shape.parts, 1) if wide else (1, 1, 4)
        while inputs > 1 and inputs * CHUNK > shape.inputs:
            inputs //= 2
        return cls._deepest(shape, device, rows, blocks, inputs)

    @classmethod
    def _deepest(
        cls, shape: Shape, device: Device, rows: int, blocks: int, inputs: int, splits: int | None = None
    ) -> Self | None:
        if splits is None:
            splits = _splits(shape, device, rows * blocks * ROWS, inputs * CHUNK)
        tiling = cls(rows, blocks, inputs, splits, _MAX_STAGES)
        stages = min(_MAX_STAGES, stages_that_fit(shape, tiling, device.shared_memory), max(2, tiling.steps(shape)))
        return dataclasses.replace(tiling, stages=stages) if stages >= 2 else None


def _splits(shape: Shape, device: Device, height: int, step: int) -> int:
    """Thread blocks come in waves of one per core, and a last wave of few leaves the others idle.

    A split costs a second launch, about two microseconds, and traffic for the partial sums: worth it for a tenth.
    """
    tiles, steps = _ceil(shape.out, height), _ceil(shape.inputs, step)
    # Four steps fill a pipeline; splits that leave none empty.
    options = [n for n in range(1, 17) if n == 1 or (n * 4 <= steps and _ceil(steps, _ceil(steps, n)) == n)]

    def cost(splits: int) -> float:
        waves = _ceil(tiles * splits, device.cores)
        return waves * _ceil(steps, splits) * (1.0 if splits == 1 else 1.1 + 0.01 * splits)

    return min(options, key=lambda splits: (cost(splits), splits))


def stages_that_fit(shape: Shape, tiling: Tiling, shared_memory: int) -> int:
    """Pipeline stages that `shared_memory` bytes hold beside the results and the operands of the epilogue."""
    stored = shape.weight.format
    height, inputs = shape.parts * tiling.height, tiling.inputs * CHUNK
    values = height * inputs * shape.weight.values.dtype.itemsize // stored.words
    groups = 0 if stored.group is None else inputs // stored.group
    scales = groups * height * (shape.weight.scales.dtype.itemsize + (shape.weight.zeros is not None))
    stage = sum(map(_aligned, (values, shape.columns * inputs * shape.itemsize, scales)))
    tile = tiling.height * shape.columns
    results = tile * (4 * shape.parts if tiling.splits > 1 else shape.result)
    sums = (tiling.inputs - 1) * shape.parts * tile * 4
    last = tile * 2 + 2 * height * 4  # residual, scales and bias
    return (shared_memory - _RESERVED - sum(map(_aligned, (results, sums, last)))) // stage


def _ceil(n: int, unit: int) -> int:
    return -(-n // unit)


def _aligned(size: int) -> int:
    return _ceil(size, 1024) * 1024


def candidates_of(shape: Shape, device: Device) -> Sequence[Config]:
    """Configurations worth timing, the default first."""
    found = [Tiling.choose(shape, device)]
    for rows, blocks, inputs in (
        (1, 1, 4),
        (1, 1, 3),
        (1, 1, 2),
        (2, 1, 1),
        (2, 1, 2),
        (3, 1, 1),
        (2, 2, 1),
        (4, 1, 1),
    ):
        height, step = rows * blocks * ROWS, inputs * CHUNK
        if step <= shape.inputs and blocks * shape.parts * shape.columns <= 128:
            best = _splits(shape, device, height, step)
            steps = _ceil(shape.inputs, step)
            for splits in sorted({1, best} | {n for n in (2, 4, 8) if _ceil(steps, _ceil(steps, n)) == n}):
                found.append(Tiling._deepest(shape, device, rows, blocks, inputs, splits))
    configs = [dataclasses.asdict(tiling) for tiling in found if tiling is not None]
    return [config for n, config in enumerate(configs) if config not in configs[:n]]
