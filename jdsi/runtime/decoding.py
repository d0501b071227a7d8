"""Prefill and decode of batches: the loop between executor and sampler."""

import dataclasses
import random
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float

from jdsi.generation import (
    SampledTokens,
    SamplerFeatures,
    SamplerState,
    SamplingParams,
    init_state,
    sample,
)
from jdsi.generation.carried import joined_rows, rows_of
from jdsi.kv_cache import join_rows

from . import peers
from .batch import Batch, PaddedPrompts, padded_rows, spread_rows
from .executor import Executor, Step


@dataclasses.dataclass(frozen=True)
class SampleEpilogue:
    """The sampler as an `Epilogue`; `choices` spreads the logits of a request over as many rows of the sampler."""

    features: SamplerFeatures
    choices: int = 1

    @property
    def apart(self) -> bool:
        """Plain greedy decoding, of which there is one kind, stays in the model's program."""
        return self.features != SamplerFeatures()

    def __call__(self, logits: Float[Array, "R V"], state: SamplerState) -> tuple[SampledTokens, SamplerState]:
        if self.choices > 1:
            logits = logits[spread_rows(logits.shape[0], self.choices, self.features)]
        return sample(logits, state, self.features)


def decode(
    executor: Executor,
    batches: Sequence[Batch],
    *,
    eos_token_ids: Sequence[int] = (),
    max_rows: int,
    dropped: Collection[int] = (),
) -> Iterator[tuple[int, SampledTokens]]:
    """Generates for batches that share every pass, yielding one token per result and step as NumPy arrays.

    While a step's tokens are read, the next step is already running where the executor wants that, so that reading
    never holds the device up. The results for a prompt lie side by side; rows past those of a batch's prompts are
    padding and never valid. A batch ends when every row of it has; the iterator when every batch has, and closing it
    earlier is fine.

    Args:
        executor: runs the model.
        batches: each of at most `max_rows` rows of the model.
        eos_token_ids: end the requests that do not ignore them.
        max_rows: no batch is padded beyond.
        dropped: batches, by index, nobody waits for any more; the caller may add to it at any time.

    Yields:
        The batch's index and its tokens.
    """
    batches = _agreed(executor, batches, eos_token_ids, max_rows)
    running = []
    for index, batch in enumerate(batches):
        most = max(1, max_rows // (batch.group * batch.choices))
        requests = padded_rows(executor, len(batch.prompts), most)
        running.append(_Running.start(executor, index, batch, requests, eos_token_ids))
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
            "prompts": [batch.rows() for batch in batches],
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
    features: SamplerFeatures
    choices: int
    steps: list[Step]
    steps_left: int
    unread: list[SampledTokens] = dataclasses.field(default_factory=list)

    @classmethod
    def start(
        cls, executor: Executor, index: int, batch: Batch, requests: int, eos_token_ids: Sequence[int]
    ) -> "_Running":
        padded = PaddedPrompts.of(batch.rows(), requests * batch.group)
        params, prompts = batch.results(requests - len(batch.prompts))
        features = SamplerFeatures.of(batch.params)
        state = init_state(
            params, prompts, vocab_size=executor.spec.vocab_size, eos_token_ids=eos_token_ids, features=features
        )
        new_tokens = max(p.max_new_tokens for p in batch.params)
        epilogue = SampleEpilogue(features, batch.choices)
        steps = []
        for piece in _pieces(requests, executor.prompt_pieces, executor.row_multiple):
            part = padded.part(_times(piece, batch.group))
            cache = executor.new_cache(len(part.lengths), padded.width + new_tokens)
            context = cache.begin(part.lengths, padded.width)
            whole = len(part.lengths) == requests * batch.group
            own = state if whole else rows_of(state, _times(piece, batch.choices))
            steps.append(Step(part.tokens, context, part.last, epilogue, own))
        return cls(index, features, batch.choices, steps, new_tokens)

    def advance(self, outcomes: Sequence[tuple[SampledTokens, Any, SamplerState]]) -> None:
        sampled, cache, state = outcomes[0] if len(outcomes) == 1 else _joined(outcomes)
        if self.steps[0].wanted is not None:
            if self.choices > 1:
                cache = cache.select(spread_rows(cache.rows, self.choices, self.features))
            cache = cache.begin(np.ones(cache.rows, np.int32), 1)  # as every step from here on
        fed = sampled.tokens if sampled.fed is None else sampled.fed
        self.steps = [Step(fed, cache, None, SampleEpilogue(self.features), state)]
        self.steps_left -= 1
        self.unread.append(sampled)


def _times(rows: slice, factor: int) -> slice:
    return slice(rows.start * factor, rows.stop * factor)


def _pieces(rows: int, wanted: int, multiple: int) -> list[slice]:
    """Equal pieces of a batch, at most as many as wanted, each of a multiple of rows."""
    units = rows // multiple
    count = max(n for n in range(1, min(wanted, units) + 1) if units % n == 0)
    size = rows // count
    return [slice(start, start + size) for start in range(0, rows, size)]


def _joined(outcomes: Sequence[tuple[SampledTokens, Any, SamplerState]]) -> tuple[SampledTokens, Any, SamplerState]:
    """The rows of several pieces as those of one batch."""
    sampled, caches, states = zip(*outcomes, strict=True)
    return join_rows(sampled), type(caches[0]).join(caches), joined_rows(states)
