"""From a checkpoint to parameters on the device, and to a model."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jdsi.models import Transformer, TransformerSpec, abstract_parameters, place
from jdsi.models.weight_map import WeightMap
from jdsi.sharding import AxisRules

from .checkpoint import AnyCheckpoint, open_checkpoint, parameters_of, resolve_config
from .config import load_family, resolve_dtype
from .progress import Progress, Silent
from .watch import Watcher


def load_parameters(
    checkpoint: AnyCheckpoint,
    weight_map: WeightMap,
    abstract: Mapping[str, jax.ShapeDtypeStruct],
    *,
    progress: Progress | None = None,
) -> dict[str, jax.Array]:
    """Read all parameters of a model onto the device.

    Host memory stays within a few percent of the weights as kept: each parameter is read and cast into one aligned
    buffer, which the CPU backend then uses as it is and other backends copy and drop.

    Args:
        checkpoint: from `open_checkpoint`.
        weight_map: the family's table; unused for our own folders, which hold parameters in our layout.
        abstract: shape, type and, optionally, sharding of every parameter, by dotted path.
        progress: told of bytes of parameters as they arrive; silent by default.

    Raises:
        CheckpointError: a tensor is missing, unknown, misshapen or damaged, or integer weights would become floats.

    Warns:
        NonFiniteWarning: tensors hold NaN or infinity.
    """
    progress = progress or Silent()
    progress.start(sum(leaf.size * leaf.dtype.itemsize for leaf in abstract.values()))
    try:
        shapes = {name: tuple(leaf.shape) for name, leaf in abstract.items()}
        source = parameters_of(checkpoint, weight_map, shapes)
        watcher = Watcher(progress)
        parameters = {}
        for name, leaf in abstract.items():
            array = source.read(name, np.dtype(leaf.dtype), watcher)
            # The buffer is never written again, so the zero-copy alias that the CPU backend makes of it is safe.
            parameters[name] = jax.device_put(array, leaf.sharding)
            if jax.default_backend() != "cpu":
                parameters[name].block_until_ready()
        watcher.warn(checkpoint.label)
        return parameters
    finally:
        progress.finish()


def load_spec(path: str | Path) -> TransformerSpec:
    """The spec of a checkpoint folder, a config file or a hub id; weights are neither read nor fetched.

    Raises:
        CheckpointError: the config is missing or damaged.
        ConfigError: its family or one of its options is not supported.
    """
    return load_family(resolve_config(path))[1]


def load_model(
    path: str | Path, *, dtype: Any = "auto", sharding: AxisRules | None = None, progress: Progress | None = None
) -> Transformer:
    """Load a model from a Hugging Face folder or hub id, or from a folder that `convert` made.

    Args:
        path: the folder or hub id.
        dtype: of the weights in memory: `"float32"`, `"bfloat16"`, `"float16"`, or `"auto"`, which is float32 on the
            CPU, whose narrow types are slow, and bfloat16 elsewhere.
        sharding: spreads the parameters over a mesh; the model then runs under `jax.jit` on all its devices.
        progress: told of bytes of parameters as they arrive; silent by default.

    Raises:
        CheckpointError: the checkpoint is missing, damaged or does not fit its config.
        ConfigError: its family or one of its options is not supported, or `dtype` is unknown.
    """
    dtype = resolve_dtype(dtype)
    checkpoint = open_checkpoint(path)
    family, spec = load_family(checkpoint.path)
    abstract = abstract_parameters(spec, dtype)
    if sharding is not None:
        abstract = place(abstract, sharding)
    parameters = load_parameters(checkpoint, family.weight_map(spec), abstract, progress=progress)
    return Transformer.from_parameters(spec, parameters)
