"""What one request asks of the sampler."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NoReturn, Self

from jdsi.errors import ConfigError, nearest

from .sampling_checks import check_values, contradictions, wrong
from .sampling_fields import FIELDS, NEUTRAL, TRUNCATION, Unfit
from .token_automaton import TokenAutomaton
from .transformers_names import RENAMED, UNSUPPORTED

AllowedTokens = Callable[..., Any] | TokenAutomaton | Sequence[Sequence[int]]
LogitsProcessor = Callable[..., Any]
Biases = Mapping[int, float] | Mapping[tuple[int, ...], float] | Sequence[tuple[Sequence[int], float]]


class _LeftOut:
    """The type of `LEFT_OUT`, of which nothing but its identity is of use: all else is an error, not an answer."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "LEFT_OUT"

    def __reduce__(self) -> str:
        return "LEFT_OUT"

    def _misused(self, *_: object) -> NoReturn:
        raise TypeError("this sampling parameter was left out; only SamplingParams.filled() has a value for it")

    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = _misused
    __bool__ = __int__ = __float__ = __index__ = __len__ = __iter__ = _misused
    __hash__ = object.__hash__


LEFT_OUT: Any = _LeftOut()
"""The value of the fields of `SamplingParams` that the caller leaves to the model's folder."""


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class SamplingParams:
    """How the tokens of one request are chosen and when it ends.

    A field that is left out takes the value of the model folder's `generation_config.json`, and without one there its
    neutral value, given below; see docs/generation.md. One that is given wins, also where it is neutral. Without both
    the search is greedy. What could have no effect next to the other fields raises instead, but for a `seed`, and
    for truncation beside `temperature=0`, since programs pass them whatever the temperature.

    Attributes:
        max_new_tokens: the request ends with `"length"` after this many tokens; 128, or as many as fit.
        min_new_tokens: end-of-sequence and `stop_token_ids` have probability zero, and a `stop` string that is whole
            does not count, before this many tokens; 0.
        n: results for the prompt: of sampling each with its own noise, the first as without `n`; of a beam search the
            `n` best; 1.
        temperature: divides the logits; 0 takes the most probable token (lowest id of equals).
        top_k: keep the `top_k` most probable tokens and those tied with the last of them; 0 keeps all.
        top_p: keep the most probable tokens up to and including the one whose cumulative probability reaches `top_p`,
            and those tied with it; 1 keeps all.
        min_p: keep tokens at least `min_p` times as probable as the most probable one; 0 keeps all.
        typical_p: keep the tokens closest to the average surprise up to this much of the probability
            (arXiv:2202.00666), and those tied with the last of them; 1 keeps all.
        epsilon_cutoff: keep tokens at least this probable (arXiv:2210.15191); 0 keeps all.
        eta_cutoff: the same, with a bound that falls where many tokens are probable; 0 keeps all.
        min_tokens_to_keep: no truncation keeps fewer tokens; 1.
        repetition_penalty: divides positive and multiplies negative logits of tokens in the prompt or the output
            (arXiv:1909.05858, section 4.1); 1.
        presence_penalty: subtracted once from the logit of every token already generated; 0.
        frequency_penalty: subtracted from a token's logit as many times as it was generated; 0.
        no_repeat_ngram: no sequence of this many tokens occurs twice in prompt plus output; 0 is off.
        logit_bias: numbers added to the logits of tokens: a mapping from token ids, or from tuples of ids, whose last
            token is changed where it would complete them. Minus infinity bans. Kept as pairs.
        bad_words_ids: sequences of token ids that must not occur. Kept as tuples.
        bad_words: texts of which this is true, as words of their own and as ends of longer ones, in the way that the
            tokenizer cuts them.
        suppress_tokens: ids that must not occur.
        begin_suppress_tokens: ids that the output must not begin with.
        forced_bos_token_id: what the output begins with behind a prompt of one token, as in encoder-decoder models.
        forced_eos_token_id: what it ends with where it reaches `max_new_tokens`; one id or several. Kept as a tuple.
        exponential_decay_length_penalty: `(start, factor)`: behind `start` tokens the logits of what ends the request
            are raised by their distance from 0 times `factor ** tokens - 1`.
        allowed_tokens: what may come next: a JAX function `(tokens[B, L], lengths[B]) -> allowed[B, V]` of prompts and
            outputs, in which what lies past a row's length has no meaning; or a `TokenAutomaton` or its table.
        logits_processor: a JAX function `(tokens[B, L], lengths[B], logits[B, V]) -> logits[B, V]`, applied before
            temperature and truncation. Functions are compiled in: pass the same object again, and compute row by row.
        guidance_scale: how many times as far as they are the log-probabilities are moved away from those behind the
            negative prompt (arXiv:2306.17806); takes two rows of the batch. 1 is off.
        negative_prompt: text or token ids; by default the last token of the prompt. Kept as a tuple where it is ids.
        stop: a string or strings that end the request; the text ends before the one that is whole first. They may have
            the content of special tokens in them. Kept as a tuple.
        stop_token_ids: ids that end the request as end-of-sequence does. Kept as a tuple.
        ignore_eos: the model's end-of-sequence ids neither end the request nor are they held back.
        logprobs: `None` for none, else how many of the most probable tokens to report beside the chosen one. They are
            of the model's own distribution, before penalties, temperature and truncation.
        seed: makes the tokens a function of the logits; `None` draws a fresh seed per request. Changes nothing where
            nothing is drawn.
        num_beams: 1, or the width of a beam search.
        length_penalty: beams are ranked by log-probability divided by length to this power; 1.
        early_stopping: `True` ends a beam search at `num_beams` finished hypotheses, `False` when the best running beam
            would not do better at its present length, `"never"` when it cannot do better at any length.
        renormalize_logits: in a beam search, log-probabilities are normalised again behind all that changed them.
    """

    max_new_tokens: int = LEFT_OUT
    min_new_tokens: int = LEFT_OUT
    n: int = LEFT_OUT
    temperature: float = LEFT_OUT
    top_k: int = LEFT_OUT
    top_p: float = LEFT_OUT
    min_p: float = LEFT_OUT
    typical_p: float = LEFT_OUT
    epsilon_cutoff: float = LEFT_OUT
    eta_cutoff: float = LEFT_OUT
    min_tokens_to_keep: int = LEFT_OUT
    repetition_penalty: float = LEFT_OUT
    presence_penalty: float = LEFT_OUT
    frequency_penalty: float = LEFT_OUT
    no_repeat_ngram: int = LEFT_OUT
    logit_bias: Biases = LEFT_OUT
    bad_words_ids: Sequence[Sequence[int]] = LEFT_OUT
    bad_words: Sequence[str] = LEFT_OUT
    suppress_tokens: Sequence[int] = LEFT_OUT
    begin_suppress_tokens: Sequence[int] = LEFT_OUT
    forced_bos_token_id: int | None = LEFT_OUT
    forced_eos_token_id: int | Sequence[int] = LEFT_OUT
    exponential_decay_length_penalty: tuple[int, float] | None = LEFT_OUT
    allowed_tokens: AllowedTokens | None = LEFT_OUT
    logits_processor: LogitsProcessor | None = LEFT_OUT
    guidance_scale: float = LEFT_OUT
    negative_prompt: str | Sequence[int] | None = LEFT_OUT
    stop: Sequence[str] = LEFT_OUT
    stop_token_ids: Sequence[int] = LEFT_OUT
    ignore_eos: bool = LEFT_OUT
    logprobs: int | None = LEFT_OUT
    seed: int | None = LEFT_OUT
    num_beams: int = LEFT_OUT
    length_penalty: float = LEFT_OUT
    early_stopping: bool | Literal["never"] = LEFT_OUT
    renormalize_logits: bool = LEFT_OUT

    def __post_init__(self) -> None:
        given = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is LEFT_OUT:
                continue
            try:
                given[field.name] = FIELDS[field.name].check(value)
            except Unfit as error:
                raise wrong(field.name, value, str(error)) from None
            object.__setattr__(self, field.name, given[field.name])
        object.__setattr__(self, "_given", given)
        for name, right in contradictions(given):
            raise wrong(name, given[name], right)

    @property
    def given(self) -> Mapping[str, Any]:
        """The fields that are not left out, with their values."""
        return vars(self).get("_given", {})

    def filled(self, defaults: Mapping[str, Any] | None = None, source: str = "the defaults") -> "SamplingParams":
        """All fields with values: those given here, else those in `defaults`, else neutral ones.

        Truncation beside temperature 0 becomes neutral.

        Args:
            defaults: for what is left out here.
            source: what error messages call them.

        Raises:
            ConfigError: fields contradict each other, or truncation is given and nothing says the temperature.
        """
        if vars(self).get("_filled"):
            return self
        values = {**NEUTRAL, **(defaults or {}), **self.given}
        if values["temperature"] == 0:
            for name in TRUNCATION:
                if name in self.given and "temperature" not in self.given and values[name] != NEUTRAL[name]:
                    raise wrong(name, values[name], "used with a temperature above 0, such as temperature=1")
                values[name] = NEUTRAL[name]
        for name, right in contradictions(values):
            raise wrong(name, values[name], right, "" if name in self.given else f" of {source}")
        complete = SamplingParams(**values)
        object.__setattr__(complete, "_filled", True)
        return complete

    @classmethod
    def from_dict(cls, options: Mapping[str, Any]) -> Self:
        """Parameters from a mapping; raises `ConfigError` that names every unknown key and what it is called here."""
        unknown = [f"{key!r}{_hint(str(key))}" for key in options if key not in FIELDS]
        if unknown:
            raise ConfigError(f"unknown sampling parameter {', '.join(unknown)}; valid are {', '.join(FIELDS)}")
        return cls(**options)

    @property
    def greedy(self) -> bool:
        """Whether no random number is used; of filled parameters."""
        return self.temperature == 0.0

    @property
    def changes(self) -> dict[str, Any]:
        """The fields that are given and not neutral."""
        return {name: value for name, value in self.given.items() if value != NEUTRAL[name]}

    @property
    def described(self) -> dict[str, Any]:
        """`changes` in words that are the same in every process: functions by name."""
        return {name: name_of(value) if callable(value) else value for name, value in self.changes.items()}

    def __eq__(self, other: object) -> bool:
        return self.given == other.given if isinstance(other, SamplingParams) else NotImplemented

    def __hash__(self) -> int:
        return hash(tuple(self.given.items()))

    def __repr__(self) -> str:
        return f"SamplingParams({', '.join(f'{name}={value!r}' for name, value in self.given.items())})"


def check_vocabulary(params: SamplingParams, vocab_size: int) -> None:
    """Raises `ConfigError` where fields that are given ask for other tokens than the `vocab_size` there are."""
    check_values(params.given, vocab_size)


def name_of(function: Callable[..., Any]) -> str:
    """Where a function was defined: the same in every process that runs the same program."""
    kind = function if hasattr(function, "__qualname__") else type(function)
    return f"{kind.__module__}.{kind.__qualname__}"


def _hint(name: str) -> str:
    if name in RENAMED:
        return f" (did you mean {RENAMED[name]!r}?)"
    return " (not supported)" if name in UNSUPPORTED else nearest(name, FIELDS)
