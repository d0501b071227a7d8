"""Stop strings, matched on the text as it appears."""

import copy
import itertools
from collections.abc import Sequence
from typing import Self


class StopStrings:
    """Passes text through until one of `stop` occurs in it, and holds back an end that may be the start of one.

    What is shown in front of the first occurrence is passed on, the occurrence and what follows are not. The occurrence
    that is whole first counts, and of those that are whole at once the one that begins first; so it does not matter
    into which pieces the text is cut.
    """

    def __init__(self, stop: Sequence[str]):
        self._stop = tuple(stop)
        self._held = ""
        self._shown: list[bool] = []  # of every character held
        self.matched: str | None = None

    def feed(self, text: str, *, shown: bool = True, counts: bool = True) -> str:
        """The text that is certain to be in front of any stop string.

        Args:
            text: what comes next.
            shown: whether it is passed on; it is part of a stop string in any case.
            counts: whether an occurrence that ends in it counts.
        """
        if self.matched is not None:
            return ""
        before, self._held = len(self._held), self._held + text
        self._shown += [shown] * len(text)
        found = self._first(before) if counts else None
        if found is not None:
            at, self.matched = found
            passed = self._pass_on(at)
            self._pass_on(len(self._held))
            return passed
        return self._pass_on(len(self._held) - max((_overlap(self._held, s) for s in self._stop), default=0))

    def flush(self) -> str:
        """What was held back, once no more text follows."""
        return self._pass_on(len(self._held))

    def copy(self) -> Self:
        """One that goes on from here on its own."""
        other = copy.copy(self)
        other._shown = list(self._shown)
        return other

    def _first(self, before: int) -> tuple[int, str] | None:
        """Where the first occurrence begins that ends after `before` characters, and of what."""
        starts = ((self._held.find(s, max(0, before - len(s) + 1)), s) for s in self._stop)
        ends = [(at + len(s), at, s) for at, s in starts if at >= 0]
        return min(ends)[1:] if ends else None

    def _pass_on(self, length: int) -> str:
        passed = "".join(itertools.compress(self._held[:length], self._shown))
        self._held, self._shown = self._held[length:], self._shown[length:]
        return passed


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a proper start of `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
