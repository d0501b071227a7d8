"""How much of their time a pipeline's stages stand idle, beside the schedule; runs in a process of its own."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

import jdsi
from jdsi.runtime.mesh_executor import MeshExecutor
from jdsi.runtime.stage_program import StageInput
from jdsi.sharding import PipelineSchedule

from .passes import Passes, Stopwatch, Timing, prompt_step, token_step
from .rounds import interleave

_ALONE = 4  # times that a stage runs alone in each round
_SPARE = 4


@dataclasses.dataclass(frozen=True)
class Case:
    """One way to use a pipeline.

    Attributes:
        phase: "prompt", one pass, or "generation", many.
        micro_batches: batches on their way.
        pieces: into how many each is cut while prompts are read.
        flush: every token of all batches is waited for before the next is queued.
    """

    phase: str
    micro_batches: int
    pieces: int = 1
    flush: bool = False


@dataclasses.dataclass(frozen=True)
class Load:
    """What a micro-batch is: `rows` sequences in generation, `prompts` of `length` tokens while they are read."""

    rows: int
    prompts: int
    length: int


def measure(
    folder: str,
    *,
    stages: int,
    micro_batches: Sequence[int],
    pieces: int,
    load: Load,
    new_tokens: int,
    rounds: int,
) -> dict[str, Any]:
    """Bubbles of every case, in rounds in which each stage also runs alone.

    A stage's time is that of its program run several times, one behind another, while nothing else runs. The bubble is
    the part of all stages' time, from issuing the first program to the end of the last, that those times do not fill.

    Args:
        folder: the model.
        stages: of the pipeline.
        micro_batches: how many at a time, each of the size that `load` says.
        pieces: of a micro-batch's prompts, beside whole ones.
        load: the micro-batch.
        new_tokens: of each sequence in generation.
        rounds: of measuring.

    Returns:
        `stages`, for each kind of work, and each round, every stage's seconds alone; `together`, seconds of all of them
        at once in generation, with nothing to wait for; `cores` that each kind of stage took; `cases`, each with the
        schedule's time and bubble for stages as fast as alone, and for stages that slow each other down.
    """
    executor = jdsi.init_inference(folder, dtype="float32", pipeline_parallel=stages).executor
    assert isinstance(executor, MeshExecutor)
    works = {"generation": (load.rows, 1), "prompt": (load.prompts, load.length)}
    if pieces > 1:
        works["piece"] = (load.prompts // pieces, load.length)
    contenders: dict[str, Callable[[], Timing]] = {
        f"{work} {stage}": partial(_alone, executor, [stage], *shape)
        for work, shape in works.items()
        for stage in range(stages)
    }
    contenders["together"] = partial(_alone, executor, range(stages), *works["generation"])
    cases = list(_cases(micro_batches, pieces))
    contenders |= {str(case): partial(_run, executor, case, load, new_tokens) for case in cases}
    timings = interleave(contenders, rounds)
    costs = {
        work: list(zip(*([t.seconds for t in timings[f"{work} {stage}"]] for stage in range(stages)), strict=True))
        for work in works
    }
    slowdowns = [
        max(1.0, together.seconds / max(alone))
        for together, alone in zip(timings["together"], costs["generation"], strict=True)
    ]
    return {
        "devices": [device.device_kind for device in executor.mesh.devices.flat],
        "stages": costs,
        "together": [timing.seconds for timing in timings["together"]],
        "cores": {work: [t.cores for stage in range(stages) for t in timings[f"{work} {stage}"]] for work in works},
        "cases": [_outcome(case, costs, slowdowns, timings[str(case)], new_tokens) for case in cases],
    }


def _cases(micro_batches: Sequence[int], pieces: int) -> Iterator[Case]:
    for count in micro_batches:
        for cut in sorted({1, pieces}):
            yield Case("prompt", count, pieces=cut)
    for count in micro_batches:
        for flush in (False, True):
            yield Case("generation", count, flush=flush)


def _outcome(
    case: Case,
    costs: dict[str, list[tuple[float, ...]]],
    slowdowns: Sequence[float],
    timings: Sequence[Timing],
    new_tokens: int,
) -> dict[str, Any]:
    work = "piece" if case.pieces > 1 else case.phase
    figures: dict[str, list[float]] = {"bubble": []}
    for name in ("scheduled", "slowed"):
        figures |= {f"{name}_seconds": [], f"{name}_bubble": []}
    for alone, slowdown, timing in zip(costs[work], slowdowns, timings, strict=True):
        schedule = schedule_of(case, alone, new_tokens)
        at_best = {"scheduled": schedule.makespan, "slowed": slowed(schedule, slowdown)}
        figures["bubble"].append(1 - schedule.busy / (len(alone) * timing.seconds))
        for name, wall in at_best.items():
            figures[f"{name}_seconds"].append(wall)
            figures[f"{name}_bubble"].append(1 - schedule.busy / (len(alone) * wall))
    return {
        **dataclasses.asdict(case),
        "seconds": [timing.seconds for timing in timings],
        "cores": [timing.cores for timing in timings],
        **figures,
    }


def slowed(schedule: PipelineSchedule, slowdown: float) -> float:
    """The makespan where stages that work at the same time slow each other down: they share a memory, or too few cores.

    Args:
        schedule: with the costs of stages that work alone.
        slowdown: how many times as long everything takes while all stages work; with fewer it is less, in proportion.
    """
    times = sorted({time for slot in schedule.timeline for time in (slot.start, slot.end)})
    total = 0.0
    for start, end in itertools.pairwise(times):
        middle = (start + end) / 2
        at_work = sum(slot.start < middle < slot.end for slot in schedule.timeline)
        total += (end - start) * (1 + (slowdown - 1) * max(0, at_work - 1) / (schedule.stages - 1))
    return total


def schedule_of(case: Case, costs: tuple[float, ...], new_tokens: int) -> PipelineSchedule:
    """The schedule of a case whose stages take `costs` seconds for a task."""
    if case.phase == "prompt":
        pieces = case.micro_batches * case.pieces
        return PipelineSchedule(len(costs), pieces, case.micro_batches, 1, prompt_cost=costs)
    # Generation alone, from an empty pipeline: its first token takes the prompt's place.
    count = case.micro_batches
    return PipelineSchedule(
        len(costs), count, count, new_tokens, prompt_cost=costs, generation_cost=costs, flush=case.flush
    )


def _run(executor: MeshExecutor, case: Case, load: Load, new_tokens: int) -> Timing:
    if case.phase == "prompt":
        batches, rows = case.micro_batches * case.pieces, load.prompts // case.pieces
        passes = Passes.prompts(executor, batches, rows, load.length, load.length + _SPARE)
        watch = Stopwatch()
        passes.issue()
    else:
        passes = Passes.generation(executor, case.micro_batches, load.rows, new_tokens + _SPARE)
        watch = Stopwatch()
        for _ in range(new_tokens):
            passes.issue()
            if case.flush:
                passes.wait()
    passes.wait()
    return watch.stop()


def _alone(executor: MeshExecutor, stages: Sequence[int], rows: int, length: int) -> Timing:
    """One run of the stages' programs, several times in a row, with no stage waiting for another; time of one run."""
    parameters = executor.parameters()
    runs = [_StageRuns(executor, stage, parameters, rows, length) for stage in stages]
    jax.block_until_ready([run.given for run in runs])
    watch = Stopwatch()
    for _ in range(_ALONE):
        for run in runs:
            run.issue()
    jax.block_until_ready([run.out for run in runs])
    return watch.stop(_ALONE)


