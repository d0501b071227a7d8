"""Where the time of one decoding step goes: kernels, gaps between them, the host, copies, and CUDA graphs."""

import dataclasses
import re
import time
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax

from jdsi.models import Transformer, abstract_parameters
from jdsi.runtime import ResidentExecutor, Step

from ..contest import reason
from ..limits import product_weights, weight_bytes
from ..passes import token_step
from ..report import spread
from .backend import start
from .contenders import prepared, ratios, take_turns
from .limits import NO_GRAPHS
from .model_shapes import model_spec, random_model
from .stage_worker import Task
from .step_trace import trace_facts

_ROUNDS, _STEPS, _TRACED_STEPS = 5, 32, 8
_CAPACITY = 512  # of the KV memory; all steps that a chain takes here are fewer
_PROFILED: Mapping[str, Any] = {"xla_enable_command_buffers_during_profiling": True}


def measure(task: Task, model: str) -> None:
    """Times a batch-1 step with and without CUDA graphs, counts what they hold, and looks at a trace.

    Under a profiler XLA uses no graphs unless it is told to, so gaps are those of a program that was.

    Args:
        task: the stage's.
        model: one of `MODELS`.
    """
    start(task)
    tiny = task.rehearsal
    task.doing("random weights")
    loaded = random_model(model_spec(model, tiny=tiny))
    executor = ResidentExecutor(loaded)
    dump = Path(task.scratch) / "dump"
    task.doing("compiling")
    chains = prepared(
        task,
        "compiling",
        {
            "graphs": lambda: Chain.of(executor, {"xla_dump_to": str(dump)}),
            "no graphs": lambda: Chain.of(executor, NO_GRAPHS),
            "graphs under a profiler": lambda: Chain.of(executor, _PROFILED),
        },
    )
    if sequence := thunk_text(dump):
        task.emit("thunks", facts=thunk_facts(sequence))
    steps = 2 if tiny else _STEPS
    runs = {name: partial(chains[name].seconds, steps) for name in ("graphs", "no graphs") if name in chains}
    task.doing("timing")
    figures = take_turns(task, "step", runs, 1 if tiny else _ROUNDS)
    moved = weight_bytes(product_weights(loaded))
    for name, times in figures.items():
        task.emit("step", name, seconds=spread(times), bytes=moved, over=ratios(figures, name))
        issuing = [chains[name].issue_seconds(steps) for _ in range(3)]
        task.emit("host's part of a step", name, seconds=spread(issuing))
    for name in ("graphs under a profiler", "no graphs"):
        if name in chains:
            task.doing(f"tracing, {name}")
            folder = Path(task.scratch) / name.replace(" ", "-")
            try:
                facts = trace_facts(partial(chains[name].seconds, _TRACED_STEPS), folder, _TRACED_STEPS)
            except Exception as error:  # the profiler is a library of its own, which may lack what it needs
                task.emit("trace", name, failed=reason(error))
            else:
                task.emit("trace", name, facts=facts)
    if tiny and not task.short:
        compile_for_h200(task, model)


@dataclasses.dataclass
class Chain:
    """Steps that follow each other, each on what the last one gave.

    Attributes:
        run: a compiled step.
        step: the next.
    """

    run: Callable[[Step], tuple[Any, Any, Any]]
    step: Step

    @classmethod
    def of(cls, executor: ResidentExecutor, options: Mapping[str, Any]) -> "Chain":
        """A batch-1 step in the midst of generation, compiled with XLA's options."""
        step = token_step(executor, 1, _CAPACITY)
        function, arguments = executor.program(step)
        compiled = jax.jit(function, donate_argnums=(2, 5)).lower(*arguments).compile(dict(options))

        def run(step: Step) -> tuple[Any, Any, Any]:
            return compiled(*executor.program(step)[1])

        return cls(run, step)

    def issue(self, count: int) -> None:
        """Starts so many steps."""
        for _ in range(count):
            result, context, carry = self.run(self.step)
            self.step = Step(result.tokens, context, None, self.step.epilogue, carry)

    def seconds(self, count: int) -> float:
        """Of a step, of so many."""
        began = time.perf_counter()
        self.issue(count)
        jax.block_until_ready(self.step.tokens)
        return (time.perf_counter() - began) / count

    def issue_seconds(self, count: int) -> float:
        """That the host takes for a step, whether the device is done or not."""
        began = time.perf_counter()
        self.issue(count)
        took = (time.perf_counter() - began) / count
        jax.block_until_ready(self.step.tokens)
        return took


def thunk_text(dump: Path) -> str:
    """XLA's list of what a program launches, the largest in a folder of dumps; empty where there is none."""
    files = [*dump.glob("*thunk_sequence_after_thunk_passes.txt")] or [*dump.glob("*thunk_sequence.txt")]
    return max((file.read_text() for file in files), key=len, default="")


def thunk_facts(text: str) -> dict[str, Any]:
    """What is launched, and what of it lies in CUDA graphs."""
    found = re.findall(r"^(\s*)\d+: (k\w+)", text, re.M)
    outermost = min((len(indent) for indent, _ in found), default=0)
    inside = Counter(kind for indent, kind in found if len(indent) > outermost)
    outside = Counter(kind for indent, kind in found if len(indent) == outermost)
    graphs = outside.pop("kCommandBuffer", 0)
    return {
        "CUDA graphs": graphs,
        "launches inside them": inside.total(),
        "launches outside": outside.total(),
        **{f"outside: {kind.removeprefix('k')}": count for kind, count in outside.most_common()},
        **{f"inside: {kind.removeprefix('k')}": count for kind, count in inside.most_common()},
    }


def compile_for_h200(task: Task, model: str) -> None:
    """Compiles a model's decoding step for an H200 at its real size, and counts what it would launch there."""
    from .rehearsal import lowered_for_h200, why_not_compiled

    if why := why_not_compiled():
        task.emit(f"{model} for an H200", skipped=why)
        return
    task.doing(f"compiling {model}'s step for an H200")
    spec = model_spec(model)
    shapes: Any = abstract_parameters(spec, "bfloat16")
    executor = ResidentExecutor(Transformer.from_parameters(spec, shapes))
    began = time.perf_counter()
    function, arguments = executor.program(token_step(executor, 1, _CAPACITY))
    dump = Path(task.scratch) / f"dump-{model}"
    lowered = lowered_for_h200(function, *arguments, donate_argnums=(2, 5))
    compiled = lowered.compile({"xla_dump_to": str(dump)})
    kernels = (compiled.as_text() or "").count('custom_call_target="mosaic_gpu')
    took = round(time.perf_counter() - began, 1)
    task.emit(
        f"{model} for an H200",
        facts={"seconds to compile": took, "kernels of ours": kernels, **thunk_facts(thunk_text(dump))},
    )
