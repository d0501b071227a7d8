"""Attention of few queries to a long KV memory in Triton: keys in chunks, then one sum over the chunks."""

# Triton's language only looks like Python, whose types do not hold in it.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportGeneralTypeIssues=false, reportOperatorIssue=false

import triton
import triton.language as tl

from ..attention.triton_kernels import LOWEST, attend, finish, key_range


@triton.jit
def decode(
    q,  # [B, S, H, D]
    k,  # [B, K, L, D]; with tables [P, K, PAGE, D]
    v,  # as k, or None
    tables,  # [B, N] or None
    q_start,  # [B]
    k_lengths,  # [B] or None
    k_scales,  # as k without D, or None
    v_scales,
    slopes,  # [H] or None
    S,
    LENGTH,  # keys a sequence can have
    pages,
    out,  # [B, S, H, DV]; with CHUNKS > 1 [CHUNKS, B, S, H, DV], float32
    lse,  # the same without DV
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    PAGE: tl.constexpr,
    D: tl.constexpr,
    D_MAIN: tl.constexpr,
    D_TAIL: tl.constexpr,
    DV: tl.constexpr,
    DV_MAIN: tl.constexpr,
    SCALE: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    SINKS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ALIBI: tl.constexpr,
    ALIBI_SCALE: tl.constexpr,
    CHUNKS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One chunk of keys for a block of the queries that share a KV head."""
    GROUP: tl.constexpr = HEADS // KV_HEADS
    sequence = tl.program_id(0) // KV_HEADS
    head = tl.program_id(0) % KV_HEADS
    chunk = tl.program_id(2)
    row = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    exists = row < S * GROUP
    query = row // GROUP
    heads = head * GROUP + row % GROUP
    q_rows = (sequence * S + query) * HEADS + heads
    begin = tl.load(q_start + sequence)
    length = begin + S
    if k_lengths is not None:
        length = tl.load(k_lengths + sequence)
    length = tl.minimum(length, LENGTH)
    first = begin + tl.program_id(1) * BLOCK_M // GROUP
    last = begin + tl.minimum((tl.program_id(1) * BLOCK_M + BLOCK_M - 1) // GROUP, S - 1)
    start, stop = key_range(first, last, length, chunk * CHUNK, chunk * CHUNK + CHUNK, CAUSAL, WINDOW, SINKS)
    out_rows = chunk.to(tl.int64) * (tl.num_programs(0) // KV_HEADS * S * HEADS) + q_rows
    if CHUNKS > 1 and start >= stop:
        tl.store(lse + out_rows, tl.full([BLOCK_M], float("-inf"), tl.float32), mask=exists)
        return
    slope = tl.zeros([BLOCK_M], tl.float32)
    if slopes is not None:
        slope = tl.load(slopes + heads, mask=exists, other=0.0)
    table = tables
    if tables is not None:
        table = tables + sequence * tl.cdiv(LENGTH, PAGE)
    base = (sequence * KV_HEADS + head).to(tl.int64) * LENGTH
    values, top, total = attend(
        q, q_rows, exists, begin + query, slope, k, v, k_scales, v_scales, table, base, head, pages, start, stop,
        PAGE, KV_HEADS, D, D_MAIN, D_TAIL, DV, DV_MAIN,
        SCALE, CAUSAL, WINDOW, SINKS, SOFTCAP, ALIBI, ALIBI_SCALE, BLOCK_M, BLOCK_N,
    )  # fmt: skip
    finish(values, top, total, out_rows, exists, out, lse, DV, DV_MAIN)


@triton.jit
def combine(
    partial,  # [CHUNKS, ROWS, DV]; undefined where the logarithm is -inf
    partial_lse,  # [CHUNKS, ROWS]
    ROWS,
    out,  # [ROWS, DV]
    lse,  # [ROWS]
    DV: tl.constexpr,
    DV_MAIN: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK: tl.constexpr,  # chunks at a time
):
    """Adds one query's chunks, always in the same order."""
    row = tl.program_id(0)
    columns = tl.arange(0, DV_MAIN)
    top = tl.full([1], LOWEST, tl.float32)
    total = tl.zeros([1], tl.float32)
    values = tl.zeros([1, DV_MAIN], tl.float32)
    for first in range(0, CHUNKS, BLOCK):
        chunks = first + tl.arange(0, BLOCK)
        source = chunks.to(tl.int64) * ROWS + row
        logarithms = tl.load(partial_lse + source, mask=chunks < CHUNKS, other=float("-inf")) * 1.4426950408889634
        higher = tl.maximum(top, tl.max(logarithms, 0))
        weights = tl.exp2(logarithms - higher)
        rescale = tl.exp2(top - higher)
        inside = (logarithms > float("-inf"))[:, None] & (columns < DV)[None, :]
        parts = tl.load(partial + source[:, None] * DV + columns[None, :], mask=inside, other=0.0)
        values = values * rescale[:, None] + tl.sum(parts * weights[:, None], 0)[None, :]
        total = total * rescale + tl.sum(weights, 0)
        top = higher
    rows = row + tl.arange(0, 1)
    finish(values, top, total, rows, rows >= 0, out, lse, DV, DV_MAIN)
