"""The skinny product with a quantised weight in Triton: for NVIDIA GPUs that the Pallas kernel leaves out."""

import dataclasses
import itertools
from collections.abc import Sequence

from jaxtyping import Array

from ..device import Device
from ..linear.epilogue import reduce_splits
from ..linear.form import LinearForm
from ..linear.triton import Tiling as LinearTiling
from ..linear.triton import block_tokens, result, why_not_tokens
from ..linear.triton import default as linear_default
from ..operator import Config
from ..triton_support import launch, why_not_device, why_not_dtype
from .weight import BLOCK, QuantizedWeight


@dataclasses.dataclass(frozen=True)
class Tiling(LinearTiling):
    """As in `linear`; with groups of inputs `block_in` is a multiple of the group, in 8 bits the group itself."""

    def stored(self, weight: QuantizedWeight, form: LinearForm) -> int:
        """Bytes of the weight that one load brings."""
        numbers = form.operands * self.block_out * self.block_in
        return numbers // 2 if weight.format.kind == "int4" else numbers

    def fits(self, tokens: int, weight: QuantizedWeight, form: LinearForm, device: Device) -> bool:
        """Whether the kernel's shared memory suffices: weights as stored and widened, and the tokens."""
        widened = 2 * form.operands * self.block_out * self.block_in
        load = self.stored(weight, form) + 2 * self.block_in * _block_tokens(tokens, weight)
        return self.stages * load + widened <= device.shared_memory


def why_not(
    x: Array,
    weight: QuantizedWeight,
    bias: Array | None = None,
    residual: Array | None = None,
    *,
    device: Device,
    form: LinearForm,
) -> str | None:
    """See `KernelModule`."""
    if reason := why_not_device(device) or why_not_dtype(x=x):
        return reason
    rows, inputs = weight.shape
    if reason := why_not_tokens(x.shape[0], rows, form):
        return reason
    if form.norm is not None:
        return "it fuses no norm"
    if inputs % 32 or inputs == 0:
        return f"in must be a multiple of 32, for rows of 16 bytes, not {inputs}"
    return None


def candidates(
    x: Array,
    weight: QuantizedWeight,
    bias: Array | None = None,
    residual: Array | None = None,
    *,
    device: Device,
    form: LinearForm,
) -> Sequence[Config]:
    """See `KernelModule`."""
    options = itertools.product((16, 32, 64, 128), _blocks_in(weight), (1, 2, 4), ((4, 4), (8, 4), (4, 6), (4, 8)))
    found = [Tiling(rows, inputs, splits, *rest) for rows, inputs, splits, rest in options]
    return [dataclasses.asdict(option) for option in found if option.fits(x.shape[0], weight, form, device)]


def run(
    x: Array,
    weight: QuantizedWeight,
    bias: Array | None = None,
    residual: Array | None = None,
    *,
    device: Device,
    config: Config | None,
    form: LinearForm,
) -> Array:
    """See `KernelModule`."""
    from .triton_kernels import product

    (tokens, inputs), outputs = x.shape, weight.shape[0] // form.operands
    tiling = dataclasses.replace(_default(tokens, weight, form, device), **config or {})
    dtype = form.result_dtype(x.dtype)
    whole = tiling.splits == 1
    (y,) = launch(
        product,
        x,
        weight.values,
        weight.scales,
        weight.zeros,
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
        FOUR_BITS=weight.format.kind == "int4",
        GROUP=weight.format.columns or 0,
        COLUMNS=weight.scales.shape[1],
        ROWS_PER_SCALE=BLOCK if weight.format.blocks else 1,
        SPLITS=tiling.splits,
        SPLIT_IN=tiling.split_in(inputs),
        BLOCK_OUT=tiling.block_out,
        BLOCK_IN=tiling.block_in,
        BLOCK_T=_block_tokens(tokens, weight),
    )
    return y if whole else reduce_splits(y, bias, residual, form, outputs, dtype)


def _block_tokens(tokens: int, weight: QuantizedWeight) -> int:
    """As for `linear`; in 4 bits 16 at least, for fewer make the tokens' copies too small to be asynchronous."""
    return max(16 if weight.format.kind == "int4" else 0, block_tokens(tokens))


def _blocks_in(weight: QuantizedWeight) -> tuple[int, ...]:
    """Inputs that a block may take at a time, best first; 4 bits need 64 for the tensor cores' 16 of one place."""
    group = weight.format.columns
    if group is None:
        # Wide loads for int8, whose conversion is cheap; float8 takes more registers on the way.
        return (256, 128, 64) if weight.format.kind == "int8" else (128, 256, 64)
    if weight.format.kind == "int4":
        return (64, 128) if group < 128 else (128,)
    return (group,)


def _default(tokens: int, weight: QuantizedWeight, form: LinearForm, device: Device) -> Tiling:
    """As for `linear`, with so many loads in flight that they are 24 KiB of the weight, which the memory needs."""
    rows, inputs = weight.shape
    plain = linear_default(tokens, rows // form.operands, inputs, form, device)
    tiling = Tiling(plain.block_out, _blocks_in(weight)[0], plain.splits)
    tiling = dataclasses.replace(tiling, stages=min(9, 1 + -(-24 * 1024 // tiling.stored(weight, form))))
    while not tiling.fits(tokens, weight, form, device) and tiling.stages > 1:
        tiling = dataclasses.replace(tiling, stages=tiling.stages - 1)
    return tiling
