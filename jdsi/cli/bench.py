"""`jdsi bench`: measurements to repeat on your own machine."""

from typing import Annotated

import typer

from jdsi.errors import ConfigError

bench = typer.Typer(
    name="bench",
    help="Measure speed, memory and start-up here, beside the limits of this machine and other programs.",
    no_args_is_help=True,
)

Model = Annotated[str | None, typer.Argument(help="Folder or hub id; random weights of --shape by default.")]
Shape = Annotated[str, typer.Option(help="Model of random weights: llama-tiny, llama-125m, llama-1b or llama-8b.")]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16 or float16.")]
Rounds = Annotated[int, typer.Option(help="Every contender runs once per round.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


@bench.command()
def decode(
    model: Model = None,
    shape: Shape = "llama-125m",
    batch: Annotated[str, typer.Option(help="Prompts at once, as 1,4,8.")] = "1,4,8",
    prompt: Annotated[int, typer.Option(help="Tokens of each prompt.")] = 32,
    new_tokens: Annotated[int, typer.Option(help="Decoding steps to time.")] = 64,
    rounds: Rounds = 5,
    dtype: Dtype = "float32",
    peer: Annotated[list[str] | None, typer.Option(help="transformers or llama.cpp; may be repeated.")] = None,
    llama_cpp_python: Annotated[
        str | None, typer.Option(help="Python that has llama-cpp-python and gguf, if not this one.", metavar="PATH")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Tokens per second after the first, bytes per second, and the share of what bare matrix products reach."""
    batches = _numbers("--batch", batch)
    from jdsi.bench import bench_decode
    from jdsi.bench.report import show

    report = bench_decode(
        model,
        shape=shape,
        batches=batches,
        prompt=prompt,
        new_tokens=new_tokens,
        rounds=rounds,
        dtype=dtype,
        peers=peer or (),
        llama_cpp_python=llama_cpp_python,
    )
    show(report, as_json=as_json)


@bench.command()
def prefill(
    model: Model = None,
    shape: Shape = "llama-125m",
    tokens: Annotated[int, typer.Option(help="Tokens of the prompt.")] = 512,
    rounds: Rounds = 5,
    dtype: Dtype = "float32",
    peer: Annotated[list[str] | None, typer.Option(help="transformers.")] = None,
    matmul_size: Annotated[int, typer.Option(help="Rows and columns of the limit's matrix product.")] = 2048,
    as_json: AsJson = False,
) -> None:
    """Time to the first token of a long prompt, and the share of a large matrix product's rate."""
    from jdsi.bench import bench_prefill
    from jdsi.bench.report import show

    report = bench_prefill(
        model, shape=shape, tokens=tokens, rounds=rounds, dtype=dtype, peers=peer or (), matmul_size=matmul_size
    )
    show(report, as_json=as_json)


@bench.command()
def memory(
    shape: Shape = "llama-125m",
    gigabytes: Annotated[float, typer.Option(help="Size of the checkpoint to convert; 0 leaves it out.")] = 3.0,
    dtype: Annotated[str, typer.Option(help="Of the checkpoint to convert.")] = "bfloat16",
    max_shard_size: Annotated[str, typer.Option(help="Largest file of the Hugging Face folder written.")] = "500MB",
    rounds: Annotated[int, typer.Option(help="The largest of so many peaks counts.")] = 1,
    folder: Annotated[str | None, typer.Option(help="Where to write; the temporary folder by default.")] = None,
    as_json: AsJson = False,
) -> None:
    """Peak memory of loading and converting, in processes of their own, and whether it keeps to the goals."""
    from jdsi.bench import bench_memory
    from jdsi.bench.report import show

    report = bench_memory(
        shape=shape,
        gigabytes=gigabytes,
        dtype=dtype,
        max_shard_size=max_shard_size,
        rounds=rounds,
        folder=folder,
    )
    show(report, as_json=as_json)


@bench.command()
def start(
    model: Model = None,
    shape: Shape = "llama-125m",
    prompt: Annotated[int, typer.Option(help="Tokens of the prompt.")] = 32,
    rounds: Annotated[int, typer.Option(help="Rounds of one cold and one warm start.")] = 3,
    dtype: Annotated[str, typer.Option(help="Of the random weights on disk.")] = "float32",
    as_json: AsJson = False,
) -> None:
    """Seconds to the first token of a fresh process, with an empty and with a filled compilation cache."""
    from jdsi.bench import bench_start
    from jdsi.bench.report import show

    show(bench_start(model, shape=shape, prompt=prompt, rounds=rounds, dtype=dtype), as_json=as_json)


Operators = Annotated[list[str] | None, typer.Option("--op", help="Name of an operator; may be repeated.")]
Match = Annotated[str, typer.Option(help="Only arguments whose name contains this, as 'llama-8b' or 'T=1'.")]
MaxBytes = Annotated[
    int | None, typer.Option(help="Skip arguments that take more; by default 2/5 of a GPU's memory, 256 MB on a CPU.")
]


@bench.command()
def kernels(
    op: Operators = None,
    match: Match = "",
    implementation: Annotated[
        list[str] | None, typer.Option(help="xla, pallas, triton or cudnn; may be repeated; by default all.")
    ] = None,
    rounds: Rounds = 5,
    dtype: Annotated[str | None, typer.Option(help="Only arguments with an array of this, as bfloat16.")] = None,
    max_bytes: MaxBytes = None,
    as_json: AsJson = False,
) -> None:
    """Time of every operator by XLA and by kernels, and the share of the device's limit. Ctrl-C shows what there is."""
    from jdsi.bench import Selection, bench_kernels
    from jdsi.bench.report import show

    report = bench_kernels(
        Selection(op or (), match, dtype), implementations=implementation or (), rounds=rounds, max_bytes=max_bytes
    )
    show(report, as_json=as_json)
    if report.settings["interrupted"]:
        raise typer.Exit(130)


@bench.command()
def offload(
    gigabytes: Annotated[
        float | None, typer.Option(help="Size of the random checkpoint; by default 3, with --cap 10.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="That it is stored in.")] = "bfloat16",
    compute_dtype: Annotated[str, typer.Option(help="That the model runs in.")] = "float32",
    batch: Annotated[int, typer.Option(help="Rows of a batch.")] = 1,
    batches_per_pass: Annotated[str, typer.Option(help="Batches that share a pass, as 1,2,4.")] = "1,2,4,8,16",
    quantize: Annotated[
        list[str] | None, typer.Option(help="int8 or int4: stream it quantised as well; may be repeated.")
    ] = None,
    rounds: Rounds = 3,
    peer: Annotated[list[str] | None, typer.Option(help="disk-offload or cpu-offload; may be repeated.")] = None,
    cap: Annotated[
        bool,
        typer.Option("--cap", help="Instead, run it under a cap of memory a fifth of its size. Nothing is timed."),
    ] = False,
    folder: Annotated[str | None, typer.Option(help="Where to write; the temporary folder by default.")] = None,
    as_json: AsJson = False,
) -> None:
    """A model streamed from disk: seconds a pass beside the disk's own limit and other programs, and peak memory."""
    batches = _numbers("--batches-per-pass", batches_per_pass)
    if cap and (peer or quantize):
        raise ConfigError("--cap runs no peers and nothing quantised: leave out --peer and --quantize")
    from jdsi.bench import bench_offload
    from jdsi.bench.offload_cap import bench_offload_cap
    from jdsi.bench.report import show

    if cap:
        size = 10.0 if gigabytes is None else gigabytes
        show(
            bench_offload_cap(gigabytes=size, dtype=dtype, compute_dtype=compute_dtype, folder=folder), as_json=as_json
        )
        return
    report = bench_offload(
        gigabytes=3.0 if gigabytes is None else gigabytes,
        dtype=dtype,
        compute_dtype=compute_dtype,
        batch=batch,
        batches_per_pass=batches,
        quantize=quantize or (),
        rounds=rounds,
        peers=peer or (),
        folder=folder,
    )
    show(report, as_json=as_json)


@bench.command()
def parallel(
    shape: Annotated[str, typer.Option(help="Model of random weights, small, for the host's part.")] = "llama-mini",
    tensor_parallel: Annotated[str, typer.Option(help="Degrees it runs with, as 2,4,8; or none, ''.")] = "2,4,8",
    pipeline_parallel: Annotated[str, typer.Option(help="Degrees it runs with.")] = "2,4",
    data_parallel: Annotated[str, typer.Option(help="Degrees it runs with.")] = "2",
    deep_layers: Annotated[
        int, typer.Option(help="Layers that it has once more, on one device and the most; 0 leaves that out.")
    ] = 80,
    pipeline_shape: Annotated[
        str, typer.Option(help="Model for the bubbles; on a CPU one whose stages take one core each.")
    ] = "llama-deep",
    stages: Annotated[int, typer.Option(help="Of its pipeline.")] = 2,
    micro_batches: Annotated[str, typer.Option(help="On their way at a time, as 1,2,4.")] = "1,2,4",
    tokens: Annotated[int, typer.Option(help="Of a micro-batch's pass: its sequences, or 16 times its prompts.")] = 64,
    topology: Annotated[list[str] | None, typer.Option(help="Machine to predict for; may be repeated.")] = None,
    rounds: Rounds = 5,
    as_json: AsJson = False,
) -> None:
    """Host time, bubbles and exchanges on a mesh (of virtual devices without GPUs); predictions for large ones."""
    tensor, pipeline, data, micro = (
        _numbers(option, text)
        for option, text in (
            ("--tensor-parallel", tensor_parallel),
            ("--pipeline-parallel", pipeline_parallel),
            ("--data-parallel", data_parallel),
            ("--micro-batches", micro_batches),
        )
    )
    from jdsi.bench import bench_parallel
    from jdsi.bench.report import show
    from jdsi.bench.scaling import TOPOLOGIES

    report = bench_parallel(
        shape=shape,
        tensor_parallel=tensor,
        pipeline_parallel=pipeline,
        data_parallel=data,
        deep_layers=deep_layers,
        pipeline_shape=pipeline_shape,
        stages=stages,
        micro_batches=micro,
        tokens=tokens,
        topologies=topology or TOPOLOGIES,
        rounds=rounds,
    )
    show(report, as_json=as_json)


def _numbers(option: str, text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")] if text else []
    except ValueError:
        raise ConfigError(f"{option} {text!r} must be numbers with commas between them, as 1,4,8") from None
