"""The arithmetic of one tile of scores, shared by the attention kernels.

Plain `jnp` on arrays already in registers, so that Mosaic GPU lowers it and the interpreter runs it. A kernel's inner
loop is: scores of a tile, `tile_scores`, `update`, rescale the accumulator, add `weights @ v`; after it `finish`, and
`combine` where the keys were split among blocks.

Scores stay scaled by a static `factor` below the base-2 logarithm of the weights: `weight = 2 ** (scores * factor -
top)` is one fused multiply-add and one exponential, so the scale of the softmax costs no multiplication of its own. The
price: `top` is rounded, so weights are off by `2 ** (ulp(top) / 2)`, a thousandth at logarithms of 10^4, and
lose their meaning from 10^7 on, where no model goes.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Num

from .form import AttentionForm, RoundedAlibi

LOG2_E = math.log2(math.e)
# Where running maxima start. Finite, so that a row all of whose keys are hidden (scores of -inf) has weights
# 2 ** (-inf - LOWEST) = 0 and not 2 ** (-inf + inf) = NaN; below every score of finite inputs.
LOWEST = -1e30


def why_not_form(form: AttentionForm, heads: int) -> str | None:
    """Why kernels built on this module cannot compute `form` for `heads` query heads, or `None`."""
    if isinstance(form.alibi, RoundedAlibi):
        return "rounded ALiBi depends on absolute positions, kernels know distances"
    if form.alibi is not None and form.alibi.heads != heads:
        return f"{form.alibi.heads} ALiBi slopes for {heads} query heads"
    if not (math.isfinite(form.scale) and form.scale > 0):
        return f"the scale must be positive, not {form.scale}"
    if form.softcap is not None and form.softcap <= 0:
        return f"the soft cap must be positive, not {form.softcap}"
    return None


def tile_scores(
    raw: Float[Array, "M N"],
    form: AttentionForm,
    distance: Num[Array, "M N"] | None = None,
    *,
    slope: Float[Array, "..."] | None = None,
    masked: bool = True,
    visible: Bool[Array, "M N"] | None = None,
) -> tuple[Float[Array, "M N"], float]:
    """Capped, biased and masked scores of one tile; queries along either axis.

    Args:
        raw: products of queries and keys, float32, not scaled.
        form: what to compute.
        distance: index of the key minus index of the query, int32 or float32; needed for a bias and where `masked`.
        slope: ALiBi's slope of each query, a scalar or of the tile's shape; needed if the form has ALiBi.
        masked: apply the form's causal and window masks. `False` for tiles that lie wholly inside both.
        visible: further mask, `False` hides the key.

    Returns:
        The scores, -inf where hidden, and the positive factor that makes them base-2 logarithms of weights.
    """
    scores, factor = raw, form.scale * LOG2_E
    if form.softcap is not None:
        scores, factor = _tanh(raw * (form.scale / form.softcap)), form.softcap * LOG2_E
    if form.alibi is not None:
        assert distance is not None
        assert slope is not None
        scores, factor = scores * factor + (slope * LOG2_E) * distance.astype(jnp.float32), 1.0
    if masked:
        within = within_form(form, distance)
        visible = within if visible is None else visible if within is None else visible & within
    if visible is not None:
        scores = jnp.where(visible, scores, -jnp.inf)
    return scores, factor


def within_form(form: AttentionForm, distance: Num[Array, "M N"] | None) -> Bool[Array, "M N"] | None:
    """The form's causal and window masks; `None` if it has neither."""
    if not form.causal and form.window is None:
        return None
    assert distance is not None
    if form.window is None:
        return distance <= 0
    recent = distance > -form.window
    return recent & (distance <= 0 if form.causal else distance < form.window)


def _tanh(x: Float[Array, "M N"]) -> Float[Array, "M N"]:
    """`1 - 2 / (1 + e^2x)`, absolute error 1e-7.

    The hardware's own tanh has 11 bits, too few for a cap of 50; a square of reciprocal roots avoids the slow division
    and saturates where the exponential overflows.
    """
    root = jax.lax.rsqrt(jnp.exp2(x * (2 * LOG2_E)) + 1.0)
    return 1.0 - 2.0 * (root * root)


class Softmax(NamedTuple):
    """An online softmax's state for each query.

    Attributes:
        top: largest base-2 logarithm of a weight so far, at least `LOWEST`.
        total: sum of the weights, relative to `2 ** top`.
    """

    top: Float[Array, " M"]
    total: Float[Array, " M"]


def start(queries: int) -> Softmax:
    """The state before any key."""
    return Softmax(jnp.full((queries,), LOWEST, jnp.float32), jnp.zeros((queries,), jnp.float32))


def update(
    state: Softmax, scores: Float[Array, "M N"], factor: float, *, axis: int = 1
) -> tuple[Float[Array, "M N"], Float[Array, " M"], Softmax]:
    """One tile of keys, which lie along `axis`, enters the softmax.

    Returns:
        The tile's weights relative to the new `top`, what to multiply the accumulated values with first, the new state.
    """
    top = jnp.maximum(state.top, jnp.max(scores, axis=axis) * factor)
    weights = jnp.exp2(scores * factor - jax.lax.broadcast_in_dim(top, scores.shape, [1 - axis]))
    rescale = jnp.exp2(state.top - top)
    return weights, rescale, Softmax(top, state.total * rescale + jnp.sum(weights, axis=axis))


def finish(state: Softmax) -> tuple[Float[Array, " M"], Float[Array, " M"]]:
    """What to multiply the accumulated values with, and the natural logarithm of the sum of exponentials.

    A query that saw no key gets 0 and -inf.
    """
    seen = state.total > 0
    total = jnp.where(seen, state.total, 1.0)
    return jnp.where(seen, 1.0 / total, 0.0), jnp.where(seen, state.top / LOG2_E + jnp.log(total), -jnp.inf)


def combine(
    outs: Float[Array, "splits ... Dv"], lses: Float[Array, "splits ..."]
) -> tuple[Float[Array, "... Dv"], Float[Array, "..."]]:
    """One attention from attentions to parts of the keys, in float32: the parts' mean weighted by `exp(lse)`.

    Args:
        outs: results over each part of the keys.
        lses: their natural logarithms of the sum of exponentials, -inf for a part without visible keys.

    Returns:
        The result over all keys and its logarithm; zeros and -inf where no part has a visible key.
    """
    top = jnp.maximum(jnp.max(lses, axis=0), LOWEST)
    weights = jnp.exp(lses - top)
    total = jnp.sum(weights, axis=0)
    seen = total > 0
    safe = jnp.where(seen, total, 1.0)
    out = jnp.sum(outs.astype(jnp.float32) * weights[..., None], axis=0) / safe[..., None]
    return out, jnp.where(seen, top + jnp.log(safe), -jnp.inf)
