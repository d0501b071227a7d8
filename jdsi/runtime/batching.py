"""Which requests are decoded together."""

from collections.abc import Iterable, Iterator, Sequence

from jdsi.generation import SamplingParams
from jdsi.generation.requests import Request

from .executor import Executor


def most_requests(max_rows: int, params: SamplingParams) -> int:
    """How many requests that are sampled like this have so many rows together, at least one."""
    return max(1, max_rows // params.num_beams)


def batches_of(requests: Sequence[Request], executor: Executor, max_rows: int) -> Iterator[list[Request]]:
    """Batches that fit, one beam width in each, similar lengths together so that little is padding.

    Where several run at a time, as in a pipeline, they have `max_rows` rows together.
    """
    share = batch_share(len(requests), executor, max_rows)
    left = sorted(requests, key=lambda r: (r.params.num_beams, len(r.prompt)))
    while left:
        most = most_requests(max_rows, left[0].params)
        if left[0].params.num_beams == 1:  # a beam search runs alone, so it is not cut
            most = min(most, share)
        batch = [r for r in left[:most] if r.params.num_beams == left[0].params.num_beams]
        yield batch
        left = left[len(batch) :]


def batch_share(rows: int, executor: Executor, max_rows: int) -> int:
    """Rows of each batch, where as many run at a time as the executor wants, with `max_rows` rows together."""
    share = -(-min(rows, max_rows) // executor.micro_batches)
    return -(-share // executor.row_multiple) * executor.row_multiple


def passes_of[Item](batches: Iterable[list[Item]], executor: Executor, max_rows: int) -> Iterator[list[list[Item]]]:
    """Batches that share their passes, as many as the executor wants."""
    most = max_rows * executor.batches_per_pass // executor.micro_batches
    together: list[list[Item]] = []
    for batch in batches:
        rows = sum(map(len, together)) + len(batch)
        if together and (rows > most or len(together) == executor.batches_per_pass):
            yield together
            together = []
        together.append(batch)
    if together:
        yield together
