"""Reductions and look-ups over a vocabulary that may be divided over the mesh axis "tensor".

Inside `jax.shard_map` over that axis every rank has a share of the logits: rank r the columns of tokens `r * V` to
`(r + 1) * V`, where `V` is the width of a share, the same on every rank. Columns past the end of the vocabulary are
-inf. What these functions find out about the whole vocabulary they return on every rank alike, without gathering it.
Where the axis is not bound, or inside `undivided`, the share is the vocabulary, and nothing is exchanged.
"""

import contextlib
import contextvars
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float32, Int32, Shaped

from jdsi.sharding import TENSOR, all_gather, all_max, all_min, all_reduce, axis_index, axis_size, is_split, own_part

Share = Float32[Array, "B V"]
_undivided: contextvars.ContextVar[bool] = contextvars.ContextVar("undivided", default=False)


@contextlib.contextmanager
def undivided() -> Iterator[None]:
    """Around code in which every rank has, and does, the same for the whole vocabulary."""
    token = _undivided.set(True)
    try:
        yield
    finally:
        _undivided.reset(token)


def is_divided() -> bool:
    """Whether the logits here are a rank's share."""
    return is_split(TENSOR) and not _undivided.get()


def first_token(share: Share) -> Int32[Array, ""] | int:
    """The token that this rank's first column belongs to."""
    return axis_index(TENSOR) * share.shape[1] if is_divided() else 0


def whole(share: Share, size: int) -> Float32[Array, "B W"]:
    """All columns, on every rank.

    Args:
        share: of each rank.
        size: columns there are, without what pads the shares.
    """
    return all_gather(share, TENSOR, dim=1)[:, :size] if is_divided() else share


def own_columns(whole: Shaped[Array, "B W"], share: Share, past: float = 0) -> Shaped[Array, "B V"]:
    """The columns of `share`'s tokens in what every rank has of the whole vocabulary; `past` behind its end."""
    if not is_divided():
        return whole
    padding = axis_size(TENSOR) * share.shape[1] - whole.shape[1]
    return own_part(jnp.pad(whole, ((0, 0), (0, padding)), constant_values=past), TENSOR, dim=1)


def largest(share: Share) -> Float32[Array, " B"]:
    """The largest value of each row, NaN if there is one."""
    best = jnp.max(share, axis=1)
    if not is_divided():
        return best
    # As integers, for a maximum of floats over devices may lose a NaN, and does on the CPU.
    order = all_max(jnp.where(jnp.isnan(best), jnp.iinfo(jnp.int32).max, ordered_bits(best)), TENSOR)
    return lax.bitcast_convert_type(_monotone(order), jnp.float32)


def first_equal(share: Share, value: Float32[Array, " B"]) -> Int32[Array, " B"]:
    """The lowest token whose entry is `value`, or a number past the vocabulary."""
    token = lax.broadcasted_iota(jnp.int32, share.shape, 1) + first_token(share)
    past = (axis_size(TENSOR) if is_divided() else 1) * share.shape[1]
    found = jnp.min(jnp.where(share == value[:, None], token, past), axis=1)
    return all_min(found, TENSOR) if is_divided() else found


def total(share: Share) -> Float32[Array, " B"]:
    """The sum of each row."""
    own = jnp.sum(share, axis=1)
    return all_reduce(own, TENSOR) if is_divided() else own


def logsumexp(share: Share) -> Float32[Array, " B"]:
    """The logarithm of the sum of each row's exponentials."""
    own = jax.nn.logsumexp(share, axis=1)
    return jax.nn.logsumexp(all_gather(own[None], TENSOR), axis=0) if is_divided() else own


def entries(share: Share, tokens: Int32[Array, " B"]) -> Float32[Array, " B"]:
    """Each row's entry of its token."""
    column = tokens - first_token(share)
    found = jnp.take_along_axis(share, column[:, None], axis=1)[:, 0]
    if not is_divided():
        return found
    return all_reduce(jnp.where((column >= 0) & (column < share.shape[1]), found, 0.0), TENSOR)


def top(share: Share, count: int) -> tuple[Float32[Array, "B N"], Int32[Array, "B N"]]:
    """The `count` largest entries of each row, largest first, and their tokens, of equals the lowest first.

    Of more than there are columns, all: those past the end of the vocabulary are -inf and come last.
    """
    values, tokens = lax.top_k(share, min(count, share.shape[1]))
    if not is_divided():
        return values, tokens
    # Candidates of lower tokens stand before equal ones of higher tokens, which is the order that top_k keeps.
    values = all_gather(values, TENSOR, dim=1)
    tokens = all_gather(tokens + first_token(share), TENSOR, dim=1)
    values, best = lax.top_k(values, min(count, values.shape[1]))
    return values, jnp.take_along_axis(tokens, best, axis=1)


def ordered_bits(x: Float32[Array, "..."]) -> Int32[Array, "..."]:
    """Integers in the order of the numbers: -0 is below 0, and NaN outside the infinities on the side of its sign."""
    return _monotone(lax.bitcast_convert_type(x, jnp.int32))


def _monotone(bits: Int32[Array, "..."]) -> Int32[Array, "..."]:
    """From sign and magnitude to two's complement, and back."""
    return jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
