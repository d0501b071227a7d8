"""Beam search over an executor: B prompts run as B * K rows of one KV cache."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jdsi.generation import Completion, FinishCode, SamplerFeatures, beam
from jdsi.generation.answer_text import AnswerText
from jdsi.generation.beam_text import BeamTexts
from jdsi.generation.requests import Request
from jdsi.sharding import DATA, axis_index

from . import peers
from .batch import PaddedPrompts, padded_rows
from .executor import Executor, Step


@dataclasses.dataclass(frozen=True)
class BeamEpilogue:
    """One beam-search step as an `Epilogue`; `repeat` spreads the logits of a prompt over its beams."""

    features: SamplerFeatures
    repeat: int = 1
    apart: ClassVar[bool] = True

    def __call__(self, logits: Float[Array, "R V"], state: beam.BeamState) -> tuple[Any, beam.BeamState]:
        tokens, parents, state = beam.step(jnp.repeat(logits, self.repeat, axis=0), state, self.features)
        first = axis_index(DATA) * parents.shape[0]  # of the rows that this device's group has
        return (tokens, first + parents, state.done), state


@dataclasses.dataclass(frozen=True)
class ProposeEpilogue:
    """The first half of a step, for where the host looks at the candidates before it goes on."""

    features: SamplerFeatures
    repeat: int = 1
    apart: ClassVar[bool] = True

    def __call__(self, logits: Float[Array, "R V"], state: beam.BeamState) -> tuple[beam.Candidates, beam.BeamState]:
        return beam.propose(jnp.repeat(logits, self.repeat, axis=0), state, self.features), state


_settle = jax.jit(beam.settle)


def beam_search(
    executor: Executor,
    requests: Sequence[Request],
    tokenizer: Any,
    *,
    eos_token_ids: Sequence[int] = (),
    max_requests: int,
) -> list[list[Completion]]:
    """The `n` best answers to each request, best first.

    Args:
        executor: runs the model.
        requests: at most `max_requests`; all have the same `num_beams`.
        tokenizer: a `transformers` tokenizer, or `None`, which leaves token ids alone.
        eos_token_ids: end the requests that do not ignore them.
        max_requests: the requests are not padded beyond.
    """
    texts = [AnswerText(r.params, tokenizer, r.prompt) if r.params.stop else None for r in requests]
    found = _hypotheses(executor, requests, eos_token_ids, max_requests, texts)
    return [
        [_completion(request, tokenizer, one) for one in hypotheses[: request.params.n]]
        for request, hypotheses in zip(requests, found, strict=True)
    ]


def _completion(request: Request, tokenizer: Any, found: beam.Hypothesis) -> Completion:
    builder = request.builder(tokenizer)
    for token in found.token_ids[:-1]:
        builder.add(token)
    builder.add(found.token_ids[-1], FinishCode.STOP if found.finish_reason == "stop" else FinishCode.LENGTH)
    return dataclasses.replace(builder.completion(), score=found.score)


def _hypotheses(
    executor: Executor,
    requests: Sequence[Request],
    eos_token_ids: Sequence[int],
    max_requests: int,
    texts: Sequence[AnswerText | None],
) -> list[list[beam.Hypothesis]]:
    prompts, params = [r.prompt for r in requests], [r.params for r in requests]
    executor.agree(
        {
            "call": "beam search",
            "prompts": prompts,
            "sampling": [p.described for p in params],
            "eos_token_ids": eos_token_ids,
            "max_batch_size": max_requests,
        }
    )
    beams, rows = params[0].num_beams, padded_rows(executor, len(prompts), max_requests)
    idle = rows - len(prompts)
    padded = PaddedPrompts.of(prompts, rows)
    features = SamplerFeatures.of(params)
    state = beam.init(
        [*params, *[None] * idle],
        [*prompts, *[()] * idle],
        vocab_size=executor.spec.vocab_size,
        eos_token_ids=eos_token_ids,
        features=features,
    )
    steps = max(p.max_new_tokens for p in params)
    cache = executor.new_cache(rows, padded.width + steps)
    first = _Pass(executor, cache.begin(padded.lengths, padded.width), padded.tokens, padded.last)
    if any(text is not None for text in texts):
        state = _with_stop_strings(first, state, features, steps, BeamTexts([*texts, *[None] * idle], beams))
    else:
        state = executor.on_host(_on_device(first, state, features, steps))
    return beam.finish(state, [*(f"prompt {r.index}" for r in requests), *["padding"] * idle])[: len(prompts)]


@dataclasses.dataclass
class _Pass:
    """What the model's next pass is over: first the prompts, one row each, then the last tokens of all beams."""

    executor: Executor
    cache: Any
    tokens: Any
    last: Any

    def run(self, epilogue: Any, state: Any) -> tuple[Any, Any]:
        """The epilogue's result and state."""
        step = Step(self.tokens, self.cache, self.last, epilogue, state)
        result, self.cache, state = self.executor.steps([step])[0]
        return result, state

    def go_on(self, tokens: Any, parents: Any, beams: int) -> None:
        """With a token behind each beam, each of which continues the row `parents` says."""
        # In the first pass nothing can be donated: every prompt's row becomes `beams` rows.
        rows = parents if self.last is None else parents // beams
        self.cache, self.tokens = self.cache.select(rows), tokens
        if self.last is not None:
            self.cache, self.last = self.cache.begin(np.ones(len(tokens), np.int32), 1), None


def _steps(steps: int, beams: int) -> Iterator[tuple[bool, int]]:
    """Whether a step is the last, and over how many beams each row of its logits is spread."""
    for step in range(steps):
        yield step == steps - 1, beams if step == 0 else 1


def _on_device(one: _Pass, state: Any, features: SamplerFeatures, steps: int) -> Any:
    """The state when every search is done; each step is one program."""
    beams = state.running.shape[1]
    for is_last, repeat in _steps(steps, beams):
        (tokens, parents, done), state = one.run(BeamEpilogue(features, repeat), state)
        if is_last:
            break
        one.go_on(tokens, parents, beams)
        with peers.waiting():
            if np.asarray(done).all():
                break
    return state


def _with_stop_strings(one: _Pass, state: Any, features: SamplerFeatures, steps: int, texts: BeamTexts) -> Any:
    """The same with a look at the candidates' texts in the middle of each step; the state lives on the host."""
    batch, beams, _ = state.running.shape
    state = jax.device_get(state)
    for is_last, repeat in _steps(steps, beams):
        candidates, _ = one.run(ProposeEpilogue(features, repeat), state)
        with peers.waiting():
            candidates = jax.device_get(candidates)
        hits = texts.completing(candidates.parent, candidates.token)
        tokens, parents, state = jax.device_get(_settle(state, candidates, hits))
        if is_last or state.done.all():
            break
        texts.go_on(parents.reshape(batch, beams) % beams, tokens.reshape(batch, beams))
        one.go_on(tokens, parents, beams)
    return state
