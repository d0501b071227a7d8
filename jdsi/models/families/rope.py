"""Rotary parameters from a Hugging Face config."""

from typing import Any

from jdsi.errors import ConfigError
from jdsi.pallas_kernels import Rotary


def rotary(config: Any, head_dim: int) -> Rotary:
    """The rotary embedding that `config.rope_parameters` describes."""
    parameters = config.rope_parameters
    kind = parameters.get("rope_type", "default")
    if kind != "default":
        raise ConfigError(f"rope_type {kind!r} is unknown")
    return Rotary(dim=head_dim, theta=parameters["rope_theta"])
