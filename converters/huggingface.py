"""Writing checkpoints in the Hugging Face layout, through the family's table run backwards."""

import collections
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jdsi.errors import ConfigError
from jdsi.models import Transformer, parameters
from jdsi.models.families import family_for
from jdsi.models.families.architecture import exported_config
from jdsi.models.weight_map import Entry, Shape, WeightMap

from .config import config_as_written, copy_companions, parse_dtype, read_config, read_json
from .destination import check_destination, new_folder
from .progress import Progress, Silent
from .safetensors_file import SafetensorsWriter
from .sources import MemoryParameters, ParameterSource, Watch, total_bytes
from .watch import Watcher

_PREFIXES = "KMGT"
_UNITS = {
    "B": 1,
    **{f"{prefix}B": 1000**i for i, prefix in enumerate(_PREFIXES, 1)},
    **{f"{prefix}IB": 1024**i for i, prefix in enumerate(_PREFIXES, 1)},
}


def parse_size(size: int | str) -> int:
    """Bytes from a number or from text such as `"5GB"`, `"500MB"`, `"2GiB"` or `"1TiB"`.

    Raises:
        ConfigError: the text is not a positive size.
    """
    found = re.fullmatch(rf"\s*(\d+(?:\.\d+)?)\s*([{_PREFIXES}]?i?B|[{_PREFIXES}]i?)?\s*", str(size), re.IGNORECASE)
    unit = (found[2] or "B").upper() if found else "B"
    if found and unit not in _UNITS:  # "8G" is 1000 or 1024 to the third, depending on who reads it
        prefix = unit[0]
        raise ConfigError(f"size {size!r}: say {found[1]}{prefix}B (of 1000) or {found[1]}{prefix}iB (of 1024)")
    value = int(float(found[1]) * _UNITS[unit]) if found else 0
    if value <= 0:
        raise ConfigError(f"size {size!r}: wanted is a positive number of bytes or text such as '5GB' or '500MB'")
    return value


def plan_shards(tensors: Mapping[str, tuple[np.dtype, Shape]], max_shard_size: int) -> dict[str, list[str]]:
    """File name to tensor names, in order, each file at most `max_shard_size` bytes unless one tensor is larger."""
    shards: list[list[str]] = [[]]
    used = 0
    for name, (dtype, shape) in tensors.items():
        nbytes = math.prod(shape) * dtype.itemsize
        if shards[-1] and used + nbytes > max_shard_size:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += nbytes
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    return {f"model-{i:05}-of-{len(shards):05}.safetensors": names for i, names in enumerate(shards, 1)}


def write_index(folder: Path, shards: Mapping[str, list[str]], tensors: Mapping[str, tuple[np.dtype, Shape]]) -> None:
    """Write the index of a sharded checkpoint; nothing for a single file."""
    if len(shards) == 1:
        return
    total = sum(math.prod(shape) * dtype.itemsize for dtype, shape in tensors.values())
    index = {
        "metadata": {"total_size": total},
        "weight_map": {name: file for file, names in shards.items() for name in names},
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def write_huggingface(
    source: ParameterSource,
    weight_map: WeightMap,
    config: Mapping[str, Any],
    folder: Path,
    *,
    dtype: np.dtype | None,
    max_shard_size: int,
    watch: Watch,
) -> None:
    """Write weights, index and `config.json` into an existing `folder`. Memory: one parameter and what it is read with.

    Args:
        source: the parameters.
        weight_map: the family's table.
        config: `config.json` of these parameters; its `dtype` is set to the type that most bytes have.
        dtype: cast every parameter; `None` keeps each as it is.
        max_shard_size: in bytes.
        watch: sees every block read.
    """
    tensors: dict[str, tuple[np.dtype, Shape]] = {}
    places: dict[str, tuple[Entry, int]] = {}
    bytes_of: collections.Counter[str] = collections.Counter()
    idle = {stands_for: name for name, stands_for in weight_map.idle}
    for entry in weight_map.entries:
        kept = dtype or source.dtypes[entry.ours]
        bytes_of[kept.name] += math.prod(source.shapes[entry.ours]) * kept.itemsize
        for i, shape in enumerate(entry.source_shapes(source.shapes[entry.ours])):
            own = entry.sources[i].name
            for name in (own, idle[own]) if own in idle else (own,):
                tensors[name], places[name] = (kept, tuple(shape)), (entry, i)
    shards = plan_shards(tensors, max_shard_size)
    current, array = "", np.empty(0)
    for file, names in shards.items():
        with SafetensorsWriter(folder / file, {name: tensors[name] for name in names}) as writer:
            for name in names:
                entry, i = places[name]
                if entry.ours != current:
                    del array
                    array = source.read(entry.ours, tensors[name][0], watch)
                    current = entry.ours
                start, stop = entry.row_ranges(array.shape)[i] if array.shape else (0, 0)
                part = array[start:stop] if array.shape else array
                writer.write(name, entry.sources[i].op.inverse(part))
    write_index(folder, shards, tensors)
    kept_config = {key: value for key, value in config.items() if key != "torch_dtype"}
    kept_config["dtype"] = bytes_of.most_common(1)[0][0]
    # Last, so that a folder left by a killed process has no config and does not open.
    (folder / "config.json").write_text(json.dumps(kept_config, indent=2) + "\n")


def export_huggingface(
    model: Transformer,
    config: Mapping[str, Any] | str | Path,
    destination: str | Path,
    *,
    dtype: Any = None,
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Write a model in memory, such as a trained one, as a Hugging Face checkpoint that transformers loads.

    Args:
        model: the model; parameters keep their type unless `dtype` is given.
        config: the Hugging Face config as a dict, or the checkpoint folder it came from, whose tokenizer and
            generation files are then copied too.
        destination: the folder to make; it appears only when complete.
        dtype: `"float32"`, `"bfloat16"`, `"float16"`, or `None`.
        max_shard_size: largest weight file, in bytes or as text (`"500MB"`).
        overwrite: replace an existing checkpoint.
        progress: told of bytes written; silent by default.

    Returns:
        The folder.

    Raises:
        ConfigError: the config is of another family than the model, or names a class without one of its heads; or an
            option is invalid.
        CheckpointError: the destination exists, cannot be written, or the disk is full.
    """
    folder = None if isinstance(config, Mapping) else Path(config)
    if folder is not None and folder.is_file():
        folder, config = None, read_json(folder)
    if folder is not None:
        config = read_config(folder)
    assert isinstance(config, Mapping)
    if config.get("model_type") != model.spec.family:
        raise ConfigError(f"a config of {config.get('model_type')!r} for a model of family {model.spec.family!r}")
    kept = None if dtype is None else parse_dtype(dtype)
    size = parse_size(max_shard_size)
    source = MemoryParameters(parameters(model))
    weight_map = family_for(model.spec.family).weight_map(model.spec)
    config = exported_config(config, model.spec)
    target = Path(destination)
    progress = progress or Silent()
    watcher = Watcher(progress)
    needed = total_bytes(source, kept)
    check_destination(target, overwrite=overwrite, source=folder)
    progress.start(needed)
    try:
        with new_folder(target, overwrite=overwrite, needed_bytes=needed) as partial:
            if folder is not None:
                copy_companions(folder, partial)
            written = config_as_written(config, model.spec)
            write_huggingface(source, weight_map, written, partial, dtype=kept, max_shard_size=size, watch=watcher)
    finally:
        progress.finish()
    watcher.warn("the model")
    return target
