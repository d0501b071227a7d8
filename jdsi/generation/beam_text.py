"""The text of running beams, as far as stop strings have to look at it."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Int32

from .answer_text import AnswerText


class BeamTexts:
    """Those of the running beams of a batch of searches.

    Args:
        first: of each search the text of its prompt, or `None` where it has no stop strings.
        beams: of each search.
    """

    def __init__(self, first: Sequence[AnswerText | None], beams: int) -> None:
        self._running = [[text] * beams for text in first]
        self._next: list[dict[tuple[int, int], AnswerText]] = [{} for _ in first]

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
