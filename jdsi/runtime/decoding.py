"""Prefill and decode of one batch: the loop between executor and sampler."""

import dataclasses
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jdsi.generation import SampledTokens, SamplerFeatures, SamplerState, SamplingParams, init_state, pad_rows, sample
from jdsi.kv_cache import ContiguousContext

from .executor import Executor
from .shapes import batch_bucket, capacity_bucket, token_bucket


@dataclasses.dataclass(frozen=True)
class SampleEpilogue:
    """The sampler as an `Epilogue`."""

    features: SamplerFeatures

    def __call__(self, logits: Float[Array, "B V"], state: SamplerState) -> tuple[SampledTokens, SamplerState]:
        return sample(logits, state, self.features)


@dataclasses.dataclass(frozen=True)
class PaddedPrompts:
    """Prompts as one right-padded batch; rows past the real ones repeat the first prompt.

    Attributes:
        tokens: `[B * S]`, row by row.
        lengths: `[B]`.
        last: `[B]`, index in `tokens` of each row's last token.
        width: S.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    last: np.ndarray
    width: int

    @classmethod
    def of(cls, prompts: Sequence[Sequence[int]], rows: int) -> "PaddedPrompts":
        """Pads to `rows` rows and the bucket of the longest prompt."""
        filled = [*prompts, *[prompts[0]] * (rows - len(prompts))]
        lengths = np.array([len(p) for p in filled], np.int32)
        width = token_bucket(int(lengths.max()))
        tokens = pad_rows(filled, width)
        last = np.arange(rows, dtype=np.int32) * width + lengths - 1
        return cls(tokens.reshape(-1), lengths, last, width)


def new_context(executor: Executor, rows: int, width: int, new_tokens: int) -> ContiguousContext:
    """An empty KV cache for prompts padded to `width` and up to `new_tokens` more."""
    capacity = capacity_bucket(width + new_tokens)
    return ContiguousContext.create(executor.spec.kv_heads, rows, capacity, executor.dtype)


def decode(
    executor: Executor,
    prompts: Sequence[Sequence[int]],
    params: Sequence[SamplingParams],
    *,
    eos_token_ids: Sequence[int] = (),
    max_rows: int,
) -> Iterator[SampledTokens]:
    """Generates for a batch of prompts, yielding one token per row and step as NumPy arrays.

    While a step's tokens are read, the next step is already running, so that reading never holds the device up. Rows
    past `len(prompts)` in the yielded arrays are padding and never valid. The iterator ends when every row has; closing
    it earlier is fine.

    Args:
        executor: runs the model.
        prompts: token ids, at most `max_rows` prompts.
        params: one per prompt.
        eos_token_ids: end the requests that do not ignore them.
        max_rows: the batch is not padded beyond.
    """
    rows = min(batch_bucket(len(prompts)), max_rows)
    idle = rows - len(prompts)
    padded = PaddedPrompts.of(prompts, rows)
    features = SamplerFeatures.of(params)
    state = init_state(
        [*params, *[None] * idle],
        [*prompts, *[()] * idle],
        vocab_size=executor.spec.vocab_size,
        eos_token_ids=eos_token_ids,
        features=features,
    )
    epilogue = SampleEpilogue(features)
    steps = max(p.max_new_tokens for p in params)
    context = new_context(executor, rows, padded.width, steps)
    context = context.extend(jnp.asarray(padded.lengths), padded.width)
    sampled, context, state = executor.step(padded.tokens, context, padded.last, epilogue, state)
    host = jax.device_get(sampled)
    yield host  # at once, for the decode program may have to be compiled first
    if host.finish.all():
        return
    context = context.extend(jnp.ones(rows, jnp.int32), 1)
    running = None
    for _ in range(steps - 1):
        sampled, context, state = executor.step(sampled.tokens, context, None, epilogue, state)
        if running is not None:
            host = jax.device_get(running)
            yield host
            if host.finish.all():
                return
        running = sampled
    if running is not None:
        yield jax.device_get(running)
