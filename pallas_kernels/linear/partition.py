"""How a skinny product is cut into blocks: rows of weights, splits of the inputs, depth of the pipeline.

One block of the kernel owns `rows` output rows (twice that many weight rows where gate and up are two) and one split of
the inputs, and streams its weights through shared memory. The operator is memory-bound, so what counts is that every
multiprocessor loads the same number of bytes and always has enough of them in flight.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from ..device import Device

NUMBER = 2  # bytes of one weight or input
TILE = 64  # inputs of a tile of shared memory: 128 bytes of 16-bit numbers, the widest swizzle
MMA_ROWS = 64  # rows of wgmma's A operand; a tile of fewer rows leaves the rest of the operand unused
BUFFER_ALIGNMENT = 1024  # of every buffer in shared memory
MAX_ACCUMULATORS = 128  # registers per thread for sums, of 255: the epilogue needs about as many again

# Little's law at 4.3 TB/s over 132 multiprocessors and a little over a microsecond of latency gives 40 KB for loads
# that are always evenly spread; this leaves some room.
_IN_FLIGHT = 64 * 1024
# A second launch takes about two microseconds, in which a multiprocessor loads about this many bytes.
LAUNCH = 64 * 1024
# How much more than its share one multiprocessor can draw while others idle: L2 serves about a quarter more bandwidth
# than memory. An assumption to be replaced by measurement; the tuner tries the alternatives.
_ELASTICITY = 1.25
# Below this the work of a step (a wait, a few wgmma, one more copy) does not hide behind the bytes it brings.
# Longer steps also read longer runs of each row.
_STEP = 32 * 1024
_SLOT = 40 * 1024
_FEW_STAGES = 4  # below, waiting for one step stalls too large a part of the pipeline
_STAGES = 16  # more would only lengthen the code that fills the pipeline


@dataclasses.dataclass(frozen=True)
class Problem:
    """The shape of a skinny product, as the partition sees it.

    Attributes:
        tokens: rows of `x`.
        outputs: columns of the result.
        inputs: the contracted dimension.
        operands: weight rows per output: 2 where gate and up are computed together.
        resident: `x` stays in shared memory as a whole (a norm is fused), else it streams beside the weights; steps
            then divide the inputs.
        flat: the weights' dimensions are not multiples of the tiles of shared memory, so that every step is one tile
            of `TILE` inputs, which TMA need not know to be tiled.
        result_bytes: of one element of the result.
        second_pass: a second pass finishes the result even if the inputs are not split.
    """

    tokens: int
    outputs: int
    inputs: int
    operands: int = 1
    resident: bool = False
    flat: bool = False
    result_bytes: int = 2
    second_pass: bool = False

    @property
    def columns(self) -> int:
        """Columns of wgmma's B operand: tokens rounded up to 8."""
        return -(-self.tokens // 8) * 8

    @property
    def ragged(self) -> bool:
        """Whether tiles of 8 rows do not divide `x`, so that it comes in single tiles of inputs as flat weights do."""
        return self.tokens > 8 and self.tokens % 8 != 0


@dataclasses.dataclass(frozen=True)
class Tiling:
    """One way to cut a product.

    Attributes:
        rows: output rows of a block, a multiple of 8.
        step: inputs of a pipeline step.
        stages: pipeline steps in shared memory.
        splits: parts of the inputs computed by different blocks and summed by a second pass.
    """

    rows: int
    step: int
    stages: int
    splits: int = 1

    @property
    def padded_rows(self) -> int:
        """`rows` rounded up to whole wgmma operands."""
        return -(-self.rows // MMA_ROWS) * MMA_ROWS

    def override(self, config: Mapping[str, Any] | None) -> "Tiling":
        """This tiling with some fields replaced."""
        return dataclasses.replace(self, **(config or {}))


def steps_per_split(problem: Problem, tiling: Tiling) -> int:
    """Pipeline steps of each block; those past the end of the inputs bring zeros."""
    total = -(-problem.inputs // tiling.step)
    return -(-total // tiling.splits)


def units(problem: Problem, tiling: Tiling) -> int:
    """Pieces of work: tiles of rows times splits."""
    return -(-problem.outputs // tiling.rows) * tiling.splits


def slot_bytes(problem: Problem, rows: int, step: int) -> int:
    """Shared memory of one pipeline stage."""
    padded = -(-rows // MMA_ROWS) * MMA_ROWS
    weights = aligned(problem.operands * padded * step * NUMBER)
    return weights + (0 if problem.resident else aligned(problem.columns * step * NUMBER))


def direct(problem: Problem, tiling: Tiling) -> bool:
    """Whether the kernel writes the result itself, else float32 parts of it for a second pass."""
    return tiling.splits == 1 and not problem.second_pass


def staging_bytes(problem: Problem, tiling: Tiling) -> int:
    """Shared memory through which a block writes its tile."""
    element = problem.result_bytes if direct(problem, tiling) else 4 * problem.operands
    return aligned(tiling.padded_rows * problem.columns * element)


def aligned(size: int) -> int:
    """`size` rounded up to what a buffer in shared memory takes."""
    return -(-size // BUFFER_ALIGNMENT) * BUFFER_ALIGNMENT


def cost(problem: Problem, tiling: Tiling, device: Device) -> float:
    """Bytes that one multiprocessor could have loaded, at its fair share of the bandwidth, in the time this takes."""
    inputs = min(problem.inputs, steps_per_split(problem, tiling) * tiling.step)
    tile = inputs * problem.operands * min(tiling.rows, problem.outputs) * NUMBER
    x = 0 if problem.resident else inputs * problem.tokens * NUMBER  # from the cache, but through the same port
    busiest = -(-units(problem, tiling) // device.cores) * (tile + x)
    fair = problem.operands * problem.outputs * problem.inputs * NUMBER / device.cores
    in_flight = (tiling.stages - 1) * tiling.step * problem.operands * tiling.rows * NUMBER
    # A little of `busiest` in any case: of equals the evenest.
    load = (max(fair, busiest / _ELASTICITY) + 0.1 * busiest) * max(1.0, min(_IN_FLIGHT, busiest) / in_flight)
    if tiling.splits > 1:  # float32 partial sums are written and read once
        load += LAUNCH + 8 * tiling.splits * problem.tokens * problem.operands * problem.outputs / device.cores
    return load


def tilings(problem: Problem, shared_memory: int) -> Iterator[Tiling]:
    """All sensible ways to cut `problem` with `shared_memory` bytes for the pipeline, deepest pipelines only."""
    # While x is small beside a tile of weights, more than 64 rows only shorten the runs of bytes that a step reads
    # (and where a step is one tile in any case, more rows make it worth its while).
    most = MMA_ROWS if problem.columns <= 16 and not problem.flat else 256
    for rows in range(8, most + 1, 8):
        step = _step(problem, rows, shared_memory)
        total = -(-problem.inputs // step)
        # A fused norm saves the launch that a second pass costs, and every split would repeat it.
        for splits in (1,) if problem.resident else (1, 2, 3, 4, 5, 6, 8):
            per_split = -(-total // splits)
            # No split empty, and each worth its second pass.
            if splits > 1 and (per_split < 4 or -(-total // per_split) != splits):
                continue
            if tiling := fitted(problem, Tiling(rows, step, _STAGES, splits), shared_memory):
                yield tiling


def fitted(problem: Problem, tiling: Tiling, shared_memory: int) -> Tiling | None:
    """`tiling` with no more stages than there is room for, or `None` if the kernel cannot cut `problem` that way."""
    if tiling.rows % 8 or tiling.rows < 8 or tiling.step % TILE or tiling.splits < 1:
        return None
    if problem.operands * tiling.padded_rows * problem.columns > MAX_ACCUMULATORS * 128:
        return None
    if problem.flat and tiling.step != TILE:
        return None
    if problem.resident and (tiling.splits != 1 or problem.inputs % tiling.step):
        return None
    room = shared_memory - staging_bytes(problem, tiling)
    stages = min(tiling.stages, room // slot_bytes(problem, tiling.rows, tiling.step))
    return dataclasses.replace(tiling, stages=stages) if stages >= 2 else None


def best(problem: Problem, shared_memory: int, device: Device, count: int = 1) -> tuple[Tiling, ...]:
    """The `count` tilings that should load fastest, the best first; none where shared memory is too small."""

    def key(tiling: Tiling) -> tuple[float, int]:
        return cost(problem, tiling, device), -tiling.rows  # of equals the fewest blocks

    return tuple(sorted(tilings(problem, shared_memory), key=key)[:count])


def _step(problem: Problem, rows: int, shared_memory: int) -> int:
    """Inputs of a step: enough bytes to be worth it, few enough for a deep pipeline."""
    per_input = problem.operands * rows * NUMBER
    step = TILE
    while not problem.flat and step < 256 and step * per_input < _STEP:
        slot = slot_bytes(problem, rows, 2 * step)
        if slot > _SLOT or shared_memory // slot < _FEW_STAGES or (problem.resident and problem.inputs % (2 * step)):
            break
        step *= 2
    return step
