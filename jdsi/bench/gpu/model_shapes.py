"""Models of well-known shapes whose random weights are made where they are used: nothing is read from a disk."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jdsi.errors import ConfigError, nearest
from jdsi.models import Transformer, TransformerSpec, abstract_parameters
from jdsi.models.families import family_for

from ..shapes import shape_config

MODELS = ("llama-8b", "gpt-2-xl", "gpt-j")
_POSITIONS = 16384  # that Llama's computed positions may reach here


def model_config(name: str, *, tiny: bool = False) -> Any:
    """The transformers config of one of `MODELS`, or of a tiny model of its family.

    Raises:
        ConfigError: there is no such model.
    """
    from transformers import GPT2Config, GPTJConfig

    if name not in MODELS:
        raise ConfigError(f"model {name!r} is not known{nearest(name, MODELS)}; known are {', '.join(MODELS)}")
    if name == "llama-8b":
        config = shape_config("llama-tiny" if tiny else name)
        config.max_position_embeddings = _POSITIONS
        return config
    ends: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None}
    small = {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 300} if tiny else {}
    if name == "gpt-j":
        return GPTJConfig(**small, **({"rotary_dim": 8} if tiny else {}), **ends)
    return GPT2Config(**({"n_embd": 1600, "n_layer": 48, "n_head": 25} | small), **ends)


def model_spec(name: str, *, tiny: bool = False) -> TransformerSpec:
    """What such a model is."""
    config = model_config(name, tiny=tiny)
    return family_for(config.model_type).spec(config)


def random_model(spec: TransformerSpec, dtype: str = "bfloat16") -> Transformer:
    """A model with small random weights and norms near one, made on JAX's default device."""
    # Threefry, JAX's usual generator, would take longer than everything that is measured of the model.
    keys = iter(jax.random.split(jax.random.key(0, impl="rbg"), 4096))

    @partial(jax.jit, static_argnums=(1, 2))
    def values(key: jax.Array, shape: tuple[int, ...], mean: int) -> jax.Array:
        return mean + 0.02 * jax.random.normal(key, shape, jnp.dtype(dtype))

    made = {}
    for name, leaf in abstract_parameters(spec).items():
        mean = 1 if len(leaf.shape) == 1 and name.endswith("weight") else 0
        made[name] = values(next(keys), leaf.shape, mean)
    return Transformer.from_parameters(spec, jax.block_until_ready(made))
