"""`config.json`, and the files beside the weights that travel with a checkpoint unchanged."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jdsi.errors import CheckpointError, ConfigError, nearest
from jdsi.models import TransformerSpec
from jdsi.models.families import Family, family_for

from .mistaken import explain_folder, refuse_pointer

COMPANIONS = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "chat_template.jinja",
    "chat_template.json",
)
"""Tokenizer and generation files; conversions copy those that exist."""

CHAT_TEMPLATES = "additional_chat_templates/*.jinja"
"""Where transformers keeps the chat templates of a tokenizer that has several; they travel as `COMPANIONS` do."""

_DEPTHS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers")
_MOST_LAYERS = 10_000
_DTYPES = {
    "float32": jnp.float32,
    "fp32": jnp.float32,
    "float": jnp.float32,
    "float16": jnp.float16,
    "fp16": jnp.float16,
    "half": jnp.float16,
    "bfloat16": jnp.bfloat16,
    "bf16": jnp.bfloat16,
}


def parse_dtype(dtype: Any) -> np.dtype:
    """A weight type from its name, or from a JAX, NumPy or torch type.

    Args:
        dtype: `"float32"`, `"bfloat16"` or `"float16"`, DeepSpeed's and torch's names for them, or a type.

    Raises:
        ConfigError: weights are not kept in that type.
    """
    name = dtype if isinstance(dtype, str) else getattr(dtype, "__name__", None) or str(dtype)
    name = name.removeprefix("torch.")
    if name not in _DTYPES:
        raise ConfigError(f"dtype {name!r}{nearest(name, _DTYPES)}; known: float32, bfloat16, float16")
    return jnp.dtype(_DTYPES[name])


def resolve_dtype(dtype: Any) -> np.dtype:
    """`parse_dtype`, where `"auto"` is float32 on the CPU, whose narrow types are slow, and bfloat16 elsewhere."""
    if isinstance(dtype, str) and dtype == "auto":
        return jnp.dtype(jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16)
    return parse_dtype(dtype)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        CheckpointError: the file is unreadable, not JSON, or not an object.
    """
    refuse_pointer(path)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: holds a JSON {type(value).__name__}, not an object")
    return value


def read_config(folder: Path) -> dict[str, Any]:
    """`config.json` of a checkpoint folder, or a file like it, as stored.

    Raises:
        CheckpointError: it is absent or damaged, names no `model_type`, or describes quantised weights.
    """
    path = _file(folder)
    if not path.is_file():
        known = explain_folder(folder) if folder.is_dir() else None
        raise CheckpointError(f"{folder}: {known or 'no config.json, so the architecture of the model is unknown'}")
    config = read_json(path)
    if not isinstance(config.get("model_type"), str):
        raise CheckpointError(f"{path}: no 'model_type', so the family is unknown")
    refuse_quantized(path, config.get("quantization_config"))
    return config


def refuse_quantized(where: str | Path, quantization: Any) -> None:
    """Raises `CheckpointError` if a config says that its weights are quantised."""
    if quantization is not None:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        raise CheckpointError(f"{where}: weights quantised with {method!r} cannot be read; use the unquantised model")


def _file(path: Path) -> Path:
    return path if path.is_file() else path / "config.json"


def load_config(folder: Path) -> Any:
    """The `transformers` config object of a checkpoint folder or config file, with every default that it omits.

    Raises:
        ConfigError: the `model_type` is not one of our families; lists them.
        CheckpointError: `config.json` is absent, damaged, or not accepted by transformers.
    """
    stored = read_config(folder)
    model_type = stored["model_type"]
    family_of(_file(folder), model_type)
    for name in _DEPTHS:  # before config classes make a list of as many
        if isinstance(stored.get(name), int) and not 0 <= stored[name] <= _MOST_LAYERS:
            raise ConfigError(f"{_file(folder)}: {name}={stored[name]} must be from 0 to {_MOST_LAYERS}")
    from transformers import AutoConfig  # slow to import

    try:
        return AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
    except Exception as error:  # transformers validates with many types of its own
        reason = " ".join(str(error).split()) or repr(error)
        raise CheckpointError(f"{_file(folder)}: transformers refuses this {model_type}: {reason}") from error


def load_family(folder: Path) -> tuple[Family, TransformerSpec]:
    """The family and the spec that a checkpoint folder's `config.json` describes; errors as `load_config`."""
    config = load_config(folder)
    family = family_of(_file(folder), config.model_type)
    return family, spec_of(_file(folder), family, config)


def family_of(where: str | Path, model_type: str) -> Family:
    """`family_for`, with an error that names the place."""
    try:
        return family_for(model_type)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error


def spec_of(where: str | Path, family: Family, config: Any) -> TransformerSpec:
    """The spec that a config describes.

    Raises:
        ConfigError: an option is not supported, or its values describe no model; names the place.
    """
    for name, value in sorted(vars(config).items()):
        if ("dropout" in name or name.endswith("pdrop")) and isinstance(value, int | float) and not 0 <= value <= 1:
            raise ConfigError(f"{where}: {name}={value!r} must be from 0 to 1")
    padding, size = getattr(config, "pad_token_id", None), config.vocab_size
    if isinstance(padding, int) and isinstance(size, int) and not -size <= padding < size:
        raise ConfigError(f"{where}: pad_token_id={padding} is no token of the {size} there are")
    try:
        return family.spec(config)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        # Values that transformers takes because nothing has been made of them yet.
        raise ConfigError(f"{where}: its values describe no {family.model_type} model: {error!r}") from error


def config_as_written(config: Mapping[str, Any], spec: TransformerSpec) -> dict[str, Any]:
    """The config for a folder that holds a model of `spec`, which may be another than `config` says, see `fitting`."""
    # What is written has the usual names.
    config = {key: value for key, value in config.items() if key != "transformers_weights"}
    if spec.head is None or spec.head.tied or not config.get("tie_word_embeddings", _ties_by_default(config)):
        return config
    return {**config, "tie_word_embeddings": False}


def _ties_by_default(config: Mapping[str, Any]) -> bool:
    from transformers import AutoConfig

    return AutoConfig.for_model(config["model_type"]).tie_word_embeddings


def copy_companions(source: Path, target: Path) -> None:
    """Copy the tokenizer and generation files that `source` has."""
    for file in (*(source / name for name in COMPANIONS), *source.glob(CHAT_TEMPLATES)):
        if file.is_file():
            copy = target / file.relative_to(source)
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, copy)
