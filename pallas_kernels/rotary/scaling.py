"""How rotary frequencies are stretched past the length a model was trained on.

Two of these depend on the length of the sequence, `DynamicNtkScaling` and `LongRopeScaling`. The rule here is that a
token uses the length its own sequence has when the token is computed: the prompt's length for every token of a prompt,
position + 1 for a token that was generated. Nothing else in the batch, and nothing that ran before, changes the answer.
"""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from .reference import base_frequencies


@dataclasses.dataclass(frozen=True)
class LinearScaling:
    """Position interpolation (Chen et al. 2023): every position is divided by `factor`."""

    factor: float
    attention_factor: float = 1.0

    def frequencies(self, dim: int, theta: float, lengths: Int[Array, " T"]) -> np.ndarray:
        """See `RotaryScaling.frequencies`."""
        return base_frequencies(dim, theta) / np.float32(self.factor)


@dataclasses.dataclass(frozen=True)
class DynamicNtkScaling:
    """NTK-aware scaling whose base grows with the sequence: `theta * s ** (dim / (dim - 2))`.

    Here `s = factor * length / max_positions - (factor - 1)`, and 1 up to `max_positions`.

    For one sequence, prompt and generation, this is what transformers computes: keys cached earlier keep the
    frequencies they were rotated with. transformers takes the longest row of a batch for all rows, and a module that
    has seen a long sequence keeps its frequencies for shorter ones until one is below `max_positions`; here neither
    happens.

    Attributes:
        factor: how fast the base grows.
        max_positions: length up to which nothing changes.
    """

    factor: float
    max_positions: int
    attention_factor: float = 1.0

    def frequencies(self, dim: int, theta: float, lengths: Int[Array, " T"]) -> Float[Array, "T pairs"]:
        """See `RotaryScaling.frequencies`."""
        length = jnp.maximum(lengths, self.max_positions).astype(jnp.float32)
        stretch = self.factor * length / self.max_positions - (self.factor - 1)
        # theta**(-2i/dim) * stretch**(-2i/(dim-2)): exactly the unscaled frequencies while stretch is 1.
        exponents = np.arange(0, dim, 2, dtype=np.float32) / max(dim - 2, 1)
        return jnp.asarray(base_frequencies(dim, theta)) * stretch[:, None] ** -exponents


@dataclasses.dataclass(frozen=True)
class YarnScaling:
    """YaRN (Peng et al. 2023, section 3): fast dimensions keep their frequency, slow ones are interpolated.

    Attributes:
        factor: ratio of the new length to the original.
        original_length: length the model was first trained on.
        beta_fast, beta_slow: rotations over the original length above which a dimension is kept and below which it is
            fully interpolated; between them, a linear ramp.
        truncate: widen the ramp to whole dimensions.
        attention_factor: multiplies the rotated queries and keys; see `yarn_attention_factor`.
    """

    factor: float
    original_length: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0

    def _dimension(self, rotations: float, dim: int, theta: float) -> float:
        """The (fractional) pair of dimensions that turns `rotations` times over the original length."""
        return dim * math.log(self.original_length / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    def frequencies(self, dim: int, theta: float, lengths: Int[Array, " T"]) -> np.ndarray:
        """See `RotaryScaling.frequencies`."""
        low, high = self._dimension(self.beta_fast, dim, theta), self._dimension(self.beta_slow, dim, theta)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dim - 1)
        span = (high - low) or 0.001
        interpolated = np.clip((np.arange(dim // 2, dtype=np.float32) - low) / span, 0, 1).astype(np.float32)
        base = base_frequencies(dim, theta)
        return base / np.float32(self.factor) * interpolated + base * (1 - interpolated)


def yarn_attention_factor(factor: float, mscale: float | None = None, mscale_all_dim: float | None = None) -> float:
    """YaRN's temperature `0.1 ln(factor) + 1` (equation 22); with both `mscale`s, DeepSeek's ratio of two of them."""

    def temperature(scale: float) -> float:
        return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0

    if mscale and mscale_all_dim:
        return temperature(mscale) / temperature(mscale_all_dim)
    return temperature(1.0)


@dataclasses.dataclass(frozen=True)
class LongRopeScaling:
    """LongRoPE (Ding et al. 2024): a divisor per dimension, one set for short sequences and one for long ones.

    A prompt equals transformers at every length. When generation crosses `original_length`, transformers (its Phi-3)
    throws the cache away and recomputes the sequence with the long set; here keys cached before keep the short set and
    tokens from the crossing on use the long one, as transformers does for the other families. Start generation with
    the sequence as a prompt to get the recomputed answer.

    Attributes:
        short_factors, long_factors: divisors of the frequencies, `dim / 2` each.
        original_length: the longest sequence that uses the short set.
        attention_factor: multiplies the rotated queries and keys; see `longrope_attention_factor`.
    """

    short_factors: tuple[float, ...]
    long_factors: tuple[float, ...]
    original_length: int
    attention_factor: float = 1.0

    def frequencies(self, dim: int, theta: float, lengths: Int[Array, " T"]) -> Float[Array, "T pairs"]:
        """See `RotaryScaling.frequencies`."""
        base = base_frequencies(dim, theta)
        short, long = (base / np.asarray(f, np.float32) for f in (self.short_factors, self.long_factors))
        return jnp.where((lengths > self.original_length)[:, None], long, short)


def longrope_attention_factor(factor: float, original_length: int) -> float:
    """`sqrt(1 + ln(factor) / ln(original_length))`, 1 where nothing is stretched."""
    return math.sqrt(1 + math.log(factor) / math.log(original_length)) if factor > 1 else 1.0


@dataclasses.dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3.1: long wavelengths are divided by `factor`, short ones kept, those between blended.

    Attributes:
        factor: divisor of the slow frequencies.
        low_freq_factor, high_freq_factor: rotations over the original length at which the blend starts and ends.
        original_length: length the model was first trained on.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_length: int
    attention_factor: float = 1.0

    def frequencies(self, dim: int, theta: float, lengths: Int[Array, " T"]) -> np.ndarray:
        """See `RotaryScaling.frequencies`."""
        base = base_frequencies(dim, theta)
        rotations = self.original_length * base / np.float32(2 * math.pi)
        kept = np.clip((rotations - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor), 0, 1)
        return ((1 - kept) * base / np.float32(self.factor) + kept * base).astype(np.float32)
