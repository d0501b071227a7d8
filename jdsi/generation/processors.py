"""What is done to a batch of logits before a token is chosen from them, in `transformers`' order.

Every processor takes `[B, V]` float32 and one setting per row, and gives `[B, V]` float32. A row whose setting is
neutral leaves it bit for bit as it came, so a program that holds a processor and one that does not agree on it.

Where the mesh axis "tensor" is bound, the logits are a rank's share of the vocabulary, see `vocabulary`, and only a few
numbers per row are exchanged.
"""

import jax
from jaxtyping import Array, Float32

from . import vocabulary
from .bans import ban_ngrams, ban_tokens
from .features import SamplerFeatures
from .penalties import penalise_counts, penalise_repetition
from .row_settings import RowSettings
from .truncation import keep_min_p, keep_top_k, keep_top_p, scale_temperature
from .written import Written

Logits = Float32[Array, "B V"]


def process(logits: Logits, settings: RowSettings, written: Written, features: SamplerFeatures) -> Logits:
    """All that the features name.

    Args:
        logits: of every row, or this rank's share of them; a beam search's log-probabilities.
        settings, written: of the rows; made for at least these features.
        features: what to compile in.
    """
    first = vocabulary.first_token(logits)
    if features.repetition:
        seen = vocabulary.own_columns(held(written.seen), logits)
        logits = penalise_repetition(logits, seen, held(settings.repetition_penalty))
    if features.counts:
        counts = vocabulary.own_columns(held(written.counts), logits)
        logits = penalise_counts(logits, counts, held(settings.presence_penalty), held(settings.frequency_penalty))
    if features.ngrams:
        tokens, length = held(written.tokens), held(written.length)
        logits = ban_ngrams(logits, tokens, length, held(settings.no_repeat_ngram), first)
    if features.min_tokens:
        early = written.generated < held(settings.min_new_tokens)
        logits = ban_tokens(logits, settings.stop_tokens, early, first)
    return _truncated(logits, settings, features)


def _truncated(logits: Logits, settings: RowSettings, features: SamplerFeatures) -> Logits:
    """What is there for sampling only."""
    if features.noise:
        logits = scale_temperature(logits, held(settings.temperature))
    if features.top_k:
        logits = keep_top_k(logits, held(settings.top_k))
    if features.top_p:
        logits = keep_top_p(logits, held(settings.top_p))
    if features.min_p:
        logits = keep_min_p(logits, held(settings.min_p))
    return logits


def held(leaf: jax.Array | None) -> jax.Array:
    """An array that the features say is there."""
    if leaf is None:
        raise ValueError("the state was made without the arrays that the sampler features need")
    return leaf
