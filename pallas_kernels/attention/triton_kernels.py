"""What the Triton attention kernels share: one tile of keys entering an online softmax.

A head's `D` numbers are taken as `D_MAIN`, a power of two, and `D_TAIL`, a power of two or 0, so that 80, 96, 192 or
576 waste little. Weights are powers of two: `weight = 2 ** (score - top)`, the scores being base-2 logarithms.
"""

# Triton's language only looks like Python, whose types do not hold in it.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportGeneralTypeIssues=false, reportOperatorIssue=false

import triton
import triton.language as tl

from ..triton_kernels import widen

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
# Where running maxima start: finite, so that a row with no visible key has weights 2 ** (-inf - LOWEST) = 0, never NaN.
LOWEST = tl.constexpr(-1e30)


@triton.jit
def load_rows(source, rows, exists, D: tl.constexpr, FIRST: tl.constexpr, WIDTH: tl.constexpr):
    """Columns `[FIRST, FIRST + WIDTH)` of the given rows of `source[..., D]`, `[rows, WIDTH]`; zeros where none are."""
    columns = FIRST + tl.arange(0, WIDTH)
    inside = exists[:, None]
    if FIRST + WIDTH > D:
        inside = inside & (columns < D)[None, :]
    return tl.load(source + rows[:, None] * D + columns[None, :], mask=inside, other=0)


@triton.jit
def biased_scores(
    raw,
    positions,
    keys,
    slope,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ALIBI: tl.constexpr,
    ALIBI_SCALE: tl.constexpr,
):
    """Scores `[M, N]` as base-2 logarithms, before the mask, from products of queries and keys."""
    if SOFTCAP is None:
        scores = raw * (SCALE * LOG2_E)
    else:
        scores = (2.0 * tl.sigmoid(raw * (2.0 * SCALE / SOFTCAP)) - 1.0) * (SOFTCAP * LOG2_E)
    if ALIBI == "distance":
        scores += (slope * LOG2_E)[:, None] * (keys[None, :] - positions[:, None]).to(tl.float32)
    if ALIBI == "rounded":
        rounded = keys.to(tl.float32).to(tl.bfloat16).to(tl.float32)
        bias = slope.to(tl.bfloat16).to(tl.float32)[:, None] * rounded[None, :]
        scores += (ALIBI_SCALE * LOG2_E) * bias.to(tl.bfloat16).to(tl.float32)
    return scores


@triton.jit
def masked_scores(scores, positions, keys, exists, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SINKS: tl.constexpr):
    """The scores, -inf for keys that the query does not see; the window does not hide the first `SINKS` keys."""
    distance = keys[None, :] - positions[:, None]
    visible = tl.broadcast_to(exists[None, :], distance.shape)
    if CAUSAL:
        visible = visible & (distance <= 0)
    if WINDOW is not None:
        near = distance > -WINDOW
        if not CAUSAL:
            near = near & (distance < WINDOW)
        visible = visible & (near | (keys < SINKS)[None, :])
    return tl.where(visible, scores, float("-inf"))


@triton.jit
def key_range(first, last, length, start, stop, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SINKS: tl.constexpr):
    """The part of keys `[start, stop)` that queries at positions `[first, last]` may see of `length` keys."""
    stop = tl.minimum(stop, length)
    if CAUSAL:
        stop = tl.minimum(stop, last + 1)
    if WINDOW is not None:
        if not CAUSAL:
            stop = tl.minimum(stop, tl.maximum(last + WINDOW, SINKS))
        start = tl.where(start < SINKS, start, tl.maximum(start, first - WINDOW + 1))
    return start, stop