class _StageRuns:
    """One stage's program by itself, on inputs made beforehand."""

    def __init__(
        self, executor: MeshExecutor, stage: int, parameters: dict[str, jax.Array], rows: int, length: int
    ) -> None:
        self._program = executor.programs[stage]
        self._leaves = self._program.parameters(parameters)
        self.given = [self._input(executor, stage, rows, length) for _ in range(_ALONE)]
        self.out: list[Any] = []

    def _input(self, executor: MeshExecutor, stage: int, rows: int, length: int) -> tuple[StageInput, Any]:
        program, capacity, prompt = self._program, length + _SPARE, length > 1
        step = prompt_step(executor, rows, length, capacity) if prompt else token_step(executor, rows, capacity)
        x: Any = step.tokens
        if not program.first:
            tokens = rows * length
            hidden = jnp.ones((tokens, executor.spec.width), executor.dtype)
            x = jax.device_put(hidden, program.sharding(program.hidden_spec(tokens)))
        wanted, carry = (step.wanted, step.carry) if program.last else (None, ())
        return StageInput(
            x, step.context.on_stages(len(executor.programs))[stage], wanted=wanted, carry=carry
        ), step.epilogue

    def issue(self) -> None:
        given, epilogue = self.given.pop()
        self.out.append(self._program.step(self._leaves, given, epilogue))
