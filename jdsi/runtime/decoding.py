"""Prefill and decode of batches: the loop between executor and sampler."""

import dataclasses
from collections.abc import Collection, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jdsi.generation import SampledTokens, SamplerFeatures, SamplerState, SamplingParams, init_state, pad_rows, sample
from jdsi.kv_cache import ContiguousContext

from .executor import Executor, Step
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


@dataclasses.dataclass(frozen=True)
class Batch:
    """Requests decoded together: `prompts` are token ids, `params` one per prompt."""

    prompts: Sequence[Sequence[int]]
    params: Sequence[SamplingParams]


def decode(
    executor: Executor,
    batches: Sequence[Batch],
    *,
    eos_token_ids: Sequence[int] = (),
    max_rows: int,
    dropped: Collection[int] = (),
) -> Iterator[tuple[int, SampledTokens]]:
    """Generates for batches that share every pass, yielding one token per row and step as NumPy arrays.

    While a step's tokens are read, the next step is already running where the executor wants that, so that reading
    never holds the device up. Rows past a batch's prompts are padding and never valid. A batch ends when every row of
    it has; the iterator when every batch has, and closing it earlier is fine.

    Args:
        executor: runs the model.
        batches: each of at most `max_rows` prompts.
        eos_token_ids: end the requests that do not ignore them.
        max_rows: no batch is padded beyond.
        dropped: batches, by index, nobody waits for any more; the caller may add to it at any time.

    Yields:
        The batch's index and its tokens.
    """
    rows = [min(batch_bucket(len(batch.prompts)), max_rows) for batch in batches]
    running = [
        _Running.start(executor, i, batch, n, eos_token_ids)
        for i, (batch, n) in enumerate(zip(batches, rows, strict=True))
    ]
    ahead = False  # the first tokens are read at once, for the decode program may have to be compiled first
    while running:
        outcomes = executor.steps([one.step for one in running])
        for one, (sampled, context, state) in zip(running, outcomes, strict=True):
            one.advance(sampled, context, state)
        ended = set()
        for one in running:
            while len(one.unread) > (ahead and one.steps_left > 0):
                host = jax.device_get(one.unread.pop(0))
                yield one.index, host
                if host.finish.all():
                    ended.add(one.index)
        running = [one for one in running if one.steps_left and one.index not in ended and one.index not in dropped]
        ahead = executor.runs_ahead


@dataclasses.dataclass
class _Running:
    """A batch between two steps: `step` is what it wants run next."""

    index: int
    step: Step
    steps_left: int
    unread: list[SampledTokens] = dataclasses.field(default_factory=list)

    @classmethod
    def start(cls, executor: Executor, index: int, batch: Batch, rows: int, eos_token_ids: Sequence[int]) -> "_Running":
        idle = rows - len(batch.prompts)
        padded = PaddedPrompts.of(batch.prompts, rows)
        features = SamplerFeatures.of(batch.params)
        state = init_state(
            [*batch.params, *[None] * idle],
            [*batch.prompts, *[()] * idle],
            vocab_size=executor.spec.vocab_size,
            eos_token_ids=eos_token_ids,
            features=features,
        )
        steps = max(p.max_new_tokens for p in batch.params)
        context = new_context(executor, rows, padded.width, steps)
        context = context.extend(jnp.asarray(padded.lengths), padded.width)
        return cls(index, Step(padded.tokens, context, padded.last, SampleEpilogue(features), state), steps)

    def advance(self, sampled: SampledTokens, context: ContiguousContext, state: SamplerState) -> None:
        first = self.step.last is not None
        if first:
            context = context.extend(jnp.ones(context.batch, jnp.int32), 1)
        self.step = Step(sampled.tokens, context, None, self.step.epilogue, state)
        self.steps_left -= 1
        self.unread.append(sampled)
