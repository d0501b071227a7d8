"""What a caller asks for, checked before any work is done."""

import dataclasses
from typing import Any

from jdsi.errors import CapacityError, ConfigError, PromptError
from jdsi.models import TransformerSpec

from . import guidance
from .completion import CompletionBuilder
from .defaults import GenerationDefaults
from .functions import check_functions
from .prompts import as_list, encode
from .sampling_params import SamplingParams, check_vocabulary
from .words import ways_to_write


@dataclasses.dataclass(frozen=True)
class Request:
    """One prompt to continue.

    Attributes:
        index: which of the caller's prompts.
        prompt: its token ids.
        params: how to continue it, with a value for every field.
        negative: token ids of the negative prompt; empty where the request is not guided.
    """

    index: int
    prompt: list[int]
    params: SamplingParams
    negative: tuple[int, ...] = ()

    @property
    def guided(self) -> bool:
        """Whether a second row of the model runs beside each of its rows."""
        return bool(self.negative)

    @property
    def rows(self) -> int:
        """Rows of the model that it takes."""
        return max(self.params.num_beams, self.params.n * (guidance.ROWS if self.guided else 1))

    def builder(self, tokenizer: Any) -> CompletionBuilder:
        """What puts the answer together, as text too where there is a tokenizer."""
        return CompletionBuilder(self.params, tokenizer, self.prompt, name=f"prompt {self.index}")


@dataclasses.dataclass(frozen=True)
class Intake:
    """Makes requests, of a model and within limits.

    Attributes:
        spec: of the model.
        tokenizer: a `transformers` tokenizer, or `None`, which leaves token ids alone.
        max_tokens: prompt plus generated tokens of a request.
        max_batch_size: rows decoded together, hence of a request, at most.
        defaults: for what callers leave out.
    """

    spec: TransformerSpec
    tokenizer: Any
    max_tokens: int
    max_batch_size: int
    defaults: GenerationDefaults

    def requests(self, prompts: Any, sampling: Any) -> list[Request]:
        """A request for each of the prompts, see `InferenceEngine.generate`, which also has the errors."""
        if not self.spec.causal or self.spec.head is None:
            what = "is an encoder" if not self.spec.causal else "has no language-model head"
            call = self.spec.main_call
            raise ConfigError(f"this {self.spec.family} model {what} and cannot generate; use {call}")
        items = as_list(prompts)
        if not items:
            raise PromptError("no prompt was given")
        names = [f"prompt {i}" if len(items) > 1 else "prompt" for i in range(len(items))]
        vocabulary = self.spec.vocab_size
        ids = [encode(x, self.tokenizer, vocabulary, name=name) for x, name in zip(items, names, strict=True)]
        given = self._given(len(items), sampling)
        return [self._request(i, *each) for i, each in enumerate(zip(ids, given, names, strict=True))]

    def _request(self, index: int, prompt: list[int], given: SamplingParams, name: str) -> Request:
        params = self.filled(given, prompt, name)
        negative = () if params.guidance_scale == 1 else self._negative(params, prompt, name)
        request = Request(index, prompt, params, negative)
        for what, count in (("num_beams", params.num_beams), ("n", params.n)):
            if count > self.max_batch_size:
                raise ConfigError(f"{what}={count} exceeds max_batch_size={self.max_batch_size}")
        if request.rows > self.max_batch_size:
            raise ConfigError(
                f"n={params.n} with guidance_scale takes {request.rows} rows, more than max_batch_size="
                f"{self.max_batch_size}"
            )
        return request

    def _negative(self, params: SamplingParams, prompt: list[int], name: str) -> tuple[int, ...]:
        if params.negative_prompt is None:
            return tuple(prompt[-1:])
        name = f"the negative prompt of {name}"
        negative = encode(params.negative_prompt, self.tokenizer, self.spec.vocab_size, name=name)
        self._check_length(negative, params, name)
        return tuple(negative)

    def filled(self, params: SamplingParams, prompt: list[int], name: str = "prompt") -> SamplingParams:
        """How to continue a prompt, with the model's values for what is left out, checked."""
        own = self.defaults.fill(params, len(prompt), self.max_tokens, name)
        own = self._with_ids(own)
        check_vocabulary(own, self.spec.vocab_size)
        check_functions(own, self.spec.vocab_size)
        if params.given.get("forced_bos_token_id") is not None and len(prompt) > 1:
            raise ConfigError(
                f"sampling parameter forced_bos_token_id={own.forced_bos_token_id} is for prompts of one token, as in "
                f"transformers; {name} has {len(prompt)}"
            )
        if own.stop and self.tokenizer is None:
            if "stop" not in params.given:
                raise ConfigError(f"{self.defaults.source} asks for stop={own.stop!r}; give a tokenizer, or stop=()")
            raise ConfigError(f"sampling parameter stop={own.stop!r} must be left out where there is no tokenizer")
        self._check_length(prompt, own, name)
        self._warn_of_length(len(prompt), own.max_new_tokens)
        return own

    def _check_length(self, prompt: list[int], params: SamplingParams, name: str) -> None:
        if len(prompt) + params.max_new_tokens > self.max_tokens:
            raise CapacityError(
                f"{name} has {len(prompt)} tokens and max_new_tokens is {params.max_new_tokens}: together "
                f"{len(prompt) + params.max_new_tokens}, more than the {self.max_tokens} this engine takes"
            )

    def _warn_of_length(self, prompt_tokens: int, new_tokens: int) -> None:
        """Where the last token but one may be computed otherwise than in `transformers`."""
        beyond = self.spec.recomputed_beyond
        if beyond is not None and prompt_tokens <= beyond < prompt_tokens + new_tokens - 1:
            self.defaults.tell(
                f"a request may grow beyond {beyond} tokens, where this {self.spec.family} model changes to LongRoPE's "
                "long factors: transformers then computes all its keys anew, and this engine keeps those it has, so "
                f"that later tokens may differ; a prompt of more than {beyond} tokens, or forward, gives the same"
            )

    def _with_ids(self, params: SamplingParams) -> SamplingParams:
        """With the words among the parameters as token ids."""
        if not params.bad_words:
            return params
        if self.tokenizer is None:
            raise ConfigError(
                f"sampling parameter bad_words={params.bad_words!r} needs a tokenizer; give bad_words_ids"
            )
        words = (ids for word in params.bad_words for ids in ways_to_write(word, self.tokenizer))
        ids = tuple(dict.fromkeys([*params.bad_words_ids, *words]))
        return dataclasses.replace(params, bad_words=(), bad_words_ids=ids).filled()

    def _given(self, count: int, sampling: Any) -> list[SamplingParams]:
        """One for each prompt."""
        if sampling is None:
            return [SamplingParams()] * count
        params = [sampling] * count if isinstance(sampling, SamplingParams) else list(sampling)
        if not all(isinstance(own, SamplingParams) for own in params):
            raise ConfigError(
                "sampling must be SamplingParams, or a list of them; SamplingParams.from_dict takes a mapping"
            )
        if len(params) != count:
            raise ConfigError(f"{len(params)} sampling parameters for {count} prompts; give one, or one for each")
        return params
