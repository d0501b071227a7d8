"""Writing parameters, wherever they are, as a checkpoint folder of any layout."""

import dataclasses
import json
import math
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from jdsi.errors import ConfigError
from jdsi.models import TransformerSpec, parameters_of, shapes_of
from jdsi.models.families.architecture import exported_config
from jdsi.pallas_kernels.quantized_linear import WeightFormat

from .config import config_as_written, copy_companions, load_family, parse_dtype, read_config
from .destination import check_destination, new_folder
from .fitting import fit_names
from .huggingface import parse_size, write_huggingface
from .location import resolve_config
from .orbax import write_orbax
from .progress import Progress, Silent
from .quantization import Quantization
from .sharded import stored_bytes, write_sharded
from .sources import ParameterSource, check_shapes
from .streaming import StreamingCheckpoint, write_streaming
from .streaming_layout import streaming_bytes
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
    quantization: Quantization | None

    @classmethod
    def of(
        cls,
        to: Layout,
        *,
        dtype: Any = None,
        tensor_parallel: int | None = None,
        max_shard_size: int | str = "5GB",
        quantize: str | None = None,
        group_size: int | None = None,
    ) -> "Form":
        if to not in get_args(Layout):
            raise ConfigError(f"to={to!r}: wanted is 'orbax', 'hf', 'streaming' or 'sharded'")
        if to != "sharded" and tensor_parallel is not None:
            raise ConfigError(f"tensor_parallel={tensor_parallel!r} is for to='sharded' only, not for to={to!r}")
        if to == "sharded" and (type(tensor_parallel) is not int or tensor_parallel < 1):
            raise ConfigError(f"to='sharded' needs tensor_parallel, an integer of at least 1, not {tensor_parallel!r}")
        if to != "streaming" and quantize is not None:
            raise ConfigError(f"quantize={quantize!r} is for to='streaming' only, not for to={to!r}")
        if quantize is None and group_size is not None:
            raise ConfigError(f"group_size={group_size!r} is for quantize='int8' or 'int4', which is not given")
        sizes = {} if group_size is None else {"group_size": group_size}
        return cls(
            to,
            None if dtype is None else parse_dtype(dtype),
            tensor_parallel or 1,
            parse_size(max_shard_size),
            None if quantize is None else Quantization(quantize, **sizes),
        )


def save_parameters(
    source: ParameterSource,
    path: str | Path,
    *,
    like: str | Path,
    to: Layout = "orbax",
    dtype: Any = None,
    tensor_parallel: int | None = None,
    max_shard_size: int | str = "5GB",
    quantize: str | None = None,
    group_size: int | None = None,
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
        quantize: `"int8"` or `"int4"` stores the weight matrices of linear layers in that, for `"streaming"` only;
            embeddings, norms and biases stay as they are, and so do matrices that int4 cannot take, whose inputs are
            not in multiples of 32. Whoever reads the folder gets plain parameters.
        group_size: inputs of a row that share a scale, 128 (the default), 64 or 32. A matrix whose inputs are not a
            multiple of it takes the next smaller size that fits, or in int8 one scale a row.
        overwrite: replace an existing checkpoint, once the new one is complete.
        progress: told of bytes of weights; silent by default.

    Raises:
        CheckpointError: the parameters are not those of the model that `like` describes, or cannot be read, or hold
            NaN or infinity where they are to be quantised; the destination exists, cannot be written or is not apart
            from `like`; the disk is full.
        ConfigError: the family or an option is not supported, or what is to be quantised already is.

    Warns:
        NonFiniteWarning: parameters hold NaN or infinity; they are written as they are.
    """
    began = time.monotonic()
    form = Form.of(
        to,
        dtype=dtype,
        tensor_parallel=tensor_parallel,
        max_shard_size=max_shard_size,
        quantize=quantize,
        group_size=group_size,
    )
    target, origin = Path(path), resolve_config(like)
    config = origin if origin.is_file() else origin / "config.json"
    check_destination(target, overwrite=overwrite, source=origin)
    family, said = load_family(origin)
    spec = fit_names(said, source.shapes)
    check_shapes(f"what is to be saved like {origin}", source.shapes, shapes_of(spec))
    written = exported_config(config_as_written(read_config(config), spec), spec)
    formats = _formats(source, spec, form)
    needed = _bytes_read(source, form.dtype, formats)
    progress = progress or Silent()
    watcher = Watcher(progress)
    progress.start(needed)
    if to == "sharded":
        needed = stored_bytes(source, spec, form.ranks, form.dtype)
    elif to == "streaming":
        needed = streaming_bytes(source, form.dtype, formats)
    try:
        with new_folder(target, overwrite=overwrite, needed_bytes=needed) as partial:
            copy_companions(origin, partial)
            if to == "hf":
                write_huggingface(
                    source,
                    family.weight_map(spec),
                    written,
                    partial,
                    dtype=form.dtype,
                    max_shard_size=form.max_shard_size,
                    watch=watcher,
                )
            else:
                if to == "sharded":
                    write_sharded(source, spec, partial, ranks=form.ranks, dtype=form.dtype, watch=watcher)
                elif to == "streaming":
                    write_streaming(source, spec, partial, dtype=form.dtype, watch=watcher, formats=formats)
                else:
                    write_orbax(source, spec, partial, dtype=form.dtype, watch=watcher)
                # Last, so that a folder left by a killed process does not open.
                if spec == said:
                    shutil.copyfile(config, partial / "config.json")
                else:
                    (partial / "config.json").write_text(json.dumps(written, indent=2) + "\n")
    finally:
        progress.finish()
    watcher.warn(str(origin))
    files = tuple(sorted(str(file.relative_to(target)) for file in target.rglob("*") if file.is_file()))
    return ConversionReport(target, files, needed, time.monotonic() - began)


def _formats(source: ParameterSource, spec: TransformerSpec, form: Form) -> Mapping[str, WeightFormat]:
    if form.quantization is None:
        return {}
    if isinstance(source, StreamingCheckpoint) and source.quantized:
        raise ConfigError(f"{source.path}: already quantised; quantize what it was made of, or its error would grow")
    return form.quantization.formats(parameters_of(spec))


def _bytes_read(source: ParameterSource, dtype: np.dtype | None, formats: Mapping[str, WeightFormat]) -> int:
    """Bytes that the source is asked for: in `dtype`, or as stored, as all that is quantised is."""
    kept = {name: own if dtype is None or name in formats else dtype for name, own in source.dtypes.items()}
    return sum(math.prod(shape) * kept[name].itemsize for name, shape in source.shapes.items())
