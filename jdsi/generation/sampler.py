"""One token for every row of a batch of logits, inside `jit`.

A row's logits go through the `processors`. Then the largest logit plus Gumbel noise is taken, which draws from their
softmax (Maddison et al., arXiv:1411.0030). The noise of token `v` of a request's `i`-th step is a function of its seed,
`i` and `v` alone: not of the row, the batch, the padding or the size of the vocabulary.

Inside `jax.shard_map` over the mesh axis "tensor" the logits are each rank's share of the vocabulary, see `vocabulary`.
The state is the same on every rank, and so is what comes out: tokens are those of the undivided vocabulary.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32, Int32

from jdsi.sharding import TENSOR, axis_size, own_part

from . import guidance, processors, vocabulary
from .features import SamplerFeatures
from .sampler_state import FinishCode, SamplerState


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class SampledTokens:
    """What one step gives.

    Attributes:
        tokens: the token of each row, the pad token where `valid` is false.
        valid: the row was running before this step, so its token and `finish` are news.
        finish: `FinishCode` of each row after this step.
        fed: what the model's rows go on with where they are not the sampler's, for guidance takes two for one.
        logprob: log-probability of `tokens` under the unprocessed logits, or `None`.
        top_ids: ids of the most probable tokens under the unprocessed logits, best first, or `None`.
        top_logprobs: their log-probabilities, or `None`.
    """

    tokens: Int32[Array, " B"]
    valid: Bool[Array, " B"]
    finish: Int32[Array, " B"]
    fed: Int32[Array, " R"] | None = None
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
        logits: the model's output at each row's last token, or this rank's share of it; with guidance `[2 * B, V]`,
            where behind each row stands the one of its negative prompt.
        state: from `init_state`, made for at least these features.
        features: what to compile in; at least what the rows need.
    """
    logits = logits.astype(jnp.float32)
    running = state.finish == FinishCode.RUNNING

    scores = process(logits, state, features)
    if features.guidance:
        logits = logits[0 :: guidance.ROWS]
    if features.noise:
        noise = _gumbel(state, logits.shape[1])
        greedy = processors.held(state.settings.temperature) == 0
        scores = jnp.where(greedy[:, None], scores, scores + noise)
    # As two plain reductions, faster in XLA than an argmax.
    best = vocabulary.largest(scores)
    choice = vocabulary.first_equal(scores, best)
    sound = running & jnp.isfinite(best)
    tokens = jnp.where(sound, choice, state.pad_token)

    state = _advance(state, tokens, sound)
    finish = jnp.where(running & ~sound, jnp.int32(FinishCode.ERROR), state.finish)
    state = dataclasses.replace(state, finish=finish)
    fed = jnp.repeat(tokens, guidance.ROWS) if features.guidance else None
    return SampledTokens(tokens, running, finish, fed, *_logprobs(logits, tokens, features)), state


def process(logits: Float32[Array, "B V"], state: SamplerState, features: SamplerFeatures) -> Float32[Array, "B V"]:
    """The logits whose softmax is sampled from; of a greedy row, the logits whose largest is taken."""
    if features.guidance:
        logits = guidance.guided(logits, processors.held(state.settings.guidance_scale))
    return processors.process(logits, state.settings, state.written, features)


def _gumbel(state: SamplerState, columns: int) -> Float32[Array, "B V"]:
    def row(key: jax.Array, step: jax.Array) -> jax.Array:
        key = jax.random.wrap_key_data(key, impl="threefry2x32")
        return jax.random.gumbel(jax.random.fold_in(key, step), (axis_size(TENSOR) * columns,), jnp.float32)

    with jax.threefry_partitionable(True):
        # Every number depends on its own index alone, so XLA can fuse the slice and draw no other rank's.
        return own_part(jax.vmap(row)(processors.held(state.key), state.written.generated), TENSOR, dim=1)


def _advance(state: SamplerState, tokens: Int32[Array, " B"], running: Bool[Array, " B"]) -> SamplerState:
    """Records the tokens of the running rows."""
    settings = state.settings
    written = state.written.followed_by(tokens, running, settings)
    stopped = running & jnp.any(settings.stop_tokens == tokens[:, None], axis=1)
    exhausted = running & (written.generated >= settings.max_new_tokens)
    finish = jnp.where(exhausted, jnp.int32(FinishCode.LENGTH), state.finish)
    finish = jnp.where(stopped, jnp.int32(FinishCode.STOP), finish)
    return dataclasses.replace(state, written=written, finish=finish)


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
