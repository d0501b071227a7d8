"""The pipeline schedule of DeepSpeed Inference (arXiv:2207.00032, sections IV-B and IV-C), to iterate, print and plot.

A batch is cut into micro-batches, which follow each other through the stages. Training flushes the pipeline after every
step; here a micro-batch's next token is queued at the first stage as soon as its last one has left the last stage. The
schedule is hybrid: the prompt, bound by compute, goes through in many small micro-batches, so that the pipeline fills
quickly; generation, bound by reading the weights, in few large ones, each joined from several of the prompt's.
"""

import dataclasses
import functools
import math
import numbers
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from typing import Literal, NamedTuple

from jdsi.errors import ConfigError

Phase = Literal["prompt", "generation"]

_ROW = 24  # pixels: height of a stage in the drawing,
_LABEL = 72  # and width of its name
_FILL = {"prompt": "#7fb0e0", "generation": "#f58518"}
_IDLE = "#dddddd"


@dataclasses.dataclass(frozen=True, slots=True)
class Task:
    """What one stage does to one micro-batch at one step.

    Attributes:
        phase: "prompt" or "generation"; micro-batches are counted for each.
        micro_batch: which.
        token: the one it works towards: 0 for the prompt, from 1 on in generation.
        stage: where.
    """

    phase: Phase
    micro_batch: int
    token: int
    stage: int

    @property
    def label(self) -> str:
        """`p3` or `g3`: the phase and the micro-batch."""
        return f"{self.phase[0]}{self.micro_batch}"


class Slot(NamedTuple):
    """A task and when it runs, in the unit of the schedule's costs."""

    task: Task
    start: float
    end: float


