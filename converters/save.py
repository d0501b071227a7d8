"""Writing parameters, wherever they are, as a checkpoint folder of any layout."""

import dataclasses
import shutil
import time
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from jdsi.errors import ConfigError
from jdsi.models import abstract_parameters

from .checkpoint import resolve_config
from .config import copy_companions, load_family, parse_dtype, read_config
from .destination import check_destination, new_folder
from .huggingface import parse_size, write_huggingface
from .orbax import write_orbax
from .progress import Progress, Silent
from .sharded import stored_bytes, write_sharded
from .sources import ParameterSource, check_shapes, total_bytes
from .streaming import write_streaming
from .watch import Watcher

Layout = Literal["orbax", "hf", "streaming", "sharded"]
"""The layouts that a checkpoint folder can have."""


@dataclasses.dataclass(frozen=True)
class ConversionReport:
    """What was written.

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


@dataclasses.dataclass(frozen=True)
class Form:
    """What a folder is to be, checked; arguments as for `save_parameters`.

    Raises:
        ConfigError: they are unknown or contradict each other.
    """

    to: Layout
    dtype: np.dtype | None
    ranks: int
    max_shard_size: int

    @classmethod
    def of(cls, to: Layout, dtype: Any, tensor_parallel: int | None, max_shard_size: int | str) -> "Form":
        if to not in get_args(Layout):
            raise ConfigError(f"to={to!r}: wanted is 'orbax', 'hf', 'streaming' or 'sharded'")
        if to != "sharded" and tensor_parallel is not None:
            raise ConfigError(f"tensor_parallel={tensor_parallel!r} is for to='sharded' only, not for to={to!r}")
        if to == "sharded" and (type(tensor_parallel) is not int or tensor_parallel < 1):
            raise ConfigError(f"to='sharded' needs tensor_parallel, an integer of at least 1, not {tensor_parallel!r}")
        return cls(to, None if dtype is None else parse_dtype(dtype), tensor_parallel or 1, parse_size(max_shard_size))


def save_parameters(
    source: ParameterSource,
    path: str | Path,
    *,
    like: str | Path,
    to: Layout = "orbax",
    dtype: Any = None,
    tensor_parallel: int | None = None,
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
    progress: Progress | None = None,
) -> ConversionReport:
    """Write all parameters of a model as a checkpoint folder, which appears only when it is complete and on disk.

    Args:
        source: the parameters: `MemoryParameters` of plain arrays, `ShardedParameters` of arrays on a mesh, or a
            checkpoint's. They are read one at a time; no more is in memory than the largest layer, or the embedding.
        path: the folder to make.
        like: a checkpoint folder or hub id of the same model, whose config, tokenizer and generation files go along, or
            a config file alone.
        to: `"orbax"`, `"hf"`, `"streaming"`, from which models larger than memory run fastest, or `"sharded"`, cut for
            one degree of tensor parallelism, at which it loads fastest; every other can read it too.
        dtype: `"float32"`, `"bfloat16"` or `"float16"`; `None` keeps every parameter's.
        tensor_parallel: the degree that `"sharded"`, and nothing else, is cut for.
        max_shard_size: largest weight file of `"hf"`, in bytes or as text (`"500MB"`).
        overwrite: replace an existing checkpoint, once the new one is complete.
        progress: told of bytes of weights; silent by default.

    Raises:
        CheckpointError: the parameters are not those of the model that `like` describes, or cannot be read; the
            destination exists, cannot be written or is not apart from `like`; the disk is full.
        ConfigError: the family or an option is not supported.

    Warns:
        NonFiniteWarning: parameters hold NaN or infinity; they are written as they are.
    """
    began = time.monotonic()
    form, target, origin = Form.of(to, dtype, tensor_parallel, max_shard_size), Path(path), resolve_config(like)
    config = origin if origin.is_file() else origin / "config.json"
    check_destination(target, overwrite=overwrite, source=origin)
    family, spec = load_family(origin)
    shapes = {name: tuple(leaf.shape) for name, leaf in abstract_parameters(spec).items()}
    check_shapes(f"what is to be saved like {origin}", source.shapes, shapes)
    needed = total_bytes(source, form.dtype)
    progress = progress or Silent()
    watcher = Watcher(progress)
    progress.start(needed)
    if to == "sharded":
        needed = stored_bytes(source, spec, form.ranks, form.dtype)
    try:
        with new_folder(target, overwrite=overwrite, needed_bytes=needed) as partial:
            copy_companions(origin, partial)
            if to == "hf":
                write_huggingface(
                    source,
                    family.weight_map(spec),
                    read_config(config),
                    partial,
                    dtype=form.dtype,
                    max_shard_size=form.max_shard_size,
                    watch=watcher,
                )
            else:
                if to == "sharded":
                    write_sharded(source, spec, partial, ranks=form.ranks, dtype=form.dtype, watch=watcher)
                else:
                    write = write_orbax if to == "orbax" else write_streaming
                    write(source, partial, dtype=form.dtype, watch=watcher)
                # Last, so that a folder left by a killed process does not open.
                shutil.copyfile(config, partial / "config.json")
    finally:
        progress.finish()
    watcher.warn(str(origin))
    files = tuple(sorted(str(file.relative_to(target)) for file in target.rglob("*") if file.is_file()))
    return ConversionReport(target, files, needed, time.monotonic() - began)
