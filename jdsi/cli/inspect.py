"""`jdsi inspect`: what a checkpoint is, without reading its weights."""

import collections
import dataclasses
import json
import math
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jdsi.without_torch import import_transformers_without_torch

if TYPE_CHECKING:
    from jdsi.models import TransformerSpec

_ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def inspect(
    model: Annotated[str, typer.Argument(help="Folder of a checkpoint, or a hub id.")],
    parameters: Annotated[bool, typer.Option("--parameters", help="List every parameter.")] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Read all weights of a streaming folder and compare checksums.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show the spec, the parameters and the memory a model takes."""
    import_transformers_without_torch()
    from jdsi.converters import load_spec

    if verify:
        _verify(model)
    spec = load_spec(model)
    report = _report(spec) | _stored(model) | {"generation": _generation(model) if spec.generates else None}
    if as_json:
        json.dump(report, sys.stdout)
        sys.stdout.write("\n")
        return
    _show(report, parameters)


def _verify(model: str) -> None:
    from jdsi.converters import ProgressBar, open_checkpoint
    from jdsi.converters.streaming import StreamingCheckpoint
    from jdsi.errors import ConfigError

    checkpoint = open_checkpoint(model)
    if not isinstance(checkpoint, StreamingCheckpoint):
        raise ConfigError(f"{model}: only folders that `jdsi convert --to streaming` made hold checksums to verify")
    checkpoint.verify(ProgressBar("verifying"))


def _report(spec: "TransformerSpec") -> dict[str, Any]:
    from jdsi.kv_cache import token_bytes
    from jdsi.models import abstract_parameters

    shapes = {name: list(struct.shape) for name, struct in abstract_parameters(spec).items()}
    total = sum(math.prod(shape) for shape in shapes.values())
    return {
        "family": spec.family,
        "parameters": total,
        "weight_bytes": {dtype: total * size for dtype, size in _ITEM_BYTES.items()},
        "kv_bytes_per_token": {dtype: token_bytes(spec.kv_shapes, size) for dtype, size in _ITEM_BYTES.items()}
        if spec.generates
        else None,
        "spec": _described(spec),
        "shapes": shapes,
    }


def _described(spec: "TransformerSpec") -> dict[str, Any]:
    """The spec as nested dictionaries, with a layer's sublayers by their names."""
    layers = [
        {one.name: _fields(one) for one in layer.sublayers} | {"residual": _fields(layer.residual)}
        for layer in spec.layers
    ]
    return _fields(dataclasses.replace(spec, layers=())) | {"layers": layers}


def _fields(spec: Any) -> dict[str, Any]:
    return dataclasses.asdict(spec)


def _generation(model: str) -> dict[str, Any]:
    """How the folder wants the model sampled, by the names of `SamplingParams`."""
    from jdsi.converters.location import resolve_config
    from jdsi.generation.defaults import GenerationDefaults

    found = GenerationDefaults.read(resolve_config(model))
    lengths = {"max_length": found.max_length, "min_length": found.min_length}
    return {
        **found.values,
        **{name: length for name, length in lengths.items() if length is not None},
        "eos_token_ids": found.eos_token_ids,
        "unsupported": found.unsupported,
    }


def _stored(model: str) -> dict[str, Any]:
    """What one of our own folders says of its weights: bytes on disk, and the formats of those that are quantised."""
    from jdsi.converters import open_checkpoint
    from jdsi.converters.location import resolve_config
    from jdsi.converters.manifest import MANIFEST
    from jdsi.converters.streaming import StreamingCheckpoint

    path = resolve_config(model)
    if not (path / MANIFEST).is_file():
        return {"stored_bytes": None, "quantization": {}}
    checkpoint, formats = open_checkpoint(path), {}
    if isinstance(checkpoint, StreamingCheckpoint):
        formats = {
            name: {**dataclasses.asdict(stored.format), "bytes": stored.nbytes, "of": checkpoint.dtypes[name].name}
            for name, stored in checkpoint.quantized.items()
        }
    return {"stored_bytes": checkpoint.nbytes, "quantization": formats}


def _show(report: dict[str, Any], every_parameter: bool) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    spec = report["spec"]
    console.print(
        f"[bold]{report['family']}[/bold]: {report['parameters'] / 1e6:,.1f} M parameters, "
        f"{len(spec['layers'])} layers, width {spec['width']}, "
        f"vocabulary {spec['vocab_size']}, {spec['max_positions']} positions"
    )
    table = Table("dtype", "weights", *(["KV cache per token"] if report["kv_bytes_per_token"] else []))
    for dtype, size in report["weight_bytes"].items():
        kv = [f"{report['kv_bytes_per_token'][dtype] / 1e3:,.1f} kB"] if report["kv_bytes_per_token"] else []
        table.add_row(dtype, f"{size / 1e6:,.1f} MB", *kv)
    console.print(table)
    if report["stored_bytes"] is not None:
        console.print(f"stored: {report['stored_bytes'] / 1e6:,.1f} MB")
        for form, count in collections.Counter(map(_format, report["quantization"].values())).items():
            console.print(f"quantised: {count} matrices in {form}")
    for first, last, layer in _runs(spec["layers"]):
        console.print(f"layers {first} to {last}:" if last > first else f"layer {first}:", layer)
    for key in ("embedding", "norm", "head", "classifier"):
        console.print(f"{key}:", spec[key])
    if report["generation"] is not None:
        asked = ", ".join(f"{name}={value}" for name, value in report["generation"].items() if value != ())
        console.print("generation:", asked or "greedy")
    if every_parameter:
        formats = report["quantization"]
        table = Table("parameter", "shape", "values", *(["stored in"] if formats else []))
        for name, shape in report["shapes"].items():
            form = [_format(formats[name]) if name in formats else ""] if formats else []
            table.add_row(name, " × ".join(map(str, shape)), f"{math.prod(shape):,}", *form)
        console.print(table)


def _format(form: dict[str, Any]) -> str:
    return f"{form['kind']}, " + (f"groups of {form['group']}" if form["group"] else "one scale a row")


def _runs(layers: list[dict[str, Any]]) -> list[tuple[int, int, dict[str, Any]]]:
    """Equal neighbours as `(first, last, layer)`."""
    runs: list[tuple[int, int, dict[str, Any]]] = []
    for i, layer in enumerate(layers):
        if runs and runs[-1][2] == layer:
            runs[-1] = (runs[-1][0], i, layer)
        else:
            runs.append((i, i, layer))
    return runs
