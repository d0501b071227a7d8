"""The models that benchmarks make on the spot: named shapes, and shapes of a wanted size."""

import contextlib
import math
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from jdsi.converters import random_checkpoint
from jdsi.errors import ConfigError, nearest

_Sizes = Mapping[str, int]

ITEM_BYTES: Mapping[str, int] = MappingProxyType({"float32": 4, "bfloat16": 2, "float16": 2})
"""Dtypes that checkpoints are made in."""


def check_dtypes(*dtypes: str) -> None:
    """Raises `ConfigError` for one that checkpoints are not made in."""
    for dtype in dtypes:
        if dtype not in ITEM_BYTES:
            raise ConfigError(f"dtype {dtype!r} must be among {', '.join(ITEM_BYTES)}")


def _sizes(layers: int, width: int, heads: int, kv_heads: int, intermediate: int, vocabulary: int) -> _Sizes:
    return MappingProxyType(
        {
            "num_hidden_layers": layers,
            "hidden_size": width,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "intermediate_size": intermediate,
            "vocab_size": vocabulary,
        }
    )


SHAPES: Mapping[str, _Sizes] = MappingProxyType(
    {
        "llama-tiny": _sizes(2, 48, 6, 2, 80, 300),
        "llama-mini": _sizes(4, 64, 8, 8, 128, 512),  # divides evenly among up to 8 devices, or 4 stages
        "llama-deep": _sizes(120, 128, 4, 2, 256, 512),  # its products are too small for XLA to use several cores
        "llama-125m": _sizes(12, 768, 12, 4, 2048, 32_000),
        "llama-1b": _sizes(16, 2048, 32, 8, 8192, 32_000),
        "llama-8b": _sizes(32, 4096, 32, 8, 14336, 128_256),
    }
)


def shape_config(name: str, **changes: int) -> Any:
    """The `LlamaConfig` of a named shape.

    Args:
        name: see `SHAPES`.
        changes: sizes to have instead of the shape's, by their name in the config.

    Raises:
        ConfigError: there is no such shape.
    """
    if name not in SHAPES:
        raise ConfigError(f"shape {name!r} is not known{nearest(name, SHAPES)}; known are {', '.join(SHAPES)}")
    return _llama({**SHAPES[name], **changes})


def sized_config(gigabytes: float, itemsize: int, *, least_layers: int = 1) -> Any:
    """A `LlamaConfig` whose weights take at least `gigabytes` (10^9 bytes) of values of `itemsize` bytes.

    Args:
        least_layers: for the sake of as many the model is made narrower, down to a width of 256.
    """
    values = gigabytes * 1e9 / itemsize
    for width, vocabulary in ((2048, 32_000), (1024, 32_000), (512, 8_000), (256, 2_000)):
        heads, intermediate = width // 64, 4 * width
        per_layer = 4 * width * width + 3 * width * intermediate
        layers = max(1, math.ceil((values - 2 * vocabulary * width) / per_layer))
        if layers >= least_layers and values >= 3e8 * (width / 2048) ** 2:
            break
    return _llama(_sizes(layers, width, heads, heads, intermediate, vocabulary))


def _llama(sizes: _Sizes) -> Any:
    from transformers import LlamaConfig

    options: dict[str, Any] = {**sizes, "max_position_embeddings": 4096, "bos_token_id": None, "eos_token_id": None}
    return LlamaConfig(**options)


@contextlib.contextmanager
def scratch(parent: str | os.PathLike[str] | None = None) -> Iterator[Path]:
    """A folder for what a benchmark writes; gone afterwards, also when interrupted.

    Args:
        parent: where to make it; by default where temporary files go.

    Raises:
        ConfigError: `parent` is not a folder that can be written.
    """
    try:
        folder = tempfile.TemporaryDirectory(prefix="jdsi-bench-", dir=parent)
    except OSError as error:
        raise ConfigError(f"no temporary folder can be made in {parent or tempfile.gettempdir()}: {error}") from error
    with folder as path:
        yield Path(path)


@contextlib.contextmanager
def checkpoint(model: str | None, shape: str, dtype: str) -> Iterator[Path]:
    """The folder of `model`, or of random weights of `shape` in `dtype` that lives as long as the block."""
    if model is not None:
        from jdsi.converters import open_checkpoint

        yield open_checkpoint(model).path
        return
    config = shape_config(shape)
    with scratch() as folder:
        yield random_checkpoint(folder / shape, config, dtype=dtype)
