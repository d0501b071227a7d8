"""Beam search over an executor: B prompts run as B * K rows of one KV cache."""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jdsi.generation import SamplingParams, beam
from jdsi.kv_cache import ContiguousContext

from .decoding import PaddedPrompts, new_context
from .executor import Executor, Step
from .shapes import batch_bucket


@dataclasses.dataclass(frozen=True)
class BeamEpilogue:
    """One beam-search step as an `Epilogue`; `repeat` spreads the logits of a prompt over its beams."""

    features: beam.BeamFeatures
    repeat: int = 1

    def __call__(self, logits: Float[Array, "R V"], state: beam.BeamState) -> tuple[Any, beam.BeamState]:
        tokens, parents, state = beam.step(jnp.repeat(logits, self.repeat, axis=0), state, self.features)
        return (tokens, parents, jnp.all(state.done)), state


@partial(jax.jit, donate_argnums=0)
def _follow(context: ContiguousContext, parents: Array) -> ContiguousContext:
    return context.select(parents)


def _step(executor: Executor, step: Step) -> tuple[Any, ContiguousContext, Any]:
    return executor.steps([step])[0]


def beam_search(
    executor: Executor,
    prompts: Sequence[Sequence[int]],
    params: Sequence[SamplingParams],
    *,
    eos_token_ids: Sequence[int] = (),
    max_rows: int,
    names: Sequence[str],
) -> list[list[beam.Hypothesis]]:
    """The hypotheses of every prompt, best first.

    Args:
        executor: runs the model.
        prompts: token ids, at most `max_rows` prompts.
        params: one per prompt; all have the same `num_beams`.
        eos_token_ids: end the requests that do not ignore them.
        max_rows: the prompts are not padded beyond.
        names: what error messages call each prompt.
    """
    beams, rows = params[0].num_beams, min(batch_bucket(len(prompts)), max_rows)
    idle = rows - len(prompts)
    padded = PaddedPrompts.of(prompts, rows)
    features = beam.BeamFeatures.of(params)
    state = beam.init(
        [*params, *[None] * idle],
        [*prompts, *[()] * idle],
        vocab_size=executor.spec.vocab_size,
        eos_token_ids=eos_token_ids,
    )
    steps = max(p.max_new_tokens for p in params)
    context = new_context(executor, rows, padded.width, steps)
    context = context.extend(jnp.asarray(padded.lengths), padded.width)
    prefill = BeamEpilogue(features, repeat=beams)
    (tokens, parents, done), context, state = _step(executor, Step(padded.tokens, context, padded.last, prefill, state))
    # Nothing can be donated here: every prompt's row becomes `beams` rows.
    context = context.select(parents // beams).extend(jnp.ones(rows * beams, jnp.int32), 1)
    epilogue = BeamEpilogue(features)
    for _ in range(steps - 1):
        if np.asarray(done):
            break
        (tokens, parents, done), context, state = _step(executor, Step(tokens, context, None, epilogue, state))
        context = _follow(context, parents)
    return beam.finish(state, [*names, *["padding"] * idle])[: len(prompts)]
