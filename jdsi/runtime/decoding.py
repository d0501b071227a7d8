"""Prefill and decode of batches: the loop between executor and sampler."""

import dataclasses
import random
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float

from jdsi.generation import SampledTokens, SamplerFeatures, SamplerState, SamplingParams, init_state, pad_rows, sample
from jdsi.generation.carried import joined_rows, rows_of
from jdsi.kv_cache import join_rows

from . import peers
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

    def part(self, rows: slice) -> "PaddedPrompts":
        """Some of the rows."""
        lengths = self.lengths[rows]
        last = np.arange(len(lengths), dtype=np.int32) * self.width + lengths - 1
        return PaddedPrompts(self.tokens.reshape(-1, self.width)[rows].reshape(-1), lengths, last, self.width)


def new_context(executor: Executor, rows: int, width: int, new_tokens: int) -> Any:
    """An empty KV cache for prompts padded to `width` and up to `new_tokens` more."""
    return executor.new_context(rows, capacity_bucket(width + new_tokens))


def padded_rows(executor: Executor, prompts: int, max_rows: int) -> int:
    """Rows that a batch of so many prompts is padded to."""
    rows, multiple = min(batch_bucket(prompts), max(prompts, max_rows)), executor.row_multiple
    return -(-rows // multiple) * multiple


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
    batches = _agreed(executor, batches, eos_token_ids, max_rows)
    rows = [padded_rows(executor, len(batch.prompts), max_rows) for batch in batches]
    running = [
        _Running.start(executor, i, batch, n, eos_token_ids)
        for i, (batch, n) in enumerate(zip(batches, rows, strict=True))
    ]
    ahead = False  # the first tokens are read at once, for the decode program may have to be compiled first
    while running:
        outcomes = iter(executor.steps([step for one in running for step in one.steps]))
        for one in running:
            one.advance([next(outcomes) for _ in one.steps])
        ended = set()
        for one in running:
            while len(one.unread) > (ahead and one.steps_left > 0):
                with peers.waiting():
                    host = jax.device_get(one.unread.pop(0))
                yield one.index, host
                if host.finish.all():
                    ended.add(one.index)
        running = [one for one in running if one.steps_left and one.index not in ended and one.index not in dropped]
        ahead = executor.runs_ahead


def _agreed(
    executor: Executor, batches: Sequence[Batch], eos_token_ids: Sequence[int], max_rows: int
) -> Sequence[Batch]:
    """The batches, after a comparison between the processes that run the executor; with seeds that all of them use."""
    number = executor.agree(
        {
            "call": "generate",
            "prompts": [batch.prompts for batch in batches],
            "sampling": [[p.described for p in batch.params] for batch in batches],
            "eos_token_ids": eos_token_ids,
            "max_batch_size": max_rows,
        }
    )
    if number is None:
        return batches
    draw = random.Random(number)

    def seeded(params: SamplingParams) -> SamplingParams:
        return params if params.seed is not None else dataclasses.replace(params, seed=draw.getrandbits(64))

    return [dataclasses.replace(batch, params=[seeded(p) for p in batch.params]) for batch in batches]


@dataclasses.dataclass
class _Running:
    """A batch between two passes: `steps` are what it wants run next, the pieces of its prompts or one for all rows."""

    index: int
    steps: list[Step]
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
        new_tokens = max(p.max_new_tokens for p in batch.params)
        steps = []
        for piece in _pieces(rows, executor.prompt_pieces, executor.row_multiple):
            prompts = padded.part(piece)
            context = new_context(executor, len(prompts.lengths), padded.width, new_tokens)
            context = context.extend(prompts.lengths, padded.width)
            own = state if len(prompts.lengths) == rows else rows_of(state, piece)
            steps.append(Step(prompts.tokens, context, prompts.last, SampleEpilogue(features), own))
        return cls(index, steps, new_tokens)

    def advance(self, outcomes: Sequence[tuple[SampledTokens, Any, SamplerState]]) -> None:
        step = self.steps[0]
        sampled, context, state = outcomes[0] if len(outcomes) == 1 else _joined(outcomes)
        if step.last is not None:
            context = context.extend(np.ones(context.batch, np.int32), 1)
        self.steps = [Step(sampled.tokens, context, None, step.epilogue, state)]
        self.steps_left -= 1
        self.unread.append(sampled)


def _pieces(rows: int, wanted: int, multiple: int) -> list[slice]:
    """Equal pieces of a batch, at most as many as wanted, each of a multiple of rows."""
    units = rows // multiple
    count = max(n for n in range(1, min(wanted, units) + 1) if units % n == 0)
    size = rows // count
    return [slice(start, start + size) for start in range(0, rows, size)]


def _joined(outcomes: Sequence[tuple[SampledTokens, Any, SamplerState]]) -> tuple[SampledTokens, Any, SamplerState]:
    """The rows of several pieces as those of one batch."""
    sampled, contexts, states = zip(*outcomes, strict=True)
    return join_rows(sampled), type(contexts[0]).join(contexts), joined_rows(states)
