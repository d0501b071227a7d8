"""The text of running beams, as far as stop strings have to look at it."""

import copy
from collections.abc import Sequence
from typing import Self

import numpy as np
from jaxtyping import Bool, Int32

from .detokenizer import Detokenizer, Tokenizer
from .sampling_params import SamplingParams
from .stopping import StopStrings


class BeamText:
    """What one beam has written, followed as that of a request which is sampled.

    Args:
        params: the request's, filled; with stop strings.
        tokenizer: a `transformers` tokenizer.
        prompt: as in `Detokenizer`.

    Attributes:
        stopped: whether the last token completed a stop string.
    """

    def __init__(self, params: SamplingParams, tokenizer: Tokenizer, prompt: Sequence[int]) -> None:
        self._params, self._tokenizer = params, tokenizer
        self._detokenizer, self._stop = Detokenizer(tokenizer, prompt), StopStrings(params.stop)
        self._tokens = 0
        self.stopped = False

    def followed_by(self, token: int) -> Self:
        """A beam that goes on with a token; this one stays as it is."""
        beam = copy.copy(self)
        beam._detokenizer = copy.deepcopy(self._detokenizer, {id(self._tokenizer): self._tokenizer})
        # Behind a stop string goes on only what is of no use any more; it is looked at as if it had none.
        beam._stop = StopStrings(self._params.stop) if self.stopped else copy.deepcopy(self._stop)
        beam._tokens += 1
        text = beam._detokenizer.add(token)
        if beam._tokens < self._params.min_new_tokens:
            beam._stop.flush()
        else:
            beam._stop.feed(text)
        beam.stopped = beam._stop.matched is not None
        return beam


class BeamTexts:
    """Those of the running beams of a batch of searches.

    Args:
        first: of each search the text of its prompt, or `None` where it has no stop strings.
        beams: of each search.
    """

    def __init__(self, first: Sequence[BeamText | None], beams: int) -> None:
        self._running = [[text] * beams for text in first]
        self._next: list[dict[tuple[int, int], BeamText]] = [{} for _ in first]

    def completing(self, parent: Int32[np.ndarray, "B C"], token: Int32[np.ndarray, "B C"]) -> Bool[np.ndarray, "B C"]:
        """Which candidates complete a stop string."""
        hits = np.zeros(parent.shape, np.bool_)
        for row, running in enumerate(self._running):
            self._next[row] = {}
            for place, way in enumerate(zip(parent[row].tolist(), token[row].tolist(), strict=True)):
                text = running[way[0]]
                if text is None:
                    break
                self._next[row][way] = text.followed_by(way[1])
                hits[row, place] = self._next[row][way].stopped
        return hits

    def go_on(self, parent: Int32[np.ndarray, "B K"], token: Int32[np.ndarray, "B K"]) -> None:
        """Takes those of the last candidates that run on."""
        for row, found in enumerate(self._next):
            if found:
                ways = zip(parent[row].tolist(), token[row].tolist(), strict=True)
                self._running[row] = [found[way] for way in ways]