@triton.jit
def page_rows(table, keys, exists, head, pages, PAGE: tl.constexpr, KV_HEADS: tl.constexpr):
    """Rows of one sequence's keys in `[P, KV_HEADS, PAGE, D]`, and which exist: entries outside `[0, P)` are holes."""
    page = tl.load(table + keys // PAGE, mask=exists, other=-1)
    exists = exists & (page >= 0) & (page < pages)
    return (page.to(tl.int64) * KV_HEADS + head) * PAGE + keys % PAGE, exists


@triton.jit
def update(scores, top, total):
    """One tile enters the softmax: its weights, the factor for what was accumulated before, the new state."""
    higher = tl.maximum(top, tl.max(scores, 1))
    weights = tl.exp2(scores - higher[:, None])
    rescale = tl.exp2(top - higher)
    return weights, rescale, higher, total * rescale + tl.sum(weights, 1)


@triton.jit
def attend(
    q,
    q_rows,  # [M] rows of q
    q_exists,
    positions,  # [M]
    slope,  # [M], zeros without ALiBi
    k,
    v,  # None: the first D_MAIN numbers of k
    k_scales,
    v_scales,
    table,  # of the sequence, or None
    base,  # row of the sequence's first key, without a table
    head,
    pages,
    start,
    stop,
    PAGE: tl.constexpr,
    KV_HEADS: tl.constexpr,
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
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Attention of a block of one sequence's queries to its keys `[start, stop)`, not divided by the weights' sum.

    Returns:
        The weighted values `[M, DV_MAIN]`, the base-2 logarithm of the largest weight, the weights' sum.
    """
    q_main = load_rows(q, q_rows, q_exists, D, 0, D_MAIN)
    if D_TAIL > 0:
        q_tail = load_rows(q, q_rows, q_exists, D, D_MAIN, D_TAIL)
    top = tl.full([BLOCK_M], LOWEST, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    values = tl.zeros([BLOCK_M, DV_MAIN], tl.float32)
    for first in range(start, stop, BLOCK_N):
        keys = first + tl.arange(0, BLOCK_N)
        exists = keys < stop
        if table is not None:
            rows, exists = page_rows(table, keys, exists, head, pages, PAGE, KV_HEADS)
        else:
            rows = base + keys
        k_main = widen(load_rows(k, rows, exists, D, 0, D_MAIN), q_main.dtype)
        raw = tl.dot(q_main, tl.trans(k_main))
        if D_TAIL > 0:
            k_tail = widen(load_rows(k, rows, exists, D, D_MAIN, D_TAIL), q_main.dtype)
            raw = tl.dot(q_tail, tl.trans(k_tail), raw)
        if k_scales is not None:
            raw *= tl.load(k_scales + rows, mask=exists, other=0.0).to(tl.float32)[None, :]
        scores = biased_scores(raw, positions, keys, slope, SCALE, SOFTCAP, ALIBI, ALIBI_SCALE)
        scores = masked_scores(scores, positions, keys, exists, CAUSAL, WINDOW, SINKS)
        weights, rescale, top, total = update(scores, top, total)
        values *= rescale[:, None]
        vs = k_main
        if v is not None:
            vs = widen(load_rows(v, rows, exists, DV, 0, DV_MAIN), q_main.dtype)
        # Where the values are part of the keys, so are their scales.
        scales = k_scales if v is None else v_scales
        if scales is not None:
            weights *= tl.load(scales + rows, mask=exists, other=0.0).to(tl.float32)[None, :]
        values = tl.dot(weights.to(q_main.dtype), vs, values)
    return values, top, total


@triton.jit
def finish(
    values,  # [M, DV_MAIN], relative to 2 ** top
    top,
    total,
    rows,  # [M] rows of out and lse
    exists,
    out,
    lse,
    DV: tl.constexpr,
    DV_MAIN: tl.constexpr,
):
    """Divides by the sum of the weights and stores; no visible key gives zeros and -inf."""
    seen = total > 0.0
    total = tl.where(seen, total, 1.0)
    columns = tl.arange(0, DV_MAIN)
    target = out + rows[:, None] * DV + columns[None, :]
    inside = exists[:, None] & (columns < DV)[None, :]
    tl.store(target, (values / total[:, None]).to(out.dtype.element_ty), mask=inside)
    tl.store(lse + rows, tl.where(seen, (top + tl.log2(total)) * LN_2, float("-inf")), mask=exists)
