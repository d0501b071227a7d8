"""The inference pipeline schedule: held against the rules it follows and against a simulation of events."""

import heapq
import itertools
import math
import xml.etree.ElementTree as ElementTree
from collections import deque
from collections.abc import Iterable
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jdsi import ConfigError
from jdsi.sharding.schedule import PipelineSchedule, Task, split_layers, wavefront


@st.composite
def schedules(draw: st.DrawFn, *, even: bool = False) -> PipelineSchedule:
    """Costs are small whole numbers: sums are exact, and ties happen."""
    stages, micro_batches = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    cost = st.integers(1, 4)
    costs = cost if even else cost | st.tuples(*[cost] * stages)
    return PipelineSchedule(
        stages=stages,
        prompt_micro_batches=micro_batches * draw(st.integers(1, 4)),
        generation_micro_batches=micro_batches,
        new_tokens=draw(st.integers(1, 5)),
        prompt_cost=draw(costs),
        generation_cost=draw(costs),
        flush=draw(st.booleans()),
    )


def all_tasks(schedule: PipelineSchedule) -> list[Task]:
    prompt = itertools.product(range(schedule.prompt_micro_batches), range(schedule.stages))
    later = itertools.product(
        range(schedule.generation_micro_batches), range(1, schedule.new_tokens), range(schedule.stages)
    )
    return [Task("prompt", m, 0, s) for m, s in prompt] + [Task("generation", m, t, s) for m, t, s in later]


def step_of(schedule: PipelineSchedule, token: int) -> list[Task]:
    """The last stage's tasks of one step."""
    return [task for task in all_tasks(schedule) if task.token == token and task.stage == schedule.stages - 1]


