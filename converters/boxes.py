"""Parts of stored tensors: reading a box of one, and no byte beside it."""

import math
from collections.abc import Iterable

import numpy as np

from jdsi.models.weight_map import Box, Shape

from .buffers import BLOCK_BYTES, OnBlock, cast, check_cast
from .safetensors_file import TensorInfo, opened, read_exactly

Piece = tuple[Box, np.ndarray]
"""A box and the array of its shape, of any strides and any type that the casting rule allows, that it is read into."""


def box_shape(box: Box) -> Shape:
    """The shape of an array that holds a box."""
    return tuple(part.stop - part.start for part in box)


def whole(shape: Shape) -> Box:
    """The box that is all of an array."""
    return tuple(slice(0, size) for size in shape)


def along(shape: Shape, dim: int, start: int, stop: int) -> Box:
    """The box with entries `start` to `stop` of dimension `dim`, and all of the others."""
    return (*whole(shape[:dim]), slice(start, stop), *whole(shape[dim + 1 :]))


def read_boxes(info: TensorInfo, pieces: Iterable[Piece], *, on_block: OnBlock | None = None) -> None:
    """Read boxes of a tensor that lies in a file row by row, one read for every stretch of bytes.

    Memory beyond the targets: one block of `BLOCK_BYTES` (or one row, if that is more) where the bytes cannot be read
    to where they belong.

    Args:
        info: where the tensor lies, of at least one dimension.
        pieces: what is read, and into what.
        on_block: called with every block, flat, when it is filled.

    Raises:
        CheckpointError: the file ends early or cannot be read, or a cast is refused.
        ValueError: a box does not fit its target or the tensor.
    """
    with opened(info) as descriptor:
        for box, target in pieces:
            _check(info, box, target)
            if target.size:
                _read_box(descriptor, info, box, target, on_block)


def _check(info: TensorInfo, box: Box, target: np.ndarray) -> None:
    check_cast(info.dtype, target.dtype, info.where)
    fits = len(box) == len(info.shape) and all(
        0 <= part.start <= part.stop <= size for part, size in zip(box, info.shape, strict=True)
    )
    if not fits or box_shape(box) != target.shape:
        raise ValueError(f"{box} of {info.where} with shape {info.shape}, into an array of shape {target.shape}")


def _read_box(descriptor: int, info: TensorInfo, box: Box, target: np.ndarray, on_block: OnBlock | None) -> None:
    # Dimensions of the box that are whole, from the last one on, and the one in front of them are one stretch of bytes.
    depth = len(box) - 1
    while depth and target.shape[depth] == info.shape[depth]:
        depth -= 1
    same = info.dtype == target.dtype
    direct = same and target.flags.c_contiguous
    row = math.prod(target.shape[1:]) * max(info.dtype.itemsize, target.dtype.itemsize)
    rows = max(1, BLOCK_BYTES // row)
    scratch = None if direct else np.empty((min(rows, len(target)), *target.shape[1:]), info.dtype)
    for first in range(0, len(target), rows):
        block = target[first : first + rows]
        read = block if scratch is None else scratch[: len(block)]
        raw = read.reshape(-1).view(np.uint8).data
        size = math.prod(read.shape[depth:]) * info.dtype.itemsize
        inside = (slice(box[0].start + first, box[0].start + first + len(block)), *box[1:])
        for i, offset in enumerate(_offsets(info, inside, depth)):
            read_exactly(descriptor, raw[i * size : (i + 1) * size], offset, info)
        if scratch is not None:
            cast(block, read)
        if on_block is not None:
            on_block(np.ascontiguousarray(read if same else block).reshape(-1))


def _offsets(info: TensorInfo, box: Box, depth: int) -> list[int]:
    """Where in the file the stretches of a box begin, in order; its first `depth` dimensions tell them apart."""
    strides = [math.prod(info.shape[dim + 1 :]) * info.dtype.itemsize for dim in range(len(box))]
    found = np.array([info.offset + sum(part.start * stride for part, stride in zip(box, strides, strict=True))])
    for part, stride in zip(box[:depth], strides, strict=False):
        found = (found[:, None] + np.arange(part.stop - part.start) * stride).reshape(-1)
    return found.tolist()
