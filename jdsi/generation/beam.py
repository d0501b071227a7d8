"""Beam search inside `jit`, step by step as `transformers` does it.

A batch of `B` prompts with `K` beams runs as `B * K` rows of the model, the beams of a prompt side by side. Every
prompt ends on its own: what one request returns does not depend on the others.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float32, Int32

from . import vocabulary
from .beam_state import NEVER, OUT, BeamState, Hypothesis, finish, init
from .features import SamplerFeatures
from .processors import process
from .written import Written

__all__ = ["BeamState", "Candidates", "Hypothesis", "finish", "init", "propose", "settle", "step"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Candidates:
    """Ways on of `B` searches, best first.

    Attributes:
        scores: log-probabilities of the whole sequences.
        parent: which running beam each continues.
        token: with what.
    """

    scores: Float32[Array, "B C"]
    parent: Int32[Array, "B C"]
    token: Int32[Array, "B C"]


def step(
    logits: Float32[Array, "R V"], state: BeamState, features: SamplerFeatures
) -> tuple[Int32[Array, " R"], Int32[Array, " R"], BeamState]:
    """Extends every running beam by one token. Pure; `features` is static, `state` donatable.

    Args:
        logits: `[B * K, V]`, the model's output at the last token of each beam. Before the first step all beams of a
            prompt are equal, so a prefill of `B` rows gives `jnp.repeat(logits, K, axis=0)`. Inside `jax.shard_map`
            over the mesh axis "tensor" each rank's share of them, see `vocabulary`; all ranks then return the same.
        state: from `init` or the previous step.
        features: what to compile in.

    Returns:
        The next token of each row, the row whose KV cache it continues, and the new state. Stop when all of
        `state.done`; a prompt that is done no longer changes, its rows go on with meaningless tokens.
    """
    return settle(state, propose(logits, state, features))


def propose(logits: Float32[Array, "R V"], state: BeamState, features: SamplerFeatures) -> Candidates:
    """The first half of `step`: so many of the best ways on that enough are left when some of them end."""
    batch, beams, _ = state.running.shape
    # Everything below, ranks of equals and roundings included, is as if the vocabulary were not divided.
    logits = vocabulary.whole(logits, state.settings.vocab_size)
    vocab_size = logits.shape[-1]
    with vocabulary.undivided():
        log_probs = _processed(jax.nn.log_softmax(logits.astype(jnp.float32)), state, features)
    totals = log_probs.reshape(batch, beams, vocab_size) + state.scores[:, :, None]
    # Of (stop tokens + 1) * K candidates at least K do not end: each beam has one candidate per stop token.
    kept = min(max(2, 1 + state.settings.stop_tokens.shape[1]), vocab_size) * beams
    scores, index = lax.top_k(totals.reshape(batch, beams * vocab_size), kept)
    return Candidates(scores, index // vocab_size, index % vocab_size)


def settle(
    state: BeamState, candidates: Candidates, hits: Bool[Array, "B C"] | None = None
) -> tuple[Int32[Array, " R"], Int32[Array, " R"], BeamState]:
    """The second half of `step`: which of the candidates go on and which are finished.

    Args:
        state: as it was when the candidates were found.
        candidates: of `propose`.
        hits: those that complete a stop string.
    """
    batch, beams, _ = state.running.shape
    totals, parent, token = candidates.scores, candidates.parent, candidates.token
    length = state.step + 1
    position = jnp.arange(state.running.shape[2]) == (state.prompt_length + state.step)[:, None]
    extended = jnp.take_along_axis(state.running, parent[:, :, None], axis=1)
    extended = jnp.where(position[:, None], token[:, :, None], extended)
    stops = jnp.any(token[:, :, None] == state.settings.stop_tokens[:, None], axis=2)
    ends = stops | (length >= state.settings.max_new_tokens)[:, None]
    goes_on = totals
    if hits is not None:
        # Any number of candidates may be hit, so that it matters how many there are; here as many as in transformers.
        tokens_that_stop = jnp.sum(state.settings.stop_tokens >= 0, axis=1)
        past = jnp.arange(totals.shape[1]) >= beams * jnp.maximum(2, 1 + tokens_that_stop)[:, None]
        ends, goes_on = ends | hits | past, jnp.where(past, -jnp.inf, totals)

    scores, best = lax.top_k(goes_on + ends * OUT, beams)
    running, next_token, next_parent = (_pick(x, best) for x in (extended, token, parent))
    states = state.automaton_state
    if states is not None and state.settings.automaton is not None:
        states = state.settings.automaton[_pick(states, next_parent), next_token]
    state = dataclasses.replace(
        _collect(state, extended, totals, ends),
        running=running,
        scores=scores,
        step=jnp.where(state.done, state.step, length),
        automaton_state=states,
    )
    state = _judge(state, jnp.all(ends, axis=1))
    rows = next_parent + beams * jnp.arange(batch)[:, None]
    return next_token.reshape(-1), rows.reshape(-1), state


def _processed(log_probs: Float32[Array, "R V"], state: BeamState, features: SamplerFeatures) -> Float32[Array, "R V"]:
    """The processors, like in `transformers` on log-probabilities and without normalising again."""
    batch, beams, size = state.running.shape
    tokens = state.running.reshape(batch * beams, size)
    prompt_length, step = (jnp.repeat(x, beams) for x in (state.prompt_length, state.step))
    states = None if state.automaton_state is None else state.automaton_state.reshape(-1)
    written = Written.of_tokens(tokens, prompt_length, step, states, log_probs.shape[1], features)
    return process(log_probs, state.settings.repeated(beams), written, features, together=beams)


def _collect(
    state: BeamState, extended: Int32[Array, "B C L"], totals: Float32[Array, "B C"], ends: Bool[Array, "B C"]
) -> BeamState:
    """Merges the candidates that end into the pool of finished hypotheses, which keeps its `K` best.

    Only the `K` best candidates may enter; those behind them are there to keep `K` beams running.
    """
    beams = state.scores.shape[1]
    enters = ends & (jnp.arange(totals.shape[1]) < beams)
    full = jnp.all(state.is_finished, axis=1) & (state.early_stopping == 1)
    closed = full | ~state.improvable | state.done
    length = (state.step + 1)[:, None]
    scores = totals / length ** state.length_penalty[:, None]
    scores += (closed[:, None] + (~enters).astype(jnp.float32)) * OUT

    merged, best = lax.top_k(jnp.concatenate([state.finished_scores, scores], axis=1), beams)

    def merge(old: jax.Array, new: jax.Array) -> jax.Array:
        return _pick(jnp.concatenate([old, new], axis=1), best)

    return dataclasses.replace(
        state,
        finished=merge(state.finished, extended),
        finished_scores=merged,
        finished_length=merge(state.finished_length, jnp.broadcast_to(length, totals.shape)),
        is_finished=merge(state.is_finished, enters),
    )


def _judge(state: BeamState, stuck: Bool[Array, " B"]) -> BeamState:
    """Decides which searches are done: nothing better can come, the pool is full and that suffices, or no beam goes on.

    "Better" is judged by the best running beam at the present length, or, for `"never"` and a penalty that favours
    length, at the greatest.
    """
    longest = (state.early_stopping == NEVER) & (state.length_penalty > 0)
    length = jnp.where(longest, state.settings.max_new_tokens, state.step).astype(jnp.float32)
    hopeful = state.scores[:, 0] / length**state.length_penalty
    worst = jnp.where(state.is_finished, jnp.min(state.finished_scores, axis=1, keepdims=True), OUT)
    improvable = state.improvable & jnp.any(hopeful[:, None] > worst, axis=1)
    full = jnp.all(state.is_finished, axis=1) & (state.early_stopping == 1)
    return dataclasses.replace(state, improvable=improvable, done=state.done | ~improvable | full | stuck)


def _pick(array: jax.Array, index: Int32[Array, "B K"]) -> jax.Array:
    """Rows `index` along axis 1 of every batch entry."""
    return jnp.take_along_axis(array, index.reshape(index.shape + (1,) * (array.ndim - 2)), axis=1)
