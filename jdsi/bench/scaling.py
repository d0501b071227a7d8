"""What the cost model predicts for large models on machines of several sizes; nothing is measured or compiled."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, get_args

from jdsi.errors import CapacityError
from jdsi.models import TransformerSpec
from jdsi.models.families import family_for
from jdsi.planning import Goal, Plan, make_plan

TOPOLOGIES = ("h200:8", "h200:64", "h200:256")
CONTEXT, PROMPT = 4096, 2048  # tokens of a sequence in the end, and at the start

_LLAMA_3 = {"num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192, "rope_theta": 500000.0}
LARGE: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "llama-3-70b": _LLAMA_3
        | {
            "hidden_size": 8192,
            "intermediate_size": 28672,
            "num_hidden_layers": 80,
            "num_attention_heads": 64,
        },
        "llama-3.1-405b": _LLAMA_3
        | {
            "hidden_size": 16384,
            "intermediate_size": 53248,
            "num_hidden_layers": 126,
            "num_attention_heads": 128,
            "max_position_embeddings": 131072,
        },
    }
)
"""What their configs say, see examples/configs."""


def large_spec(name: str) -> TransformerSpec:
    """The spec of a model of `LARGE`."""
    from transformers import AutoConfig

    return family_for("llama").spec(AutoConfig.for_model("llama", **LARGE[name]))


def scaling(topologies: Sequence[str] = TOPOLOGIES) -> list[dict[str, Any]]:
    """The degrees that the planner chooses for latency and for throughput, and what it predicts of them.

    Args:
        topologies: machines, smallest first; the first is what the others are compared with.

    Returns:
        A record for each model, machine and goal; `fits` is false where the model does not fit the machine.

    Raises:
        ConfigError: a topology is unknown.
    """
    found = []
    for name in LARGE:
        spec = large_spec(name)
        for goal in get_args(Goal):
            found += _of_model(name, spec, goal, topologies)
    return found


def _of_model(name: str, spec: TransformerSpec, goal: Goal, topologies: Sequence[str]) -> Iterator[dict[str, Any]]:
    first: dict[str, Any] | None = None
    for topology in topologies:
        about = {"section": "scaling", "source": "predicted by the cost model, not measured"}
        about |= {"model": name, "topology": topology, "goal": goal}
        try:
            plan = make_plan(spec, topology, goal=goal, context=CONTEXT, prompt=PROMPT, compiled=False)
        except CapacityError as error:
            yield about | {"fits": False, "why": str(error)}
            continue
        record = about | {"fits": True} | _record(plan)
        first = first or record
        record["speed_over_first"] = record["tokens_per_second"] / first["tokens_per_second"]
        record["devices_over_first"] = record["devices"] / first["devices"]
        yield record


def _record(plan: Plan) -> dict[str, Any]:
    decode = plan.decode
    return {
        "devices": plan.topology.count,
        "parallelism": dataclasses.asdict(plan.parallelism),
        "used_devices": plan.parallelism.devices,
        "batch": plan.batch,
        "seconds_per_token": decode.seconds,
        "tokens_per_second": decode.tokens_per_second,
        "first_token_seconds": plan.prefill.seconds,
        "bytes_per_device": max(stage.total for stage in plan.stages),
        "communication": decode.communication,
        "bubble": decode.bubble,
    }
