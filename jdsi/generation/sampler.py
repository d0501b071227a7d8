"""One token for every row of a batch of logits, inside `jit`.

A row's logits go through, in `transformers`' order: repetition penalty, presence and frequency penalties,
`no_repeat_ngram`, `min_new_tokens`, temperature, top-k, top-p, min-p. Then the largest logit plus Gumbel noise is
taken, which draws from their softmax (Maddison et al., arXiv:1411.0030). The noise of token `v` of a request's `i`-th
step is a function of its seed, `i` and `v` alone: not of the row, the batch, the padding or the size of the vocabulary.

Inside `jax.shard_map` over the mesh axis "tensor" the logits are each rank's share of the vocabulary, see `vocabulary`.
The state is the same on every rank, and so is what comes out: tokens are those of the undivided vocabulary.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32, Int32

from jdsi.generation import processors, vocabulary
from jdsi.generation.sampler_state import FinishCode, SamplerFeatures, SamplerState
from jdsi.sharding import TENSOR, axis_size, own_part


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class SampledTokens:
    """What one step gives.

    Attributes:
        tokens: the token of each row, the pad token where `valid` is false.
        valid: the row was running before this step, so its token and `finish` are news.
        finish: `FinishCode` of each row after this step.
        logprob: log-probability of `tokens` under the unprocessed logits, or `None`.
        top_ids: ids of the most probable tokens under the unprocessed logits, best first, or `None`.
        top_logprobs: their log-probabilities, or `None`.
    """

    tokens: Int32[Array, " B"]
    valid: Bool[Array, " B"]
    finish: Int32[Array, " B"]
    logprob: Float32[Array, " B"] | None = None
    top_ids: Int32[Array, "B N"] | None = None
    top_logprobs: Float32[Array, "B N"] | None = None


def sample(
    logits: Float32[Array, "B V"],
    state: SamplerState,
    features: SamplerFeatures,
) -> tuple[SampledTokens, SamplerState]:
    """Draws the next token of every running row and advances its state. Pure; `features` is static, `state` donatable.

    Args:
        logits: the model's output at each row's last token, or this rank's share of it.
        state: from `init_state`, made for at least these features.
        features: what to compile in; at least what the rows need.
    """
    logits = logits.astype(jnp.float32)
    running = state.finish == FinishCode.RUNNING

    scores = process(logits, state, features)
    if features.noise:
        noise = _gumbel(state, logits.shape[1])
        scores = jnp.where((state.temperature == 0)[:, None], scores, scores + noise)
    # As two plain reductions, faster in XLA than an argmax.
    best = vocabulary.largest(scores)
    choice = vocabulary.first_equal(scores, best)
    sound = running & jnp.isfinite(best)
    tokens = jnp.where(sound, choice, state.pad_token)

    state = _advance(state, tokens, sound)
    finish = jnp.where(running & ~sound, jnp.int32(FinishCode.ERROR), state.finish)
    state = dataclasses.replace(state, finish=finish)
    return SampledTokens(tokens, running, finish, *_logprobs(logits, tokens, features)), state


def process(logits: Float32[Array, "B V"], state: SamplerState, features: SamplerFeatures) -> Float32[Array, "B V"]:
    """The logits whose softmax is sampled from; of a greedy row, the logits whose largest is taken."""
    first = vocabulary.first_token(logits)
    if features.repetition:
        seen = vocabulary.own_columns(_held(state.seen), logits)
        logits = processors.penalise_repetition(logits, seen, state.repetition_penalty)
    if features.counts:
        counts = vocabulary.own_columns(_held(state.counts), logits)
        logits = processors.penalise_counts(logits, counts, state.presence_penalty, state.frequency_penalty)
    if features.ngrams:
        history = _held(state.history)
        logits = processors.ban_ngrams(logits, history, state.history_length, state.no_repeat_ngram, first)
    if features.min_tokens:
        early = state.num_generated < state.min_new_tokens
        logits = processors.ban_tokens(logits, state.stop_tokens, early, first)
    if features.noise:
        logits = processors.scale_temperature(logits, state.temperature)
    if features.top_k:
        logits = processors.keep_top_k(logits, state.top_k)
    if features.top_p:
        logits = processors.keep_top_p(logits, state.top_p)
    if features.min_p:
        logits = processors.keep_min_p(logits, state.min_p)
    return logits


def _held(leaf: jax.Array | None) -> jax.Array:
    if leaf is None:
        raise ValueError("the sampler state was made without the arrays that the sampler features need")
    return leaf


def _gumbel(state: SamplerState, columns: int) -> Float32[Array, "B V"]:
    def row(key: jax.Array, step: jax.Array) -> jax.Array:
        key = jax.random.wrap_key_data(key, impl="threefry2x32")
        return jax.random.gumbel(jax.random.fold_in(key, step), (axis_size(TENSOR) * columns,), jnp.float32)

    with jax.threefry_partitionable(True):
        # Every number depends on its own index alone, so XLA can fuse the slice and draw no other rank's.
        return own_part(jax.vmap(row)(state.key, state.num_generated), TENSOR, dim=1)


def _advance(state: SamplerState, tokens: Int32[Array, " B"], running: Bool[Array, " B"]) -> SamplerState:
    """Records the tokens of the running rows."""
    rows = jnp.arange(tokens.shape[0])
    num_generated = state.num_generated + running
    stopped = running & jnp.any(state.stop_tokens == tokens[:, None], axis=1)
    exhausted = running & (num_generated >= state.max_new_tokens)
    finish = jnp.where(exhausted, jnp.int32(FinishCode.LENGTH), state.finish)
    finish = jnp.where(stopped, jnp.int32(FinishCode.STOP), finish)

    seen, counts, history, history_length = state.seen, state.counts, state.history, state.history_length
    if seen is not None:
        seen = seen.at[rows, tokens].max(running)
    if counts is not None:
        counts = counts.at[rows, tokens].add(running.astype(jnp.int32))
    if history is not None:
        recorded = running & (state.no_repeat_ngram > 0)
        at = jnp.where(recorded, history_length, history.shape[1])
        history = history.at[rows, at].set(tokens, mode="drop")
        history_length = history_length + recorded
    return dataclasses.replace(
        state,
        num_generated=num_generated,
        finish=finish,
        seen=seen,
        counts=counts,
        history=history,
        history_length=history_length,
    )


def _logprobs(
    logits: Float32[Array, "B V"], tokens: Int32[Array, " B"], features: SamplerFeatures
) -> tuple[jax.Array | None, jax.Array | None, jax.Array | None]:
    if not features.logprobs:
        return None, None, None
    normaliser = vocabulary.logsumexp(logits)
    chosen = vocabulary.entries(logits, tokens) - normaliser
    if not features.top_logprobs:
        return chosen, None, None
    top, ids = vocabulary.top(logits, features.top_logprobs)
    return chosen, ids, top - normaliser[:, None]
