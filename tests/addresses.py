"""Evaluates integer expressions of a kernel that is being lowered, for every time that the kernel gets to them.

Blocks, warpgroups and counters of loops take all their values, and branches that are not entered leave them out. What
comes from memory is unknown, but a remainder of it can only be one of so many numbers, and takes them all.
"""

import operator
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from jaxlib.mlir import ir

_COMPARISONS: Sequence[Callable[[Any, Any], Any]] = (
    operator.eq,
    operator.ne,
    *(operator.lt, operator.le, operator.gt, operator.ge) * 2,  # signed, unsigned: nothing here is negative
)


def _integer(a: Any) -> Any:
    return a + np.int64(0)


def _divided(a: Any, b: Any) -> Any:
    return np.where(b == 0, 0, np.trunc(a / np.where(b == 0, 1, b))).astype(np.int64)


def _remainder(a: Any, b: Any) -> Any:
    return a - _divided(a, b) * b


_OPERATIONS: dict[str, Callable[..., Any]] = {
    "arith.addi": operator.add,
    "arith.subi": operator.sub,
    "arith.muli": operator.mul,
    "arith.divsi": _divided,
    "arith.divui": _divided,
    "arith.remsi": _remainder,
    "arith.remui": _remainder,
    "arith.minsi": np.minimum,
    "arith.minui": np.minimum,
    "arith.maxsi": np.maximum,
    "arith.maxui": np.maximum,
    "arith.andi": operator.and_,
    "arith.ori": operator.or_,
    "arith.xori": operator.xor,
    "arith.shli": operator.lshift,
    "arith.shrui": operator.rshift,
    "arith.shrsi": operator.rshift,
    "arith.select": lambda condition, a, b: np.where(condition, a, b),
    **dict.fromkeys(("arith.index_cast", "arith.index_castui", "arith.extui", "arith.extsi", "arith.trunci"), _integer),
}
_OTHERS = ("arith.cmpi", "nvvm.shfl.sync")
_LEAVES = ("arith.constant", "gpu.block_id", "gpu.thread_id", "gpu.block_dim", "gpu.grid_dim")
_AXES = {"x": 0, "y": 1, "z": 2}


def evaluated(
    values: Sequence[ir.Value], grid: tuple[int, int, int], block: tuple[int, int, int]
) -> list[np.ndarray | None]:
    """Each of `values`, used where instructions are being inserted now, at every time that the kernel gets there.

    Args:
        grid, block: of the launch.

    Returns:
        Arrays that belong together, number by number; `None` for values that memory decides.
    """
    loops, conditions = [], []
    for operation, region in _around(ir.InsertionPoint.current):
        if operation.name == "scf.for":
            loops.append(operation.regions[0].blocks[0].arguments[0])
        elif operation.name == "scf.if":
            conditions.append((operation.operands[0], lambda x, region=region: x != region))
        elif operation.name == "scf.index_switch":
            cases = [int(x) for x in ir.DenseI64ArrayAttr(operation.attributes["cases"])]
            if region:
                conditions.append((operation.operands[0], lambda x, case=cases[region - 1]: x == case))
            else:
                conditions.append((operation.operands[0], lambda x, cases=cases: ~np.isin(x, cases)))
    worlds = _Worlds(grid, block)
    conditions = [(value, holds) for value, holds in conditions if known(value)]
    for value in (*reversed(loops), *values, *(value for value, _ in conditions)):
        if known(value):
            worlds.spread(value)
    reached = np.ones(worlds.count, bool)
    for value, holds in conditions:
        reached &= holds(worlds.evaluate(value))
    return [
        np.broadcast_to(worlds.evaluate(value), reached.shape)[reached] if known(value) else None for value in values
    ]


def known(value: Any) -> bool:
    """Whether all values of an expression can be told."""
    if isinstance(value, ir.BlockArgument):
        return value.arg_number == 0 and (bounds := _bounds(value)) is not None and all(map(known, bounds))
    if _remainder_of_unknown(value):
        return True
    name = value.owner.name
    return name in _LEAVES or (name in (*_OPERATIONS, *_OTHERS) and all(map(known, value.owner.operands)))


def _remainder_of_unknown(value: Any) -> int:
    """The constant that it is a remainder by, 0 if it is anything else."""
    if value.owner.name not in ("arith.remsi", "arith.remui"):
        return 0
    dividend, divisor = value.owner.operands
    if known(dividend) or isinstance(divisor, ir.BlockArgument) or divisor.owner.name != "arith.constant":
        return 0
    return int(ir.IntegerAttr(divisor.owner.attributes["value"]).value)