def needed_by(schedule: PipelineSchedule, task: Task) -> list[Task]:
    """What must have ended before `task` starts, from the words of the paper."""
    if task.stage:
        return [Task(task.phase, task.micro_batch, task.token, task.stage - 1)]
    if task.token == 0:
        return []
    before = step_of(schedule, task.token - 1)
    if schedule.flush:
        return before
    if task.token > 1:
        return [other for other in before if other.micro_batch == task.micro_batch]
    joined = schedule.prompt_micro_batches // schedule.generation_micro_batches
    return [other for other in before if other.micro_batch // joined == task.micro_batch]


def replayed(schedule: PipelineSchedule, order: Iterable[Task]) -> dict[Task, tuple[float, float]]:
    """Start and end of tasks enqueued in `order` on devices that work off their queues in order."""
    free = [0.0] * schedule.stages
    times: dict[Task, tuple[float, float]] = {}
    for task in order:
        # A KeyError here is a task issued before one that it needs.
        start = max([free[task.stage], *(times[other][1] for other in needed_by(schedule, task))])
        free[task.stage] = start + schedule.stage_costs(task.phase)[task.stage]
        times[task] = start, free[task.stage]
    return times


def simulated(schedule: PipelineSchedule) -> dict[Task, tuple[float, float]]:
    """Start and end of tasks when each joins its stage's queue the moment that all it needs has ended."""
    tasks = all_tasks(schedule)
    missing = {task: set(needed_by(schedule, task)) for task in tasks}
    queues = [deque(task for task in tasks if task.stage == s and not missing[task]) for s in range(schedule.stages)]
    running: list[tuple[float, int, Task]] = []
    idle, now, times = set(range(schedule.stages)), 0.0, {}
    while True:
        for stage in [stage for stage in idle if queues[stage]]:
            task = queues[stage].popleft()
            idle.remove(stage)
            times[task] = now, now + schedule.stage_costs(task.phase)[stage]
            heapq.heappush(running, (times[task][1], stage, task))
        if not running:
            return times
        now = running[0][0]
        while running and running[0][0] == now:
            _, stage, done = heapq.heappop(running)
            idle.add(stage)
            for task in tasks:
                if done in missing[task]:
                    missing[task].remove(done)
                    if not missing[task]:
                        queues[task.stage].append(task)


def starts_and_ends(schedule: PipelineSchedule) -> dict[Task, tuple[float, float]]:
    return {slot.task: (slot.start, slot.end) for slot in schedule.timeline}


@given(schedules())
def test_every_task_once(schedule: PipelineSchedule) -> None:
    tasks = list(schedule)
    assert len(tasks) == len(schedule) == len(set(tasks))
    assert set(tasks) == set(all_tasks(schedule))


@given(schedules())
def test_nothing_starts_before_what_it_needs_has_ended(schedule: PipelineSchedule) -> None:
    times = starts_and_ends(schedule)
    for task, (start, end) in times.items():
        assert end - start == schedule.stage_costs(task.phase)[task.stage]
        assert all(times[other][1] <= start for other in needed_by(schedule, task))


@given(schedules())
def test_a_stage_does_one_task_at_a_time(schedule: PipelineSchedule) -> None:
    for stage in range(schedule.stages):
        slots = [slot for slot in schedule.timeline if slot.task.stage == stage]
        assert all(a.end <= b.start for a, b in itertools.pairwise(slots))


@given(schedules())
def test_timeline_is_what_events_give(schedule: PipelineSchedule) -> None:
    assert starts_and_ends(schedule) == simulated(schedule)


@given(schedules())
def test_issued_in_order_it_runs_as_the_timeline_says(schedule: PipelineSchedule) -> None:
    assert replayed(schedule, schedule) == starts_and_ends(schedule)
    starts = [slot.start for slot in schedule.timeline]
    assert starts == sorted(starts)


def by_wavefront(schedule: PipelineSchedule, token: int) -> list[Task]:
    phase = "generation" if token else "prompt"
    micro_batches = schedule.generation_micro_batches if token else schedule.prompt_micro_batches
    return [Task(phase, micro_batch, token, stage) for stage, micro_batch in wavefront(schedule.stages, micro_batches)]


@given(schedules())
def test_issued_step_after_step_it_runs_as_the_timeline_says(schedule: PipelineSchedule) -> None:
    order = [task for token in range(schedule.new_tokens) for task in by_wavefront(schedule, token)]
    assert replayed(schedule, order) == starts_and_ends(schedule)


@given(st.integers(1, 6), st.integers(1, 7), st.integers(1, 4), st.integers(1, 4), st.booleans())
def test_wavefront_is_the_order_of_starts(stages: int, batches: int, pieces: int, tokens: int, flush: bool) -> None:
    pieces = pieces if batches >= stages else 1
    schedule = PipelineSchedule(stages, batches * pieces, batches, tokens, flush=flush)
    for token in range(tokens):
        assert [task for task in schedule if task.token == token] == by_wavefront(schedule, token)


def test_wavefront_is_lazy() -> None:
    assert list(itertools.islice(wavefront(2, 10**12), 4)) == [(0, 0), (1, 0), (0, 1), (1, 1)]


@given(schedules())
def test_figures(schedule: PipelineSchedule) -> None:
    times = starts_and_ends(schedule).values()
    assert schedule.makespan == max(end for _, end in times)
    assert schedule.busy == sum(end - start for start, end in times)
    assert schedule.bubble_fraction == 1 - schedule.busy / (schedule.stages * schedule.makespan)


@given(st.integers(1, 5), st.integers(1, 4), st.integers(1, 4), st.integers(1, 5), st.data())
def test_no_flush_is_never_slower(stages: int, batches: int, pieces: int, tokens: int, data: st.DataObject) -> None:
    costs = st.tuples(*[st.integers(1, 4)] * stages)
    arguments = (stages, batches * pieces, batches, tokens, data.draw(costs), data.draw(costs))
    ours, flushed = PipelineSchedule(*arguments), PipelineSchedule(*arguments, flush=True)
    assert ours.makespan <= flushed.makespan
    if stages > 1 and batches > 1 and tokens > 2:
        assert ours.makespan < flushed.makespan


@given(schedules(even=True))
def test_predicted_bubble(schedule: PipelineSchedule) -> None:
    assert schedule.predicted_bubble() == pytest.approx(schedule.bubble_fraction, abs=1e-12)


def test_predicted_bubble_of_a_step_and_in_the_long_run() -> None:
    assert PipelineSchedule(4, 8, 4, 1).predicted_bubble() == pytest.approx(3 / 11)
    assert PipelineSchedule(4, 4, 4, 9, flush=True).predicted_bubble() == pytest.approx(3 / 7)
    assert PipelineSchedule(4, 8, 4, 10**9).predicted_bubble() == pytest.approx(0, abs=1e-8)
    assert PipelineSchedule(4, 8, 1, 10**9).predicted_bubble() == pytest.approx(1 - 1 / 4)
    # With the bubble of the prompt only: (P - 1) / (M_p + T M_g + P - 1) of T tokens after the first.
    assert PipelineSchedule(4, 8, 4, 6).predicted_bubble() == pytest.approx(3 / (8 + 5 * 4 + 3))
    with pytest.raises(ConfigError, match=r"generation_cost=\(1, 2\) must be equal"):
        PipelineSchedule(2, 2, 2, 2, generation_cost=(1, 2)).predicted_bubble()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stages": 0}, "stages=0 must be an integer of at least 1"),
        ({"prompt_micro_batches": -2}, "prompt_micro_batches=-2 "),
        ({"generation_micro_batches": True}, "generation_micro_batches=True "),
        ({"new_tokens": 1.5}, "new_tokens=1.5 "),
        ({"prompt_micro_batches": 5}, "prompt_micro_batches=5 must be a multiple of generation_micro_batches=2"),
        ({"prompt_cost": (1.0,)}, "prompt_cost has 1 entries for stages=2"),
        ({"generation_cost": [1, 2, 3]}, "generation_cost has 3 entries for stages=2"),
        ({"generation_cost": 0}, "generation_cost=0 must be positive"),
        ({"prompt_cost": (1, math.nan)}, r"prompt_cost=\(1, nan\) must be positive"),
    ],
)
def test_what_cannot_be_scheduled_is_named(changes: dict, message: str) -> None:
    plain = {"stages": 2, "prompt_micro_batches": 4, "generation_micro_batches": 2, "new_tokens": 3}
    with pytest.raises(ConfigError, match=message):
        PipelineSchedule(**{**plain, **changes})


