"""What others offer for the operators' arguments."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Literal

import jax
from jaxtyping import Array, Float, Int

from jdsi.errors import UnsupportedError
from jdsi.pallas_kernels import AttentionForm


def jax_attention(
    q: Float[Array, "B S H D"],
    k: Float[Array, "B K L D"],
    v: Float[Array, "B K L D"],
    q_start: Int[Array, " B"] | None,
    k_lengths: Int[Array, " B"] | None,
    q_segments: Int[Array, "B S"] | None,
    k_segments: Int[Array, "B L"] | None,
    *,
    form: AttentionForm,
    return_lse: bool = False,
    implementation: Literal["cudnn", "xla"] = "cudnn",
) -> Float[Array, "B S H D"]:
    """Prefill attention by `jax.nn.dot_product_attention`; bringing k and v into its layout is part of the work.

    Raises:
        UnsupportedError: what cuDNN's attention, as JAX offers it, cannot express.
    """
    cannot = {
        "q_start": q_start is not None,
        "packed sequences": q_segments is not None or k_segments is not None,
        "a soft cap": form.softcap is not None,
        "ALiBi without its whole matrix": form.alibi is not None,
        "a window that is not causal": form.window is not None and not form.causal,
        "values of another width than keys": v.shape[-1] != k.shape[-1],
        "the logarithm of the sum": return_lse,
    }
    if missing := [what for what, asked in cannot.items() if asked]:
        raise UnsupportedError(f"jax.nn.dot_product_attention does not offer {', '.join(missing)}")
    return jax.nn.dot_product_attention(
        q,
        k.swapaxes(1, 2),
        v.swapaxes(1, 2),
        scale=form.scale,
        is_causal=form.causal,
        key_value_seq_lengths=k_lengths,
        local_window_size=None if form.window is None else (form.window - 1, 0),
        implementation=implementation,
    )


# By operator and name; each takes the operator's arguments and gives its results, or raises `UnsupportedError`.
PEERS: Mapping[str, Mapping[str, Callable[..., Any]]] = MappingProxyType(
    {"prefill_attention": MappingProxyType({"cudnn": jax_attention})}
)
