"""Which parts of the sampler a batch needs."""

import dataclasses
from collections.abc import Sequence
from typing import Self

from .padding import power_of_two
from .sampling_params import SamplingParams


@dataclasses.dataclass(frozen=True)
class SamplerFeatures:
    """What is compiled into the sampler, and into beam search. More than a batch needs costs time, changes no token."""

    noise: bool = False
    top_k: bool = False
    top_p: bool = False
    min_p: bool = False
    repetition: bool = False
    counts: bool = False
    ngrams: bool = False
    min_tokens: bool = False
    logprobs: bool = False
    top_logprobs: int = 0

    @classmethod
    def of(cls, params: Sequence[SamplingParams | None]) -> Self:
        """What the requests need together; `top_logprobs` is rounded up to a power of two to compile less often."""
        live = [p.filled() for p in params if p is not None]
        top = max((p.logprobs or 0 for p in live), default=0)
        return cls(
            noise=any(not p.greedy for p in live),
            top_k=any(p.top_k > 0 for p in live),
            top_p=any(p.top_p < 1 for p in live),
            min_p=any(p.min_p > 0 for p in live),
            repetition=any(p.repetition_penalty != 1 for p in live),
            counts=any(p.presence_penalty != 0 or p.frequency_penalty != 0 for p in live),
            ngrams=any(p.no_repeat_ngram > 0 for p in live),
            min_tokens=any(p.min_new_tokens > 0 for p in live),
            logprobs=any(p.logprobs is not None for p in live),
            top_logprobs=power_of_two(top),
        )

    @property
    def history(self) -> bool:
        """Whether the tokens themselves are needed, not only which of them there are."""
        return self.ngrams

    def __or__(self, other: "SamplerFeatures") -> "SamplerFeatures":
        """What both need."""
        both = {f.name: max(getattr(self, f.name), getattr(other, f.name)) for f in dataclasses.fields(self)}
        return SamplerFeatures(**both)
