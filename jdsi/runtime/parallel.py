"""From a config and a model to an executor over a mesh."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jdsi.config import InferenceConfig
from jdsi.converters import StoredModel, parse_dtype, resolve_dtype
from jdsi.converters.sharded_loader import from_arrays, load_sharded
from jdsi.kv_cache import Contiguous
from jdsi.models import Transformer, TransformerSpec, parameters
from jdsi.pallas_kernels.operator import Implementation
from jdsi.planning import Choice, choose, even_stages
from jdsi.sharding import Parallelism, make_mesh
from jdsi.sharding.topology import Topology

from . import peers
from .mesh_executor import Loader, MeshExecutor

_USUAL_CONTEXT = 4096  # what degrees are chosen for where no `max_tokens` is given and the model would take more


def wants_mesh(config: InferenceConfig) -> bool:
    """Whether a config asks for more than one device, or for a choice of how many."""
    return config.parallelism is not None or degrees(config).devices > 1


def degrees(config: InferenceConfig) -> Parallelism:
    """The degrees that a config names."""
    return Parallelism(config.tensor_parallel, config.pipeline_parallel, config.data_parallel)


def mesh_executor(
    model: StoredModel | Transformer, config: InferenceConfig, implementation: Implementation | None
) -> MeshExecutor:
    """An executor over the devices that JAX sees; of a folder, each process reads only what its devices hold.

    Raises:
        ConfigError: the degrees do not fit the devices or the model; before anything is read or computed.
        CapacityError: degrees are to be chosen, and none fits the memory.
        CheckpointError: as `load_sharded`.
    """
    if isinstance(model, Transformer):
        spec, arrays = model.spec, parameters(model)
        dtype = next(iter(arrays.values())).dtype if config.dtype == "auto" else parse_dtype(config.dtype)

        def load(mesh: jax.sharding.Mesh, names: Sequence[str]) -> dict[str, jax.Array]:
            return from_arrays(arrays, spec, mesh, names, dtype=dtype)

        return _built(spec, load, dtype, config, implementation)
    stored, dtype = model, resolve_dtype(config.dtype)
    _agree(config, stored)

    def read(mesh: jax.sharding.Mesh, names: Sequence[str]) -> dict[str, jax.Array]:
        return load_sharded(stored, mesh, names, dtype=dtype)

    return _built(stored.spec, read, dtype, config, implementation)


def _agree(config: InferenceConfig, stored: StoredModel) -> None:
    """Sees to it, before anything can fail in one process alone, that all were given the same."""
    places = ("checkpoint", "tokenizer", "compilation_cache")  # may be elsewhere in each process
    settings = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    told = {name: value for name, value in settings.items() if name not in places}
    folders = {folder for folder in (stored.path, getattr(stored.store, "path", None)) if folder is not None}
    files = sorted((str(f.relative_to(d)), f.stat().st_size) for d in folders for f in d.rglob("*") if f.is_file())
    peers.agree({"call": "init_inference", **told, "model": stored.spec, "files of the checkpoint": files})


def _built(
    spec: TransformerSpec, load: Loader, dtype: Any, config: InferenceConfig, implementation: Implementation | None
) -> MeshExecutor:
    choice = None if config.parallelism is None else _choose(spec, dtype, config)
    wanted = degrees(config) if choice is None else choice.parallelism
    stages = even_stages(spec, wanted.pipeline)
    mesh = make_mesh(tensor=wanted.tensor, pipe=wanted.pipeline, data=wanted.data)
    return MeshExecutor(
        spec,
        mesh,
        load,
        dtype=jnp.dtype(dtype),
        stages=stages,
        implementation=implementation,
        sequence_parallel=config.sequence_parallel,
        micro_batches=config.micro_batches,
        prompt_pieces=config.prompt_pieces,
        choice=choice,
        cache=config.cache or Contiguous(),
    )


def _choose(spec: TransformerSpec, dtype: Any, config: InferenceConfig) -> Choice:
    """The degrees for the devices there are: for one sequence, or for as many as the engine takes at a time."""
    throughput = config.parallelism == "throughput"
    context = config.max_tokens or min(spec.max_positions, _USUAL_CONTEXT)
    return choose(
        spec,
        Topology.of(jax.devices()),
        batch=config.max_batch_size if throughput else 1,
        context=context,
        goal="throughput" if throughput else "latency",
        memory_limit=None if config.memory_limit is None else int(config.memory_limit),
        dtype=dtype,
        multiple=jax.process_count(),
    )
