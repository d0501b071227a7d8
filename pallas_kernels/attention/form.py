"""What one layer's attention computes, apart from its arrays."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ..rotary import Rotary


@dataclasses.dataclass(frozen=True)
class Alibi:
    """Biases that grow linearly with distance (Press et al. 2022): `slope * (key position - query position)`.

    Attributes:
        slopes: one per query head.
        split: inside `jax.shard_map` with the heads divided over an axis: its name and its ranks. `slopes` are then
            those of all ranks, one rank's behind another's.
    """

    slopes: tuple[float, ...]
    split: tuple[str, int] | None = dataclasses.field(default=None, kw_only=True)

    @property
    def heads(self) -> int:
        """Query heads that attention has here."""
        return len(self.slopes) // (1 if self.split is None else self.split[1])

    def values(self) -> Float[Array, " H"]:
        """The slopes of the heads that attention has here, float32."""
        slopes = jnp.asarray(self.slopes, jnp.float32)
        return slopes if self.split is None else slopes.reshape(-1, self.heads)[jax.lax.axis_index(self.split[0])]

    def bias(self, q_positions: Int[Array, "B S"], k_positions: Int[Array, "B L"]) -> Float[Array, "B H S L"]:
        """What is added to the scaled scores, float32."""
        distance = (k_positions[:, None, None, :] - q_positions[:, None, :, None]).astype(jnp.float32)
        return self.values()[:, None, None] * distance


@dataclasses.dataclass(frozen=True)
class RoundedAlibi(Alibi):
    """ALiBi as Falcon has it: `scale * bfloat16(slope * key position)`, whatever the dtype of the model.

    The softmax would not notice that the query position is missing, but it does notice the rounding, which at position
    1000 is in steps of up to 4; so this is not a function of the distance.

    Attributes:
        scale: multiplies the rounded bias.
    """

    scale: float = 1.0

    def bias(self, q_positions: Int[Array, "B S"], k_positions: Int[Array, "B L"]) -> Float[Array, "B H S L"]:
        """See `Alibi.bias`; the same for every query."""
        slopes = _to_bfloat16(self.values())[:, None, None]
        positions = _to_bfloat16(k_positions.astype(jnp.float32))[:, None, None, :]
        bias = self.scale * _to_bfloat16(slopes * positions)
        return jnp.broadcast_to(bias, (*bias.shape[:2], q_positions.shape[1], bias.shape[3]))


def _to_bfloat16(x: Float[Array, "..."]) -> Float[Array, "..."]:
    # A pair of casts would not do: XLA may leave both out.
    return jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)


@dataclasses.dataclass(frozen=True)
class AttentionForm:
    """The static part of one layer's attention: what is computed from q, k and v. Hashable.

    Attributes:
        scale: multiplies the scores.
        causal: a query sees only keys at its own position or earlier.
        window: a query at position i sees only keys at positions > i - window.
        softcap: scores become `softcap * tanh(scores / softcap)` before the mask.
        alibi: linear biases, added to the scores before the mask.
        rotary: rotary embedding of q and k. Whoever owns the KV memory applies it, for only it knows the positions.
    """

    scale: float
    causal: bool = True
    window: int | None = None
    softcap: float | None = None
    alibi: Alibi | None = None
    rotary: Rotary | None = None
