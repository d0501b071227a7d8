"""`jdsi classify`: labels of texts by a sequence classifier."""

import contextlib
import json
import sys
from typing import Annotated, Any

import typer

from jdsi.without_torch import import_transformers_without_torch

from . import engine_options as options
from .progress import progress_line
from .prompts import read_prompts

_TEXTS = "Texts (each may be repeated)"


def classify(
    model: options.Model,
    text: Annotated[list[str] | None, typer.Option(help="Text to classify.", rich_help_panel=_TEXTS)] = None,
    pair: Annotated[
        list[str] | None,
        typer.Option(
            help="The second text of a pair; the first --pair goes with the first --text, and so on.",
            rich_help_panel=_TEXTS,
        ),
    ] = None,
    chat_file: Annotated[
        list[str] | None, typer.Option(help="JSON file with a chat, as for generate.", rich_help_panel=_TEXTS)
    ] = None,
    prompt_ids: Annotated[
        list[str] | None, typer.Option(help="Token ids to classify, as 5,6,7.", rich_help_panel=_TEXTS)
    ] = None,
    dtype: options.Dtype = "auto",
    offload: options.Offload = None,
    memory_limit: Annotated[
        str | None, typer.Option(help="With --offload: memory to keep to, as 2GiB; by default what is free.")
    ] = None,
    gpu_direct: options.GpuDirect = False,
    tensor_parallel: options.TensorParallel = 1,
    pipeline_parallel: options.PipelineParallel = 1,
    data_parallel: options.DataParallel = 1,
    distributed: options.Distributed = False,
    coordinator: options.Coordinator = None,
    num_processes: options.NumProcesses = None,
    process_id: options.ProcessId = None,
    kernels: options.Kernels = True,
    tokenizer: options.Tokenizer = None,
    checkpoint: options.Weights = None,
    strict: options.Strict = False,
    as_json: options.AsJson = False,
) -> None:
    """Label texts, or pairs of texts, with a sequence classifier: a line for each, the label and its score."""
    texts = _texts(text or [], pair or [], chat_file or [], prompt_ids or [])
    import_transformers_without_torch()  # slow, as what follows: mistakes above are answered before
    from jdsi import init_inference

    first = options.join_others(distributed, coordinator, num_processes, process_id)
    engine = init_inference(
        model,
        dtype=dtype,
        tokenizer=tokenizer,
        checkpoint=checkpoint,
        strict=strict,
        offload=offload,
        memory_limit=memory_limit,
        gpu_direct=gpu_direct,
        kernels=kernels,
        tensor_parallel=tensor_parallel,
        pipeline_parallel=pipeline_parallel,
        data_parallel=data_parallel,
    )
    with contextlib.closing(engine), progress_line(engine), contextlib.nullcontext() if first else options.silence():
        found = engine.classify(texts)
        if as_json:
            report = {"classifications": [one.as_dict() for one in found], "stats": engine.stats.as_dict()}
            json.dump(report, sys.stdout)
            sys.stdout.write("\n")
            return
        for one in found:
            sys.stdout.write(f"{one.label}\t{one.score:.6g}\n")


def _texts(texts: list[str], pairs: list[str], chat_files: list[str], ids: list[str]) -> list[Any]:
    if pairs and len(pairs) != len(texts):
        raise typer.BadParameter(f"{len(pairs)} --pair for {len(texts)} --text; give one for each, or none")
    found: list[Any] = list(zip(texts, pairs, strict=True)) if pairs else list(texts)
    found += read_prompts([], [], ids, chat_files, chat=False)
    if not found:
        raise typer.BadParameter("give at least one --text, --chat-file or --prompt-ids")
    return found
