"""The fields of `SamplingParams`: their neutral values and what each of them takes."""

import dataclasses
import math
import numbers
from collections.abc import Callable, Hashable, Mapping
from typing import Any

from .token_automaton import TokenAutomaton

INT32_MAX = 2**31 - 1  # what the device counts in
FLOAT32_MAX = 3.4e38
LARGE = 1e30  # a factor that leaves any logit finite in float32, and so does its reciprocal

Check = Callable[[Any], Any]
"""Gives a value in the form it is kept in; raises `Unfit`."""


class Unfit(ValueError):
    """A value that a field does not take; the text says what it must be."""


@dataclasses.dataclass(frozen=True)
class Field:
    """One field.

    Attributes:
        neutral: the value that leaves everything as it is.
        check: of values that are given.
    """

    neutral: Any
    check: Check


def integer(low: int, high: int = INT32_MAX, hint: str = "") -> Check:
    """Integers of any library."""

    def check(value: Any) -> int:
        if not is_int(value) or not low <= value <= high:
            raise Unfit(f"an integer from {low} to {high}{hint}")
        return int(value)

    return check


def real(low: float, high: float, *, above: bool = False, below: bool = False, hint: str = "") -> Check:
    """Finite numbers from `low` on, or `above` it, up to `high`, or `below` it."""
    bounds = f"{'above' if above else 'of at least'} {low:g} and {'below' if below else 'at most'} {high:g}"

    def check(value: Any) -> float:
        number = float(value) if isinstance(value, numbers.Real) and not isinstance(value, bool) else math.nan
        if (
            not math.isfinite(number)
            or not low <= number <= high
            or (above and number == low)
            or (below and number == high)
        ):
            raise Unfit(f"a finite number {bounds}{hint}")
        return number

    return check


def optional(inner: Check) -> Check:
    """Also `None`."""

    def check(value: Any) -> Any:
        try:
            return None if value is None else inner(value)
        except Unfit as error:
            raise Unfit(f"{error}, or None") from None

    return check


def flag(value: Any) -> bool:
    """True or false."""
    if not isinstance(value, bool):
        raise Unfit("True or False")
    return value


def texts(value: Any) -> tuple[str, ...]:
    """One non-empty string or several, of whole characters."""
    items = [value] if isinstance(value, str) else value
    if not isinstance(items, list | tuple | set | frozenset):
        raise Unfit("a string or a sequence of strings")
    if not all(isinstance(item, str) and item for item in items):
        raise Unfit("non-empty strings")
    if any("\ud800" <= character <= "\udfff" for item in items for character in item):
        raise Unfit("text, which has no half of a surrogate pair")
    return tuple(items)


def token_id(value: Any) -> int:
    """One id."""
    if not is_int(value) or not 0 <= value <= INT32_MAX:
        raise Unfit(f"a token id from 0 to {INT32_MAX}")
    return int(value)


def token_ids(value: Any) -> tuple[int, ...]:
    """Ids in any sequence."""
    if not isinstance(value, list | tuple | set | frozenset):
        raise Unfit("a sequence of token ids")
    if not all(is_int(item) and 0 <= item <= INT32_MAX for item in value):
        raise Unfit(f"token ids from 0 to {INT32_MAX}")
    return tuple(int(item) for item in value)


def one_or_more_ids(value: Any) -> tuple[int, ...]:
    """One id or several, or `None`, which is none."""
    return () if value is None else (int(value),) if is_int(value) and value >= 0 else token_ids(value)


def phrases(value: Any) -> tuple[tuple[int, ...], ...]:
    """Sequences of one or more ids."""
    if not isinstance(value, list | tuple | set | frozenset):
        raise Unfit("a sequence of sequences of token ids")
    found = tuple(token_ids(item) for item in value)
    if not all(found):
        raise Unfit("sequences of at least one token id")
    return found


def biases(value: Any) -> tuple[tuple[tuple[int, ...], float], ...]:
    """Numbers for ids, which JSON has as text, and for sequences of ids: a mapping or pairs."""
    pairs = list(value.items() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else [None])
    found: dict[tuple[int, ...], float] = {}
    for pair in pairs:
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise Unfit("a mapping from token ids to numbers, or pairs of a sequence of token ids and a number")
        key, bias = pair
        key = int(key) if isinstance(key, str) and key.isdecimal() else key
        ids = (token_id(key),) if is_int(key) else token_ids(key)
        if not ids or ids in found:
            raise Unfit("a number for each sequence of at least one token id, each of them once")
        number = float(bias) if isinstance(bias, numbers.Real) and not isinstance(bias, bool) else math.nan
        if not (abs(number) <= LARGE or number == -math.inf):
            raise Unfit(f"numbers from -{LARGE:g} to {LARGE:g}, or minus infinity")
        found[ids] = number
    return tuple(found.items())


