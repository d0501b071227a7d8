"""The skinny matrix product in Triton: for NVIDIA GPUs that the Pallas kernel leaves out.

Blocks of weight rows go through the inputs, all of them or one of a few splits; bias, activation, gate and residual
follow in the same kernel or, after splits, in the pass that adds these up. A norm comes first, as XLA's own kernel.
"""

import dataclasses
import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array

from ..device import Device
from ..normalization import normalise
from ..operator import Config
from ..triton_support import launch, why_not_device, why_not_dtype
from .epilogue import reduce_splits
from .form import PLAIN, LinearForm

MAX_TOKENS = 64


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How the work is cut.

    Attributes:
        block_out: outputs of one block, a power of two, at least 16.
        block_in: inputs at a time, a power of two, at least 16.
        splits: parts into which the inputs are divided.
        warps: of one block.
        stages: loads in flight.
    """

    block_out: int
    block_in: int
    splits: int
    warps: int = 4
    stages: int = 4

    def split_in(self, inputs: int) -> int:
        """Inputs of one split."""
        return -(-inputs // (self.splits * self.block_in)) * self.block_in

    def shared_memory(self, tokens: int, form: LinearForm) -> int:
        """Bytes that the kernel takes at most."""
        return 2 * self.stages * self.block_in * (form.operands * self.block_out + block_tokens(tokens))


def block_tokens(tokens: int) -> int:
    """Columns of a block: a power of two, at least the tensor cores' 8."""
    return max(8, 1 << (tokens - 1).bit_length())


def why_not_tokens(tokens: int, outputs: int, form: LinearForm) -> str | None:
    """Why the kernels of skinny products cannot take so many tokens or such results, or `None`."""
    if tokens > MAX_TOKENS:
        return f"at most {MAX_TOKENS} tokens, not {tokens}: that is XLA's matrix product"
    if tokens == 0 or outputs == 0:
        return "there is nothing to compute"
    if form.out_dtype not in (None, jnp.bfloat16, jnp.float16, jnp.float32):
        return f"the result cannot be {form.out_dtype}"
    return None


def why_not(
    x: Array,
    weight: Array,
    bias: Array | None = None,
    residual: Array | None = None,
    norm_weight: Array | None = None,
    norm_bias: Array | None = None,
    *,
    device: Device,
    form: LinearForm = PLAIN,
) -> str | None:
    """See `KernelModule`."""
    if reason := why_not_device(device) or why_not_dtype(x=x, weight=weight):
        return reason
    if reason := why_not_tokens(x.shape[0], weight.shape[0], form):
        return reason
    if x.shape[1] % 8 or x.shape[1] == 0:
        return f"in must be a multiple of 8, for rows of 16 bytes, not {x.shape[1]}"
    return None


def candidates(
    x: Array,
    weight: Array,
    bias: Array | None = None,
    residual: Array | None = None,
    norm_weight: Array | None = None,
    norm_bias: Array | None = None,
    *,
    device: Device,
    form: LinearForm = PLAIN,
) -> Sequence[Config]:
    """See `KernelModule`."""
    options = itertools.product((16, 32, 64, 128), (64, 128, 256), (1, 2, 4), ((4, 4), (8, 4), (4, 6)))
    found = [Tiling(rows, inputs, splits, *rest) for rows, inputs, splits, rest in options]
    fitting = [option for option in found if option.shared_memory(x.shape[0], form) <= device.shared_memory]
    return [dataclasses.asdict(option) for option in fitting]


def run(
    x: Array,
    weight: Array,
    bias: Array | None = None,
    residual: Array | None = None,
    norm_weight: Array | None = None,
    norm_bias: Array | None = None,
    *,
    device: Device,
    config: Config | None,
    form: LinearForm = PLAIN,
) -> Array:
    """See `KernelModule`."""
    from .triton_kernels import product

    if form.norm is not None:
        x = normalise(x, norm_weight, norm_bias, form.norm)
    (tokens, inputs), outputs = x.shape, weight.shape[0] // form.operands
    tiling = dataclasses.replace(default(tokens, outputs, inputs, form, device), **config or {})
    dtype = form.result_dtype(x.dtype)
    whole = tiling.splits == 1
    (y,) = launch(
        product,
        x,
        weight,
        bias if whole else None,
        residual if whole else None,
        tokens,
        out=[result(tokens, outputs, tiling.splits, form, dtype)],
        grid=(-(-outputs // tiling.block_out), tiling.splits),
        device=device,
        warps=tiling.warps,
        stages=tiling.stages,
        OUT=outputs,
        IN=inputs,
        GATED=form.gated,
        ACTIVATION=form.activation,
        SPLITS=tiling.splits,
        SPLIT_IN=tiling.split_in(inputs),
        BLOCK_OUT=tiling.block_out,
        BLOCK_IN=tiling.block_in,
        BLOCK_T=block_tokens(tokens),
    )
    return y if whole else reduce_splits(y, bias, residual, form, outputs, dtype)


def result(
    tokens: int, outputs: int, splits: int, form: LinearForm, dtype: jax.typing.DTypeLike
) -> jax.ShapeDtypeStruct:
    """What a kernel writes: the result, or the splits' sums as `reduce_splits` takes them."""
    if splits == 1:
        return jax.ShapeDtypeStruct((tokens, outputs), dtype)
    return jax.ShapeDtypeStruct((splits, form.operands, tokens, outputs), jnp.float32)


def default(tokens: int, outputs: int, inputs: int, form: LinearForm, device: Device) -> Tiling:
    """Blocks as large as leave every multiprocessor one, and splits where small ones are too few.

    Large blocks read the tokens less often and put more of the weight in flight; a split costs a second pass. Neither
    depends on the tokens, so that these decide as little as possible about the order of sums.
    """
    rows = next((r for r in (64, 32) if outputs >= r * device.cores), 32) // form.operands
    blocks = -(-outputs // rows)
    splits = max(1, min(8, 2 * device.cores // blocks, inputs // 1024)) if blocks < device.cores else 1
    tiling = Tiling(rows, 128, splits)
    while tiling.shared_memory(tokens, form) > device.shared_memory:
        tiling = dataclasses.replace(tiling, stages=tiling.stages - 1)
    return tiling
