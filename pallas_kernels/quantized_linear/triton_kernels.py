"""Skinny products with quantised weights in Triton: `y^T = W x^T`, scales applied to float32 sums of their inputs."""

# Triton's language only looks like Python, whose types do not hold in it.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportGeneralTypeIssues=false, reportOperatorIssue=false

import triton
import triton.language as tl

from ..linear.triton_kernels import finish, store_partial
from ..triton_kernels import widen


@triton.jit
def product(
    x,  # [T, IN]
    values,  # int8 or float8 [ROWS, IN]; 4 bits [ROWS, IN / 4], see QuantizedWeight
    scales,  # [IN / GROUP, COLUMNS], or [1, COLUMNS] without groups
    zeros,  # as scales, or None
    bias,  # [ROWS] or None
    residual,  # [T, OUT] or None
    T,
    out,  # [T, OUT]; with SPLITS > 1 the partial sums [SPLITS, 1 or 2, T, OUT], float32
    OUT: tl.constexpr,
    IN: tl.constexpr,
    GATED: tl.constexpr,  # ROWS = 2 OUT, the gate's first
    ACTIVATION: tl.constexpr,
    FOUR_BITS: tl.constexpr,
    GROUP: tl.constexpr,  # inputs that share a scale, 0 for all
    COLUMNS: tl.constexpr,
    ROWS_PER_SCALE: tl.constexpr,
    SPLITS: tl.constexpr,
    SPLIT_IN: tl.constexpr,  # inputs of one split, a multiple of BLOCK_IN
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,  # with groups a multiple of GROUP, in 8 bits GROUP itself
    BLOCK_T: tl.constexpr,
):
    """One block of outputs for all tokens, over one split of the inputs."""
    split = tl.program_id(1)
    rows = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    known = rows < OUT
    tokens = tl.arange(0, BLOCK_T)
    total = tl.zeros([BLOCK_OUT, BLOCK_T], tl.float32)
    up = tl.zeros([BLOCK_OUT, BLOCK_T], tl.float32)
    WORDS: tl.constexpr = 4 if FOUR_BITS else 1  # inputs in one stored value
    BLOCK_WORDS: tl.constexpr = BLOCK_IN // WORDS
    row = values + rows.to(tl.int64)[:, None] * (IN // WORDS)
    column = x + tokens[None, :] * IN
    for first in range(split * SPLIT_IN, tl.minimum((split + 1) * SPLIT_IN, IN), BLOCK_IN):
        # Masks are compared in the units of what they mask, for only then does Triton see how wide it may load.
        word = tl.arange(0, BLOCK_WORDS)
        stored = first // WORDS + word
        inside = known[:, None] & (stored < IN // WORDS)[None, :]
        ws = tl.load(row + stored[None, :], mask=inside, other=0, eviction_policy="evict_first")
        if GATED:
            second = row + OUT * (IN // WORDS)
            us = tl.load(second + stored[None, :], mask=inside, other=0, eviction_policy="evict_first")
        if FOUR_BITS:
            for group in tl.static_range(BLOCK_IN // GROUP):
                # All but the group's own inputs count as zeros, so that groups smaller than a block need no cut tiles.
                part = tl.zeros([BLOCK_OUT, BLOCK_T], tl.float32)
                up_part = tl.zeros([BLOCK_OUT, BLOCK_T], tl.float32)
                xs_sum = tl.zeros([BLOCK_WORDS, BLOCK_T], tl.float32)
                for j in tl.static_range(4):
                    inner = first + word // 8 * 32 + 8 * j + word % 8
                    inside = (inner < IN)[:, None] & (tokens < T)[None, :]
                    xs = tl.load(column + inner[:, None], mask=inside, other=0.0)
                    if BLOCK_IN > GROUP:
                        xs = tl.where((word // (GROUP // 4) == group)[:, None], xs, 0.0)
                    xs_sum += xs.to(tl.float32)
                    part = tl.dot(sixteen_more(ws, j, xs.dtype), xs, part)
                    if GATED:
                        up_part = tl.dot(sixteen_more(us, j, xs.dtype), xs, up_part)
                sums = tl.sum(xs_sum, 0)[None, :]
                there = rows < tl.where(first + group * GROUP < IN, OUT, 0)
                place = (first // GROUP + group) * COLUMNS + rows
                total += scaled(part, sums, scales, zeros, place, there)
                if GATED:
                    up += scaled(up_part, sums, scales, zeros, place + OUT, there)
        else:
            inner = first + tl.arange(0, BLOCK_IN)
            xs = tl.load(column + inner[:, None], mask=(inner < IN)[:, None] & (tokens < T)[None, :], other=0.0)
            if GROUP == 0:
                total = tl.dot(widen(ws, xs.dtype), xs, total)
                if GATED:
                    up = tl.dot(widen(us, xs.dtype), xs, up)
            else:
                place = scales + first // GROUP * COLUMNS
                scale = tl.load(place + rows // ROWS_PER_SCALE, mask=known, other=0.0).to(tl.float32)
                total += tl.dot(widen(ws, xs.dtype), xs) * scale[:, None]
                if GATED:
                    scale = tl.load(place + (OUT + rows) // ROWS_PER_SCALE, mask=known, other=0.0).to(tl.float32)
                    up += tl.dot(widen(us, xs.dtype), xs) * scale[:, None]
    if GROUP == 0:
        total *= tl.load(scales + rows, mask=known, other=0.0).to(tl.float32)[:, None]
        if GATED:
            up *= tl.load(scales + OUT + rows, mask=known, other=0.0).to(tl.float32)[:, None]
    inside = known[:, None] & (tokens < T)[None, :]
    if SPLITS == 1:
        finish(total, up, bias, residual, out, tokens[None, :], rows[:, None], inside, OUT, GATED, ACTIVATION)
    else:
        store_partial(total, up, out, split, T, tokens[None, :], rows[:, None], inside, OUT, GATED)


@triton.jit
def sixteen_more(words, j: tl.constexpr, DTYPE: tl.constexpr):
    """16 + the unsigned numbers in bits `4 j .. 4 j + 3`, exactly, by one shift and one logical operation.

    The four bits become the highest of the mantissa of a number between 16 and 32.
    """
    LOWEST: tl.constexpr = 6 if tl.float16 == DTYPE else 3  # bit of the mantissa that is worth 1
    SIXTEEN: tl.constexpr = 0x4C00 if tl.float16 == DTYPE else 0x4180
    moved = words >> (4 * j - LOWEST) if 4 * j >= LOWEST else words << (LOWEST - 4 * j)
    return ((moved & (15 << LOWEST)) | SIXTEEN).to(tl.int16).to(DTYPE, bitcast=True)


@triton.jit
def scaled(part, sums, scales, zeros, place, there):
    """A group's product, from that of numbers 16 too large: the sums of x take away 16 and the zero point at once."""
    scale = tl.load(scales + place, mask=there, other=0.0).to(tl.float32)
    if zeros is None:
        return (part - 24.0 * sums) * scale[:, None]
    else:
        zero = tl.load(zeros + place, mask=there, other=0).to(tl.float32)
        return (part - (16.0 + zero)[:, None] * sums) * scale[:, None]
