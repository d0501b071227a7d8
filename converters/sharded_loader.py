"""From a checkpoint, or a model in memory, to parameters spread over a mesh; each process reads its own shares only.

A parameter that tensor parallelism splits becomes one array of all ranks' shares (`Split.global_shape`), divided over
the mesh axis "tensor"; every other is replicated. Replicas on several devices of a process are read once.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jdsi.models import TransformerSpec, parameters_of, shapes_of, splits_of
from jdsi.sharding import TENSOR, Split

from .config import parse_dtype
from .progress import Progress, Silent
from .sources import MemoryParameters, ParameterSource
from .stored_model import StoredModel
from .watch import Watcher


def load_sharded(
    stored: StoredModel,
    mesh: Mesh,
    names: Iterable[str] | None = None,
    *,
    dtype: Any,
    progress: Progress | None = None,
) -> dict[str, jax.Array]:
    """Read parameters of a model onto a mesh.

    Host memory stays within a few percent of this process's shares and one tensor. On the CPU backend the devices use
    the memory that was read into, those with the same share together.

    Args:
        stored: the whole model.
        mesh: its axis "tensor" splits the parameters; over all others, and without it, they are replicated.
        names: of the parameters wanted, such as a pipeline stage's; by default all.
        dtype: of the arrays: `"float32"`, `"bfloat16"` or `"float16"`.
        progress: told of the bytes of parameters that this process reads; silent by default.

    Raises:
        CheckpointError: a tensor is damaged.
        ConfigError: `dtype` is unknown.
        ValueError: a name is none of the model's.

    Warns:
        NonFiniteWarning: the shares read hold NaN or infinity.
    """
    source = stored.parameters
    kept = _kept(stored.spec, dtype)
    return _load(source, stored.spec, mesh, names, kept, progress or Silent(), stored.label)


def from_arrays(
    parameters: Mapping[str, jax.Array],
    spec: TransformerSpec,
    mesh: Mesh,
    names: Iterable[str] | None = None,
    *,
    dtype: Any = None,
    progress: Progress | None = None,
) -> dict[str, jax.Array]:
    """Spread a model in memory over a mesh, as `load_sharded` does one on disk.

    Args:
        parameters: plain arrays by dotted path, as `jdsi.models.parameters` gives them; at least those wanted.
        spec, mesh, names, progress: as for `load_sharded`.
        dtype: `None` keeps every parameter's.

    Raises:
        ConfigError: `dtype` is unknown.
        ValueError: a parameter is absent or of another shape than the model's.
    """
    shapes = shapes_of(spec)
    names = list(shapes if names is None else names)
    source = MemoryParameters({name: parameters[name] for name in names if name in parameters})
    if wrong := [name for name in names if name not in shapes or source.shapes.get(name) != shapes[name]]:
        raise ValueError(f"absent, or not of the shape this {spec.family} has: {', '.join(wrong[:20])}")
    kept = source.dtypes if dtype is None else _kept(spec, dtype)
    return _load(source, spec, mesh, names, kept, progress or Silent(), "the model")


def abstract_shares(
    spec: TransformerSpec, mesh: Mesh, names: Iterable[str] | None = None, *, dtype: Any
) -> dict[str, jax.ShapeDtypeStruct]:
    """Global shape, type and sharding of what `load_sharded` returns; errors as there."""
    infos, kept, ranks = parameters_of(spec), parse_dtype(dtype), _ranks(mesh)
    out = {}
    for name in _known(names, infos, spec):
        info, split = infos[name], infos[name].split(ranks)
        shape = split.global_shape(info.shape) if split else info.shape
        out[name] = jax.ShapeDtypeStruct(shape, info.dtype_in(kept), sharding=_sharding(mesh, split))
    return out


def _load(
    source: ParameterSource,
    spec: TransformerSpec,
    mesh: Mesh,
    names: Iterable[str] | None,
    dtypes: Mapping[str, np.dtype],
    progress: Progress,
    label: str,
) -> dict[str, jax.Array]:
    wanted = _known(names, source.shapes, spec)
    divided = splits_of(spec, _ranks(mesh))
    splits = {name: divided[name] for name in wanted}
    devices = {name: _devices(mesh, split, source.shapes[name]) for name, split in splits.items()}
    watcher = Watcher(progress)
    progress.start(
        sum(
            _entries(splits[name], rank, source.shapes[name]) * dtypes[name].itemsize
            for name in wanted
            for rank in devices[name]
        )
    )
    arrays = {}
    try:
        for name, split in splits.items():
            shards = []
            for rank, holders in devices[name].items():
                if split is None:
                    share = source.read(name, dtypes[name], watcher)
                else:
                    share = source.read_share(name, dtypes[name], split, rank, watcher)
                # The buffer is never written again, so the zero-copy alias that the CPU backend makes of it is safe.
                shards += [jax.device_put(share, device) for device in holders]
                if holders[0].platform != "cpu":
                    jax.block_until_ready(shards)
                del share
            shape = split.global_shape(source.shapes[name]) if split else source.shapes[name]
            arrays[name] = jax.make_array_from_single_device_arrays(
                shape, _sharding(mesh, split), shards, dtype=dtypes[name]
            )
    finally:
        progress.finish()
    watcher.warn(label)
    return arrays


def _kept(spec: TransformerSpec, dtype: Any) -> dict[str, np.dtype]:
    """The type of each parameter in a model that runs in `dtype`."""
    wanted = parse_dtype(dtype)
    return {name: info.dtype_in(wanted) for name, info in parameters_of(spec).items()}


def _known(names: Iterable[str] | None, known: Iterable[str], spec: TransformerSpec) -> list[str]:
    known = dict.fromkeys(known)
    names = list(known if names is None else names)
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"not parameters of this {spec.family}: {', '.join(unknown[:20])}")
    return names


def _ranks(mesh: Mesh) -> int:
    return mesh.shape.get(TENSOR, 1)


def _sharding(mesh: Mesh, split: Split | None) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec() if split is None else PartitionSpec(*(None,) * split.dim, TENSOR))


def _devices(mesh: Mesh, split: Split | None, shape: tuple[int, ...]) -> dict[int, list[Any]]:
    """This process's devices on the mesh by the rank whose share they hold; by 0 where all hold everything."""
    if split is None:
        local = list(_sharding(mesh, split).addressable_devices)
        return {0: local} if local else {}
    holders: dict[int, list[Any]] = {}
    for device, index in _sharding(mesh, split).addressable_devices_indices_map(split.global_shape(shape)).items():
        holders.setdefault((index[split.dim].start or 0) // split.size if index else 0, []).append(device)
    return holders


def _entries(split: Split | None, rank: int, shape: tuple[int, ...]) -> int:
    """How many values of the plain parameter a rank's share has."""
    if split is None:
        return math.prod(shape)
    return math.prod(shape) // max(1, shape[split.dim]) * sum(map(len, split.runs[rank]))
