"""What a step costs the host on several meshes, and what their devices exchange; runs in a process of its own."""

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax

import jdsi
from jdsi.planning import Workload, collectives_of, stage_costs
from jdsi.runtime import Executor
from jdsi.runtime.mesh_executor import MeshExecutor
from jdsi.sharding import Parallelism

from .passes import Passes, greedy
from .rounds import interleave

_SPARE = 8  # slots of the KV memory that are left when all steps are done


@dataclasses.dataclass(frozen=True)
class HostTimes:
    """Seconds of one decode step of one batch.

    Attributes:
        context: to make the batch's KV memory, until the call returns; once a batch, not once a step.
        issue: until `Executor.steps` returns, with nothing queued before.
        processor: of that, what the issuing thread worked.
        waited: until the tokens are there, with nothing queued before.
        queued: of many steps queued one behind another, until the last tokens are there, over their number.
    """

    context: float
    issue: float
    processor: float
    waited: float
    queued: float


def measure(models: Mapping[str, Mapping[str, Any]], *, rows: int, prompt: int, rounds: int) -> dict[str, Any]:
    """Host times, and the exchanges of the compiled programs.

    Args:
        models: by name, each with its `folder`, how many `steps` are timed in a round, the `degrees` it runs with
            (tensor, pipeline, data), and whether its `exchanges` are wanted.
        rows: of the batch.
        prompt: tokens of each row's prompt, for the exchanges.
        rounds: of measuring.

    Returns:
        `devices`, what they are; `skipped`, degrees that there are too few devices for; and by model, for each of its
        degrees, `host`, a record of `HostTimes` for each round, and `exchanges`.
    """
    devices = jax.devices()
    found: dict[str, Any] = {"devices": [device.device_kind for device in devices], "skipped": [], "models": {}}
    for name, model in models.items():
        degrees = [Parallelism(*one) for one in model["degrees"]]
        fitting = [one for one in degrees if one.devices <= len(devices)]
        found["skipped"] += [dataclasses.astuple(one) for one in degrees if one not in fitting]
        executors = {one: _executor(model["folder"], one) for one in fitting}
        contenders = {one: partial(host_times, executor, rows, model["steps"]) for one, executor in executors.items()}
        times = interleave(_named(contenders), rounds)
        found["models"][name] = [
            {
                "parallelism": dataclasses.astuple(one),
                "host": [dataclasses.asdict(figure) for figure in times[str(one)]],
                "exchanges": exchanges(executor, rows, prompt) if model["exchanges"] else [],
            }
            for one, executor in executors.items()
        ]
    return found


def _named[T](contenders: Mapping[Parallelism, Callable[[], T]]) -> dict[str, Callable[[], T]]:
    return {str(one): run for one, run in contenders.items()}


def _executor(folder: str, degrees: Parallelism) -> Executor:
    """One device gets the executor for one device, as from the engine."""
    return jdsi.init_inference(
        folder,
        dtype="float32",
        tensor_parallel=degrees.tensor,
        pipeline_parallel=degrees.pipeline,
        data_parallel=degrees.data,
    ).executor


def host_times(executor: Executor, rows: int, steps: int) -> HostTimes:
    """Times `steps` steps that are waited for one by one, then as many that are queued; medians of the former."""
    capacity = 2 * steps + _SPARE
    start = time.perf_counter()
    executor.new_cache(rows, capacity)
    context = time.perf_counter() - start
    passes = Passes.generation(executor, 1, rows, capacity)
    issue, processor, waited = [], [], []
    for _ in range(steps):
        start, worked = time.perf_counter(), time.thread_time()
        passes.issue()
        issue.append(time.perf_counter() - start)
        processor.append(time.thread_time() - worked)
        passes.wait()
        waited.append(time.perf_counter() - start)
    start = time.perf_counter()
    for _ in range(steps):
        passes.issue()
    passes.wait()
    queued = (time.perf_counter() - start) / steps
    return HostTimes(context, statistics.median(issue), statistics.median(processor), statistics.median(waited), queued)


def exchanges(executor: Executor, rows: int, prompt: int) -> list[dict[str, Any]]:
    """What each device exchanges in a decode step and for a prompt, by stage: compiled, and as the planner counts it.

    Copies from stage to stage (`passed_on`, bytes) are no part of a stage's program and only counted.
    """
    if not isinstance(executor, MeshExecutor):
        return []
    spec, degrees, item = executor.spec, executor.parallelism, executor.dtype.itemsize
    layers = [program.layers for program in executor.programs]
    epilogue, carry = greedy(rows, spec.vocab_size)
    found = []
    for phase, length in (("generation", 1), ("prompt", prompt)):
        work = Workload(rows // degrees.data, length, length)
        counted = stage_costs(spec, degrees, work, dtype=executor.dtype, stages=layers)
        for stage, (program, costs) in enumerate(zip(executor.programs, counted, strict=True)):
            text = program.lower(rows, length, prompt + _SPARE, epilogue, carry).compile().as_text() or ""
            found.append(
                {
                    "phase": phase,
                    "stage": stage,
                    "layers": len(program.layers),
                    "embeds": program.first,
                    "tokens": work.tokens,
                    "hidden_bytes": work.tokens * spec.width * item,
                    "collectives": list(map(dataclasses.asdict, collectives_of(text, dict(program.mesh.shape)))),
                    "counted": list(map(dataclasses.asdict, costs.collectives)),
                    "passed_on": None if costs.transfer is None else costs.transfer.bytes,
                }
            )
    return found
