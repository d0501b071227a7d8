"""Beam search over an executor: B prompts run as B * K rows of one KV cache."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jdsi.generation import SamplerFeatures, SamplingParams, beam
from jdsi.sharding import DATA, axis_index

from . import peers
from .decoding import PaddedPrompts, new_context, padded_rows
from .executor import Executor, Step
from .row_selection import select_rows


@dataclasses.dataclass(frozen=True)
class BeamEpilogue:
    """One beam-search step as an `Epilogue`; `repeat` spreads the logits of a prompt over its beams."""

    features: SamplerFeatures
    repeat: int = 1

    def __call__(self, logits: Float[Array, "R V"], state: beam.BeamState) -> tuple[Any, beam.BeamState]:
        tokens, parents, state = beam.step(jnp.repeat(logits, self.repeat, axis=0), state, self.features)
        first = axis_index(DATA) * parents.shape[0]  # of the rows that this device's group has
        return (tokens, first + parents, state.done), state


def _step(executor: Executor, step: Step) -> tuple[Any, Any, Any]:
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
    executor.agree(
        {
            "call": "beam search",
            "prompts": prompts,
            "sampling": [p.described for p in params],
            "eos_token_ids": eos_token_ids,
            "max_batch_size": max_rows,
        }
    )
    beams, rows = params[0].num_beams, padded_rows(executor, len(prompts), max_rows)
    idle = rows - len(prompts)
    padded = PaddedPrompts.of(prompts, rows)
    features = SamplerFeatures.of(params)
    state = beam.init(
        [*params, *[None] * idle],
        [*prompts, *[()] * idle],
        vocab_size=executor.spec.vocab_size,
        eos_token_ids=eos_token_ids,
    )
    steps = max(p.max_new_tokens for p in params)
    context = new_context(executor, rows, padded.width, steps)
    context = context.extend(padded.lengths, padded.width)
    prefill = BeamEpilogue(features, repeat=beams)
    (tokens, parents, done), context, state = _step(executor, Step(padded.tokens, context, padded.last, prefill, state))
    # Nothing can be donated here: every prompt's row becomes `beams` rows.
    context = select_rows(context, parents // beams).extend(np.ones(rows * beams, np.int32), 1)
    epilogue = BeamEpilogue(features)
    for _ in range(steps - 1):
        with peers.waiting():
            if np.asarray(done).all():
                break
        (tokens, parents, done), context, state = _step(executor, Step(tokens, context, None, epilogue, state))
        context = select_rows(context, parents)
    return beam.finish(executor.on_host(state), [*names, *["padding"] * idle])[: len(prompts)]
