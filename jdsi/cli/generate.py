"""`jdsi generate`: text from a checkpoint."""

import contextlib
import dataclasses
import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from .engine_options import (
    PARALLELISM,
    Coordinator,
    DataParallel,
    Distributed,
    GpuDirect,
    Kernels,
    NumProcesses,
    Offload,
    PipelineParallel,
    ProcessId,
    TensorParallel,
    Tokenizer,
    join_others,
    silence,
)
from .progress import progress_line
from .prompts import read_prompts

_SAMPLING = "Sampling"
_PROMPTS = "Prompts (each may be repeated)"


def generate(
    model: Annotated[str, typer.Argument(help="Folder of a Hugging Face or converted checkpoint, or a hub id.")],
    prompt: Annotated[list[str] | None, typer.Option(help="Text to continue.", rich_help_panel=_PROMPTS)] = None,
    prompt_file: Annotated[
        list[str] | None,
        typer.Option(help="UTF-8 file with text to continue; - is standard input.", rich_help_panel=_PROMPTS),
    ] = None,
    prompt_ids: Annotated[
        list[str] | None, typer.Option(help="Token ids to continue, as 5,6,7.", rich_help_panel=_PROMPTS)
    ] = None,
    chat: Annotated[
        bool,
        typer.Option("--chat", help="Texts are a user's messages: apply the chat template.", rich_help_panel=_PROMPTS),
    ] = False,
    chat_file: Annotated[
        list[str] | None,
        typer.Option(
            help="JSON file with a list of messages, or an object of messages, tools, documents, ... as jdsi.Chat has; "
            "- is standard input.",
            rich_help_panel=_PROMPTS,
        ),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Stop after this many tokens.", rich_help_panel=_SAMPLING)] = 128,
    min_new_tokens: Annotated[int, typer.Option(help="Do not stop before.", rich_help_panel=_SAMPLING)] = 0,
    temperature: Annotated[float, typer.Option(help="0 is greedy.", rich_help_panel=_SAMPLING)] = 0.0,
    top_k: Annotated[int, typer.Option(help="0 is off.", rich_help_panel=_SAMPLING)] = 0,
    top_p: Annotated[float, typer.Option(help="1 is off.", rich_help_panel=_SAMPLING)] = 1.0,
    min_p: Annotated[float, typer.Option(help="0 is off.", rich_help_panel=_SAMPLING)] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(help="1 is off.", rich_help_panel=_SAMPLING)] = 1.0,
    presence_penalty: Annotated[float, typer.Option(help="0 is off.", rich_help_panel=_SAMPLING)] = 0.0,
    frequency_penalty: Annotated[float, typer.Option(help="0 is off.", rich_help_panel=_SAMPLING)] = 0.0,
    no_repeat_ngram: Annotated[int, typer.Option(help="0 is off.", rich_help_panel=_SAMPLING)] = 0,
    num_beams: Annotated[int, typer.Option(help="Beam search of this width.", rich_help_panel=_SAMPLING)] = 1,
    stop: Annotated[list[str] | None, typer.Option(help="End at this text.", rich_help_panel=_SAMPLING)] = None,
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="Go on behind EOS.", rich_help_panel=_SAMPLING)
    ] = False,
    logprobs: Annotated[
        int | None, typer.Option(help="With --json: report this many top tokens per step.", rich_help_panel=_SAMPLING)
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Makes sampling repeatable.", rich_help_panel=_SAMPLING)] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    offload: Offload = None,
    memory_limit: Annotated[
        str | None,
        typer.Option(help="With --offload or --parallelism: memory to keep to, as 2GiB; by default what is free."),
    ] = None,
    gpu_direct: GpuDirect = False,
    kv_offload: Annotated[
        str | None, typer.Option(help="With --offload: host or nvme, where keys and values live as well.")
    ] = None,
    spill_folder: Annotated[
        Path | None, typer.Option(help="With --kv-offload nvme: where; by default the temporary folder.")
    ] = None,
    devices_per_link: Annotated[
        int, typer.Option(help="With --kv-offload: devices that share a link to the host.")
    ] = 1,
    tensor_parallel: TensorParallel = 1,
    pipeline_parallel: PipelineParallel = 1,
    data_parallel: DataParallel = 1,
    parallelism: Annotated[
        str | None,
        typer.Option(help="auto, latency or throughput: choose the degrees.", rich_help_panel=PARALLELISM),
    ] = None,
    distributed: Distributed = False,
    coordinator: Coordinator = None,
    num_processes: NumProcesses = None,
    process_id: ProcessId = None,
    kernels: Kernels = True,
    tokenizer: Tokenizer = None,
    stream: Annotated[bool, typer.Option("--stream", help="Print text as it comes (one prompt).")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Continue prompts with a model."""
    from jdsi import SamplingParams, init_inference

    prompts = read_prompts(prompt or [], prompt_file or [], prompt_ids or [], chat_file or [], chat=chat)
    if not prompts:
        raise typer.BadParameter("give at least one --prompt, --prompt-file, --prompt-ids or --chat-file")
    if stream and (as_json or len(prompts) > 1):
        raise typer.BadParameter("--stream prints one prompt's text as it comes; leave out --json and further prompts")
    if logprobs is not None and not as_json:
        raise typer.BadParameter("--logprobs is shown only with --json")
    sampling = SamplingParams(
        max_new_tokens=max_new_tokens,
        min_new_tokens=min_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        no_repeat_ngram=no_repeat_ngram,
        num_beams=num_beams,
        stop=tuple(stop or ()),
        ignore_eos=ignore_eos,
        logprobs=logprobs,
        seed=seed,
    )
    first = join_others(distributed, coordinator, num_processes, process_id)
    engine = init_inference(
        model,
        dtype=dtype,
        tokenizer=tokenizer,
        offload=offload,
        memory_limit=memory_limit,
        gpu_direct=gpu_direct,
        kv_offload=kv_offload,
        spill_folder=spill_folder,
        devices_per_link=devices_per_link,
        kernels=kernels,
        tensor_parallel=tensor_parallel,
        pipeline_parallel=pipeline_parallel,
        data_parallel=data_parallel,
        parallelism=parallelism,
    )
    with contextlib.closing(engine), progress_line(engine):
        choice = engine.executor.choice
        if choice is not None and first:
            sys.stderr.write(f"{choice.explain()}\n")
        with contextlib.nullcontext() if first else silence():
            _run(engine, prompts, sampling, stream=stream, as_json=as_json)


def _run(engine: Any, prompts: list[Any], sampling: Any, *, stream: bool, as_json: bool) -> None:
    if stream:
        for event in engine.stream(prompts, sampling):
            sys.stdout.write(event.text if engine.tokenizer is not None else f"{event.token_id} ")
            sys.stdout.flush()
        sys.stdout.write("\n")
        return
    completions = engine.generate(prompts, sampling)
    if as_json:
        json.dump(
            {"completions": [dataclasses.asdict(c) for c in completions], "stats": engine.stats.as_dict()}, sys.stdout
        )
        sys.stdout.write("\n")
        return
    for shown, completion in zip(prompts, completions, strict=True):
        lead = shown if isinstance(shown, str) else ""
        text = completion.text if engine.tokenizer is not None else ",".join(map(str, completion.token_ids))
        sys.stdout.write(f"{lead}{text}\n")
    sys.stderr.write(f"{engine.stats.summary()}\n")
