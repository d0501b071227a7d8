"""What is done to a batch of logits before a token is chosen from them, in `transformers`' order.

Every processor takes `[B, V]` float32 and one setting per row, and gives `[B, V]` float32. A row whose setting is
neutral leaves it bit for bit as it came, so a program that holds a processor and one that does not agree on it.

Where the mesh axis "tensor" is bound, the logits are a rank's share of the vocabulary, see `vocabulary`, and only a few
numbers per row are exchanged.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float32

from . import vocabulary
from .bans import allow_only, ban_ngrams, ban_tokens, force_tokens
from .features import SamplerFeatures
from .functions import allowed_by, processed_by
from .penalties import add_biases, penalise_counts, penalise_length, penalise_repetition
from .row_settings import RowSettings
from .truncation import (
    keep_above_epsilon,
    keep_above_eta,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    keep_typical,
    scale_temperature,
)
from .written import Written

Logits = Float32[Array, "B V"]


def process(
    logits: Logits, settings: RowSettings, written: Written, features: SamplerFeatures, together: int = 1
) -> Logits:
    """All that the features name.

    Args:
        logits: of every row, or this rank's share of them; a beam search's log-probabilities.
        settings, written: of the rows; made for at least these features.
        features: what to compile in.
        together: so many neighbouring rows are the beams of one search.
    """
    first = vocabulary.first_token(logits)
    if features.bias:
        phrases = held(settings.logit_bias)
        logits = add_biases(logits, phrases, phrases.due(written.tokens, written.length), first)
    if features.repetition:
        seen = vocabulary.own_columns(held(written.seen), logits)
        logits = penalise_repetition(logits, seen, held(settings.repetition_penalty))
    if features.counts:
        counts = vocabulary.own_columns(held(written.counts), logits)
        logits = penalise_counts(logits, counts, held(settings.presence_penalty), held(settings.frequency_penalty))
    if features.ngrams:
        tokens, length = held(written.tokens), held(written.length)
        logits = ban_ngrams(logits, tokens, length, held(settings.no_repeat_ngram), first)
    if features.bad_words:
        phrases = held(settings.bad_words)
        logits = ban_tokens(logits, phrases.last, phrases.due(written.tokens, written.length), first)
    if features.min_tokens:
        early = written.generated < held(settings.min_new_tokens)
        logits = ban_tokens(logits, settings.stop_tokens, early[:, None], first)
    logits = _constrained(logits, settings, written, features, together)
    if features.forced_first:
        logits = force_tokens(logits, held(settings.forced_first), written.generated == 0, first)
    if features.forced_last:
        last = written.generated == settings.max_new_tokens - 1
        logits = force_tokens(logits, held(settings.forced_last), last, first)
    if features.decay:
        factor = jnp.take_along_axis(held(settings.decay), written.generated[:, None], axis=1, mode="clip")[:, 0]
        logits = penalise_length(logits, settings.stop_tokens, factor, first)
    if features.suppressed:
        logits = ban_tokens(logits, held(settings.suppressed), jnp.bool_(True), first)
    if features.begin:
        begins = written.generated == held(settings.begin_step)
        logits = ban_tokens(logits, held(settings.begin_suppressed), begins[:, None], first)
    if features.functions:
        logits = _by_functions(logits, settings, written, features)
    logits = _truncated(logits, settings, features)
    if features.renormalize:
        total = vocabulary.logsumexp(logits)
        total = jnp.where(held(settings.renormalize) & jnp.isfinite(total), total, 0.0)
        logits = logits - total[:, None]
    return logits


def _constrained(
    logits: Logits, settings: RowSettings, written: Written, features: SamplerFeatures, together: int
) -> Logits:
    """With what `allowed_tokens` does not allow banned."""
    if features.automaton:
        state = held(written.state)
        # A row whose state is -1 was forced to a token that is not allowed, and is at its end.
        allowed = (held(settings.automaton)[state] >= 0) & (state >= 0)[:, None]
        logits = allow_only(logits, vocabulary.own_columns(allowed, logits), state != 0, together)
    for place, function in enumerate(features.allowed):
        mask = allowed_by(function, held(written.tokens), held(written.length), settings.vocab_size)
        where = held(settings.allowed_by) == place
        logits = allow_only(logits, vocabulary.own_columns(mask, logits), where, together)
    return logits


def _by_functions(logits: Logits, settings: RowSettings, written: Written, features: SamplerFeatures) -> Logits:
    """As the callers' functions make them, which are given the whole vocabulary."""
    whole = vocabulary.whole(logits, settings.vocab_size)
    for place, function in enumerate(features.functions):
        changed = processed_by(function, held(written.tokens), held(written.length), whole)
        own = vocabulary.own_columns(changed, logits, -jnp.inf)
        logits = jnp.where((held(settings.processed_by) == place)[:, None], own, logits)
    return logits


def _truncated(logits: Logits, settings: RowSettings, features: SamplerFeatures) -> Logits:
    """What is there for sampling only."""
    least = settings.min_tokens_to_keep if features.least else None
    if features.noise:
        logits = scale_temperature(logits, held(settings.temperature))
    if features.top_k:
        logits = keep_top_k(logits, held(settings.top_k), least)
    if features.top_p:
        logits = keep_top_p(logits, held(settings.top_p), least)
    if features.min_p:
        logits = keep_min_p(logits, held(settings.min_p), least)
    if features.typical:
        logits = keep_typical(logits, held(settings.typical_p), least)
    if features.epsilon:
        logits = keep_above_epsilon(logits, held(settings.epsilon_cutoff), least)
    if features.eta:
        logits = keep_above_eta(logits, held(settings.eta_cutoff), least)
    return logits


def held[Leaf](leaf: Leaf | None) -> Leaf:
    """An array that the features say is there."""
    if leaf is None:
        raise ValueError("the state was made without the arrays that the sampler features need")
    return leaf
