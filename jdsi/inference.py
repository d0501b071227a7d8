"""From a checkpoint or a module to an engine."""

import dataclasses
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from jdsi.config import InferenceConfig
from jdsi.converters import StoredModel, load_model, open_model, resolve_dtype
from jdsi.converters.block_store import BlockStore
from jdsi.converters.live_model import is_module
from jdsi.converters.location import resolve_setting
from jdsi.engine import InferenceEngine
from jdsi.errors import ConfigError
from jdsi.generation.defaults import GenerationDefaults
from jdsi.generation.tokenizer import load_tokenizer, own_tokenizer
from jdsi.kv_cache import Contiguous
from jdsi.models import Transformer, parameters
from jdsi.pallas_kernels.operator import Implementation
from jdsi.runtime import Executor, ResidentExecutor, enable_compilation_cache
from jdsi.runtime.kv_demand import KVPlace
from jdsi.runtime.offload import footprint_on, offloaded_executor, plan_offload
from jdsi.runtime.parallel import degrees, mesh_executor, wants_mesh
from jdsi.sharding import make_mesh


def init_inference(
    model: Any = None,
    config: InferenceConfig | Mapping[str, Any] | str | os.PathLike[str] | None = None,
    *,
    tokenizer: Any = None,
    eos_token_ids: Sequence[int] | None = None,
    **overrides: Any,
) -> InferenceEngine:
    """An engine for a model.

    Args:
        model: a folder (Hugging Face or converted by `jdsi convert`), a hub id, a `Transformer`, or a `transformers`
            model in PyTorch's memory, whose weights are copied; by default what the config names as `checkpoint`.
        config: an `InferenceConfig`, a mapping in our keys or DeepSpeed's, or a JSON file with one.
        tokenizer: a tokenizer object, or where to load it from; by default the model's own, or for a model in memory
            the one of its name.
        eos_token_ids: ids that end a sequence; by default those the checkpoint names, or the tokenizer's.
        **overrides: single settings, over `config`: the fields of `InferenceConfig`.

    Raises:
        ConfigError, CheckpointError: naming what is wrong and what would be right.
    """
    parsed = _parse_config(config, overrides)
    source, weights = (model, parsed.checkpoint) if model is not None else (parsed.checkpoint, None)
    if model is None and isinstance(source, Mapping):
        raise ConfigError("checkpoint= lists files of weights; give the model that they are of as well")
    if not isinstance(source, str | os.PathLike | Transformer) and not is_module(source):
        what = "no model was given" if source is None else f"the model is a {type(source).__name__}"
        raise ConfigError(f"{what}; give a folder, a hub id, a transformers model or a jdsi Transformer")
    if parsed.compilation_cache:
        enable_compilation_cache(None if parsed.compilation_cache is True else parsed.compilation_cache)
    implementation = None if parsed.kernels else "xla"
    chosen = tokenizer if tokenizer is not None else parsed.tokenizer
    if isinstance(chosen, str | os.PathLike):
        chosen = load_tokenizer(chosen, required=True)
    defaults, folder = GenerationDefaults(), None
    if parsed.offload is not None and (isinstance(source, Transformer) or (is_module(source) and weights is None)):
        raise ConfigError("offload needs a checkpoint folder; this model is in memory already")
    if isinstance(source, Transformer):
        if weights is not None:
            raise ConfigError(
                f"checkpoint={str(weights)!r} names weights, and this Transformer has its own; leave it out"
            )
        if wants_mesh(parsed):
            executor: Executor = mesh_executor(source, parsed, implementation)
        else:
            loaded = source if parsed.dtype == "auto" else _cast(source, parsed.dtype)
            executor = ResidentExecutor(loaded, implementation, parsed.cache or Contiguous())
    else:
        if model is None and isinstance(source, str | os.PathLike):
            source = resolve_setting("checkpoint", Path(source) if isinstance(source, os.PathLike) else source)
        # First of all, so that a folder that is no model's is told by its config and not by its tokenizer.
        stored = open_model(source, weights=weights, strict=parsed.strict)
        folder = stored.path
        use = parsed.generation_config
        if stored.spec.generates:  # whatever is said of generation has no effect on others
            defaults = GenerationDefaults.read(folder, use) if folder else GenerationDefaults.of_model(source, use)
        chosen = own_tokenizer(source if folder is None else folder) if chosen is None else chosen
        if parsed.offload is not None:
            executor = _offloaded(stored, parsed, implementation)
        elif wants_mesh(parsed):
            executor = mesh_executor(stored, parsed, implementation)
        else:
            loaded = load_model(stored, dtype=parsed.dtype)
            executor = ResidentExecutor(loaded, implementation, parsed.cache or Contiguous())
    if eos_token_ids is not None:
        ends = tuple(eos_token_ids)
    elif isinstance(source, Transformer):
        end = getattr(chosen, "eos_token_id", None)
        ends = () if end is None else (end,)
    else:
        ends = defaults.end_of(chosen) if stored.spec.generates else ()
    return InferenceEngine(
        executor, parsed, tokenizer=chosen, eos_token_ids=ends, generation_defaults=defaults, checkpoint=folder
    )


def _offloaded(stored: StoredModel, config: InferenceConfig, implementation: Implementation | None) -> Executor:
    wanted = degrees(config)
    store = BlockStore.open(stored, tensor_parallel=wanted.tensor)
    mesh = make_mesh(tensor=wanted.tensor, data=wanted.data, devices=jax.local_devices())
    footprint = footprint_on(store, resolve_dtype(config.dtype), mesh)
    kv_place = KVPlace(
        config.kv_offload or "device",
        Path(config.spill_folder or tempfile.gettempdir()),
        config.devices_per_link,
        config.cache or Contiguous(),
    )
    plan = plan_offload(
        footprint,
        str(config.offload),
        None if config.memory_limit is None else int(config.memory_limit),
        max_tokens=config.max_tokens or store.spec.max_positions,
        max_batch_size=config.max_batch_size,
        batches_per_pass=config.batches_per_pass,
        kv_place=kv_place,
    )
    return offloaded_executor(footprint, plan, implementation, mesh, kv_place, config.gpu_direct)


def _parse_config(config: Any, overrides: dict[str, Any]) -> InferenceConfig:
    if isinstance(config, str | os.PathLike):
        return InferenceConfig.read(config, **overrides)
    if isinstance(config, InferenceConfig):
        config = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    if config is not None and not isinstance(config, Mapping):
        raise ConfigError(f"config is a {type(config).__name__}; give an InferenceConfig, a mapping or a JSON file")
    return InferenceConfig.from_dict(config or {}, **overrides)


def _cast(model: Transformer, dtype: str) -> Transformer:
    return Transformer.from_parameters(model.spec, jax.tree.map(lambda a: a.astype(dtype), parameters(model)))
