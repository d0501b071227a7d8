"""The text of an answer while it is written, as far as stop strings let it be shown."""

import copy
from collections.abc import Sequence
from typing import Self

from .detokenizer import Detokenizer, Tokenizer
from .sampling_params import SamplingParams
from .stopping import StopStrings


class AnswerText:
    """What the tokens of one answer say, up to the stop string that ends it.

    Special tokens are not shown, but their text counts for stop strings, as in `transformers`.

    Args:
        params: of the request, filled.
        tokenizer: a `transformers` tokenizer, or `None`, which leaves the text empty.
        prompt_ids: as in `Detokenizer`.
    """

    def __init__(self, params: SamplingParams, tokenizer: Tokenizer | None, prompt_ids: Sequence[int] = ()) -> None:
        self._params = params
        self._detokenizer = None if tokenizer is None else Detokenizer(tokenizer, prompt_ids)
        self._stop = StopStrings(params.stop)
        self._tokens = 0

    @property
    def stopped(self) -> bool:
        """Whether a stop string is complete; what comes later is not shown."""
        return self._stop.matched is not None

    def add(self, token_id: int, *, ends: bool = False) -> str:
        """What became certain with a token; one that `ends` the answer is no more shown than a special one."""
        self._tokens += 1
        text = self._detokenizer
        if text is None:
            return ""
        before = self._pass_on(text.flush()) if ends else ""  # not that token's, so it is shown
        own = text.special.get(token_id, "") + text.add(token_id) + (text.flush() if ends else "")
        return before + self._pass_on(own, shown=not ends and token_id not in text.special)

    def end(self) -> str:
        """What was held back, once no more tokens follow."""
        return self._pass_on(self._detokenizer.flush() if self._detokenizer else "") + self._stop.flush()

    def followed_by(self, token_id: int) -> Self:
        """One that goes on with a token; this one stays as it is.

        Behind a stop string goes on only what is of no use any more; it is looked at as if it had had none.
        """
        text = copy.copy(self)
        text._detokenizer = None if self._detokenizer is None else self._detokenizer.copy()
        text._stop = StopStrings(self._params.stop) if self.stopped else self._stop.copy()
        text.add(token_id)
        return text

    def _pass_on(self, text: str, *, shown: bool = True) -> str:
        return self._stop.feed(text, shown=shown, counts=self._tokens >= self._params.min_new_tokens)
