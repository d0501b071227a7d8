"""What each row of a batch asks for, as arrays."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float32, Int32

from jdsi.errors import ConfigError

from .features import Functions, SamplerFeatures
from .padding import NO_TOKEN, pad_rows, power_of_two
from .phrases import Phrases, token_rows
from .sampling_fields import LARGE
from .sampling_params import SamplingParams, check_vocabulary
from .token_automaton import TokenAutomaton, joined


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class RowSettings:
    """One entry per row, but for `automaton`. `None` where the features do without.

    Attributes:
        stop_tokens: tokens that end the row, then `NO_TOKEN`.
        remembers: the row's tokens are kept, for what has to look at them.
        automaton: `[S, V]`, see `token_automaton.joined`.
        allowed_by, processed_by: which of the features' functions, or -1.
        forced_first: what the first token must be, or `NO_TOKEN`.
        decay: see `penalties.penalise_length`, for every number of tokens generated.
        begin_suppressed: banned at the step `begin_step`.
        vocab_size: tokens there are, without what pads the logits where they are divided over devices.
    """

    max_new_tokens: Int32[Array, " B"]
    stop_tokens: Int32[Array, "B N"]
    min_new_tokens: Int32[Array, " B"] | None
    remembers: Bool[Array, " B"] | None
    guidance_scale: Float32[Array, " B"] | None
    logit_bias: Phrases | None
    repetition_penalty: Float32[Array, " B"] | None
    presence_penalty: Float32[Array, " B"] | None
    frequency_penalty: Float32[Array, " B"] | None
    no_repeat_ngram: Int32[Array, " B"] | None
    bad_words: Phrases | None
    automaton: Int32[Array, "S V"] | None
    allowed_by: Int32[Array, " B"] | None
    forced_first: Int32[Array, "B 1"] | None
    forced_last: Int32[Array, "B N"] | None
    decay: Float32[Array, "B T"] | None
    suppressed: Int32[Array, "B N"] | None
    begin_suppressed: Int32[Array, "B N"] | None
    begin_step: Int32[Array, " B"] | None
    processed_by: Int32[Array, " B"] | None
    temperature: Float32[Array, " B"] | None
    top_k: Int32[Array, " B"] | None
    top_p: Float32[Array, " B"] | None
    min_p: Float32[Array, " B"] | None
    typical_p: Float32[Array, " B"] | None
    epsilon_cutoff: Float32[Array, " B"] | None
    eta_cutoff: Float32[Array, " B"] | None
    min_tokens_to_keep: Int32[Array, " B"] | None
    renormalize: Bool[Array, " B"] | None
    vocab_size: int = dataclasses.field(metadata={"static": True})

    @classmethod
    def of(
        cls,
        params: Sequence[SamplingParams],
        prompts: Sequence[Sequence[int]],
        *,
        vocab_size: int,
        eos_token_ids: Sequence[int],
        features: SamplerFeatures,
    ) -> Self:
        """Those of filled parameters.

        Raises:
            ConfigError: a parameter does not fit the vocabulary, or there are texts in it, which no tokenizer made ids.
        """
        for own in params:
            check_vocabulary(own, vocab_size)
            if own.bad_words:
                raise ConfigError(f"sampling parameter bad_words={own.bad_words!r} must be bad_words_ids here")
        stops = stop_rows(params, eos_token_ids)
        single = [
            len(prompt) == 1 and p.forced_bos_token_id is not None for p, prompt in zip(params, prompts, strict=True)
        ]

        def column(needed: bool, name: str, dtype: type) -> Array | None:
            return jnp.asarray(np.array([getattr(p, name) for p in params], dtype)) if needed else None

        def tokens(needed: bool, name: str) -> Array | None:
            return token_rows([getattr(p, name) for p in params]) if needed else None

        return cls(
            max_new_tokens=jnp.asarray(np.array([p.max_new_tokens for p in params], np.int32)),
            stop_tokens=jnp.asarray(stops),
            min_new_tokens=column(features.min_tokens, "min_new_tokens", np.int32),
            remembers=jnp.asarray(np.array([remembers(p) for p in params])) if features.history else None,
            guidance_scale=column(features.guidance, "guidance_scale", np.float32),
            logit_bias=Phrases.of([p.given["logit_bias"] for p in params]) if features.bias else None,
            repetition_penalty=column(features.repetition, "repetition_penalty", np.float32),
            presence_penalty=column(features.counts, "presence_penalty", np.float32),
            frequency_penalty=column(features.counts, "frequency_penalty", np.float32),
            no_repeat_ngram=column(features.ngrams, "no_repeat_ngram", np.int32),
            bad_words=Phrases.of(_bad_words(params, stops)) if features.bad_words else None,
            automaton=jnp.asarray(joined(automata(params))[0]) if features.automaton else None,
            allowed_by=_which(features.allowed, [p.allowed_tokens for p in params]),
            forced_first=_forced_first(params, single) if features.forced_first else None,
            forced_last=tokens(features.forced_last, "forced_eos_token_id"),
            decay=_decay(params) if features.decay else None,
            suppressed=tokens(features.suppressed, "suppress_tokens"),
            begin_suppressed=tokens(features.begin, "begin_suppress_tokens"),
            begin_step=jnp.asarray(np.array(single, np.int32)) if features.begin else None,
            processed_by=_which(features.functions, [p.logits_processor for p in params]),
            temperature=jnp.asarray(_temperatures([p.temperature for p in params])) if features.noise else None,
            top_k=column(features.top_k, "top_k", np.int32),
            top_p=column(features.top_p, "top_p", np.float32),
            min_p=column(features.min_p, "min_p", np.float32),
            typical_p=column(features.typical, "typical_p", np.float32),
            epsilon_cutoff=column(features.epsilon, "epsilon_cutoff", np.float32),
            eta_cutoff=column(features.eta, "eta_cutoff", np.float32),
            min_tokens_to_keep=column(features.least, "min_tokens_to_keep", np.int32),
            renormalize=column(features.renormalize, "renormalize_logits", np.bool_),
            vocab_size=vocab_size,
        )

    def repeated(self, times: int) -> Self:
        """Every row so many times, its copies side by side."""
        rows = dataclasses.replace(self, automaton=None)
        rows = jax.tree.map(lambda leaf: jnp.repeat(leaf, times, axis=0), rows)
        return dataclasses.replace(rows, automaton=self.automaton)


def automata(params: Sequence[SamplingParams]) -> list[TokenAutomaton | None]:
    """Those among `allowed_tokens`."""
    return [p.allowed_tokens if isinstance(p.allowed_tokens, TokenAutomaton) else None for p in params]


def remembers(params: SamplingParams) -> bool:
    """Whether a request has to look at its tokens."""
    return SamplerFeatures.of([params]).history


def stop_rows(params: Sequence[SamplingParams], eos_token_ids: Sequence[int]) -> np.ndarray:
    """`[B, N]`: tokens that end each request, then `NO_TOKEN`. N is a power of two from 4 on, to compile rarely."""
    stops = [(*p.stop_token_ids, *(() if p.ignore_eos else eos_token_ids)) for p in params]
    return pad_rows(stops, power_of_two(max(4, *map(len, stops))), NO_TOKEN)


def _temperatures(values: Sequence[float]) -> np.ndarray:
    """In float32, where none may become 0 that is not: 0 is greedy."""
    least = np.finfo(np.float32).tiny
    return np.array([max(value, least) if value else 0.0 for value in values], np.float32)


def _which(functions: Functions, own: Sequence[Any]) -> Array | None:
    """Each row's place among the functions, or -1."""
    places = {function: place for place, function in enumerate(functions)}
    return jnp.asarray(np.array([places.get(function, -1) for function in own], np.int32)) if functions else None


