"""What each decoding step adds to the answers."""

import dataclasses
from collections.abc import Iterator, Sequence

from .completion import Completion, CompletionBuilder, TokenLogprob
from .requests import Request
from .sampler import SampledTokens
from .sampler_state import FinishCode


@dataclasses.dataclass(frozen=True)
class StreamEvent:
    """One step of one request in `InferenceEngine.stream`.

    Attributes:
        index: which prompt.
        text: text that became certain; may be empty.
        token_id: the token.
        completion: the whole answer with the request's last event, else `None`.
        choice: which of the `n` results for the prompt.
    """

    index: int
    text: str
    token_id: int
    completion: Completion | None = None
    choice: int = 0


def events_of(
    step: SampledTokens, requests: Sequence[Request], builders: Sequence[CompletionBuilder]
) -> Iterator[StreamEvent]:
    """What a step adds to the results that are still open, `n` for each request; their builders take the tokens."""
    choices = ((request, choice) for request in requests for choice in range(request.params.n))
    for row, ((request, choice), builder) in enumerate(zip(choices, builders, strict=True)):
        broken = step.finish[row] == FinishCode.ERROR
        if builder.finish_reason is not None or not (step.valid[row] or broken):
            continue
        token = int(step.tokens[row])
        text = builder.add(token, int(step.finish[row]), _logprob(step, row))
        done = builder.completion() if builder.finish_reason is not None else None
        yield StreamEvent(request.index, text, token, done, choice)


def _logprob(step: SampledTokens, row: int) -> TokenLogprob | None:
    if step.logprob is None:
        return None
    top: list[tuple[int, float]] = []
    if step.top_ids is not None and step.top_logprobs is not None:
        top = list(zip(step.top_ids[row].tolist(), step.top_logprobs[row].tolist(), strict=True))
    return TokenLogprob(int(step.tokens[row]), float(step.logprob[row]), top)
