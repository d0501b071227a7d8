"""Where weights live and how a step reaches them."""

from collections.abc import Callable
from typing import Any, Protocol

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from jdsi.kv_cache import AttentionContext
from jdsi.models import TransformerSpec

Epilogue = Callable[[Float[Array, "B V"], Any], tuple[Any, Any]]
"""`(logits, carry) -> (result, carry)`: pure, hashable by value, traced behind the model so that it costs no launch."""


class Executor(Protocol):
    """Runs forward passes of one model; callers do not know whether its weights are resident, staged or streamed."""

    @property
    def spec(self) -> TransformerSpec:
        """The model's."""
        ...

    @property
    def dtype(self) -> jax.numpy.dtype:
        """Dtype of weights and activations."""
        ...

    def step[Context: AttentionContext](
        self,
        tokens: Int[Array | np.ndarray, " T"],
        context: Context,
        last: Int[Array | np.ndarray, " B"] | None,
        epilogue: Epilogue,
        carry: Any,
    ) -> tuple[Any, Context, Any]:
        """One forward pass and what is done with its logits.

        Args:
            tokens: packed ids.
            context: which token belongs where. Donated: use the returned one from here on.
            last: index in `tokens` of each row whose logits are wanted; `None` for all tokens.
            epilogue: applied to the logits in the same program.
            carry: its state. Donated.

        Returns:
            The epilogue's result, the context that has seen the tokens, the epilogue's new state.
        """
        ...

    def logits(
        self, tokens: Int[Array, "B S"], lengths: Int[Array, " B"], token_types: Int[Array, "B S"] | None = None
    ) -> Float[Array, "B S V"]:
        """Logits of every token of a right-padded batch, without a cache (hidden states if the model has no head)."""
        ...
