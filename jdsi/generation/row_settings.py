"""What each row of a batch asks for, as arrays."""

import dataclasses
from collections.abc import Sequence
from typing import Self

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float32, Int32

from .features import SamplerFeatures
from .padding import pad_rows, power_of_two
from .sampling_params import SamplingParams, check_vocabulary

NO_TOKEN = -1


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class RowSettings:
    """One entry per row. `None` where the features do without.

    Attributes:
        stop_tokens: tokens that end the row, then `NO_TOKEN`.
        remembers: the row's tokens are kept, for what has to look at them.
        vocab_size: tokens there are, without what pads the logits where they are divided over devices.
    """

    max_new_tokens: Int32[Array, " B"]
    stop_tokens: Int32[Array, "B N"]
    min_new_tokens: Int32[Array, " B"] | None
    remembers: Bool[Array, " B"] | None
    repetition_penalty: Float32[Array, " B"] | None
    presence_penalty: Float32[Array, " B"] | None
    frequency_penalty: Float32[Array, " B"] | None
    no_repeat_ngram: Int32[Array, " B"] | None
    temperature: Float32[Array, " B"] | None
    top_k: Int32[Array, " B"] | None
    top_p: Float32[Array, " B"] | None
    min_p: Float32[Array, " B"] | None
    vocab_size: int = dataclasses.field(metadata={"static": True})

    @classmethod
    def of(
        cls,
        params: Sequence[SamplingParams],
        *,
        vocab_size: int,
        eos_token_ids: Sequence[int],
        features: SamplerFeatures,
    ) -> Self:
        """Those of filled parameters.

        Raises:
            ConfigError: a parameter does not fit the vocabulary.
        """
        for own in params:
            check_vocabulary(own, vocab_size)

        def column(needed: bool, name: str, dtype: type) -> Array | None:
            return jnp.asarray(np.array([getattr(p, name) for p in params], dtype)) if needed else None

        return cls(
            max_new_tokens=jnp.asarray(np.array([p.max_new_tokens for p in params], np.int32)),
            stop_tokens=jnp.asarray(stop_rows(params, eos_token_ids)),
            min_new_tokens=column(features.min_tokens, "min_new_tokens", np.int32),
            remembers=jnp.asarray(np.array([remembers(p) for p in params])) if features.history else None,
            repetition_penalty=column(features.repetition, "repetition_penalty", np.float32),
            presence_penalty=column(features.counts, "presence_penalty", np.float32),
            frequency_penalty=column(features.counts, "frequency_penalty", np.float32),
            no_repeat_ngram=column(features.ngrams, "no_repeat_ngram", np.int32),
            temperature=jnp.asarray(_temperatures([p.temperature for p in params])) if features.noise else None,
            top_k=column(features.top_k, "top_k", np.int32),
            top_p=column(features.top_p, "top_p", np.float32),
            min_p=column(features.min_p, "min_p", np.float32),
            vocab_size=vocab_size,
        )

    def repeated(self, times: int) -> Self:
        """Every row so many times, its copies side by side."""
        return jax.tree.map(lambda leaf: jnp.repeat(leaf, times, axis=0), self)


def remembers(params: SamplingParams) -> bool:
    """Whether a request has to look at its tokens."""
    return SamplerFeatures.of([params]).history


def stop_rows(params: Sequence[SamplingParams], eos_token_ids: Sequence[int]) -> np.ndarray:
    """`[B, N]`: tokens that end each request, then `NO_TOKEN`. N is a power of two from 4 on, to compile rarely."""
    stops = [(*p.stop_token_ids, *(() if p.ignore_eos else eos_token_ids)) for p in params]
    return pad_rows(stops, power_of_two(max(4, *map(len, stops))), NO_TOKEN)


def _temperatures(values: Sequence[float]) -> np.ndarray:
    """In float32, where none may become 0 that is not: 0 is greedy."""
    least = np.finfo(np.float32).tiny
    return np.array([max(value, least) if value else 0.0 for value in values], np.float32)
