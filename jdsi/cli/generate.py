"""`jdsi generate`: text from a checkpoint."""

import contextlib
import dataclasses
import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from jdsi.errors import ConfigError
from jdsi.without_torch import import_transformers_without_torch

from . import engine_options as options
from .progress import progress_line
from .prompts import read_prompts, token_ids

_SAMPLING = "Sampling"
_PROMPTS = "Prompts (each may be repeated)"


def generate(
    model: options.Model,
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
    max_new_tokens: Annotated[
        int | None, typer.Option(help="Stop after this many tokens.", rich_help_panel=_SAMPLING)
    ] = None,
    min_new_tokens: Annotated[int | None, typer.Option(help="Do not stop before.", rich_help_panel=_SAMPLING)] = None,
    n: Annotated[
        int | None, typer.Option("--n", help="Results for each prompt, sampled or beams.", rich_help_panel=_SAMPLING)
    ] = None,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy.", rich_help_panel=_SAMPLING)] = None,
    top_k: Annotated[int | None, typer.Option(help="0 is off.", rich_help_panel=_SAMPLING)] = None,
    top_p: Annotated[float | None, typer.Option(help="1 is off.", rich_help_panel=_SAMPLING)] = None,
    min_p: Annotated[float | None, typer.Option(help="0 is off.", rich_help_panel=_SAMPLING)] = None,
    typical_p: Annotated[float | None, typer.Option(help="1 is off.", rich_help_panel=_SAMPLING)] = None,
    epsilon_cutoff: Annotated[float | None, typer.Option(help="0 is off.", rich_help_panel=_SAMPLING)] = None,
    eta_cutoff: Annotated[float | None, typer.Option(help="0 is off.", rich_help_panel=_SAMPLING)] = None,
    repetition_penalty: Annotated[float | None, typer.Option(help="1 is off.", rich_help_panel=_SAMPLING)] = None,
    presence_penalty: Annotated[float | None, typer.Option(help="0 is off.", rich_help_panel=_SAMPLING)] = None,
    frequency_penalty: Annotated[float | None, typer.Option(help="0 is off.", rich_help_panel=_SAMPLING)] = None,
    no_repeat_ngram: Annotated[int | None, typer.Option(help="0 is off.", rich_help_panel=_SAMPLING)] = None,
    bad_words: Annotated[
        list[str] | None, typer.Option(help="A word that must not occur.", rich_help_panel=_SAMPLING)
    ] = None,
    suppress_tokens: Annotated[
        str | None, typer.Option(help="Token ids that must not occur, as 1,2.", rich_help_panel=_SAMPLING)
    ] = None,
    guidance_scale: Annotated[
        float | None, typer.Option(help="Away from the negative prompt; 1 is off.", rich_help_panel=_SAMPLING)
    ] = None,
    negative_prompt: Annotated[
        str | None, typer.Option(help="By default the prompt's last token.", rich_help_panel=_SAMPLING)
    ] = None,
    num_beams: Annotated[int | None, typer.Option(help="Beam search of this width.", rich_help_panel=_SAMPLING)] = None,
    length_penalty: Annotated[
        float | None, typer.Option(help="With beams: above 0 favours length.", rich_help_panel=_SAMPLING)
    ] = None,
    stop: Annotated[list[str] | None, typer.Option(help="End at this text.", rich_help_panel=_SAMPLING)] = None,
    stop_token_ids: Annotated[
        str | None, typer.Option(help="End at these tokens, as 1,2.", rich_help_panel=_SAMPLING)
    ] = None,
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="Go on behind EOS.", rich_help_panel=_SAMPLING)
    ] = False,
    logprobs: Annotated[
        int | None, typer.Option(help="With --json: report this many top tokens per step.", rich_help_panel=_SAMPLING)
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Makes sampling repeatable.", rich_help_panel=_SAMPLING)] = None,
    sampling: Annotated[
        str | None,
        typer.Option(
            help="These and more as a JSON object, or @FILE with one, see docs/generation.md; other options win.",
            rich_help_panel=_SAMPLING,
        ),
    ] = None,
    generation_config: Annotated[
        str,
        typer.Option(help="ignore: not what the model's folder asks for by default.", rich_help_panel=_SAMPLING),
    ] = "auto",
    dtype: options.Dtype = "auto",
    offload: options.Offload = None,
    memory_limit: Annotated[
        str | None,
        typer.Option(help="With --offload or --parallelism: memory to keep to, as 2GiB; by default what is free."),
    ] = None,
    gpu_direct: options.GpuDirect = False,
    kv_offload: Annotated[
        str | None, typer.Option(help="With --offload: host or nvme, where keys and values live as well.")
    ] = None,
    spill_folder: Annotated[
        Path | None, typer.Option(help="With --kv-offload nvme: where; by default the temporary folder.")
    ] = None,
    devices_per_link: Annotated[
        int, typer.Option(help="With --kv-offload: devices that share a link to the host.")
    ] = 1,
    tensor_parallel: options.TensorParallel = 1,
    pipeline_parallel: options.PipelineParallel = 1,
    data_parallel: options.DataParallel = 1,
    parallelism: Annotated[
        str | None,
        typer.Option(help="auto, latency or throughput: choose the degrees.", rich_help_panel=options.PARALLELISM),
    ] = None,
    distributed: options.Distributed = False,
    coordinator: options.Coordinator = None,
    num_processes: options.NumProcesses = None,
    process_id: options.ProcessId = None,
    kernels: options.Kernels = True,
    tokenizer: options.Tokenizer = None,
    checkpoint: options.Weights = None,
    strict: options.Strict = False,
    stream: Annotated[bool, typer.Option("--stream", help="Print text as it comes (one prompt).")] = False,
    as_json: options.AsJson = False,
) -> None:
    """Continue prompts with a model."""
    prompts = read_prompts(prompt or [], prompt_file or [], prompt_ids or [], chat_file or [], chat=chat)
    if not prompts:
        raise typer.BadParameter("give at least one --prompt, --prompt-file, --prompt-ids or --chat-file")
    if stream and (as_json or len(prompts) > 1):
        raise typer.BadParameter("--stream prints one prompt's text as it comes; leave out --json and further prompts")
    if logprobs is not None and not as_json:
        raise typer.BadParameter("--logprobs is shown only with --json")
    own = {
        "max_new_tokens": max_new_tokens,
        "min_new_tokens": min_new_tokens,
        "n": n,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "typical_p": typical_p,
        "epsilon_cutoff": epsilon_cutoff,
        "eta_cutoff": eta_cutoff,
        "repetition_penalty": repetition_penalty,
        "presence_penalty": presence_penalty,
        "frequency_penalty": frequency_penalty,
        "no_repeat_ngram": no_repeat_ngram,
        "bad_words": bad_words or None,
        "suppress_tokens": None if suppress_tokens is None else token_ids(suppress_tokens, "--suppress-tokens"),
        "guidance_scale": guidance_scale,
        "negative_prompt": negative_prompt,
        "num_beams": num_beams,
        "length_penalty": length_penalty,
        "stop": stop or None,
        "stop_token_ids": None if stop_token_ids is None else token_ids(stop_token_ids, "--stop-token-ids"),
        "ignore_eos": ignore_eos or None,
        "logprobs": logprobs,
        "seed": seed,
    }
    given = {name: value for name, value in own.items() if value is not None}
    asked = {**_sampling(sampling), **given}
    import_transformers_without_torch()  # slow, as what follows: mistakes above are answered before
    from jdsi import SamplingParams, init_inference

    params = SamplingParams.from_dict(asked)
    if stream and params.given.get("n", 1) > 1:
        raise typer.BadParameter("--stream prints one result's text as it comes; leave out --n")
    first = options.join_others(distributed, coordinator, num_processes, process_id)
    engine = init_inference(
        model,
        dtype=dtype,
        tokenizer=tokenizer,
        checkpoint=checkpoint,
        strict=strict,
        generation_config=generation_config,
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
        with contextlib.nullcontext() if first else options.silence():
            _run(engine, prompts, params, stream=stream, as_json=as_json)


def _run(engine: Any, prompts: list[Any], sampling: Any, *, stream: bool, as_json: bool) -> None:
    if stream:
        for event in engine.stream(prompts, dataclasses.replace(sampling, n=1)):
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
        for one in (completion, *completion.alternatives):
            text = one.text if engine.tokenizer is not None else ",".join(map(str, one.token_ids))
            sys.stdout.write(f"{lead}{text}\n")
    sys.stderr.write(f"{engine.stats.summary()}\n")


def _sampling(text: str | None) -> dict[str, Any]:
    """The sampling parameters in a JSON object, or in the file behind an @."""
    if text is None:
        return {}
    try:
        found = json.loads(Path(text[1:]).read_text() if text.startswith("@") else text)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--sampling {text} cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise ConfigError(f"--sampling holds a JSON {type(found).__name__}; it must be an object")
    return found
