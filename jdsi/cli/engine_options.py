"""Options that every command with an engine has, and what several processes that run one command do first."""

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Annotated

import typer

PARALLELISM = "Parallelism"

Model = Annotated[str, typer.Argument(help="Folder of a Hugging Face or converted checkpoint, or a hub id.")]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]
Offload = Annotated[str | None, typer.Option(help="host, nvme or auto: weights that need not stay on the device.")]
GpuDirect = Annotated[
    bool,
    typer.Option("--gpu-direct", help="With --offload nvme: read straight into the memory of GPUs; needs kvikio."),
]
TensorParallel = Annotated[int, typer.Option(help="Devices that share every layer.", rich_help_panel=PARALLELISM)]
PipelineParallel = Annotated[int, typer.Option(help="Stages of layers.", rich_help_panel=PARALLELISM)]
DataParallel = Annotated[int, typer.Option(help="Groups of devices that share a batch.", rich_help_panel=PARALLELISM)]
Distributed = Annotated[
    bool,
    typer.Option(
        "--distributed",
        help="Several processes run this command; SLURM, Open MPI or Kubernetes says which.",
        rich_help_panel=PARALLELISM,
    ),
]
Coordinator = Annotated[
    str | None, typer.Option(help="HOST:PORT of process 0, where nothing says which.", rich_help_panel=PARALLELISM)
]
NumProcesses = Annotated[int | None, typer.Option(help="How many do.", rich_help_panel=PARALLELISM)]
ProcessId = Annotated[int | None, typer.Option(help="Which of them this is; 0 prints.", rich_help_panel=PARALLELISM)]
Kernels = Annotated[bool, typer.Option(help="Use hand-written GPU kernels.")]
Strict = Annotated[bool, typer.Option("--strict", help="Refuse tensors that the model does not use.")]
Weights = Annotated[
    str | None,
    typer.Option("--checkpoint", help="Where the weights are, if not MODEL: a folder, hub id or JSON list of files."),
]
Tokenizer = Annotated[str | None, typer.Option(help="Folder or hub id, if not the model's own.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


def join_others(distributed: bool, coordinator: str | None, num_processes: int | None, process_id: int | None) -> bool:
    """Makes this one of several processes, if told to; whether it is the one that shows what all of them find."""
    if not distributed and (coordinator, num_processes, process_id) == (None, None, None):
        return True
    import jax

    from jdsi.sharding import initialize

    # What carries data between CPUs reports its connections on standard output, which is for what the model says.
    sys.stdout = os.fdopen(os.dup(1), "w", encoding=sys.stdout.encoding, errors=sys.stdout.errors)
    os.dup2(2, 1)
    initialize(coordinator, num_processes, process_id)
    return jax.process_index() == 0


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Around what another process shows."""
    with (
        open(os.devnull, "w", errors="replace") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        yield
