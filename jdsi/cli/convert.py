"""`jdsi convert`: one checkpoint format into another."""

import dataclasses
import json
import sys
from typing import Annotated, Literal

import typer

from jdsi.without_torch import import_transformers_without_torch


def convert(
    source: Annotated[str, typer.Argument(help="Folder of a checkpoint, or a hub id.")],
    destination: Annotated[str, typer.Argument(help="Folder to write.")],
    to: Annotated[Literal["orbax", "hf", "streaming", "sharded"], typer.Option(help="Format to write.")] = "orbax",
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; by default as it is.")] = None,
    tensor_parallel: Annotated[
        int | None, typer.Option(help="Ranks that --to sharded cuts for; other degrees can load it too.")
    ] = None,
    max_shard_size: Annotated[str, typer.Option(help="Largest file of --to hf, as 5GB.")] = "5GB",
    quantize: Annotated[
        Literal["int8", "int4"] | None, typer.Option(help="Store the matrices of --to streaming in 8 or 4 bits.")
    ] = None,
    group_size: Annotated[
        int | None, typer.Option(help="Inputs that share a scale of --quantize: 32, 64 or 128, by default 128.")
    ] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Refuse tensors that the model does not use, instead of leaving them out.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing checkpoint.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object, no progress bar.")] = False,
) -> None:
    """Convert a checkpoint. What is interrupted leaves nothing behind that would load."""
    import_transformers_without_torch()
    from jdsi.converters import ProgressBar
    from jdsi.converters import convert as run

    report = run(
        source,
        destination,
        to=to,
        dtype=dtype,
        tensor_parallel=tensor_parallel,
        max_shard_size=max_shard_size,
        quantize=quantize,
        group_size=group_size,
        strict=strict,
        overwrite=overwrite,
        progress=None if as_json else ProgressBar("converting"),
    )
    if as_json:
        json.dump(dataclasses.asdict(report), sys.stdout, default=str)
        sys.stdout.write("\n")
        return
    rate = report.bytes / max(report.seconds, 1e-9) / 1e6
    sys.stdout.write(f"wrote {destination}: {report.bytes / 1e6:.1f} MB in {report.seconds:.1f} s ({rate:.0f} MB/s)\n")
