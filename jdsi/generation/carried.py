"""What states that are carried from step to step have in common: a row for each sequence, and a table they share."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jdsi.kv_cache import join_rows
from jdsi.sharding import DATA

from .row_settings import RowSettings


class Carried(Protocol):
    """A dataclass of arrays whose first dimension are rows, all but the automaton of its settings."""

    settings: RowSettings


def partition(state: Carried) -> Any:
    """How the state lies on a mesh: rows over "data", the table everywhere."""
    shared, table = _without_table(state)
    return _with_table(jax.tree.map(lambda _: PartitionSpec(DATA), shared), None if table is None else PartitionSpec())


def rows_of[State: Carried](state: State, rows: slice) -> State:
    """Some of the rows, with a table of their own, for states are donated."""
    shared, table = _without_table(state)
    return _with_table(jax.tree.map(lambda leaf: leaf[rows], shared), None if table is None else jnp.copy(table))


def joined_rows[State: Carried](states: Sequence[State]) -> State:
    """The rows of several states of one batch, one behind another."""
    tables = [_without_table(state) for state in states]
    return _with_table(join_rows([shared for shared, _ in tables]), tables[0][1])


def _without_table[State: Carried](state: State) -> tuple[State, Any]:
    return _with_table(state, None), state.settings.automaton


def _with_table[State: Carried](state: State, table: Any) -> State:
    settings = dataclasses.replace(state.settings, automaton=table)
    return dataclasses.replace(state, settings=settings)  # type: ignore[type-var]
