"""Whole sequences through a model, in passes that leave no keys and values behind."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jdsi.generation.vocabulary import whole
from jdsi.kv_cache import PackedContext

from .epilogue import unchanged
from .executor import Executor, Step


@dataclasses.dataclass(frozen=True)
class WholeLogits:
    """The `Epilogue` that gives every rank the logits of the whole vocabulary."""

    vocabulary: int

    def __call__(self, logits: Float[Array, "B V"], carry: Any) -> tuple[Float[Array, "B V"], Any]:
        return whole(logits, self.vocabulary), carry


def packed_rows(width: int, lengths: Int[np.ndarray, " B"]) -> PackedContext:
    """The context of right-padded rows, on the host, for it goes to the devices of every stage."""
    return jax.device_get(PackedContext.from_dense(len(lengths), width, jnp.asarray(lengths)))


def forward(
    executor: Executor,
    tokens: Int[np.ndarray, "B S"],
    lengths: Int[np.ndarray, " B"],
    token_types: Int[np.ndarray, "B S"] | None = None,
) -> Float[Array, "B S V"]:
    """Logits of every token of a right-padded batch (hidden states if the model has no head)."""
    rows, length = tokens.shape
    padding = -rows % executor.row_multiple

    def fill(x: np.ndarray) -> np.ndarray:
        return np.pad(x, [(0, padding), *[(0, 0)] * (x.ndim - 1)], mode="edge")

    executor.agree({"call": "forward", "tokens": tokens, "lengths": lengths, "token_types": token_types})
    epilogue = WholeLogits(executor.spec.vocab_size) if executor.spec.head else unchanged
    types = None if token_types is None else fill(token_types).reshape(-1)
    step = Step(fill(tokens).reshape(-1), packed_rows(length, fill(lengths)), None, epilogue, (), types)
    [(out, _, _)] = executor.steps([step])
    if not out.is_fully_addressable:  # an array of this process, which it can use without the others
        out = out.addressable_data(0)
    return out.reshape(rows + padding, length, -1)[:rows]
