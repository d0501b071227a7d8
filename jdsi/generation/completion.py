"""One request's answer, built token by token on the host."""

import dataclasses
from collections.abc import Sequence
from typing import Literal

from jdsi.errors import ConfigError, JdsiError
from jdsi.generation.answer_text import AnswerText
from jdsi.generation.detokenizer import Tokenizer
from jdsi.generation.sampler_state import FinishCode
from jdsi.generation.sampling_params import SamplingParams

FinishReason = Literal["stop", "length"]


@dataclasses.dataclass(frozen=True)
class TokenLogprob:
    """Log-probability of a generated token and of the most probable ones (best first), under the model's own output."""

    token_id: int
    logprob: float
    top: list[tuple[int, float]]


@dataclasses.dataclass(frozen=True)
class Completion:
    """The answer to one request.

    Attributes:
        text: the generated text, without special tokens, without what ended it: the stop string and what the same token
            put after it, or the text of a stop token. Stop strings are looked for in the text with those tokens.
        token_ids: every generated token, the one that ended the request included; where a stop string ended it, the
            last one completes that string, so the tokens decode to more than `text`.
        finish_reason: `"stop"` (end of sequence, stop token or stop string) or `"length"`.
        logprobs: one for each of `token_ids` if asked for.
        alternatives: the other results where several were asked for; of a beam search best first.
        score: of a beam search: log-probability divided by length to the power of `length_penalty`.
    """

    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    logprobs: list[TokenLogprob] | None = None
    alternatives: list["Completion"] = dataclasses.field(default_factory=list)
    score: float | None = None


class CompletionBuilder:
    """Turns the tokens of one request into text and decides on the host what the device cannot: stop strings.

    Args:
        params: the request's.
        tokenizer: `None` gives completions without text.
        prompt_ids: as in `Detokenizer`.
        name: what error messages call the request.

    Raises:
        ConfigError: stop strings without a tokenizer.
    """

    def __init__(
        self,
        params: SamplingParams,
        tokenizer: Tokenizer | None = None,
        prompt_ids: Sequence[int] = (),
        *,
        name: str = "the request",
    ):
        params = params.filled()
        if params.stop and tokenizer is None:
            raise ConfigError(f"sampling parameter stop={params.stop!r} must be left out where there is no tokenizer")
        self._params = params
        self._name = name
        self._answer = AnswerText(params, tokenizer, prompt_ids)
        self._text: list[str] = []
        self._token_ids: list[int] = []
        self._logprobs: list[TokenLogprob] = []
        self.finish_reason: FinishReason | None = None

    def add(self, token_id: int, finish: int = FinishCode.RUNNING, logprob: TokenLogprob | None = None) -> str:
        """Takes the next valid token with its row's finish code and returns the text that is now certain.

        After this, `finish_reason` says whether the request is over; a token that comes later is ignored.

        Raises:
            JdsiError: the device found no finite logit.
        """
        if self.finish_reason is not None:
            return ""
        if finish == FinishCode.ERROR:
            raise JdsiError(
                f"token {len(self._token_ids)} of {self._name} could not be chosen: its largest logit is not finite. "
                "Either the model's output has NaN or infinity (a damaged checkpoint, or float16 where bfloat16 is "
                "needed), or bans, constraints and functions of the request left no token"
            )
        self._token_ids.append(int(token_id))
        if logprob is not None and self._params.logprobs is not None:
            self._logprobs.append(dataclasses.replace(logprob, top=logprob.top[: self._params.logprobs]))
        delta = self._answer.add(int(token_id), ends=finish == FinishCode.STOP)
        if self._answer.stopped:
            self.finish_reason = "stop"
        elif finish != FinishCode.RUNNING:
            delta += self._end("stop" if finish == FinishCode.STOP else "length")
        return self._record(delta)

    def completion(self) -> Completion:
        """The whole answer. Of a request that is not over, what there is so far, with reason `"length"`."""
        if self.finish_reason is None:
            self._record(self._end("length"))
        return Completion(
            text="".join(self._text),
            token_ids=list(self._token_ids),
            finish_reason=self.finish_reason or "length",
            logprobs=None if self._params.logprobs is None else list(self._logprobs),
        )

    def _end(self, reason: FinishReason) -> str:
        delta = self._answer.end()
        self.finish_reason = "stop" if self._answer.stopped else reason
        return delta

    def _record(self, delta: str) -> str:
        self._text.append(delta)
        return delta