def decay(value: Any) -> tuple[int, float]:
    """Where a penalty begins, and the factor it grows by."""
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise Unfit("a pair (tokens after which it begins, factor)")
    start, factor = value
    try:
        return integer(0)(start), real(0.0, LARGE, above=True)(factor)
    except Unfit as error:
        raise Unfit(f"a pair of an integer from 0 on and a factor above 0; one of them must be {error}") from None


def function(value: Any) -> Callable[..., Any]:
    """Anything that can be called, and told from others."""
    if not callable(value) or not isinstance(value, Hashable):
        raise Unfit("a function")
    return value


def allowed(value: Any) -> Any:
    """A function or a table."""
    if isinstance(value, TokenAutomaton) or (callable(value) and isinstance(value, Hashable)):
        return value
    try:
        return TokenAutomaton(value)
    except ValueError as error:
        raise Unfit(f"a function, or {error}") from None


def early_stopping(value: Any) -> Any:
    """True, false or "never"."""
    if not isinstance(value, bool) and value != "never":
        raise Unfit("True, False or 'never'")
    return value


def is_int(value: object) -> bool:
    """Whether a value is an integer of any library, and no boolean."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def prompt(value: Any) -> str | tuple[int, ...]:
    """Text or ids, not empty."""
    found = value if isinstance(value, str) else token_ids(value.tolist() if hasattr(value, "tolist") else value)
    if not found:
        raise Unfit("text or token ids, and not empty")
    return found


FIELDS: dict[str, Field] = {
    "max_new_tokens": Field(128, integer(1)),
    "min_new_tokens": Field(0, integer(0)),
    "n": Field(1, integer(1)),
    "temperature": Field(0.0, real(0.0, FLOAT32_MAX, hint="; 0 is greedy")),
    "top_k": Field(0, integer(0, hint="; 0 keeps every token")),
    "top_p": Field(1.0, real(0.0, 1.0, above=True, hint="; 1 keeps every token")),
    "min_p": Field(0.0, real(0.0, 1.0, hint="; 0 keeps every token")),
    "typical_p": Field(1.0, real(0.0, 1.0, above=True, hint="; 1 keeps every token")),
    "epsilon_cutoff": Field(0.0, real(0.0, 1.0, below=True, hint="; 0 keeps every token")),
    "eta_cutoff": Field(0.0, real(0.0, 1.0, below=True, hint="; 0 keeps every token")),
    "min_tokens_to_keep": Field(1, integer(1)),
    "repetition_penalty": Field(1.0, real(1 / LARGE, LARGE, hint="; 1 is off")),
    "presence_penalty": Field(0.0, real(-2.0, 2.0)),
    "frequency_penalty": Field(0.0, real(-2.0, 2.0)),
    "no_repeat_ngram": Field(0, integer(0, hint="; 0 is off")),
    "logit_bias": Field((), biases),
    "bad_words_ids": Field((), phrases),
    "bad_words": Field((), texts),
    "suppress_tokens": Field((), token_ids),
    "begin_suppress_tokens": Field((), token_ids),
    "forced_bos_token_id": Field(None, optional(token_id)),
    "forced_eos_token_id": Field((), one_or_more_ids),
    "exponential_decay_length_penalty": Field(None, optional(decay)),
    "allowed_tokens": Field(None, optional(allowed)),
    "logits_processor": Field(None, optional(function)),
    "guidance_scale": Field(1.0, real(-LARGE, LARGE, hint="; 1 is off")),
    "negative_prompt": Field(None, optional(prompt)),
    "stop": Field((), texts),
    "stop_token_ids": Field((), token_ids),
    "ignore_eos": Field(False, flag),
    "logprobs": Field(None, optional(integer(0))),
    "seed": Field(None, optional(integer(0, 2**64 - 1))),
    "num_beams": Field(1, integer(1)),
    "length_penalty": Field(1.0, real(-FLOAT32_MAX, FLOAT32_MAX)),
    "early_stopping": Field(False, early_stopping),
    "renormalize_logits": Field(False, flag),
}

NEUTRAL: dict[str, Any] = {name: field.neutral for name, field in FIELDS.items()}
"""The values that leave everything as it is."""

TRUNCATION = ("top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff", "min_tokens_to_keep")
"""What is of use only where tokens are drawn at random."""

BEAMS = ("length_penalty", "early_stopping")
"""What is of use only in a beam search."""
