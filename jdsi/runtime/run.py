"""One generation from its requests to its completions, and what it took."""

import dataclasses
import time
from collections.abc import Collection, Generator, Iterator, Sequence
from typing import Any

from jdsi.generation import Completion, SampledTokens
from jdsi.generation.requests import Request
from jdsi.generation.stream_events import StreamEvent, events_of

from .batch import Batch
from .batching import batches_of, most_requests, passes_of
from .beam_decoding import beam_search
from .closing import closed_at_exit
from .decoding import decode
from .executor import Executor
from .memory import peak_device_memory, peak_memory
from .stats import GenerationStats
from .weight_stream import StreamReport


@dataclasses.dataclass(frozen=True)
class Run:
    """Requests on their way through an executor. Several may be open at a time; each counts for itself.

    Attributes:
        executor: runs the model.
        requests: all of them.
        max_rows: rows decoded together, at most.
        tokenizer: a `transformers` tokenizer, or `None`.
        eos_token_ids: end the requests that do not ignore them.
        stats: what it has taken so far.
    """

    executor: Executor
    requests: Sequence[Request]
    max_rows: int
    tokenizer: Any = None
    eos_token_ids: Sequence[int] = ()
    stats: GenerationStats = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        prompts = sum(len(request.prompt) for request in self.requests)
        object.__setattr__(self, "stats", GenerationStats(prompt_tokens=prompts))

    def completions(self) -> list[Completion]:
        """Of every request, in order."""
        done: dict[int, dict[int, Completion]] = {request.index: {} for request in self.requests}
        with Measured(self.executor, self.stats):
            for batch in self._batches([r for r in self.requests if r.params.num_beams > 1]):
                for index, completions in self._beam_search(batch).items():
                    done[index] = dict(enumerate(completions))
            for event in self._sample([r for r in self.requests if r.params.num_beams == 1]):
                if event.completion is not None:
                    done[event.index][event.choice] = event.completion
        return [_together([found[choice] for choice in sorted(found)]) for found in done.values()]

    def stream(self) -> "Stream":
        """Of every request, token by token; none of them may be a beam search."""
        return Stream(self)

    def warm_up(self) -> None:
        """Runs as much as compiles every program of a batch of all requests."""
        if self.requests[0].params.num_beams > 1:
            self._beam_search(list(self.requests))
            return
        for _ in zip(range(2), self._decode([list(self.requests)]), strict=False):
            pass  # two tokens run the prefill and the decode program

    def events(self) -> Generator[StreamEvent]:
        """What `stream` gives."""
        with Measured(self.executor, self.stats):  # also where it is left
            yield from self._sample(self.requests)

    def _batches(self, requests: Sequence[Request]) -> Iterator[list[Request]]:
        return batches_of(requests, self.executor, self.max_rows)

    def _beam_search(self, batch: list[Request]) -> dict[int, list[Completion]]:
        start, most = time.perf_counter(), most_requests(self.max_rows, batch[0])
        found = beam_search(self.executor, batch, self.tokenizer, eos_token_ids=self.eos_token_ids, max_requests=most)
        self.stats.new_tokens += sum(len(one.token_ids) for completions in found for one in completions)
        self.stats.first_token_seconds += time.perf_counter() - start
        return {request.index: completions for request, completions in zip(batch, found, strict=True)}

    def _sample(self, requests: Sequence[Request]) -> Generator[StreamEvent]:
        for batches in passes_of(self._batches(requests), self.executor, self.max_rows):
            yield from self._sample_together(batches)

    def _sample_together(self, batches: list[list[Request]]) -> Iterator[StreamEvent]:
        """Of batches that share passes."""
        builders = [[r.builder(self.tokenizer) for r in batch for _ in range(r.params.n)] for batch in batches]
        dropped: set[int] = set()
        started: set[int] = set()
        for (index, step), seconds in _timed(self._decode(batches, dropped)):
            if index in started:
                self.stats.decode_seconds += seconds
            else:
                self.stats.first_token_seconds += seconds
                started.add(index)
            for event in events_of(step, batches[index], builders[index]):
                self.stats.new_tokens += 1
                yield event
            if all(b.finish_reason is not None for b in builders[index]):
                dropped.add(index)

    def _decode(
        self, batches: Sequence[list[Request]], dropped: Collection[int] = ()
    ) -> Iterator[tuple[int, SampledTokens]]:
        return decode(
            self.executor,
            [Batch.of(batch) for batch in batches],
            eos_token_ids=self.eos_token_ids,
            max_rows=self.max_rows,
            dropped=dropped,
        )


class Stream(Iterator[StreamEvent]):
    """The events of a run; to leave it before its end, `close` it or drop it.

    Attributes:
        stats: of this stream alone, what was read of it so far.
    """

    def __init__(self, run: Run) -> None:
        self.stats = run.stats
        self._events = closed_at_exit(run.events())

    def __next__(self) -> StreamEvent:
        return next(self._events)

    def close(self) -> None:
        """Ends it; there are no events afterwards."""
        self._events.close()


class Measured:
    """Notes in `stats`, at the end of the block, the memory that was used and what fetching weights took in it."""

    def __init__(self, executor: Executor, stats: GenerationStats) -> None:
        self._executor, self._stats = executor, stats

    def __enter__(self) -> None:
        self._before = self._executor.stream_report() or StreamReport()

    def __exit__(self, *_: object) -> None:
        self._stats.peak_memory_bytes, self._stats.peak_device_bytes = peak_memory(), peak_device_memory()
        report = self._executor.stream_report()
        if report is not None:
            self._stats.stream = report.since(self._before)


def _together(completions: list[Completion]) -> Completion:
    """The first, with the others as its alternatives."""
    first, *others = completions
    return dataclasses.replace(first, alternatives=others) if others else first


def _timed[Item](steps: Iterator[Item]) -> Iterator[tuple[Item, float]]:
    """Each step with the seconds it was waited for."""
    while True:
        start = time.perf_counter()
        step = next(steps, None)
        if step is None:
            return
        yield step, time.perf_counter() - start
