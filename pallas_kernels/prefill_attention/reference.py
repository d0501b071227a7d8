"""Attention of many queries to contiguous keys and values, reference form."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ..attention.form import AttentionForm
from ..attention.reference import attention


def prefill_attention_reference(
    q: Float[Array, "B S H D"],
    k: Float[Array, "B K L D"],
    v: Float[Array, "B K L Dv"],
    q_start: Int[Array, " B"] | None,
    k_lengths: Int[Array, " B"] | None,
    q_segments: Int[Array, "B S"] | None,
    k_segments: Int[Array, "B L"] | None,
    *,
    form: AttentionForm,
    return_lse: bool = False,
) -> Float[Array, "B S H Dv"] | tuple[Float[Array, "B S H Dv"], Float[Array, "B S H"]]:
    """See `prefill_attention`."""
    raise NotImplementedError