def _bounds(counter: ir.BlockArgument) -> list[Any] | None:
    """Beginning, end and step of a loop's counter, `None` if it is another argument."""
    owner = _operation(counter.owner.owner)
    return list(owner.operands)[:3] if owner.name == "scf.for" else None


def _operation(value: Any) -> Any:
    return getattr(value, "operation", value)


def _around(point: ir.InsertionPoint) -> Iterator[tuple[Any, int]]:
    """The operations around a place, from the innermost, and in which of their regions it is."""
    block = point.block
    while True:
        operation = _operation(block.owner)
        yield operation, next(i for i, region in enumerate(operation.regions) if block.region == region)
        if operation.parent is None:
            return
        block = operation.block


class _Worlds:
    """All assignments of numbers to the variables that expressions depend on; arrays have one number for each."""

    def __init__(self, grid: tuple[int, int, int], block: tuple[int, int, int]) -> None:
        self.grid, self.block, self.count = grid, block, 1
        self.variables: dict[Any, np.ndarray] = {}
        self.found: dict[Any, Any] = {}

    def spread(self, value: Any) -> None:
        """Adds the variables of an expression, which is known."""
        if value in self.found:
            return
        if isinstance(value, ir.BlockArgument):
            bounds = _bounds(value)
            assert bounds is not None  # it is known
            if value not in self.variables:
                for bound in bounds:
                    self.spread(bound)
                self._turns(value, *(np.broadcast_to(self.evaluate(bound), (self.count,)) for bound in bounds))
            return
        if divisor := _remainder_of_unknown(value):
            self._cross(value, np.arange(divisor))
            return
        name = value.owner.name
        if name in ("gpu.block_id", "gpu.thread_id"):
            axis = _axis(value.owner)
            # A warpgroup does everything together, so that one thread stands for it.
            size, step = (self.grid[axis], 1) if name == "gpu.block_id" else (self.block[axis], 128)
            self._cross((name, axis), np.arange(0, size, step))
        elif name in (*_OPERATIONS, *_OTHERS):
            for operand in value.owner.operands:
                self.spread(operand)
            self.found[value] = self.evaluate(value)

    def _turns(self, counter: Any, begin: np.ndarray, end: np.ndarray, step: np.ndarray) -> None:
        turns = np.maximum(0, -(-(end - begin) // step))
        which = np.repeat(np.arange(self.count), turns)
        turn = np.arange(len(which)) - np.repeat(np.cumsum(turns) - turns, turns)
        self.variables = {name: x[which] for name, x in self.variables.items()}
        self.variables[counter] = begin[which] + turn * step[which]
        self.count, self.found = len(which), {}

    def _cross(self, name: Any, numbers: np.ndarray) -> None:
        if name not in self.variables:
            self.variables = {other: np.repeat(x, len(numbers)) for other, x in self.variables.items()}
            self.variables[name] = np.tile(numbers, self.count)
            self.count, self.found = self.count * len(numbers), {}

    def evaluate(self, value: Any) -> Any:
        """An expression's value for each assignment, an array or one number."""
        if value in self.variables:
            return self.variables[value]
        if value in self.found:
            return self.found[value]
        owner = value.owner
        match owner.name:
            case "arith.constant":
                number = int(ir.IntegerAttr(owner.attributes["value"]).value)
                return bool(number) if str(value.type) == "i1" else number
            case "gpu.block_id" | "gpu.thread_id":
                return self.variables[owner.name, _axis(owner)]
            case "gpu.grid_dim" | "gpu.block_dim":
                return (self.grid if owner.name == "gpu.grid_dim" else self.block)[_axis(owner)]
            case "nvvm.shfl.sync":  # what one thread of a warp has, for all: here no two differ
                return self.evaluate(owner.operands[1])
            case "arith.cmpi":
                compare = _COMPARISONS[int(ir.IntegerAttr(owner.attributes["predicate"]).value)]
                return compare(*map(self.evaluate, owner.operands))
            case name:
                return _OPERATIONS[name](*map(self.evaluate, owner.operands))


def _axis(operation: Any) -> int:
    return _AXES[re.findall(r"\b[xyz]\b", str(operation.attributes["dimension"]))[0]]
