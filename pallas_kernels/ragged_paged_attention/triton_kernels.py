"""Attention of packed queries, prompt chunks and decodes mixed, to paged KV memory, in Triton."""

# Triton's language only looks like Python, whose types do not hold in it.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportGeneralTypeIssues=false, reportOperatorIssue=false

import triton
import triton.language as tl

from ..attention.triton_kernels import attend, finish, key_range


@triton.jit
def ragged(
    q,  # [T, H, D]
    k_pages,  # [P, K, PAGE, D]
    v_pages,  # as k_pages, or None
    tables,  # [B, N]
    q_offsets,  # [B + 1]
    k_lengths,  # [B]
    slopes,  # [H] or None
    T,
    B,
    N,
    pages,
    out,  # [T, H, DV]
    lse,  # [T, H]
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
    SOFTCAP: tl.constexpr,
    ALIBI: tl.constexpr,
    ALIBI_SCALE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """A block of one sequence's queries that share a KV head, to all keys they see.

    Sequence b's blocks begin at `q_offsets[b] // QUERIES + b`, which leaves it enough of them whatever the offsets, so
    a block finds its sequence by bisection. Tokens behind the last sequence are one more sequence, without keys.
    """
    GROUP: tl.constexpr = HEADS // KV_HEADS
    QUERIES: tl.constexpr = BLOCK_M // GROUP
    block = tl.program_id(0)
    head = tl.program_id(1)
    low = 0
    high = B
    while low < high:
        middle = (low + high + 1) // 2
        if tl.load(q_offsets + middle) // QUERIES + middle <= block:
            low = middle
        else:
            high = middle - 1
    sequence = low
    begin = tl.load(q_offsets + sequence)
    end = tl.load(q_offsets + sequence + 1, mask=sequence < B, other=T)
    end = tl.minimum(end, T)
    length = tl.load(k_lengths + sequence, mask=sequence < B, other=0)
    queries = end - begin
    first = (block - begin // QUERIES - sequence) * QUERIES
    if first >= queries:
        return
    row = tl.arange(0, BLOCK_M)
    query = first + row // GROUP
    exists = (row < QUERIES * GROUP) & (query < queries)
    heads = head * GROUP + row % GROUP
    q_rows = (begin + query).to(tl.int64) * HEADS + heads
    shift = length - queries  # the last query is the last key's token
    last = tl.minimum(first + QUERIES, queries) - 1
    start, stop = key_range(shift + first, shift + last, length, 0, N * PAGE, CAUSAL, WINDOW, 0)
    slope = tl.zeros([BLOCK_M], tl.float32)
    if slopes is not None:
        slope = tl.load(slopes + heads, mask=exists, other=0.0)
    values, top, total = attend(
        q, q_rows, exists, shift + query, slope, k_pages, v_pages, None, None, tables + sequence * N, 0, head,
        pages, start, stop, PAGE, KV_HEADS, D, D_MAIN, D_TAIL, DV, DV_MAIN,
        SCALE, CAUSAL, WINDOW, 0, SOFTCAP, ALIBI, ALIBI_SCALE, BLOCK_M, BLOCK_N,
    )  # fmt: skip
    finish(values, top, total, q_rows, exists, out, lse, DV, DV_MAIN)
