"""Where parallelism loses time: the host, the pipeline's bubbles, what devices exchange, and what that is at scale."""

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from jdsi.converters import random_checkpoint
from jdsi.errors import ConfigError
from jdsi.sharding import Parallelism

from .parallel_tables import bubble_table, exchange_table, host_table, notes_on, scaling_table
from .processes import ask
from .report import Report, spread, warn, warn_if_busy
from .rounds import Ratio
from .scaling import TOPOLOGIES, scaling
from .shapes import scratch, shape_config

_STEPS, _DEEP_STEPS = 20, 5  # timed in each round
_ONE = Parallelism()
_HOST_TIMES = ("context", "issue", "processor", "waited", "queued")


def bench_parallel(
    *,
    shape: str = "llama-mini",
    tensor_parallel: Sequence[int] = (2, 4, 8),
    pipeline_parallel: Sequence[int] = (2, 4),
    data_parallel: Sequence[int] = (2,),
    deep_layers: int = 80,
    rows: int = 8,
    prompt: int = 16,
    pipeline_shape: str = "llama-deep",
    stages: int = 2,
    micro_batches: Sequence[int] = (1, 2, 4),
    pieces: int = 2,
    tokens: int = 64,
    new_tokens: int = 8,
    topologies: Sequence[str] = TOPOLOGIES,
    rounds: int = 5,
) -> Report:
    """Four looks at a model on several devices; on virtual ones where there are no GPUs.

    The host's part of a decode step of a model so small that the rest hardly counts, beside one device; the bubbles of
    a pipeline, beside `jdsi.sharding.PipelineSchedule`; the exchanges of the compiled programs, beside the formula; and
    what the cost model predicts for large models on many GPUs.

    Args:
        shape: of the small model, see `SHAPES`.
        tensor_parallel, pipeline_parallel, data_parallel: degrees that it runs with, each by itself, and the smallest
            of all three together.
        deep_layers: it also runs with so many layers, on one device and with the largest tensor-parallel degree; 0
            leaves that out.
        rows, prompt: its sequences, and the tokens of each one's prompt.
        pipeline_shape: of the model whose bubbles are measured. On a CPU it should be one whose stages take one core
            each, for a pipeline gains nothing where one stage can have all of them.
        stages: of its pipeline.
        micro_batches: on their way at a time.
        pieces: that a micro-batch is cut into while prompts are read, beside whole ones.
        tokens: of a micro-batch's pass: sequences in generation, and prompts of `prompt` tokens before.
        new_tokens: of each sequence in generation.
        topologies: machines of the predictions, smallest first.
        rounds: of measuring.

    Raises:
        ConfigError: a number is out of range, or a shape or topology is unknown.
        JdsiError: a measuring process failed.
    """
    numbers = [*tensor_parallel, *pipeline_parallel, *data_parallel, *micro_batches]
    if min([*numbers, rows, prompt - 1, stages - 1, pieces, new_tokens, rounds]) < 1 or deep_layers < 0:
        raise ConfigError("degrees and counts must be at least 1, prompt and stages at least 2")
    if not micro_batches or tokens % (prompt * pieces):
        raise ConfigError(f"{tokens=} of a micro-batch must be a multiple of {prompt=} times {pieces=}")
    small, large = shape_config(shape), shape_config(pipeline_shape)
    if stages > large.num_hidden_layers:
        raise ConfigError(f"{stages=} exceeds the {large.num_hidden_layers} layers of {pipeline_shape}")
    degrees = _degrees(tensor_parallel, pipeline_parallel, data_parallel, small.num_hidden_layers)
    if any(rows % one.data for one in degrees):
        raise ConfigError(f"{rows=} must be a multiple of every data-parallel degree")
    warn_if_busy()
    warn("parallel: predictions")
    predicted = scaling(topologies)
    models = {shape: (small, degrees, _STEPS)}
    if deep_layers:
        deep = shape_config(shape, num_hidden_layers=deep_layers)
        widest = Parallelism(tensor=max(tensor_parallel, default=1))
        models[f"{shape}, {deep_layers} layers"] = (deep, list(dict.fromkeys([_ONE, widest])), _DEEP_STEPS)
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(scratch())
        warn("parallel: steps and exchanges")
        asked = {}
        for index, (name, (config, wanted, steps)) in enumerate(models.items()):
            asked[name] = {
                "folder": random_checkpoint(folder / str(index), config, dtype="float32"),
                "degrees": [dataclasses.astuple(one) for one in wanted],
                "steps": steps,
                "exchanges": config is small,
            }
        count = max(one.devices for one in degrees)
        on_meshes = ask("mesh_steps", devices=count, models=asked, rows=rows, prompt=prompt, rounds=rounds)
        devices, bubbles = on_meshes["devices"], None
        if stages <= len(devices):
            warn("parallel: bubbles")
            bubbles = ask(
                "pipeline",
                devices=stages,
                folder=random_checkpoint(folder / "pipeline", large, dtype="float32"),
                stages=stages,
                micro_batches=list(micro_batches),
                pieces=pieces,
                load={"rows": tokens, "prompts": tokens // prompt, "length": prompt},
                new_tokens=new_tokens,
                rounds=rounds,
            )
    layers = {name: config.num_hidden_layers for name, (config, *_) in models.items()}
    host = _host(on_meshes, layers)
    exchanged = _exchanges(on_meshes["models"][shape])
    pipeline = [] if bubbles is None else _pipeline(bubbles)
    settings = {
        "shape": shape,
        "devices": devices,
        "skipped": [str(Parallelism(*one)) for one in on_meshes["skipped"]],
        "deep_layers": deep_layers,
        "rows": rows,
        "prompt": prompt,
        "pipeline_shape": pipeline_shape,
        "stages": stages,
        "pieces": pieces,
        "tokens": tokens,
        "new_tokens": new_tokens,
        "rounds": rounds,
    }
    title = (
        f"The host's part of a decode step of {rows} rows, on {len(on_meshes['devices'])} x {on_meshes['devices'][0]}"
    )
    return Report(
        "parallel",
        settings,
        [*host, *pipeline, *exchanged, *predicted],
        host_table(host),
        notes_on(settings, host, pipeline, predicted),
        title,
        (
            (f"Bubbles of {stages} stages, micro-batches of {tokens} tokens", bubble_table(pipeline)),
            ("Exchanges between devices, bytes on each", exchange_table(exchanged)),
            ("Predicted by the cost model, not measured: bfloat16, 4096 tokens a sequence", scaling_table(predicted)),
        ),
    )


def _degrees(tensor: Sequence[int], pipeline: Sequence[int], data: Sequence[int], layers: int) -> list[Parallelism]:
    """One device first."""
    if max(pipeline, default=1) > layers:
        raise ConfigError(f"pipeline_parallel={max(pipeline)} exceeds the {layers} layers of the shape")
    found = [_ONE, *(Parallelism(tensor=n) for n in tensor), *(Parallelism(pipeline=n) for n in pipeline)]
    found += [Parallelism(data=n) for n in data]
    if tensor and pipeline and data:
        found.append(Parallelism(min(tensor), min(pipeline), min(data)))
    return list(dict.fromkeys(found))


def _host(answer: Mapping[str, Any], layers: Mapping[str, int]) -> list[dict[str, Any]]:
    found = []
    for name, runs in answer["models"].items():
        times = {}
        for run in runs:
            times[tuple(run["parallelism"])] = {key: [figures[key] for figures in run["host"]] for key in _HOST_TIMES}
        one = times[dataclasses.astuple(_ONE)]
        for degrees, figures in times.items():
            parallelism = Parallelism(*degrees)
            found.append(
                {
                    "section": "host",
                    "model": name,
                    "layers": layers[name],
                    "parallelism": dataclasses.asdict(parallelism),
                    "devices": parallelism.devices,
                    **{key: spread(values) for key, values in figures.items()},
                    "issue_over_one": Ratio.of(figures["issue"], one["issue"]),
                    "queued_over_one": Ratio.of(figures["queued"], one["queued"]),
                }
            )
    return found


def _exchanges(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Per configuration and stage; those of hidden states beside how many and how large they must be."""
    found = []
    for run in runs:
        for stage in run["exchanges"]:
            hidden = [one for one in stage["collectives"] if _is_hidden(one, stage["hidden_bytes"])]
            total, counted = (
                sum(one["bytes"] * one["count"] for one in stage[key]) for key in ("collectives", "counted")
            )
            found.append(
                {
                    "section": "exchanges",
                    "parallelism": dataclasses.asdict(Parallelism(*run["parallelism"])),
                    **stage,
                    "of_hidden_states": sum(one["count"] * one["arrays"] for one in hidden),
                    "expected": (2 * stage["layers"] + stage["embeds"]) * (run["parallelism"][0] > 1),
                    "bytes": total,
                    "counted_bytes": counted,
                    "bytes_per_token": total / stage["tokens"],
                }
            )
    return found


def _is_hidden(collective: Mapping[str, Any], nbytes: int) -> bool:
    """Whether it is of one or more arrays of T x E values."""
    return collective["axis"] == "tensor" and collective["bytes"] == nbytes * collective["arrays"]


def _pipeline(answer: Mapping[str, Any]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for work, rounds in answer["stages"].items():
        seconds = [spread(figures) for figures in zip(*rounds, strict=True)]
        found.append({"section": "stage", "work": work, "seconds": seconds, "cores": spread(answer["cores"][work])})
    slowest = [max(alone) for alone in answer["stages"]["generation"]]
    together = answer["together"]
    found.append({"section": "at once", "seconds": spread(together), "over_slowest_alone": Ratio.of(together, slowest)})
    seconds = {(c["phase"], c["micro_batches"], c["pieces"], c["flush"]): c["seconds"] for c in answer["cases"]}
    for case in answer["cases"]:
        plain = {key: case[key] for key in ("phase", "micro_batches", "pieces", "flush")}
        flushed = seconds.get(("generation", case["micro_batches"], 1, True))
        found.append(
            {
                "section": "bubble",
                **plain,
                **{key: spread(case[key]) for key in ("seconds", "cores", "bubble")},
                **{key: spread(case[key]) for key in ("scheduled_seconds", "scheduled_bubble")},
                **{key: spread(case[key]) for key in ("slowed_seconds", "slowed_bubble")},
                "seconds_over_scheduled": Ratio.of(case["seconds"], case["scheduled_seconds"]),
                "seconds_over_slowed": Ratio.of(case["seconds"], case["slowed_seconds"]),
                "speed_over_flushed": Ratio.of(flushed, case["seconds"])
                if flushed and case["phase"] == "generation"
                else None,
            }
        )
    return found
