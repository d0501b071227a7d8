"""Skinny matrix products in Triton: `y^T = W x^T`, as the rows of W fill the tensor cores, few tokens do not."""

# Triton's language only looks like Python, whose types do not hold in it.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportGeneralTypeIssues=false, reportOperatorIssue=false

import triton
import triton.language as tl


@triton.jit
def product(
    x,  # [T, IN]
    weight,  # [OUT, IN], or [2 OUT, IN] with the gate's rows first
    bias,  # [OUT], [2 OUT] or None
    residual,  # [T, OUT] or None
    T,
    out,  # [T, OUT]; with SPLITS > 1 the partial sums [SPLITS, 1 or 2, T, OUT], float32
    OUT: tl.constexpr,
    IN: tl.constexpr,
    GATED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SPLITS: tl.constexpr,
    SPLIT_IN: tl.constexpr,  # inputs of one split, a multiple of BLOCK_IN
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """One block of outputs for all tokens, over one split of the inputs."""
    split = tl.program_id(1)
    rows = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    tokens = tl.arange(0, BLOCK_T)
    total = tl.zeros([BLOCK_OUT, BLOCK_T], tl.float32)
    up = tl.zeros([BLOCK_OUT, BLOCK_T], tl.float32)
    row = weight + rows.to(tl.int64)[:, None] * IN
    column = x + tokens[None, :] * IN
    for first in range(split * SPLIT_IN, tl.minimum((split + 1) * SPLIT_IN, IN), BLOCK_IN):
        inner = first + tl.arange(0, BLOCK_IN)
        inside = (rows < OUT)[:, None] & (inner < IN)[None, :]
        xs = tl.load(column + inner[:, None], mask=(inner < IN)[:, None] & (tokens < T)[None, :], other=0.0)
        ws = tl.load(row + inner[None, :], mask=inside, other=0.0, eviction_policy="evict_first")
        total = tl.dot(ws, xs, total)
        if GATED:
            ws = tl.load(row + OUT * IN + inner[None, :], mask=inside, other=0.0, eviction_policy="evict_first")
            up = tl.dot(ws, xs, up)
    inside = (rows < OUT)[:, None] & (tokens < T)[None, :]
    if SPLITS == 1:
        finish(total, up, bias, residual, out, tokens[None, :], rows[:, None], inside, OUT, GATED, ACTIVATION)
    else:
        store_partial(total, up, out, split, T, tokens[None, :], rows[:, None], inside, OUT, GATED)


@triton.jit
def store_partial(total, up, out, split, T, token, column, inside, OUT: tl.constexpr, GATED: tl.constexpr):
    """Leaves one split's sums for the pass that adds them up."""
    PARTS: tl.constexpr = 2 if GATED else 1
    target = out + (split * PARTS * T + token) * OUT + column
    tl.store(target, total, mask=inside)
    if GATED:
        tl.store(target + T * OUT, up, mask=inside)


@triton.jit
def finish(
    total,
    up,
    bias,
    residual,
    out,
    token,
    column,
    inside,
    OUT: tl.constexpr,
    GATED: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """All that follows the sum over inputs, in float32; `token` and `column` broadcast to the sums' shape."""
    known = column < OUT
    if bias is not None:
        total += tl.load(bias + column, mask=known, other=0.0).to(tl.float32)
    total = activate(total, ACTIVATION)
    if GATED:
        if bias is not None:
            up += tl.load(bias + OUT + column, mask=known, other=0.0).to(tl.float32)
        total *= up
    y = total.to(out.dtype.element_ty)
    if residual is not None:
        # Rounds twice, as a model made of single operators does.
        before = tl.load(residual + token * OUT + column, mask=inside, other=0.0).to(tl.float32)
        y = (before + y.to(tl.float32)).to(out.dtype.element_ty)
    tl.store(out + token * OUT + column, y, mask=inside)


@triton.jit
def activate(x, NAME: tl.constexpr):
    """The activation function of that name; see `ACTIVATIONS`."""
    if NAME == "silu" or NAME == "swish":
        x = x * tl.sigmoid(x)
    elif NAME == "gelu":
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif NAME == "gelu_new" or NAME == "gelu_fast" or NAME == "gelu_pytorch_tanh":
        # 0.5 (1 + tanh(z)) is sigmoid(2 z).
        x = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif NAME == "quick_gelu":
        x = x * tl.sigmoid(1.702 * x)
    elif NAME == "relu":
        x = tl.maximum(x, 0.0)
    elif NAME == "relu2":
        x = tl.maximum(x, 0.0)
        x = x * x
    elif NAME == "tanh":
        x = 2.0 * tl.sigmoid(2.0 * x) - 1.0
    else:
        tl.static_assert(NAME is None, "unknown activation")
    return x
