"""What is asked of a search for degrees of parallelism, and what it weighs."""

import dataclasses
from typing import Literal

from jax.typing import DTypeLike

from jdsi.kv_cache import Contiguous
from jdsi.models import TransformerSpec
from jdsi.runtime.shapes import token_bucket
from jdsi.sharding import Parallelism
from jdsi.sharding.topology import Topology

from .cost_model import StepTime
from .memory import Memory

Goal = Literal["latency", "throughput"]

TIE = 1.02
"""Times that differ by less are equal: the model is not that exact."""


def padded_lengths(prompt: int, context: int) -> tuple[int, int]:
    """What the engine makes of a prompt and a context: the tokens a row is padded to, and the KV memory it gets."""
    width = token_bucket(prompt)
    return width, Contiguous().slots(width + context - prompt)


@dataclasses.dataclass(frozen=True)
class Request:
    """What is to be run, and where.

    Attributes:
        spec: the model's.
        topology: the machines.
        goal: "latency", the shortest time per token of a batch, or "throughput", the most tokens a second.
        batch: sequences at a time; `None` for as many as fit.
        context: tokens that a sequence has in the end; what a token costs is counted there.
        prompt: tokens that it starts with.
        limit: bytes of each device.
        dtype: of weights, activations and KV cache.
    """

    spec: TransformerSpec
    topology: Topology
    goal: Goal
    batch: int | None
    context: int
    prompt: int
    limit: int
    dtype: DTypeLike


@dataclasses.dataclass(frozen=True)
class Candidate:
    """Degrees, and what they come to.

    Attributes:
        parallelism: the degrees.
        batch: sequences at a time.
        memory: of a device of the stage that needs most; `None` where the degrees themselves are out of the question.
        decode: of a step at full context; `None` where it does not fit.
        prefill: of all prompts.
        rejected: why it cannot be taken, or "".
    """

    parallelism: Parallelism
    batch: int
    memory: Memory | None = None
    decode: StepTime | None = None
    prefill: StepTime | None = None
    rejected: str = ""


def describe_memory(memory: Memory, limit: int) -> str:
    """What it is made of, against what there is."""
    parts = ((memory.weights, "weights"), (memory.kv, "KV"), (memory.activations + memory.logits, "activations"))
    return " + ".join(f"{gib(size)} {name}" for size, name in parts) + f", and there are {gib(limit)}"


def gib(size: float) -> str:
    """Bytes as text."""
    if size >= 2**30:
        return f"{size / 2**30:.1f} GiB"
    return f"{size / 2**20:.1f} MiB" if size >= 2**20 else f"{size / 2**10:.1f} KiB"
