"""What a caller asks for, checked before any work is done."""

import dataclasses
from typing import Any

from jdsi.errors import CapacityError, ConfigError, PromptError
from jdsi.models import TransformerSpec

from .completion import CompletionBuilder
from .prompts import as_list, encode
from .sampling_params import SamplingParams, check_vocabulary


@dataclasses.dataclass(frozen=True)
class Request:
    """One prompt to continue.

    Attributes:
        index: which of the caller's prompts.
        prompt: its token ids.
        params: how to continue it.
    """

    index: int
    prompt: list[int]
    params: SamplingParams

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
        max_batch_size: rows decoded together, hence beams of a request, at most.
    """

    spec: TransformerSpec
    tokenizer: Any
    max_tokens: int
    max_batch_size: int

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
        params = self._params(ids, sampling)
        for name, prompt, own in zip(names, ids, params, strict=True):
            self._check(name, prompt, own)
        return [Request(i, prompt, own) for i, (prompt, own) in enumerate(zip(ids, params, strict=True))]

    def default_params(self, prompt_tokens: int) -> SamplingParams:
        """Greedy; fewer new tokens than usual where the model is too small for the usual number."""
        usual = SamplingParams()
        room = self.max_tokens - prompt_tokens
        return usual if room >= usual.max_new_tokens else SamplingParams(max_new_tokens=max(1, room))

    def _params(self, ids: list[list[int]], sampling: Any) -> list[SamplingParams]:
        """One for each prompt."""
        if sampling is None:
            return [self.default_params(len(prompt)) for prompt in ids]
        params = [sampling] * len(ids) if isinstance(sampling, SamplingParams) else list(sampling)
        if not all(isinstance(own, SamplingParams) for own in params):
            raise ConfigError(
                "sampling must be SamplingParams, or a list of them; SamplingParams.from_dict takes a mapping"
            )
        if len(params) != len(ids):
            raise ConfigError(f"{len(params)} sampling parameters for {len(ids)} prompts; give one, or one for each")
        return params

    def _check(self, name: str, prompt: list[int], params: SamplingParams) -> None:
        check_vocabulary(params, self.spec.vocab_size)
        if params.stop and self.tokenizer is None:
            raise ConfigError(f"sampling parameter stop={params.stop!r} must be left out where there is no tokenizer")
        if params.num_beams > self.max_batch_size:
            raise ConfigError(f"num_beams={params.num_beams} exceeds max_batch_size={self.max_batch_size}")
        if len(prompt) + params.max_new_tokens > self.max_tokens:
            raise CapacityError(
                f"{name} has {len(prompt)} tokens and max_new_tokens is {params.max_new_tokens}: together "
                f"{len(prompt) + params.max_new_tokens}, more than the {self.max_tokens} this engine takes"
            )
