"""What a kernel copies between global and shared memory, read from the module that it is lowered to for the H200.

Needs no GPU and no compiler: each copy is seen as Mosaic turns it into instructions, with its place in global memory as
an expression of block, warpgroup and loop counters, which is then evaluated for all their values.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple
from unittest import mock

import jax
import numpy as np
from jax.experimental.mosaic.gpu import core, utils
from jax.experimental.mosaic.gpu.launch_context import (
    KERNEL_ARG_ID_ATTR,
    CollapseLeadingIndicesTransform,
    DropUnitDimsTransform,
    LaunchContext,
)
from jax.experimental.mosaic.gpu.launch_context import _find_kernel_argument_for_gmem_ref as _argument
from jaxlib.mlir import ir

from addresses import evaluated
from jdsi.pallas_kernels.device import H200, target

# Launch limits of compute capability 9.0 (CUDA C++ Programming Guide, table of technical specifications), x first.
_GRID = (2**31 - 1, 65535, 65535)
_BLOCK, _SHARED_MEMORY = 1024, 227 * 1024


@dataclasses.dataclass(frozen=True)
class Copy:
    """One asynchronous copy, as often as it runs.

    Attributes:
        store: from shared to global memory, else the other way.
        argument: which of the kernel's arrays, the results behind the operands.
        bulk: a run of bytes that knows nothing of rows and stops only at the end of the array; else a copy of a box,
            which stops in every dimension where the array does.
        shape, itemsize: of the array in global memory.
        sizes: how much of each dimension is copied.
        starts: where in each dimension it begins, for every time it runs; `None` where memory decides that.
        box: `(sizes, strides)` of a boxed copy's dimensions as the hardware is told them, the last one contiguous.
        swizzle: bytes of a boxed copy's swizzle, 16 for none.
        alignment: of its place in shared memory, in bytes.
    """

    store: bool
    argument: int
    bulk: bool
    shape: tuple[int, ...]
    itemsize: int
    sizes: tuple[int, ...]
    starts: tuple[np.ndarray | None, ...]
    box: tuple[tuple[int, ...], tuple[int, ...]] | None
    swizzle: int
    alignment: int

    def __str__(self) -> str:
        way = "store to" if self.store else "load from"
        return f"{'bulk' if self.bulk else 'boxed'} {way} an array {list(self.shape)} of {list(self.sizes)}"

    @property
    def known(self) -> bool:
        """Whether its places are, in every dimension."""
        return all(start is not None for start in self.starts)

    def runs(self) -> tuple[np.ndarray, np.ndarray]:
        """Where the runs of numbers that it copies begin and end in the array, counted without dimensions."""
        assert self.known, f"{self}: memory decides where it begins"
        starts = [start for start in self.starts if start is not None]
        strides = [math.prod(self.shape[axis + 1 :]) for axis in range(len(self.shape))]
        if self.bulk:
            begin = sum(start * stride for start, stride in zip(starts, strides, strict=True))
            return begin, np.minimum(begin + math.prod(self.sizes), math.prod(self.shape))
        steps = np.indices(self.sizes[:-1]).reshape(len(strides) - 1, -1)
        rows = [start[:, None] + step for start, step in zip(starts, steps, strict=False)]
        inside = np.logical_and.reduce([row < size for row, size in zip(rows, self.shape, strict=False)])
        first = np.broadcast_to(starts[-1][:, None], inside.shape)[inside]
        begin = first + sum(row[inside] * stride for row, stride in zip(rows, strides, strict=False))
        return begin, begin + np.minimum(self.sizes[-1], self.shape[-1] - first)

    def faults(self) -> Iterator[str]:
        """What the hardware refuses, and for bulk copies what it does instead of stopping at the end of a row."""
        if self.alignment % (16 if self.bulk else 128):
            yield f"{self}: its place in shared memory starts at multiples of {self.alignment} bytes"
        if self.box is not None:
            sizes, strides = self.box
            if len(sizes) > 5:
                yield f"{self}: {len(sizes)} dimensions, more than 5"
            if max(sizes) > 256:
                yield f"{self}: {max(sizes)} numbers in a dimension of the box, more than 256"
            if sizes[-1] * self.itemsize % 16 or strides[-1] != 1:
                yield f"{self}: rows of {sizes[-1] * self.itemsize} bytes, not a multiple of 16"
            if self.swizzle > 16 and sizes[-1] * self.itemsize > self.swizzle:
                yield f"{self}: rows of {sizes[-1] * self.itemsize} bytes under a swizzle of {self.swizzle}"
            if any(stride * self.itemsize % 16 or stride * self.itemsize >= 2**40 for stride in strides[:-1]):
                yield f"{self}: strides of {strides} numbers, not multiples of 16 bytes"
            return
        if math.prod(self.sizes) * self.itemsize % 16 or self.itemsize * math.prod(self.sizes) == 0:
            yield f"{self}: {math.prod(self.sizes) * self.itemsize} bytes, not a multiple of 16"
        if self.known and (self.runs()[0] * self.itemsize % 16).any():
            yield f"{self}: it begins where 16 bytes do not"
        for axis, (start, size, whole) in enumerate(zip(self.starts, self.sizes, self.shape, strict=True)):
            if start is None:
                if axis:
                    yield f"{self}: nothing is known of where it begins in dimension {axis}"
            elif len(start) and (start.min() < 0 or start.max() + size > whole):
                yield f"{self}: it reaches {start.max() + size} in dimension {axis}, which ends at {whole}"


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One launch: its grid and block (x, y, z), bytes of shared memory, how many operands, results, copies."""

    name: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared_memory: int
    operands: int
    results: tuple[jax.ShapeDtypeStruct, ...]
    copies: list[Copy]

    def faults(self) -> Iterator[str]:
        """What a launch of it would fail of, or do wrong."""
        for axis, (size, most) in zip("xyz", zip(self.grid, _GRID, strict=True), strict=True):
            if not 1 <= size <= most:
                yield f"{self.name}: {size} blocks along {axis}, where there are 1 to {most}"
        if math.prod(self.block) > _BLOCK:
            yield f"{self.name}: {math.prod(self.block)} threads in a block, more than {_BLOCK}"
        if self.shared_memory > _SHARED_MEMORY:
            yield f"{self.name}: {self.shared_memory} bytes of shared memory, more than {_SHARED_MEMORY}"
        for copy in self.copies:
            yield from (f"{self.name}: {fault}" for fault in copy.faults())

    def times_written(self, result: int) -> np.ndarray:
        """How often copies write each number of a result; all of its copies' places have to be known."""
        shape = self.results[result].shape
        changes = np.zeros(math.prod(shape) + 1, np.int32)
        for copy in self.copies:
            if copy.store and copy.argument == self.operands + result:
                begin, end = copy.runs()
                np.add.at(changes, begin, 1)
                np.add.at(changes, end, -1)
        return changes.cumsum()[:-1].reshape(shape)


