"""Which heads a checkpoint has, by the class name under `architectures` of its config."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from jdsi.errors import ConfigError, nearest
from jdsi.models.spec import ClassifierSpec, HeadSpec, TransformerSpec
from jdsi.models.weight_map import Entry, tensor

_DECODER_HEADS = ("ForCausalLM", "LMHeadModel")
_CLASSIFIER = "ForSequenceClassification"


def decoder_head(config: Any, head: HeadSpec) -> HeadSpec | None:
    """`head`, or `None` for a bare decoder such as `LlamaModel`; without `architectures` it is the language model.

    Raises:
        ConfigError: the class is another one, or the decoder is not causal.
    """
    if not getattr(config, "is_causal", True):
        raise ConfigError(f"is_causal=False: {config.model_type} models are run as causal language models only")
    return head if _suffix(config, _DECODER_HEADS) != "Model" else None


@dataclasses.dataclass(frozen=True)
class EncoderHeads:
    """The heads that an encoder family has.

    Attributes:
        language_models: what the names of its classes with a language-model head end in.
        transform, classifier: the activations of `HeadTransform` and `ClassifierSpec`.
    """

    language_models: tuple[str, ...]
    transform: str
    classifier: str


def encoder_heads(
    config: Any, heads: EncoderHeads, head: HeadSpec, classifier: ClassifierSpec, *, causal: bool
) -> tuple[HeadSpec | None, ClassifierSpec | None]:
    """Which of `head` and `classifier` an encoder has; without `architectures` it is the language model.

    Raises:
        ConfigError: the class is another one, it is causal and the encoder is not, or there is cross-attention.
    """
    if getattr(config, "add_cross_attention", False):
        raise ConfigError("add_cross_attention=True: there is no encoder whose output could be attended to")
    suffix = _suffix(config, (*heads.language_models, _CLASSIFIER))
    if suffix in _DECODER_HEADS and not causal:
        raise ConfigError(f"{config.architectures[0]} needs is_decoder=True; without it every token sees all others")
    if suffix == _CLASSIFIER:
        return None, classifier
    return (head if suffix != "Model" else None), None


def head_weight(
    spec: TransformerSpec, embedding: str, theirs: str = "lm_head.weight"
) -> tuple[list[Entry], tuple[tuple[str, str], ...]]:
    """The vocabulary projection's part of a table: its entry, or what it is tied to; a bare model has neither.

    Args:
        spec: the model.
        embedding, theirs: names of the token embedding and of the projection.
    """
    if spec.head is None:
        return [], ()
    return ([], ((theirs, embedding),)) if spec.head.tied else ([tensor("head.weight", theirs)], ())


def _suffix(config: Any, heads: Sequence[str]) -> str | None:
    """How the class name ends: one of `heads`, or `Model`; `None` when the config names no class."""
    if not config.architectures:
        return None
    name, family = config.architectures[0], type(config).__name__.removesuffix("Config")
    # Remote code renames classes (`RWForCausalLM`), so any name will do for a head, but not for the bare model:
    # `GPT2DoubleHeadsModel` has heads.
    known = [family + suffix for suffix in (*heads, "Model")]
    if name.lower() == known[-1].lower():
        return "Model"
    for suffix in heads:
        if name.endswith(suffix):
            return suffix
    raise ConfigError(f"unknown architecture {name!r}{nearest(name, known)}; supported: {', '.join(known)}")
