"""`jdsi classify`: labels of texts by a sequence classifier."""

import contextlib
import json
import sys
from typing import Annotated, Any

import typer

from jdsi.without_torch import import_transformers_without_torch

from .engine_options import (
    Coordinator,
    DataParallel,
    Distributed,
    GpuDirect,
    Kernels,
    NumProcesses,
    Offload,
    PipelineParallel,
    ProcessId,
    Strict,
    TensorParallel,
    Tokenizer,
    Weights,
    join_others,
    silence,
)
from .progress import progress_line
from .prompts import read_prompts

_TEXTS = "Texts (each may be repeated)"


def classify(
    model: Annotated[str, typer.Argument(help="Folder of a Hugging Face or converted checkpoint, or a hub id.")],
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
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    offload: Offload = None,
    memory_limit: Annotated[
        str | None, typer.Option(help="With --offload: memory to keep to, as 2GiB; by default what is free.")
    ] = None,
    gpu_direct: GpuDirect = False,
    tensor_parallel: TensorParallel = 1,
    pipeline_parallel: PipelineParallel = 1,
    data_parallel: DataParallel = 1,
    distributed: Distributed = False,
    coordinator: Coordinator = None,
    num_processes: NumProcesses = None,
    process_id: ProcessId = None,
    kernels: Kernels = True,
    tokenizer: Tokenizer = None,
    checkpoint: Weights = None,
    strict: Strict = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Label texts, or pairs of texts, with a sequence classifier: a line for each, the label and its score."""
    texts = _texts(text or [], pair or [], chat_file or [], prompt_ids or [])
    import_transformers_without_torch()  # slow, as what follows: mistakes above are answered before
    from jdsi import init_inference

    first = join_others(distributed, coordinator, num_processes, process_id)
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
    with contextlib.closing(engine), progress_line(engine), contextlib.nullcontext() if first else silence():
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