def kernels_of(function: Callable[..., Any], *arguments: Any) -> list[Kernel]:
    """The kernels that `function` launches on an H200; `arguments` are pytrees of shapes and dtypes."""
    with recorded() as kernels, target(H200):
        jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",))
    return kernels


@contextlib.contextmanager
def recorded() -> Iterator[list[Kernel]]:
    """Collects the kernels that are lowered within it."""
    kernels: list[Kernel] = []
    lower, copy = core._lower_as_gpu_kernel, LaunchContext.async_copy

    def lowering(body: Any, **how: Any) -> Any:
        if how["kernel_name"] != "mgpu_layout_rule":  # JAX lowers pieces of kernels too, to find out about layouts
            shapes = (*how["out_shape"], *how["inout_shape"])
            size = core._smem_tree_size(how["smem_scratch_shape"])
            given = len(how["in_shapes"])
            kernels.append(Kernel(how["kernel_name"], how["grid"], how["block"], size, given, shapes, []))
        return lower(body, **how)

    def copying(self: LaunchContext, *, src_ref: ir.Value, dst_ref: ir.Value, gmem_slice: Any, **options: Any) -> None:
        boxes: list[_Box] = []
        with mock.patch.object(LaunchContext, "_get_tma_desc", _noting(boxes)):
            copy(self, src_ref=src_ref, dst_ref=dst_ref, gmem_slice=gmem_slice, **options)
        kernels[-1].copies.append(_copy(kernels[-1], src_ref, dst_ref, gmem_slice, boxes))

    with (
        mock.patch.object(core, "_lower_as_gpu_kernel", lowering),
        mock.patch.object(LaunchContext, "async_copy", copying),
    ):
        yield kernels


