"""`jdsi plan`: what a model takes on machines one may not have."""

import json
import sys
from typing import Annotated

import typer

from jdsi.cuda_compiler import find_cuda_compiler
from jdsi.errors import ConfigError
from jdsi.without_torch import import_transformers_without_torch

_DEGREES = "Degrees (all three 1 by default; with none of them given they are chosen for --goal)"


def plan(
    model: Annotated[
        str, typer.Argument(help="Folder with a config.json (weights are not read), that file, or a hub id.")
    ],
    topology: Annotated[str, typer.Option(help="Machines: h200:8, h100:256 (8 to a host), a100:4, or cpu:8.")],
    tensor_parallel: Annotated[int | None, typer.Option(help="Devices to a layer.", rich_help_panel=_DEGREES)] = None,
    pipeline_parallel: Annotated[int | None, typer.Option(help="Stages of layers.", rich_help_panel=_DEGREES)] = None,
    data_parallel: Annotated[
        int | None, typer.Option(help="Groups that share the batch.", rich_help_panel=_DEGREES)
    ] = None,
    goal: Annotated[str, typer.Option(help="latency or throughput.", rich_help_panel=_DEGREES)] = "latency",
    batch: Annotated[
        int | None, typer.Option(help="Sequences at a time; by default 1, or for throughput as many as fit.")
    ] = None,
    context: Annotated[int, typer.Option(help="Tokens that a sequence has in the end.")] = 2048,
    prompt: Annotated[int | None, typer.Option(help="Tokens it starts with; by default all but one.")] = None,
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
    memory_limit: Annotated[
        str | None, typer.Option(help="Of each device, as 80GiB; by default what the device has.")
    ] = None,
    sequence_parallel: Annotated[
        bool | None, typer.Option(help="Divide tokens over tensor-parallel ranks; by default where they are many.")
    ] = None,
    compiled: Annotated[
        bool,
        typer.Option(
            "--compile/--no-compile",
            help="Compile the programs and read memory and collectives from them.",
        ),
    ] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Compile a model's step for machines you need not have: memory, collectives, predicted times, and what fits."""
    if goal not in ("latency", "throughput"):
        raise ConfigError(f"--goal {goal!r} must be latency or throughput")
    find_cuda_compiler()
    import_transformers_without_torch()
    import jax

    from jdsi.converters import load_spec, parse_dtype, parse_size
    from jdsi.planning import make_plan
    from jdsi.sharding import Parallelism
    from jdsi.sharding.topology import Topology

    where = Topology.parse(topology)
    jax.config.update("jax_platforms", "cpu")  # the machines that are planned for are elsewhere
    if where.name == "cpu":
        jax.config.update("jax_num_cpu_devices", where.count)
    given = (tensor_parallel, pipeline_parallel, data_parallel)
    degrees = None if given == (None, None, None) else Parallelism(*(1 if n is None else n for n in given))
    found = make_plan(
        load_spec(model),
        where,
        degrees,
        batch=batch,
        context=context,
        prompt=prompt,
        goal="latency" if goal == "latency" else "throughput",
        memory_limit=None if memory_limit is None else parse_size(memory_limit),
        dtype=parse_dtype(dtype).name,
        sequence_parallel=sequence_parallel,
        compiled=compiled,
    )
    if as_json:
        json.dump(found.as_dict(), sys.stdout)
        sys.stdout.write("\n")
    else:
        sys.stdout.write(f"{found.text()}\n")
