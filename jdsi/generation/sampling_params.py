"""What one request asks of the sampler."""

import dataclasses
import math
import numbers
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Self

from jdsi.errors import ConfigError, nearest

_INT32_MAX = 2**31 - 1  # what the device counts in


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How the tokens of one request are chosen and when it ends. The default is greedy search.

    Anything that would have no effect next to the other fields raises instead: truncation needs a temperature, beam
    options need beams. Only a `seed` may be given without effect, since programs pass one whatever the temperature.

    Attributes:
        max_new_tokens: the request ends with `"length"` after this many tokens.
        min_new_tokens: end-of-sequence and `stop_token_ids` have probability zero, and a `stop` string that is whole
            does not count, before this many tokens.
        temperature: divides the logits; 0 takes the most probable token (lowest id of equals).
        top_k: keep the `top_k` most probable tokens and those tied with the last of them; 0 keeps all.
        top_p: keep the most probable tokens up to and including the one whose cumulative probability reaches `top_p`,
            and those tied with it; 1 keeps all.
        min_p: keep tokens at least `min_p` times as probable as the most probable one; 0 keeps all.
        repetition_penalty: divides positive and multiplies negative logits of tokens in the prompt or the output
            (arXiv:1909.05858, section 4.1).
        presence_penalty: subtracted once from the logit of every token already generated.
        frequency_penalty: subtracted from a token's logit as many times as it was generated.
        no_repeat_ngram: no sequence of this many tokens occurs twice in prompt plus output; 0 is off.
        stop: a string or strings that end the request; the text ends before the one that is whole first. They may have
            the content of special tokens in them. Kept as a tuple.
        stop_token_ids: ids that end the request as end-of-sequence does. Kept as a tuple.
        ignore_eos: the model's end-of-sequence ids neither end the request nor are they held back.
        logprobs: `None` for none, else how many of the most probable tokens to report beside the chosen one. They are
            of the model's own distribution, before penalties, temperature and truncation.
        seed: makes the tokens a function of the logits; `None` draws a fresh seed per request. Changes nothing at
            temperature 0.
        num_beams: 1, or the width of a beam search.
        length_penalty: beams are ranked by log-probability divided by length to this power.
        early_stopping: `True` ends a beam search at `num_beams` finished hypotheses, `False` when the best running beam
            would not do better at its present length, `"never"` when it cannot do better at any length.
    """

    max_new_tokens: int = 128
    min_new_tokens: int = 0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    no_repeat_ngram: int = 0
    stop: Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    seed: int | None = None
    num_beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            self._set("stop", (self.stop,))
        for name in ("stop", "stop_token_ids"):
            value = getattr(self, name)
            if not isinstance(value, list | tuple | set | frozenset):
                raise self._wrong(name, "a sequence")
            self._set(name, tuple(value))
        if not all(isinstance(s, str) and s for s in self.stop):
            raise self._wrong("stop", "non-empty strings")
        if not all(_is_int(i) and 0 <= i <= _INT32_MAX for i in self.stop_token_ids):
            raise self._wrong("stop_token_ids", f"token ids from 0 to {_INT32_MAX}")
        self._set("stop_token_ids", tuple(int(i) for i in self.stop_token_ids))

        self._integer("max_new_tokens", 1)
        self._integer("min_new_tokens", 0)
        self._integer("top_k", 0, hint="; 0 keeps every token")
        self._integer("no_repeat_ngram", 0, hint="; 0 is off")
        self._integer("num_beams", 1)
        if self.logprobs is not None:
            self._integer("logprobs", 0, hint=", or None")
        if self.seed is not None:
            self._integer("seed", 0, 2**64 - 1, hint=", or None")
        self._real("temperature", 0.0, hint="; 0 is greedy")
        self._real("top_p", 0.0, 1.0, above=True, hint="; 1 keeps every token")
        self._real("min_p", 0.0, 1.0, hint="; 0 keeps every token")
        self._real("repetition_penalty", 0.0, above=True, hint="; 1 is off")
        self._real("presence_penalty", -2.0, 2.0)
        self._real("frequency_penalty", -2.0, 2.0)
        self._real("length_penalty", -math.inf)
        if not isinstance(self.ignore_eos, bool):
            raise self._wrong("ignore_eos", "True or False")
        if not (isinstance(self.early_stopping, bool) or self.early_stopping == "never"):
            raise self._wrong("early_stopping", "True, False or 'never'")
        self._reject_contradictions()

    def _reject_contradictions(self) -> None:
        if self.min_new_tokens > self.max_new_tokens:
            raise self._wrong("min_new_tokens", f"at most max_new_tokens={self.max_new_tokens}")
        if self.num_beams > 1:
            unusable = ("temperature", "presence_penalty", "frequency_penalty", "stop", "logprobs", "seed")
            why = f"left out with num_beams={self.num_beams}: beam search is deterministic and returns whole sequences"
        else:
            unusable = ("length_penalty", "early_stopping")
            why = "left out without beam search (num_beams is 1)"
        for name in unusable:
            if getattr(self, name) != _DEFAULTS[name]:
                raise self._wrong(name, why)
        for name in ("top_k", "top_p", "min_p"):
            if self.temperature == 0.0 and getattr(self, name) != _DEFAULTS[name]:
                raise self._wrong(name, "left out with temperature=0 (greedy), or used with temperature > 0")

    @classmethod
    def from_dict(cls, options: Mapping[str, Any]) -> Self:
        """Parameters from a mapping; raises `ConfigError` that names every unknown key and the nearest valid one."""
        unknown = [f"{key!r}{nearest(str(key), _DEFAULTS)}" for key in options if key not in _DEFAULTS]
        if unknown:
            raise ConfigError(f"unknown sampling parameter {', '.join(unknown)}; valid are {', '.join(_DEFAULTS)}")
        return cls(**options)

    @property
    def greedy(self) -> bool:
        """Whether no random number is used."""
        return self.temperature == 0.0

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    def _wrong(self, name: str, right: str) -> ConfigError:
        return ConfigError(f"sampling parameter {name}={getattr(self, name)!r} must be {right}")

    def _integer(self, name: str, low: int, high: int | None = None, hint: str = "") -> None:
        value = getattr(self, name)
        high = _INT32_MAX if high is None else high
        if not _is_int(value) or not low <= value <= high:
            raise self._wrong(name, f"an integer from {low} to {high}{hint}")
        self._set(name, int(value))

    def _real(self, name: str, low: float, high: float = math.inf, above: bool = False, hint: str = "") -> None:
        value = getattr(self, name)
        bounds = "" if low == -math.inf else f" {'above' if above else 'of at least'} {low:g}"
        bounds = f"a finite number{bounds}" + ("" if high == math.inf else f" and at most {high:g}")
        number = float(value) if isinstance(value, numbers.Real) and not isinstance(value, bool) else math.nan
        if not math.isfinite(number) or not low <= number <= high or (above and number == low):
            raise self._wrong(name, bounds + hint)
        self._set(name, number)


def check_vocabulary(params: SamplingParams, vocab_size: int) -> None:
    """Raises `ConfigError` where `logprobs` or `stop_token_ids` ask for more tokens than the `vocab_size` there are."""
    if (params.logprobs or 0) > vocab_size:
        raise ConfigError(
            f"sampling parameter logprobs={params.logprobs} must be at most the {vocab_size} tokens there are"
        )
    for token in params.stop_token_ids:
        if token >= vocab_size:
            raise ConfigError(f"sampling parameter stop_token_ids has {token}; the vocabulary ends at {vocab_size - 1}")


def _is_int(value: object) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


_DEFAULTS: dict[str, Any] = {field.name: field.default for field in dataclasses.fields(SamplingParams)}
