"""Passes of an executor over batches of its own, without the engine around it."""

import dataclasses
import time
from collections.abc import Sequence
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from jdsi.generation import SamplerFeatures, SamplingParams, init_state
from jdsi.runtime import Executor, Step
from jdsi.runtime.decoding import SampleEpilogue
from jdsi.runtime.mesh_executor import MeshExecutor
from jdsi.sharding import DATA


def greedy(rows: int, vocabulary: int) -> tuple[SampleEpilogue, Any]:
    """A sampler for `rows` sequences that never end, and its state."""
    params = [SamplingParams(max_new_tokens=1 << 30, ignore_eos=True)] * rows
    features = SamplerFeatures.of(params)
    state = init_state(params, [[0]] * rows, vocab_size=vocabulary, eos_token_ids=(), features=features)
    return SampleEpilogue(features), state


def prompt_step(executor: Executor, rows: int, length: int, capacity: int) -> Step:
    """A batch whose prompts of `length` tokens are still to be read."""
    epilogue, state = greedy(rows, executor.spec.vocab_size)
    context = executor.new_cache(rows, capacity).begin(np.full(rows, length, np.int32), length)
    last = np.arange(1, rows + 1, dtype=np.int32) * length - 1
    return Step(np.zeros(rows * length, np.int32), context, last, epilogue, state)


def token_step(executor: Executor, rows: int, capacity: int) -> Step:
    """A batch in the midst of generation: what it holds lies where a step would have left it, so nothing is recompiled.

    Its memory is empty all the same.
    """
    epilogue, state = greedy(rows, executor.spec.vocab_size)
    context = executor.new_cache(rows, capacity).rollback(np.zeros(rows, np.int32)).begin(np.ones(rows, np.int32), 1)
    tokens: Any = jnp.zeros(rows, jnp.int32)
    if isinstance(executor, MeshExecutor):
        tokens = jax.device_put(tokens, executor.programs[0].sharding())
        state = jax.device_put(state, executor.programs[-1].sharding(PartitionSpec(DATA)))
    return Step(tokens, context, None, epilogue, state)


@dataclasses.dataclass
class Passes:
    """Batches that go through an executor together, pass by pass."""

    executor: Executor
    steps: list[Step]

    @classmethod
    def generation(cls, executor: Executor, batches: int, rows: int, capacity: int) -> Self:
        """Batches that have their prompts behind them, one pass included."""
        passes = cls(executor, [token_step(executor, rows, capacity) for _ in range(batches)])
        passes.issue()
        passes.wait()
        return passes

    @classmethod
    def prompts(cls, executor: Executor, batches: int, rows: int, length: int, capacity: int) -> Self:
        """Batches before their first pass, which reads their prompts."""
        return cls(executor, [prompt_step(executor, rows, length, capacity) for _ in range(batches)])

    def issue(self) -> None:
        """Queues a pass; the next continues from its tokens."""
        outcomes = self.executor.steps(self.steps)
        self.steps = [
            Step(result.tokens, context, None, step.epilogue, carry)
            for step, (result, context, carry) in zip(self.steps, outcomes, strict=True)
        ]

    def wait(self) -> None:
        """Until all that is queued is done."""
        jax.block_until_ready([step.tokens for step in self.steps])


@dataclasses.dataclass(frozen=True)
class Timing:
    """One measurement.

    Attributes:
        seconds: wall time.
        cores: that the process had in this time, on average; less than it needs where others use the machine.
    """

    seconds: float
    cores: float


class Stopwatch:
    """Measures from where it is made to `stop`."""

    def __init__(self) -> None:
        self._wall, self._processor = time.perf_counter(), time.process_time()

    def stop(self, divided_by: int = 1) -> Timing:
        """The time since, divided among equal parts."""
        wall, processor = time.perf_counter() - self._wall, time.process_time() - self._processor
        return Timing(wall / divided_by, processor / wall)


def seconds_of(timings: Sequence[Timing]) -> list[float]:
    """The wall times."""
    return [timing.seconds for timing in timings]
