"""Which parts of the sampler a batch needs."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Self

from .padding import power_of_two
from .sampling_params import SamplingParams
from .token_automaton import TokenAutomaton

Functions = tuple[Callable[..., Any], ...]


@dataclasses.dataclass(frozen=True)
class SamplerFeatures:
    """What is compiled into the sampler, and into beam search. More than a batch needs costs time, changes no token.

    Attributes:
        allowed: the functions of `allowed_tokens` there are.
        functions: those of `logits_processor`.
        top_logprobs: how many to report; a power of two, to compile rarely.
    """

    noise: bool = False
    top_k: bool = False
    top_p: bool = False
    min_p: bool = False
    typical: bool = False
    epsilon: bool = False
    eta: bool = False
    least: bool = False
    guidance: bool = False
    repetition: bool = False
    counts: bool = False
    ngrams: bool = False
    bias: bool = False
    bad_words: bool = False
    phrases: bool = False
    min_tokens: bool = False
    automaton: bool = False
    allowed: Functions = ()
    forced_first: bool = False
    forced_last: bool = False
    decay: bool = False
    suppressed: bool = False
    begin: bool = False
    functions: Functions = ()
    renormalize: bool = False
    logprobs: bool = False
    top_logprobs: int = 0

    @classmethod
    def of(cls, params: Sequence[SamplingParams | None]) -> Self:
        """What the requests need together."""
        live = [p.filled() for p in params if p is not None]

        changed = {name for p in live for name in p.changes}

        def differ(*names: str) -> bool:
            return not changed.isdisjoint(names)

        constraints = [p.allowed_tokens for p in live]
        phrases = [phrase for p in live for phrase in (*(ids for ids, _ in p.given["logit_bias"]), *p.bad_words_ids)]
        return cls(
            noise=differ("temperature"),
            top_k=differ("top_k"),
            top_p=differ("top_p"),
            min_p=differ("min_p"),
            typical=differ("typical_p"),
            epsilon=differ("epsilon_cutoff"),
            eta=differ("eta_cutoff"),
            least=differ("min_tokens_to_keep"),
            guidance=differ("guidance_scale"),
            repetition=differ("repetition_penalty"),
            counts=differ("presence_penalty", "frequency_penalty"),
            ngrams=differ("no_repeat_ngram"),
            bias=differ("logit_bias"),
            bad_words=differ("bad_words_ids"),
            phrases=any(len(phrase) > 1 for phrase in phrases),
            min_tokens=differ("min_new_tokens"),
            automaton=any(isinstance(own, TokenAutomaton) for own in constraints),
            allowed=_distinct(own for own in constraints if not isinstance(own, TokenAutomaton)),
            forced_first=differ("forced_bos_token_id"),
            forced_last=differ("forced_eos_token_id"),
            decay=differ("exponential_decay_length_penalty"),
            suppressed=differ("suppress_tokens"),
            begin=differ("begin_suppress_tokens"),
            functions=_distinct(p.logits_processor for p in live),
            renormalize=any(p.renormalize_logits and p.num_beams > 1 for p in live),
            logprobs=differ("logprobs"),
            top_logprobs=power_of_two(max((p.logprobs or 0 for p in live), default=0)),
        )

    @property
    def history(self) -> bool:
        """Whether the tokens themselves are needed, not only which of them there are."""
        return self.ngrams or self.phrases or bool(self.allowed) or bool(self.functions)

    def __or__(self, other: "SamplerFeatures") -> "SamplerFeatures":
        """What both need."""

        def both(name: str) -> Any:
            ours, theirs = getattr(self, name), getattr(other, name)
            return _distinct([*ours, *theirs]) if isinstance(ours, tuple) else max(ours, theirs)

        return SamplerFeatures(**{field.name: both(field.name) for field in dataclasses.fields(self)})


def _distinct(functions: Any) -> Functions:
    """In the order they come."""
    return tuple(dict.fromkeys(function for function in functions if function is not None))
