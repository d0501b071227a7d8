"""The skinny product as one Mosaic GPU kernel for Hopper (the SBI-GeMM of Aminabadi et al. 2022, section III-C).

Rows are cut so that every multiprocessor has the same share (see partition.py); only where that does not go are the
inputs split too, and a second pass sums the float32 parts in order. What a block does is in block.py.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from ..device import Device
from ..mosaic import not_hopper
from ..normalization import normalise
from .block import Plan, call
from .epilogue import reduce_splits
from .form import PLAIN, LinearForm
from .partition import LAUNCH, TILE, Problem, aligned, best, cost, fitted, units

MAX_TOKENS = 64  # beyond, the product is on its way to compute-bound and XLA's matrix product is the right tool
_SLACK = 4 * 1024  # barriers and the compiler's own scratch
_MUCH = 0.2  # of the weights' traffic, for parts: cuBLAS, which shares `x` among blocks, needs none


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
    """Why the kernel cannot take these arguments, or `None`."""
    if reason := not_hopper(device):
        return reason
    if x.dtype not in (jnp.bfloat16, jnp.float16):
        return f"x must be bfloat16 or float16, not {x.dtype}"
    if weight.dtype != x.dtype:
        return f"weight must have the dtype of x, {x.dtype}, not {weight.dtype}"
    if form.result_dtype(x.dtype) not in (jnp.bfloat16, jnp.float16, jnp.float32):
        return f"the result cannot be {form.out_dtype}"
    tokens, inputs = x.shape
    if tokens > MAX_TOKENS:
        return f"at most {MAX_TOKENS} tokens, not {tokens}: that is XLA's matrix product"
    if tokens == 0 or weight.shape[0] == 0:
        return "there is nothing to compute"
    if inputs % 8:
        return f"in must be a multiple of 8, for rows of 16 bytes that TMA can read, not {inputs}"
    return None


def rather_xla(
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
    """Why XLA is expected to be as fast, or `None`: small products of many tokens. Predicted, not measured."""
    plan = _plan(x, weight, bias, (norm_weight, norm_bias), device, form)
    if plan.tiling.splits == 1:
        return None
    parts = 2 * 4 * plan.tiling.splits * len(x) * weight.shape[0]  # written and read
    share = parts / (weight.size * weight.dtype.itemsize)
    if share <= _MUCH:
        return None
    return f"the parts of {plan.tiling.splits} splits take {share:.0%} of the traffic of the weights"


def run(
    x: Array,
    weight: Array,
    bias: Array | None = None,
    residual: Array | None = None,
    norm_weight: Array | None = None,
    norm_bias: Array | None = None,
    *,
    device: Device,
    config: Mapping[str, Any] | None = None,
    form: LinearForm = PLAIN,
) -> Array:
    """See `linear`; `config` overrides fields of the default `Tiling`.

    The norm is part of the kernel for up to 8 tokens, as long as `x` leaves the pipeline enough shared memory; else it
    runs before, as one XLA fusion.
    """
    plan = _plan(x, weight, bias, (norm_weight, norm_bias), device, form, config)
    extras = {"norm_weight": norm_weight, "norm_bias": norm_bias}
    if not plan.problem.resident:
        if form.norm is not None:
            x = normalise(x, norm_weight, norm_bias, form.norm)
        extras = {}
    if plan.direct:
        return call(plan, x, weight, bias=bias, residual=residual, **extras)
    return reduce_splits(call(plan, x, weight, **extras), bias, residual, form, plan.problem.outputs, plan.result)


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
) -> Sequence[Mapping[str, Any]]:
    """The tilings that load least, the best of every number of splits among them."""
    plan = _plan(x, weight, bias, (norm_weight, norm_bias), device, form)
    ordered = best(plan.problem, plan.pipeline_bytes, device, count=1000)
    firsts = {tiling.splits: tiling for tiling in reversed(ordered)}
    return [dataclasses.asdict(tiling) for tiling in dict.fromkeys((*ordered[:8], *firsts.values()))]


def _plan(
    x: Array,
    weight: Array,
    bias: Array | None,
    norm_arrays: Sequence[Array | None],
    device: Device,
    form: LinearForm,
    config: Mapping[str, Any] | None = None,
) -> Plan:
    (tokens, inputs), outputs = x.shape, weight.shape[0] // form.operands
    result = form.result_dtype(x.dtype)
    flat = weight.shape[0] % 8 != 0 or inputs % TILE != 0
    problem = Problem(
        tokens=tokens,
        outputs=outputs,
        inputs=inputs,
        operands=form.operands,
        flat=flat,
        result_bytes=result.itemsize,
        # TMA writes rows of the result that start on 16 bytes.
        second_pass=outputs * result.itemsize % 16 != 0,
    )
    room = device.shared_memory - _SLACK
    if bias is not None:
        room -= aligned(form.operands * 256 * bias.dtype.itemsize)
    tiling = best(problem, room, device)[0]
    if form.norm is not None and problem.columns == 8 and not flat:
        fused = dataclasses.replace(problem, resident=True)
        left = room - aligned(problem.columns * inputs * x.dtype.itemsize)
        left -= sum(aligned(inputs * a.dtype.itemsize) for a in norm_arrays if a is not None)
        # The fused norm saves a launch and takes memory from the pipeline.
        ahead = cost(problem, tiling, device) + LAUNCH
        found = best(fused, left, device)
        if found and cost(fused, found[0], device) < ahead:
            problem, room, tiling = fused, left, found[0]
    # What was tuned for arguments of the same bucket may not suit these: they may leave less shared memory.
    tiling = fitted(problem, tiling.override(config), room) or tiling
    return Plan(problem, tiling, form, min(units(problem, tiling), device.cores), result, room)