def test_wavefront_names_what_it_cannot_take() -> None:
    with pytest.raises(ConfigError, match="micro_batches=0"):
        wavefront(2, 0)


DRAWN = """\
stage 0 | p0 p1 p2 p3 g0 g1 g0 g1 .
stage 1 | .  p0 p1 p2 p3 g0 g1 g0 g1"""
DRAWN_FLUSHED = """\
stage 0 | p0 p1 p2 p3 .  g0 g1 .  g0 g1 .
stage 1 | .  p0 p1 p2 p3 .  g0 g1 .  g0 g1"""
DRAWN_UNEVEN = """\
stage 0 | p0 -- p1 -- .  .  g0 .  .  g0 .  .
stage 1 | .  .  p0 -- p1 -- .  g0 -- .  g0 --"""


def test_text() -> None:
    assert str(PipelineSchedule(2, 4, 2, 3)) == DRAWN
    assert str(PipelineSchedule(2, 4, 2, 3, flush=True)) == DRAWN_FLUSHED
    uneven = PipelineSchedule(2, 2, 1, 3, prompt_cost=0.2, generation_cost=[0.1, 0.2])
    assert str(uneven) == DRAWN_UNEVEN
    assert PipelineSchedule(1, 1, 1, 2).text(columns=1) == "stage 0 | p0 ..."
    assert uneven.text(unit=0.2, columns=3).splitlines()[0] == "stage 0 | p0 p1 .  ..."


@given(schedules())
def test_text_shows_every_task(schedule: PipelineSchedule) -> None:
    cells = [cell for line in schedule.text().splitlines() for cell in line.split("|")[1].split()]
    assert sorted(cell for cell in cells if cell[0] in "pg") == sorted(task.label for task in schedule)
    # Whole numbers for costs: with a column each, the dots are the bubble.
    unit = [line.split("|")[1].split() for line in schedule.text(unit=1).splitlines()]
    assert all(len(line) == schedule.makespan for line in unit)
    assert sum(line.count(".") for line in unit) == schedule.stages * schedule.makespan - schedule.busy


@given(schedules())
def test_svg(schedule: PipelineSchedule) -> None:
    root = ElementTree.fromstring(schedule.svg())
    rects = root.findall("{*}rect")
    assert len(rects) == len(schedule)
    for rect, slot in zip(rects, schedule.timeline, strict=True):
        assert rect.findtext("{*}title", "").startswith(f"{slot.task.phase} micro-batch {slot.task.micro_batch},")
        assert float(rect.attrib["width"]) >= 27.9
        assert float(rect.attrib["x"]) + float(rect.attrib["width"]) <= float(root.attrib["width"]) + 0.1
    assert len(root.findall("{*}path")) == schedule.stages
    assert len({rect.attrib["fill"] for rect in rects}) == (2 if schedule.new_tokens > 1 else 1)


@given(
    # Floats whose sums depend on the order, and few of them, for ties.
    st.lists(st.sampled_from([0.0, 0.1, 0.2, 0.3, 0.7, 1.0]), min_size=1, max_size=8),
    st.integers(1, 5),
    st.sampled_from([0, 0.1, 0.5, 2]),
    st.sampled_from([0, 0.1, 0.5, 2]),
)
def test_split_layers(costs: list[float], stages: int, first: float, last: float) -> None:
    stages = min(stages, len(costs))

    def rank(split: list[range]) -> tuple[Fraction, Fraction, list[int]]:
        loads = [sum((Fraction(costs[layer]) for layer in part), Fraction(0)) for part in split]
        loads[0] += Fraction(first)
        loads[-1] += Fraction(last)
        squares = sum((load**2 for load in loads), Fraction(0))
        return max(loads), squares, [len(part) for part in reversed(split)]

    cuts = itertools.combinations(range(1, len(costs)), stages - 1)
    splits = [[range(*ends) for ends in itertools.pairwise((0, *cut, len(costs)))] for cut in cuts]
    assert split_layers(costs, stages, first, last) == min(splits, key=rank)


def test_split_layers_by_hand() -> None:
    assert split_layers([1] * 5, 3) == [range(2), range(2, 4), range(4, 5)]
    assert split_layers([1] * 8, 2, first=1, last=5) == [range(6), range(6, 8)]
    assert split_layers([4, 1, 1, 1, 1], 2) == [range(1), range(1, 5)]
    assert split_layers([1, 1], 1, 3, 3) == [range(2)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1, 1, 1], 5), "pipeline_parallel=5 exceeds the 3 layers$"),
        (([1], 2), "pipeline_parallel=2 exceeds the 1 layer$"),
        (([1], 0), "pipeline_parallel=0 must be an integer of at least 1"),
        (([1, -1], 1), "costs: -1 must be finite and not negative"),
        (([1, 1], 1, math.nan), "first: nan"),
        (([1, 1], 1, 0, -2), "last: -2"),
    ],
)
def test_what_cannot_be_split_is_named(arguments: tuple, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        split_layers(*arguments)
