"""The families, by `model_type`."""

from collections.abc import Mapping
from types import MappingProxyType

from jdsi.errors import ConfigError, nearest

from . import (
    bert,
    bloom,
    distilbert,
    falcon,
    gemma2,
    gpt2,
    gpt_neo,
    gpt_neox,
    gptj,
    llama,
    mistral,
    opt,
    phi3,
    qwen2,
    qwen3,
    roberta,
)
from .family import Family

_MODULES = (
    bert,
    bloom,
    distilbert,
    falcon,
    gemma2,
    gpt2,
    gpt_neo,
    gpt_neox,
    gptj,
    llama,
    mistral,
    opt,
    phi3,
    qwen2,
    qwen3,
    roberta,
)

FAMILIES: Mapping[str, Family] = MappingProxyType({module.FAMILY.model_type: module.FAMILY for module in _MODULES})


def family_for(model_type: str) -> Family:
    """The family of a config's `model_type`.

    Raises:
        ConfigError: no such family; the message lists those there are.
    """
    try:
        return FAMILIES[model_type]
    except KeyError:
        known = ", ".join(sorted(FAMILIES))
        raise ConfigError(f"unknown family {model_type!r}{nearest(model_type, FAMILIES)}; known: {known}") from None


__all__ = ["FAMILIES", "Family", "family_for"]
