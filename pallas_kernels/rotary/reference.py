"""Rotary position embedding (Su et al. 2021), reference form."""

import dataclasses
from typing import Protocol

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


class RotaryScaling(Protocol):
    """How a family stretches the rotary frequencies past the length it was trained on. Hashable.

    Where `frequencies` read `lengths`, keys of one prompt cannot serve another that merely starts with the same tokens.
    """

    @property
    def attention_factor(self) -> float:
        """Multiplies the rotated vectors (YaRN's temperature); 1 for most."""
        ...

    def frequencies(
        self, dim: int, theta: float, lengths: Int[Array, " T"]
    ) -> np.ndarray | Float[Array, " pairs"] | Float[Array, "T pairs"]:
        """Radians per position of the `dim / 2` pairs; per token where the scaling depends on the length."""
        ...


@dataclasses.dataclass(frozen=True)
class Rotary:
    """Which of a head's dimensions rotate, and how fast.

    Attributes:
        dim: rotated dimensions, the first `dim` of the head; even.
        theta: base of the geometric sequence of frequencies.
        interleaved: pairs are (0, 1), (2, 3), ... (GPT-J) instead of (0, dim/2), (1, dim/2 + 1), ... (Llama).
        scaling: changes the frequencies for long contexts.
    """

    dim: int
    theta: float = 10000.0
    interleaved: bool = False
    scaling: RotaryScaling | None = None


def base_frequencies(dim: int, theta: float) -> np.ndarray:
    """`theta ** (-2 i / dim)` for i in [0, dim/2), float32.

    Exponents are rounded to float32 first, as the PyTorch models do: a position of 10^5 makes an error of 10^-7 in a
    frequency visible in the phase.
    """
    exponents = (np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)).astype(np.float64)
    return np.float32(1) / (theta**exponents).astype(np.float32)


def rotary_frequencies(
    rotary: Rotary, lengths: Int[Array, " T"]
) -> np.ndarray | Float[Array, " pairs"] | Float[Array, "T pairs"]:
    """Radians per position of every pair, scaled; per token where the scaling depends on `lengths`."""
    if rotary.scaling is None:
        return base_frequencies(rotary.dim, rotary.theta)
    return rotary.scaling.frequencies(rotary.dim, rotary.theta, lengths)


def apply_rotary(
    x: Float[Array, "T H D"], positions: Int[Array, " T"], lengths: Int[Array, " T"], rotary: Rotary
) -> Float[Array, "T H D"]:
    """Rotates the first `rotary.dim` dimensions of every head by the token's position.

    Args:
        x: queries or keys, any float dtype.
        positions: position of each token in its sequence.
        lengths: length of the sequence each token belongs to when the token is computed (the whole prompt's for a
            prompt's tokens, position + 1 for a generated one); only length-dependent scalings read it.
        rotary: the embedding's parameters.

    Returns:
        The rotated array in the dtype of `x`; the phase is computed in float32.
    """
    factor = 1.0 if rotary.scaling is None else rotary.scaling.attention_factor
    phase = positions.astype(jnp.float32)[:, None] * rotary_frequencies(rotary, lengths)
    cos, sin = (jnp.cos(phase) * factor)[:, None, :], (jnp.sin(phase) * factor)[:, None, :]
    rotated = x[..., : rotary.dim].astype(jnp.float32)
    if rotary.interleaved:
        first, second = rotated[..., 0::2], rotated[..., 1::2]
    else:
        first, second = jnp.split(rotated, 2, axis=-1)
    turned = (first * cos - second * sin, second * cos + first * sin)
    out = jnp.stack(turned, axis=-1).reshape(rotated.shape) if rotary.interleaved else jnp.concatenate(turned, axis=-1)
    out = out.astype(x.dtype)
    if rotary.dim == x.shape[-1]:
        return out
    return jnp.concatenate([out, x[..., rotary.dim :]], axis=-1)
