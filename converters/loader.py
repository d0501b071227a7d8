"""From a checkpoint to parameters on the device, and to a model."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from jdsi.models import Transformer, abstract_parameters
from jdsi.sharding import AxisRules

from .config import resolve_dtype
from .progress import Progress, Silent
from .sources import ParameterSource
from .stored_model import StoredModel, open_model
from .watch import Watcher


def load_parameters(
    source: ParameterSource,
    abstract: Mapping[str, jax.ShapeDtypeStruct],
    *,
    label: str,
    progress: Progress | None = None,
) -> dict[str, jax.Array]:
    """Read all parameters of a model onto the device.

    Host memory stays within a few percent of the weights as kept: each parameter is read and cast into one aligned
    buffer, which the CPU backend then uses as it is and other backends copy and drop.

    Args:
        source: of the parameters, such as those of `open_model`.
        abstract: shape, type and, optionally, sharding of every parameter, by dotted path.
        label: names the source in messages.
        progress: told of bytes of parameters as they arrive; silent by default.

    Raises:
        CheckpointError: a tensor is damaged, or integer weights would become floats.

    Warns:
        NonFiniteWarning: tensors hold NaN or infinity.
    """
    progress = progress or Silent()
    progress.start(sum(leaf.size * leaf.dtype.itemsize for leaf in abstract.values()))
    try:
        watcher = Watcher(progress)
        parameters = {}
        for name, leaf in abstract.items():
            array = source.read(name, np.dtype(leaf.dtype), watcher)
            # The buffer is never written again, so the zero-copy alias that the CPU backend makes of it is safe.
            parameters[name] = jax.device_put(array, leaf.sharding)
            if jax.default_backend() != "cpu":
                parameters[name].block_until_ready()
        watcher.warn(label)
        return parameters
    finally:
        progress.finish()


def load_model(
    model: Any,
    *,
    dtype: Any = "auto",
    sharding: AxisRules | None = None,
    strict: bool = False,
    progress: Progress | None = None,
) -> Transformer:
    """Load a model from a Hugging Face folder or hub id, a folder that `convert` made, or PyTorch's memory.

    Args:
        model: the folder or hub id, a `transformers` model, whose weights are copied, or what `open_model` found.
        dtype: of the weights in memory: `"float32"`, `"bfloat16"`, `"float16"`, or `"auto"`, which is float32 on the
            CPU, whose narrow types are slow, and bfloat16 elsewhere.
        sharding: spreads the parameters over a mesh; the model then runs under `jax.jit` on all its devices.
        strict: whether tensors that the model does not use are an error, and not a warning.
        progress: told of bytes of parameters as they arrive; silent by default.

    Raises:
        CheckpointError: the checkpoint is missing, damaged or does not fit its config.
        ConfigError: its family or one of its options is not supported, or `dtype` is unknown.

    Warns:
        JdsiWarning: see `open_model`.
    """
    dtype = resolve_dtype(dtype)
    stored = model if isinstance(model, StoredModel) else open_model(model, strict=strict)
    abstract = abstract_parameters(stored.spec, dtype, sharding)
    arrays = load_parameters(stored.parameters, abstract, label=stored.label, progress=progress)
    return Transformer.from_parameters(stored.spec, arrays)
