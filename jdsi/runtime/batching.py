"""Which requests are decoded together."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

from jdsi.generation.requests import Request

from .executor import Executor


def most_requests(max_rows: int, request: Request) -> int:
    """How many requests like this have so many rows together, at least one."""
    return max(1, max_rows // request.rows)


def batches_of(requests: Sequence[Request], executor: Executor, max_rows: int) -> Iterator[list[Request]]:
    """Batches that fit, of requests that take as many rows in the same way, similar lengths together.

    So little is padding. Where several run at a time, as in a pipeline, they have `max_rows` rows together.
    """
    share = batch_share(sum(request.rows for request in requests), executor, max_rows)
    left = sorted(requests, key=lambda request: (_kind(request), len(request.prompt)))
    while left:
        most = most_requests(max_rows, left[0])
        if left[0].params.num_beams == 1:  # a beam search runs alone, so it is not cut
            most = min(most, most_requests(share, left[0]))
        batch = [request for request in left[:most] if _kind(request) == _kind(left[0])]
        yield batch
        left = left[len(batch) :]


def batch_share(rows: int, executor: Executor, max_rows: int) -> int:
    """Rows of each batch, where as many run at a time as the executor wants, with `max_rows` rows together."""
    share = -(-min(rows, max_rows) // executor.micro_batches)
    return -(-share // executor.row_multiple) * executor.row_multiple


def _kind(request: Request) -> tuple[int, int, bool]:
    beams = request.params.num_beams
    return beams, 1 if beams > 1 else request.params.n, request.guided


class TakesRows(Protocol):
    """What a batch is made of."""

    @property
    def rows(self) -> int:
        """Rows of a batch that it takes."""
        ...


def passes_of[Item: TakesRows](
    batches: Iterable[list[Item]], executor: Executor, max_rows: int
) -> Iterator[list[list[Item]]]:
    """Batches that share their passes, as many as the executor wants."""
    most = max_rows * executor.batches_per_pass // executor.micro_batches
    together: list[list[Item]] = []
    rows = 0
    for batch in batches:
        own = sum(item.rows for item in batch)
        if together and (rows + own > most or len(together) == executor.batches_per_pass):
            yield together
            together, rows = [], 0
        together.append(batch)
        rows += own
    if together:
        yield together
