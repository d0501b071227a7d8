"""Converting between checkpoint layouts in bounded memory."""

import dataclasses
import shutil
import time
from pathlib import Path
from typing import Any, Literal

from jdsi.errors import ConfigError
from jdsi.models import abstract_parameters

from .checkpoint import open_checkpoint, parameters_of
from .config import copy_companions, load_family, parse_dtype, read_config
from .destination import check_destination, new_folder
from .huggingface import parse_size, write_huggingface
from .orbax import write_orbax
from .progress import Progress, Silent
from .sharded import stored_bytes, write_sharded
from .sources import total_bytes
from .streaming import write_streaming
from .watch import Watcher


@dataclasses.dataclass(frozen=True)
class ConversionReport:
    """What a conversion did.

    Attributes:
        destination: the folder made.
        files: every file in it, relative.
        bytes: of weights written.
        seconds: wall time, flushing to disk included.
    """

    destination: Path
    files: tuple[str, ...]
    bytes: int
    seconds: float


def convert(
    source: str | Path,
    destination: str | Path,
    *,
    to: Literal["orbax", "hf", "streaming", "sharded"],
    dtype: Any = None,
    tensor_parallel: int | None = None,
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
    progress: Progress | None = None,
) -> ConversionReport:
    """Convert a checkpoint to one of our folders or to the Hugging Face layout.

    Peak memory over the base process is the largest tensor group (a layer, or the embedding) and a constant, whatever
    the model's size. The destination appears only when it is complete and on disk.

    Args:
        source: a Hugging Face folder or hub id, or a folder that this function made.
        destination: the folder to make.
        to: `"orbax"`, `"hf"`, `"streaming"`, from which models larger than memory run fastest, or `"sharded"`, cut for
            one degree of tensor parallelism, at which it loads fastest; every other can read it too.
        dtype: `"float32"`, `"bfloat16"` or `"float16"`; `None` keeps every parameter's type, and the way back is then
            bit-exact.
        tensor_parallel: the degree that `"sharded"`, and nothing else, is cut for.
        max_shard_size: largest weight file of `"hf"`, in bytes or as text (`"500MB"`).
        overwrite: replace an existing checkpoint, once the new one is complete.
        progress: told of bytes of weights; silent by default.

    Raises:
        CheckpointError: the source is missing, damaged or does not fit its config; the destination exists, cannot be
            written or is not apart from the source; the disk is full.
        ConfigError: the family or an option is not supported.

    Warns:
        NonFiniteWarning: tensors hold NaN or infinity; they are converted as they are.
    """
    began = time.monotonic()
    if to not in ("orbax", "hf", "streaming", "sharded"):
        raise ConfigError(f"to={to!r}: wanted is 'orbax', 'hf', 'streaming' or 'sharded'")
    ranks = _check_degree(to, tensor_parallel)
    kept = None if dtype is None else parse_dtype(dtype)
    size = parse_size(max_shard_size)
    target = Path(destination)
    check_destination(target, overwrite=overwrite, source=Path(source) if Path(source).exists() else None)
    checkpoint = open_checkpoint(source)
    family, spec = load_family(checkpoint.path)
    weight_map = family.weight_map(spec)
    shapes = {name: tuple(leaf.shape) for name, leaf in abstract_parameters(spec).items()}
    parameters = parameters_of(checkpoint, weight_map, shapes)
    progress = progress or Silent()
    watcher = Watcher(progress)
    needed = total_bytes(parameters, kept) if to != "sharded" else stored_bytes(parameters, spec, ranks, kept)
    progress.start(total_bytes(parameters, kept))
    try:
        with new_folder(target, overwrite=overwrite, needed_bytes=needed) as partial:
            copy_companions(checkpoint.path, partial)
            if to == "hf":
                config = read_config(checkpoint.path)
                write_huggingface(
                    parameters, weight_map, config, partial, dtype=kept, max_shard_size=size, watch=watcher
                )
            else:
                if to == "sharded":
                    write_sharded(parameters, spec, partial, ranks=ranks, dtype=kept, watch=watcher)
                else:
                    write = write_orbax if to == "orbax" else write_streaming
                    write(parameters, partial, dtype=kept, watch=watcher)
                shutil.copyfile(checkpoint.path / "config.json", partial / "config.json")
    finally:
        progress.finish()
    watcher.warn(str(checkpoint.path))
    files = tuple(sorted(str(f.relative_to(target)) for f in target.rglob("*") if f.is_file()))
    return ConversionReport(target, files, needed, time.monotonic() - began)


def _check_degree(to: str, tensor_parallel: int | None) -> int:
    if to != "sharded":
        if tensor_parallel is not None:
            raise ConfigError(f"tensor_parallel={tensor_parallel!r} is for to='sharded' only, not for to={to!r}")
        return 1
    if type(tensor_parallel) is not int or tensor_parallel < 1:
        raise ConfigError(f"to='sharded' needs tensor_parallel, an integer of at least 1, not {tensor_parallel!r}")
    return tensor_parallel