@dataclasses.dataclass(frozen=True)
class PipelineSchedule:
    """Which stage works on which micro-batch when.

    Iterating gives every `Task` once, in the order of issue: earliest start first, of those the micro-batch that was
    queued first. A task comes after all it depends on, and every stage's tasks in the order of its queue, so one thread
    can hand them to the devices as they come.

    Attributes:
        stages: of the pipeline.
        prompt_micro_batches: pieces of the batch while the prompt is processed, n times `generation_micro_batches`.
        generation_micro_batches: pieces of the batch afterwards, the first one made of the prompt's first n and so on.
            From `stages` on, of equal cost, a token is back at the first stage by its turn: no bubble but the prompt's.
        new_tokens: of each sequence, with the one that the prompt gives.
        prompt_cost, generation_cost: how long a stage's task takes, in any unit; of stages that differ, one for each.
        flush: no micro-batch starts a token before all have ended the one before, the schedule to compare with.

    Raises:
        ConfigError: a count is not an integer of at least 1, the prompt's micro-batches cannot be joined evenly, a cost
            is not positive and finite, or there are not as many costs as stages.
    """

    stages: int
    prompt_micro_batches: int
    generation_micro_batches: int
    new_tokens: int
    prompt_cost: float | tuple[float, ...] = 1.0
    generation_cost: float | tuple[float, ...] = 1.0
    flush: bool = False

    def __post_init__(self) -> None:
        for name in ("stages", "prompt_micro_batches", "generation_micro_batches", "new_tokens"):
            object.__setattr__(self, name, _count(name, getattr(self, name)))
        if self.prompt_micro_batches % self.generation_micro_batches:
            raise ConfigError(
                f"prompt_micro_batches={self.prompt_micro_batches} must be a multiple of "
                f"generation_micro_batches={self.generation_micro_batches}"
            )
        for name in ("prompt_cost", "generation_cost"):
            cost = getattr(self, name)
            if isinstance(cost, Iterable):
                cost = tuple(cost)
                object.__setattr__(self, name, cost)
                if len(cost) != self.stages:
                    raise ConfigError(f"{name} has {len(cost)} entries for stages={self.stages}")
            for value in cost if isinstance(cost, tuple) else (cost,):
                if not (math.isfinite(value) and value > 0):
                    raise ConfigError(f"{name}={cost!r} must be positive and finite")

    def __iter__(self) -> Iterator[Task]:
        return (slot.task for slot in self.timeline)

    def __len__(self) -> int:
        return self.stages * (self.prompt_micro_batches + self._steps * self.generation_micro_batches)

    @functools.cached_property
    def timeline(self) -> tuple[Slot, ...]:
        """Every task with its start and end, in the order of issue."""
        joined = self.prompt_micro_batches // self.generation_micro_batches
        free = [0.0] * self.stages  # when each stage has done all that it was given
        left = [0.0] * self.generation_micro_batches  # when each micro-batch last left the last stage
        slots = []

        def pass_through(phase: Phase, micro_batch: int, token: int, ready: float) -> float:
            for stage, cost in enumerate(self.stage_costs(phase)):
                start = max(ready, free[stage])
                ready = free[stage] = start + cost
                slots.append(Slot(Task(phase, micro_batch, token, stage), start, ready))
            return ready

        # The queues are first in, first out, so micro-batches never overtake each other, and the order in which they
        # enter the first stage is the order on every stage: the prompt's, there from the beginning, then turn by turn.
        for micro_batch in range(self.prompt_micro_batches):
            left[micro_batch // joined] = pass_through("prompt", micro_batch, 0, 0.0)
        for token in range(1, self.new_tokens):
            flushed = free[-1] if self.flush else 0.0
            for micro_batch in range(self.generation_micro_batches):
                ready = max(left[micro_batch], flushed)
                left[micro_batch] = pass_through("generation", micro_batch, token, ready)
        # Sorting keeps the order of queueing among equal starts.
        return tuple(sorted(slots, key=lambda slot: slot.start))

    @property
    def makespan(self) -> float:
        """When the last task ends."""
        return max(slot.end for slot in self.timeline)

    @property
    def busy(self) -> float:
        """How long the stages work, all together."""
        prompt = self.prompt_micro_batches * math.fsum(self.stage_costs("prompt"))
        return prompt + self._steps * self.generation_micro_batches * math.fsum(self.stage_costs("generation"))

    @property
    def bubble_fraction(self) -> float:
        """The part of the stages' time, from the first start to the last end, in which they do nothing."""
        return 1 - self.busy / (self.stages * self.makespan)

    def predicted_bubble(self) -> float:
        """`bubble_fraction` in closed form, for stages of equal cost.

        Of P stages, M micro-batches a step, and a task that takes c, a step that starts and ends with an empty pipeline
        takes (M + P - 1) c and idles for (P - 1) / (M + P - 1) of it. With `flush` every step does, without it the
        prompt alone; every later token then takes max(P, M) c and idles for max(0, 1 - M / P) of it.

        Raises:
            ConfigError: the stages differ in cost.
        """
        for name in ("prompt", "generation"):
            if len(set(self.stage_costs(name))) > 1:
                raise ConfigError(f"{name}_cost={getattr(self, f'{name}_cost')} must be equal on all stages")
        prompt, generation = self.stage_costs("prompt")[0], self.stage_costs("generation")[0]
        fill, pieces, joint = self.stages - 1, self.prompt_micro_batches, self.generation_micro_batches
        first = (pieces + fill) * prompt
        if self.flush:
            makespan = first + self._steps * (joint + fill) * generation
        else:
            if self._steps:
                # Generation starts behind the whole prompt on the last stage, or on the first stage, there when the
                # first micro-batch has been joined and the others follow one by one: whichever is later.
                start = max(pieces, fill + pieces // joint) * prompt
                first = max(first, start + (min(self.stages, joint) - 1) * generation)
            makespan = first + self._steps * max(self.stages, joint) * generation
        return 1 - (pieces * prompt + self._steps * joint * generation) / makespan

    def stage_costs(self, phase: Phase) -> tuple[float, ...]:
        """How long each stage's task takes."""
        cost = self.prompt_cost if phase == "prompt" else self.generation_cost
        return cost if isinstance(cost, tuple) else (cost,) * self.stages

    def text(self, *, unit: float | None = None, columns: int | None = None) -> str:
        """One line per stage, one column per time step: `p0` a prompt micro-batch, `g0` one of generation, `.` idle.

        A task of several columns goes on with dashes.

        Args:
            unit: time of a column, by default that of the shortest task; tasks shorter than half of it may not show.
            columns: cut there, by default drawn to the end.
        """
        unit = unit or min(*self.stage_costs("prompt"), *self.stage_costs("generation"))
        total = _column(self.makespan, unit)
        shown = total if columns is None else min(total, columns)
        lines = [["."] * shown for _ in range(self.stages)]
        width = max(len(slot.task.label) for slot in self.timeline)
        for task, start, end in self.timeline:
            for column in range(first := _column(start, unit), min(_column(end, unit), shown)):
                lines[task.stage][column] = task.label if column == first else "-" * width
        digits = len(str(self.stages - 1))
        more = " ..." if shown < total else ""
        return "\n".join(
            f"stage {stage:{digits}} | {' '.join(f'{cell:{width}}' for cell in line)}{more}".rstrip()
            for stage, line in enumerate(lines)
        )

    def __str__(self) -> str:
        return self.text()

    def svg(self, *, unit: float = 28) -> str:
        """The schedule as a picture: prompt in blue, generation in orange, idle in grey; time runs to the right.

        Args:
            unit: width of the shortest task in pixels.
        """
        scale = unit / min(*self.stage_costs("prompt"), *self.stage_costs("generation"))
        width, height = self.makespan * scale, self.stages * _ROW
        parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{_LABEL + width:.6g}" height="{height + _ROW}" '
            'font-family="monospace" font-size="11">'
        ]
        for stage in range(self.stages):
            middle = (stage + 0.5) * _ROW
            parts.append(f'<path d="M{_LABEL} {middle}h{width:.6g}" stroke="{_IDLE}" stroke-width="{_ROW - 4}"/>')
            parts.append(f'<text x="4" y="{middle + 4}" fill="#888888">stage {stage}</text>')
        for task, start, end in self.timeline:
            left, top, wide = _LABEL + start * scale, task.stage * _ROW, (end - start) * scale
            # Odd tokens are paler, so that one sees where a step ends.
            parts.append(
                f'<rect x="{left:.6g}" y="{top + 2}" width="{wide:.6g}" height="{_ROW - 4}" stroke="#ffffff" '
                f'fill="{_FILL[task.phase]}" fill-opacity="{0.7 if task.token % 2 else 1}">'
                f"<title>{task.phase} micro-batch {task.micro_batch}, token {task.token}, stage {task.stage}: "
                f"{start:.6g} to {end:.6g}</title></rect>"
                f'<text x="{left + wide / 2:.6g}" y="{top + _ROW / 2 + 4}" text-anchor="middle" '
                f'pointer-events="none">{task.label}</text>'
            )
        caption = f"time {self.makespan:.6g}, bubble {self.bubble_fraction:.1%}"
        parts.append(f'<text x="{_LABEL}" y="{height + 16}" fill="#888888">{caption}</text></svg>')
        return "\n".join(parts)

    @property
    def _steps(self) -> int:
        return self.new_tokens - 1


def wavefront(stages: int, micro_batches: int) -> Iterator[tuple[int, int]]:
    """The order of issue of one step, pairs of stage and micro-batch, for a run whose length is not known beforehand.

    Issued step after step it runs as `PipelineSchedule` says, whatever tasks cost: each stage's queue is in the same
    order. With equal costs, and `micro_batches` at least `stages` or no pieces of the prompt to join, it is also the
    order of the starts within the step.

    Raises:
        ConfigError: an argument is not an integer of at least 1.
    """
    stages, micro_batches = _count("stages", stages), _count("micro_batches", micro_batches)
    return (
        (wave - micro_batch, micro_batch)
        for wave in range(stages + micro_batches - 1)
        for micro_batch in range(max(0, wave - stages + 1), min(micro_batches, wave + 1))
    )


def split_layers(costs: Sequence[float], stages: int, first: float = 0, last: float = 0) -> list[range]:
    """The layers of each stage, consecutive and at least one, such that the costliest stage costs least.

    Of equally good splits the most even one, by the sum of the stages' squared costs; of those the one with the fewest
    layers on the last stage, then on the one before it, and so on.

    Args:
        costs: of each layer, in any unit.
        stages: among how many.
        first: what the first stage has besides, the embedding.
        last: what the last stage has besides, the head.

    Raises:
        ConfigError: there are more stages than layers, fewer stages than one, or a cost is negative or not finite.
    """
    stages, layers = _count("pipeline_parallel", stages), len(costs)
    if stages > layers:
        raise ConfigError(f"pipeline_parallel={stages} exceeds the {layers} layer{'s' * (layers != 1)}")
    for name, values in (("costs", costs), ("first", [first]), ("last", [last])):
        for value in values:
            if not (math.isfinite(value) and value >= 0):
                raise ConfigError(f"{name}: {value!r} must be finite and not negative")
    # Exact, so that splits into equal sums compare as equal whatever order the floats were added in.
    before = [Fraction(float(first))]
    for cost in costs:
        before.append(before[-1] + Fraction(float(cost)))
    before[0], before[-1] = Fraction(0), before[-1] + Fraction(float(last))

    # least[s][n]: the smallest possible cost of the costliest of s stages that hold the first n layers.
    least = [{0: Fraction(0)}]
    for stage in range(1, stages + 1):
        ends = range(stage, layers - stages + stage + 1)
        above = least[-1]
        least.append({n: min(max(above[m], before[n] - before[m]) for m in above if m < n) for n in ends})
    bound = least[stages][layers]
    # even[s][n]: of s stages that hold the first n layers and cost no more than that, the smallest sum of squares, and
    # where the last of them starts.
    even = [{0: (Fraction(0), 0)}]
    for stage in range(1, stages + 1):
        found = {}
        for n in range(stage, layers - stages + stage + 1):
            sums = [
                (square + (before[n] - before[m]) ** 2, -m)
                for m, (square, _) in even[-1].items()
                if m < n and before[n] - before[m] <= bound
            ]
            if sums:
                square, start = min(sums)
                found[n] = (square, -start)
        even.append(found)
    split, stop = [], layers
    for stage in reversed(range(1, stages + 1)):
        start = even[stage][stop][1]
        split.append(range(start, stop))
        stop = start
    return split[::-1]


def _count(name: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < 1:
        raise ConfigError(f"{name}={value!r} must be an integer of at least 1")
    return int(value)


def _column(time: float, unit: float) -> int:
    """The column in which a task starts; one that takes the unit gets a column however sums of floats are rounded."""
    return math.floor(time / unit + 0.5 + 1e-6)
