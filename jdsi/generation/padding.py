"""Rows of unequal length as one array, and the few widths such arrays have."""

from collections.abc import Sequence

import numpy as np

NO_TOKEN = -1
"""What stands where a row has fewer tokens than another."""


def pad_rows(rows: Sequence[Sequence[int]], width: int, fill: int = 0) -> np.ndarray:
    """`[B, width]` int32: each row at the left of its line, `fill` to the right; a row must not exceed `width`."""
    padded = np.full((len(rows), width), fill, np.int32)
    for line, row in zip(padded, rows, strict=True):
        line[: len(row)] = row
    return padded


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least `n`; 0 for 0."""
    return 1 << (n - 1).bit_length() if n else 0
