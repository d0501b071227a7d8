"""Checkpoints of random weights, of any size, from a config alone."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from jdsi.models import shapes_of
from jdsi.models.families import family_for

from .config import parse_dtype
from .destination import new_folder
from .huggingface import parse_size, plan_shards, write_index
from .safetensors_file import SafetensorsWriter

_PERIOD = 4_194_301  # a prime: rows of any length begin at another place of the block until it has been through


def random_checkpoint(
    path: str | Path,
    hf_config: Any,
    *,
    seed: int = 0,
    dtype: Any = "bfloat16",
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
) -> Path:
    """Write a Hugging Face checkpoint of random weights, at the speed of the disk and in tens of megabytes of memory.

    One block of normal values (deviation 0.02) is repeated from a different place for each tensor; norms are near one.
    Good for measuring and for testing plumbing; the values are not independent, but no row of a matrix is like another.

    Args:
        path: the folder to make.
        hf_config: a `transformers` config object of one of our families.
        seed: of the block and the places.
        dtype: of every tensor.
        max_shard_size: largest weight file, in bytes or as text (`"500MB"`).
        overwrite: replace an existing checkpoint.

    Raises:
        ConfigError: the family or an option is not supported.
        CheckpointError: the destination exists, cannot be written, or the disk is full.
    """
    kept = parse_dtype(dtype)
    family = family_for(hf_config.model_type)
    spec = family.spec(hf_config)
    shapes = shapes_of(spec)
    tensors = {
        source.name: (kept, tuple(shape))
        for entry in family.weight_map(spec).entries
        for source, shape in zip(entry.sources, entry.source_shapes(shapes[entry.ours]), strict=True)
    }
    rng = np.random.default_rng(seed)
    block = (rng.standard_normal(_PERIOD, np.float32) * np.float32(0.02)).astype(kept)
    shards = plan_shards(tensors, parse_size(max_shard_size))
    needed = sum(math.prod(shape) for _, shape in tensors.values()) * kept.itemsize
    with new_folder(Path(path), overwrite=overwrite, needed_bytes=needed) as folder:
        for file, names in shards.items():
            with SafetensorsWriter(folder / file, {name: tensors[name] for name in names}) as writer:
                for name in names:
                    shape = tensors[name][1]
                    size, done = math.prod(shape), 0
                    start = int(rng.integers(block.size // 2))
                    while done < size:
                        values = block[start : start + size - done]
                        if len(shape) == 1 and name.endswith("weight"):
                            values = (values.astype(np.float32) + np.float32(1)).astype(kept)
                        writer.write_flat(name, done, values)
                        done += values.size
                        start = 0
        write_index(folder, shards, tensors)
        config = hf_config.to_dict() | {"dtype": kept.name}
        (folder / "config.json").write_text(json.dumps(config, indent=2, default=str) + "\n")
    return Path(path)
