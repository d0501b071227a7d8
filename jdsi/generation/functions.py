"""Functions of the caller's inside the sampling step: `allowed_tokens` and `logits_processor`."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32, Int32

from jdsi.errors import ConfigError

from .sampling_params import SamplingParams, name_of
from .token_automaton import TokenAutomaton

_ROWS, _LENGTH = 2, 256  # what a function is tried on before it is compiled in


def allowed_by(
    function: Callable[..., Any], tokens: Int32[Array, "B L"], length: Int32[Array, " B"], vocab_size: int
) -> Bool[Array, "B V"]:
    """What a function of `allowed_tokens` says of every row.

    Raises:
        ConfigError: it does not say it of every token.
    """
    mask = jnp.asarray(function(tokens, length))
    _check_shape("allowed_tokens", function, mask, (tokens.shape[0], vocab_size))
    return mask.astype(jnp.bool_)


def processed_by(
    function: Callable[..., Any],
    tokens: Int32[Array, "B L"],
    length: Int32[Array, " B"],
    logits: Float32[Array, "B V"],
) -> Float32[Array, "B V"]:
    """What a `logits_processor` makes of logits.

    Raises:
        ConfigError: not as many.
    """
    changed = jnp.asarray(function(tokens, length, logits))
    _check_shape("logits_processor", function, changed, logits.shape)
    return changed.astype(jnp.float32)


def check_functions(params: SamplingParams, vocab_size: int) -> None:
    """Tries the functions of a request on shapes.

    Raises:
        ConfigError: they fail, or give something else than they must.
    """
    for field in ("allowed_tokens", "logits_processor"):
        function = getattr(params, field)
        if function is not None and not isinstance(function, TokenAutomaton):
            _try(field, function, vocab_size)


@functools.lru_cache(maxsize=64)  # once for all prompts
def _try(field: str, function: Callable[..., Any], vocab_size: int) -> None:
    tokens = jax.ShapeDtypeStruct((_ROWS, _LENGTH), jnp.int32)
    length = jax.ShapeDtypeStruct((_ROWS,), jnp.int32)
    logits = jax.ShapeDtypeStruct((_ROWS, vocab_size), jnp.float32)
    try:
        if field == "allowed_tokens":
            jax.eval_shape(lambda t, n: allowed_by(function, t, n, vocab_size), tokens, length)
        else:
            jax.eval_shape(lambda t, n, x: processed_by(function, t, n, x), tokens, length, logits)
    except ConfigError:
        raise
    except Exception as error:  # whatever the caller's code raises
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise ConfigError(
            f"sampling parameter {field}: {name_of(function)} cannot be traced by JAX: {reason}"
        ) from error


def _check_shape(field: str, function: Callable[..., Any], found: Array, shape: tuple[int, ...]) -> None:
    if found.shape != shape:
        raise ConfigError(
            f"sampling parameter {field}: {name_of(function)} returns shape {found.shape} for {shape[0]} rows and "
            f"{shape[1]} tokens; it must be {shape}"
        )
