"""The fields of `SamplingParams`: their neutral values and what each of them takes."""

import dataclasses
import math
import numbers
from collections.abc import Callable
from typing import Any

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


def real(low: float, high: float, *, above: bool = False, hint: str = "") -> Check:
    """Finite numbers from `low` on, or `above` it, up to `high`."""
    bounds = f"{'above' if above else 'of at least'} {low:g} and at most {high:g}"

    def check(value: Any) -> float:
        number = float(value) if isinstance(value, numbers.Real) and not isinstance(value, bool) else math.nan
        if not math.isfinite(number) or not low <= number <= high or (above and number == low):
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
    """One non-empty string or several."""
    items = [value] if isinstance(value, str) else value
    if not isinstance(items, list | tuple | set | frozenset):
        raise Unfit("a string or a sequence of strings")
    if not all(isinstance(item, str) and item for item in items):
        raise Unfit("non-empty strings")
    return tuple(items)


def token_ids(value: Any) -> tuple[int, ...]:
    """Ids in any sequence."""
    if not isinstance(value, list | tuple | set | frozenset):
        raise Unfit("a sequence of token ids")
    if not all(is_int(item) and 0 <= item <= INT32_MAX for item in value):
        raise Unfit(f"token ids from 0 to {INT32_MAX}")
    return tuple(int(item) for item in value)


def early_stopping(value: Any) -> Any:
    """True, false or "never"."""
    if not isinstance(value, bool) and value != "never":
        raise Unfit("True, False or 'never'")
    return value


def is_int(value: object) -> bool:
    """Whether a value is an integer of any library, and no boolean."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


FIELDS: dict[str, Field] = {
    "max_new_tokens": Field(128, integer(1)),
    "min_new_tokens": Field(0, integer(0)),
    "temperature": Field(0.0, real(0.0, FLOAT32_MAX, hint="; 0 is greedy")),
    "top_k": Field(0, integer(0, hint="; 0 keeps every token")),
    "top_p": Field(1.0, real(0.0, 1.0, above=True, hint="; 1 keeps every token")),
    "min_p": Field(0.0, real(0.0, 1.0, hint="; 0 keeps every token")),
    "repetition_penalty": Field(1.0, real(1 / LARGE, LARGE, hint="; 1 is off")),
    "presence_penalty": Field(0.0, real(-2.0, 2.0)),
    "frequency_penalty": Field(0.0, real(-2.0, 2.0)),
    "no_repeat_ngram": Field(0, integer(0, hint="; 0 is off")),
    "stop": Field((), texts),
    "stop_token_ids": Field((), token_ids),
    "ignore_eos": Field(False, flag),
    "logprobs": Field(None, optional(integer(0))),
    "seed": Field(None, optional(integer(0, 2**64 - 1))),
    "num_beams": Field(1, integer(1)),
    "length_penalty": Field(1.0, real(-FLOAT32_MAX, FLOAT32_MAX)),
    "early_stopping": Field(False, early_stopping),
}

TRUNCATION = ("top_k", "top_p", "min_p")
"""What is of use only where tokens are drawn at random."""

BEAMS = ("length_penalty", "early_stopping")
"""What is of use only in a beam search."""
