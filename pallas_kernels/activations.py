"""Activation functions by the names checkpoints use."""

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType

import jax
import jax.numpy as jnp

from jdsi.errors import ConfigError, nearest

ACTIVATIONS: Mapping[str, Callable[[jax.Array], jax.Array]] = MappingProxyType(
    {
        "gelu": partial(jax.nn.gelu, approximate=False),
        "gelu_new": partial(jax.nn.gelu, approximate=True),
        "gelu_fast": partial(jax.nn.gelu, approximate=True),
        "gelu_pytorch_tanh": partial(jax.nn.gelu, approximate=True),
        "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
        "relu": jax.nn.relu,
        "relu2": lambda x: jnp.square(jax.nn.relu(x)),
        "silu": jax.nn.silu,
        "swish": jax.nn.silu,
        "tanh": jnp.tanh,
    }
)


def known_activation(name: str, key: str = "activation") -> str:
    """`name`, if it is one of `ACTIVATIONS`.

    Raises:
        ConfigError: it is not; the message names `key`, the option it came from, and lists those there are.
    """
    if name not in ACTIVATIONS:
        raise ConfigError(f"{key}: unknown {name!r}{nearest(str(name), ACTIVATIONS)}; known: {', '.join(ACTIVATIONS)}")
    return name
