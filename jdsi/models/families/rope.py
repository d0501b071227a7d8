"""Rotary parameters from a Hugging Face config."""

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from jdsi.errors import ConfigError, nearest
from jdsi.pallas_kernels import Rotary, RotaryScaling
from jdsi.pallas_kernels.rotary.scaling import (
    DynamicNtkScaling,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    YarnScaling,
    longrope_attention_factor,
    yarn_attention_factor,
)

Parameters = Mapping[str, Any]


def rope_parameters(config: Any, layer_type: str | None = None) -> Parameters:
    """The dict that describes the rotary embedding of layers of `layer_type`.

    `transformers` config classes bring both spellings, `rope_parameters` and the older `rope_theta` with
    `rope_scaling`, to `config.rope_parameters`: one dict, or one per layer type. As its models do, this has the config
    do so again first: only then a top-level `original_max_position_embeddings` is there, which wins.
    """
    if config.rope_parameters and hasattr(config, "standardize_rope_params"):
        config.standardize_rope_params()
    parameters = config.rope_parameters or {}
    if not any(isinstance(value, Mapping) for value in parameters.values()):
        return parameters
    if layer_type is None:
        raise ConfigError(f"rope_parameters of a {config.model_type} model must be one dict, not one per layer type")
    if not isinstance(parameters.get(layer_type), Mapping):
        raise ConfigError(f"rope_parameters has no entry for layer type {layer_type!r}, only {', '.join(parameters)}")
    return parameters[layer_type]


def rotary_dim(config: Any, head_dim: int, layer_type: str | None = None) -> int:
    """How many of a head's dimensions rotate: `partial_rotary_factor` of them."""
    factor = rope_parameters(config, layer_type).get("partial_rotary_factor", 1)
    if isinstance(factor, bool) or not isinstance(factor, int | float):
        raise ConfigError(f"partial_rotary_factor is {factor!r}; it must be a number from 0 to 1, or be left out")
    dim = int(head_dim * factor)
    if dim < 2 or dim % 2 or dim > head_dim:
        raise ConfigError(
            f"partial_rotary_factor {factor} must rotate an even number of each head's {head_dim} dimensions, not {dim}"
        )
    return dim


def rotary(config: Any, dim: int, layer_type: str | None = None) -> Rotary:
    """The rotary embedding that the config describes.

    Args:
        config: a `transformers` config.
        dim: rotated dimensions of each head; see `rotary_dim`.
        layer_type: for families that give rotary parameters per layer type.

    Raises:
        ConfigError: the type of scaling is unknown, or a key that it needs is missing or impossible.
    """
    parameters = rope_parameters(config, layer_type)
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind not in _SCALINGS:
        known = ", ".join(_SCALINGS)
        raise ConfigError(f"unknown rope_type {kind!r}{nearest(str(kind), _SCALINGS)}; known: {known}")
    required, make = _SCALINGS[kind]
    if missing := [key for key in ("rope_theta", *required) if parameters.get(key) is None]:
        raise ConfigError(f"rope_parameters of rope_type {kind!r} lacks {', '.join(missing)}")
    if not isinstance(theta := parameters["rope_theta"], int | float) or not 0 < theta < math.inf:
        raise ConfigError(f"rope_theta={theta!r} must be a positive number")
    return Rotary(dim=dim, theta=float(theta), scaling=make(parameters, config, dim))


def _linear(parameters: Parameters, config: Any, dim: int) -> RotaryScaling:
    return LinearScaling(parameters["factor"])


def _dynamic(parameters: Parameters, config: Any, dim: int) -> RotaryScaling:
    return DynamicNtkScaling(parameters["factor"], config.max_position_embeddings)


def _stretch(parameters: Parameters, config: Any) -> float:
    factor = parameters.get("factor")
    if factor is not None:
        return factor
    return config.max_position_embeddings / parameters["original_max_position_embeddings"]


def _yarn(parameters: Parameters, config: Any, dim: int) -> RotaryScaling:
    factor, attention_factor = _stretch(parameters, config), parameters.get("attention_factor")
    if attention_factor is None:
        scales = parameters.get("mscale"), parameters.get("mscale_all_dim")
        attention_factor = yarn_attention_factor(factor, *scales)
    return YarnScaling(
        factor=factor,
        original_length=parameters["original_max_position_embeddings"],
        beta_fast=parameters.get("beta_fast") or 32.0,
        beta_slow=parameters.get("beta_slow") or 1.0,
        truncate=parameters.get("truncate", True),
        attention_factor=attention_factor,
    )


def _longrope(parameters: Parameters, config: Any, dim: int) -> RotaryScaling:
    original, attention_factor = parameters["original_max_position_embeddings"], parameters.get("attention_factor")
    if attention_factor is None:
        attention_factor = longrope_attention_factor(_stretch(parameters, config), original)
    for key in ("short_factor", "long_factor"):
        if len(parameters[key]) != dim // 2:
            raise ConfigError(f"{key} of rope_parameters has {len(parameters[key])} numbers, the heads need {dim // 2}")
    short, long = tuple(parameters["short_factor"]), tuple(parameters["long_factor"])
    return LongRopeScaling(short, long, original, attention_factor)


def _llama3(parameters: Parameters, config: Any, dim: int) -> RotaryScaling:
    low, high = parameters["low_freq_factor"], parameters["high_freq_factor"]
    if high <= low:
        raise ConfigError(f"high_freq_factor {high} of rope_parameters must be greater than low_freq_factor {low}")
    return Llama3Scaling(parameters["factor"], low, high, parameters["original_max_position_embeddings"])


# Per type: the keys it needs beside rope_theta, and what makes the scaling.
_SCALINGS: Mapping[str, tuple[tuple[str, ...], Callable[[Parameters, Any, int], RotaryScaling | None]]] = (
    MappingProxyType(
        {
            "default": ((), lambda parameters, config, dim: None),
            "linear": (("factor",), _linear),
            "dynamic": (("factor",), _dynamic),
            "yarn": (("original_max_position_embeddings",), _yarn),
            "longrope": (("short_factor", "long_factor", "original_max_position_embeddings"), _longrope),
            "llama3": (
                ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
                _llama3,
            ),
        }
    )
)