class _Box(NamedTuple):
    """What the hardware is told of a boxed copy: `transforms` make the array's dimensions those of the box."""

    transforms: Sequence[Any]
    sizes: Sequence[int]
    swizzle: Any


def _noting(boxes: list[_Box]) -> Callable[..., Any]:
    describe = LaunchContext._get_tma_desc

    def describing(self: LaunchContext, array: ir.Value, transforms: Any, peer: Any, sizes: Any, *rest: Any) -> Any:
        boxes.append(_Box(transforms, sizes, rest[0]))
        return describe(self, array, transforms, peer, sizes, *rest)

    return describing


def _copy(kernel: Kernel, source: ir.Value, target: ir.Value, places: Sequence[Any], boxes: list[_Box]) -> Copy:
    store = ir.MemRefType(target.type).memory_space is None
    array, shared = (target, source) if store else (source, target)
    kind = ir.MemRefType(array.type)
    strides, box, swizzle = kind.get_strides_and_offset()[0], None, 16
    for transforms, sizes, width in boxes:
        for transform in transforms:
            strides = _transformed(transform, strides)
        box, swizzle = (tuple(sizes), tuple(strides)), int(width or 16)
    return Copy(
        store=store,
        argument=int(ir.IntegerAttr(_argument(array).owner.attributes[KERNEL_ARG_ID_ATTR]).value),
        bulk=not boxes,
        shape=tuple(kind.shape),
        itemsize=_bytes(kind),
        sizes=tuple(getattr(place, "length", 1) for place in places),
        starts=tuple(evaluated([getattr(place, "base", place) for place in places], kernel.grid, kernel.block)),
        box=box,
        swizzle=swizzle,
        alignment=_alignment(shared, kernel),
    )


def _transformed(transform: Any, strides: Sequence[int]) -> Sequence[int]:
    match transform:
        case DropUnitDimsTransform():
            return [stride for axis, stride in enumerate(strides) if axis not in transform.unit_dims]
        case CollapseLeadingIndicesTransform():
            return [transform.common_stride, *strides[len(transform.strides) :]]
    return transform.transform_strides(strides)


def _alignment(memory: ir.Value, kernel: Kernel) -> int:
    """The largest number that certainly divides the address of a part of shared memory, up to 1024."""
    owner = memory.owner
    if owner.name == "gpu.dynamic_shared_memory":
        return 1024
    below = _alignment(owner.operands[0], kernel)
    if owner.name == "memref.cast":
        return below
    kind = ir.MemRefType(owner.operands[0].type)
    if owner.name == "memref.view":
        offsets, strides, dynamic = [None], [1], iter([owner.operands[1]])
    elif owner.name == "memref.subview":
        marker = ir.ShapedType.get_dynamic_stride_or_offset()
        offsets = [None if x == marker else x for x in ir.DenseI64ArrayAttr(owner.attributes["static_offsets"])]
        strides, dynamic = kind.get_strides_and_offset()[0], iter(list(owner.operands)[1:])
    else:
        raise NotImplementedError(owner.name)
    for offset, stride in zip(offsets, strides, strict=True):
        [starts] = [np.array([offset])] if offset is not None else evaluated([next(dynamic)], kernel.grid, kernel.block)
        below = math.gcd(below, stride * _bytes(kind) * (1 if starts is None else int(np.gcd.reduce(starts))))
    return below


def _bytes(array: ir.MemRefType) -> int:
    return utils.bitwidth(array.element_type) // 8
