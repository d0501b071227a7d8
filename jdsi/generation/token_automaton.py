"""A finite automaton over token ids, which says what may come next."""

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from .padding import power_of_two


class TokenAutomaton:
    """Which tokens may follow, by a table.

    Args:
        next_state: `[S, V]` integers: the state that token `v` leads to from state `s`, -1 where it is not allowed.
            State 0 is where a request begins; only generated tokens move it.

    Raises:
        ValueError: the text says what the table must be.
    """

    def __init__(self, next_state: Any) -> None:
        try:
            table = np.asarray(next_state)
        except ValueError:
            table = np.empty(0)
        if table.ndim != 2 or not table.size or not np.issubdtype(table.dtype, np.integer):
            raise ValueError("a table of integers [states, vocabulary]")
        if table.min() < -1 or table.max() >= len(table):
            raise ValueError(f"a table of the states 0 to {len(table) - 1}, or -1")
        self.next_state = np.array(table, np.int32)
        self.next_state.flags.writeable = False
        self._digest = hashlib.sha256(self.next_state.tobytes()).hexdigest()

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, TokenAutomaton):
            return NotImplemented
        return self.next_state.shape == other.next_state.shape and self._digest == other._digest

    def __hash__(self) -> int:
        return hash(self._digest)

    def __repr__(self) -> str:
        states, tokens = self.next_state.shape
        return f"TokenAutomaton({states} states, {tokens} tokens, {self._digest[:16]})"


def joined(automata: Sequence[TokenAutomaton | None]) -> tuple[np.ndarray, np.ndarray]:
    """One table for rows that are bound by different automata or by none, and the state that each row begins in.

    State 0 is of rows that are not bound: it allows everything and leads to itself. States no row gets to make their
    number a power of two, to compile rarely.
    """
    offsets: dict[TokenAutomaton, int] = {}
    states = 1
    for automaton in automata:
        if automaton is not None and automaton not in offsets:
            offsets[automaton] = states
            states += len(automaton.next_state)
    width = next((automaton.next_state.shape[1] for automaton in offsets), 1)
    table = np.full((power_of_two(states), width), -1, np.int32)
    table[0] = 0
    for automaton, offset in offsets.items():
        own = automaton.next_state
        table[offset : offset + len(own)] = np.where(own < 0, -1, own + offset)
    return table, np.array([0 if automaton is None else offsets[automaton] for automaton in automata], np.int32)
