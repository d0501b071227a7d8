"""A checkpoint understood: which model it holds, and its parameters."""

import dataclasses
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jdsi.errors import CheckpointError, ConfigError, JdsiWarning
from jdsi.models import TransformerSpec, shapes_of
from jdsi.models.families import Family

from .checkpoint import AnyCheckpoint, Checkpoint, open_checkpoint
from .config import family_of, load_config, load_family, spec_of
from .fitting import fit, fit_names, same_but_for_ties
from .live_model import LiveModel, is_module
from .location import resolve, resolve_config, resolve_setting
from .manifest import MANIFEST
from .sources import MappedParameters, ParameterSource
from .weight_files import WeightFiles, holds_weights
from .weight_list import weights_of

Store = AnyCheckpoint | LiveModel


@dataclasses.dataclass(frozen=True)
class StoredModel:
    """What `open_model` found.

    Attributes:
        store: holds the weights: a folder, or a model in the memory of PyTorch.
        config: the `transformers` config object.
        family, spec: what the model is: its config, and where that is silent or wrong, its tensors.
        parameters: of the model, in our layout.
        path: the folder whose config, tokenizer and generation files belong to the model; `None` for one in memory.
    """

    store: Store
    config: Any
    family: Family
    spec: TransformerSpec
    parameters: ParameterSource
    path: Path | None

    @property
    def label(self) -> str:
        """The model's place, for messages."""
        return self.store.label


def open_model(source: Any, *, weights: Any = None, strict: bool = False) -> StoredModel:
    """Find out what model a checkpoint holds, and that it holds all of it; no weights are read, except to compare.

    Args:
        source: a folder (Hugging Face or ours), a hub id, or a `transformers` model in memory.
        weights: where the weights are, if not there: a folder or hub id, or what DeepSpeed takes as `checkpoint`: a
            JSON file or mapping that lists files, see `weights_of`.
        strict: whether tensors that the model does not use are an error, and not a warning.

    Raises:
        CheckpointError: it is missing, damaged or does not fit its config.
        ConfigError: its family or one of its options is not supported, or `weights` cannot be honoured.

    Warns:
        JdsiWarning: tensors are not used; the config ties tensors that differ; there are two sets of weights.
    """
    if is_module(source):
        live = LiveModel(source, weightless=weights is not None)
        path, config, where = None, live.config, live.label
    else:
        live, path = None, resolve(source)
        config, where = load_config(path), path / "config.json"
    family = family_of(where, config.model_type)
    said = spec_of(where, family, config)
    store = live or open_checkpoint(path or source) if weights is None else _elsewhere(weights, said)
    if isinstance(store, Checkpoint | LiveModel):
        spec, tensors = fit(family, said, store)
        shapes = shapes_of(spec)
        parameters = MappedParameters(store, tensors, family.weight_map(spec), shapes, strict=strict)
    else:
        spec, parameters = fit_names(said, store.shapes), store
        store.check(shapes_of(spec))
    return StoredModel(store, config, family, spec, parameters, path)


def load_spec(path: str | Path) -> TransformerSpec:
    """The spec of a checkpoint folder, a config file or a hub id, of which nothing but the config is fetched.

    Of a folder with weights it is that of the model they make; no more of them is read than `open_model` does. Where
    those in the Hugging Face layout cannot be opened (absent, damaged, git-lfs pointers), the config alone is asked.

    Raises:
        CheckpointError: the config is missing, or a folder that `convert` made is damaged.
        ConfigError: its family or one of its options is not supported.

    Warns:
        JdsiWarning: the weights cannot be opened; see also `open_model`.
    """
    place = resolve_config(path)
    family, said = load_family(place)
    if place.is_file() or not holds_weights(place):
        return said
    try:
        store = open_checkpoint(place)
    except CheckpointError as error:
        if (place / MANIFEST).is_file():
            raise
        reason = " ".join(str(error).split())
        warnings.warn(f"the weights are not asked, config.json alone says what the model is: {reason}", JdsiWarning, 2)
        return said
    return fit(family, said, store)[0] if isinstance(store, Checkpoint) else fit_names(said, store.shapes)


def _elsewhere(weights: Any, said: TransformerSpec) -> AnyCheckpoint:
    """Weights for a model whose config is in another place."""
    if isinstance(weights, Mapping) or str(weights).endswith(".json"):
        files = weights_of(weights)
        return Checkpoint(files[0].parent, files)
    folder = resolve_setting("checkpoint", weights)
    if (folder / "config.json").is_file() and not same_but_for_ties(load_family(folder)[1], said):
        raise ConfigError(f"checkpoint={str(weights)!r} holds another model than the one that its weights are for")
    if (folder / MANIFEST).is_file() or (folder / "config.json").is_file():
        return open_checkpoint(folder)
    return Checkpoint(folder, WeightFiles.of(folder).files)
