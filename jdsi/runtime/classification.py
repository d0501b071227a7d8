"""Sequences through a model and its classifier or pooler: one pass each, which leaves no keys and values behind."""

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float

from jdsi.generation import pad_rows
from jdsi.generation.classification import TokenRow
from jdsi.models import classified_tokens

from . import peers
from .batch import PaddedPrompts, padded_rows
from .batching import batch_share, passes_of
from .epilogue import unchanged
from .executor import Executor, Step
from .forward import packed_rows

Outputs = Float[np.ndarray, " outputs"]


def classify(executor: Executor, rows: Sequence[TokenRow], *, max_rows: int) -> Iterator[tuple[int, Outputs]]:
    """What the classifier or pooler gives for each row, in any order.

    While the outputs of a pass are read, the next one is already running where the executor wants that.

    Args:
        executor: runs the model, which has a classifier.
        rows: the sequences.
        max_rows: no batch is larger, those of a pipeline together.

    Yields:
        The row's index and its outputs, float32.
    """
    asked = [(row.tokens, row.token_types) for row in rows]
    executor.agree({"call": "classify", "texts": asked, "max_batch_size": max_rows})
    issued: list[tuple[list[list[TokenRow]], list[Array]]] = []
    for batches in passes_of(_batches(rows, executor, max_rows), executor, max_rows):
        outcomes = executor.steps([_step(executor, batch, max_rows) for batch in batches])
        issued.append((batches, [outputs for outputs, _, _ in outcomes]))
        if len(issued) > executor.runs_ahead:
            yield from _read(*issued.pop(0))
    for one in issued:
        yield from _read(*one)


def _batches(rows: Sequence[TokenRow], executor: Executor, max_rows: int) -> Iterator[list[TokenRow]]:
    """Of similar lengths, so that little is padding."""
    share = batch_share(len(rows), executor, max_rows)
    left = sorted(rows, key=lambda row: len(row.tokens))
    for start in range(0, len(left), share):
        yield left[start : start + share]


def _step(executor: Executor, batch: Sequence[TokenRow], max_rows: int) -> Step:
    spec = executor.spec.classifier
    assert spec is not None
    rows = padded_rows(executor, len(batch), max_rows)
    padded = PaddedPrompts.of([row.tokens for row in batch], rows)
    places = np.asarray(classified_tokens(spec, padded.tokens.reshape(rows, -1), padded.lengths))
    wanted = np.arange(rows, dtype=np.int32) * padded.width + places
    context = packed_rows(padded.width, padded.lengths)
    types = None
    if executor.spec.embedding.token_types:  # also where all are 0, so that no second program is compiled
        given = [row.token_types or [] for row in batch]
        types = pad_rows([*given, *[[]] * (rows - len(batch))], padded.width).reshape(-1)
    return Step(padded.tokens, context, wanted, unchanged, (), types, classify=True)


def _read(batches: Sequence[Sequence[TokenRow]], outputs: Sequence[Any]) -> Iterator[tuple[int, Outputs]]:
    with peers.waiting():
        found = jax.device_get(outputs)
    for batch, values in zip(batches, found, strict=True):
        for row, own in zip(batch, values[: len(batch)], strict=True):
            yield row.index, np.asarray(own)