def _bad_words(params: Sequence[SamplingParams], stops: np.ndarray) -> list[list[tuple[tuple[int, ...], float]]]:
    """Without single tokens that end the row, which are no words, as in `transformers`."""
    rows = []
    for own, stop in zip(params, stops.tolist(), strict=True):
        rows.append([(ids, 0.0) for ids in own.bad_words_ids if len(ids) > 1 or ids[0] not in stop])
    return rows


def _forced_first(params: Sequence[SamplingParams], single: Sequence[bool]) -> Array:
    """Only behind a prompt of one token, which in `transformers` is the one that a decoder begins with."""
    forced = [p.forced_bos_token_id if only else NO_TOKEN for p, only in zip(params, single, strict=True)]
    return jnp.asarray(np.array(forced, np.int32)[:, None])


def _decay(params: Sequence[SamplingParams]) -> Array:
    """`[B, T]`: the factor, to the power of the tokens behind the start, less 1; T is padded, to compile rarely."""
    steps = max((p.max_new_tokens for p in params if p.exponential_decay_length_penalty), default=1)
    rows = np.zeros((len(params), -(-steps // 128) * 128), np.float32)
    for row, own in zip(rows, params, strict=True):
        if own.exponential_decay_length_penalty:
            start, factor = own.exponential_decay_length_penalty
            behind = np.maximum(np.arange(len(row)) - start, 0)
            with np.errstate(over="ignore"):
                row[:] = np.minimum(np.float64(factor) ** behind - 1, LARGE)
    return jnp.asarray(rows)
