"""Which heads a checkpoint has, by the class name under `architectures` of its config."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from jdsi.errors import ConfigError, nearest
from jdsi.models.spec import ClassifierSpec, HeadSpec, TransformerSpec
from jdsi.models.weight_map import Entry, tensor

_DECODER_HEADS = ("ForCausalLM", "LMHeadModel")
_CLASSIFIER = "ForSequenceClassification"
_PRE_TRAINING = "ForPreTraining"
_BARE = "Model"

NEXT_SENTENCE = ("IS_NEXT", "NOT_NEXT")
"""Labels of a pair of texts by the classifier of `BertForPreTraining`: whether the second goes on from the first."""

_NOT_SUPPORTED = {
    "ForTokenClassification": "labels every token",
    "ForQuestionAnswering": "marks answers in a text",
    "ForMultipleChoice": "chooses between texts",
    "ForNextSentencePrediction": "says whether a text follows another, without a language model",
    "DoubleHeadsModel": "chooses between texts beside its language model",
}


def decoder_head(config: Any, head: HeadSpec) -> HeadSpec | None:
    """`head`, or `None` for a classifier and a bare decoder (`LlamaModel`); without `architectures` it is there.

    Raises:
        ConfigError: the class is another one, or the decoder is not causal.
    """
    if not getattr(config, "is_causal", True):
        raise ConfigError(f"is_causal=False: {config.model_type} models are run as causal language models only")
    return None if _suffix(config, (*_DECODER_HEADS, _CLASSIFIER)) in (_CLASSIFIER, _BARE) else head


def decoder_classifier(config: Any) -> ClassifierSpec | None:
    """The classifier of a decoder for sequence classification, as reward models are: it reads the last token."""
    if _suffix(config, (*_DECODER_HEADS, _CLASSIFIER)) != _CLASSIFIER:
        return None
    padding = getattr(config, "pad_token_id", None)
    return ClassifierSpec(_labels(config), None, "last", padding, bias=False, scores=_scores(config))


@dataclasses.dataclass(frozen=True)
class EncoderHeads:
    """The heads that an encoder family has.

    Attributes:
        language_models: what the names of its classes with a language-model head end in.
        transform, classifier: the activations of `HeadTransform` and `ClassifierSpec`.
        pooler: the activation of the bare encoder's pooler, if it has one.
    """

    language_models: tuple[str, ...]
    transform: str
    classifier: str
    pooler: str | None = None


def encoder_heads(
    config: Any, heads: EncoderHeads, head: HeadSpec, *, causal: bool
) -> tuple[HeadSpec | None, ClassifierSpec | None]:
    """Whether an encoder has `head`, and its classifier or pooler; without `architectures` it is the language model.

    Raises:
        ConfigError: the class is another one, it is causal and the encoder is not, or there is cross-attention.
    """
    if getattr(config, "add_cross_attention", False):
        raise ConfigError("add_cross_attention=True: there is no encoder whose output could be attended to")
    suffix = _suffix(config, (*heads.language_models, _CLASSIFIER))
    if suffix in _DECODER_HEADS and not causal:
        raise ConfigError(f"{config.architectures[0]} needs is_decoder=True; without it every token sees all others")
    if suffix == _CLASSIFIER:
        return None, ClassifierSpec(_labels(config), heads.classifier, scores=_scores(config))
    if suffix == _BARE:
        return None, None if heads.pooler is None else ClassifierSpec(None, heads.pooler)
    return head, ClassifierSpec(NEXT_SENTENCE, heads.pooler) if suffix == _PRE_TRAINING else None


def _labels(config: Any) -> tuple[str, ...]:
    names, count = config.id2label or {}, config.num_labels
    if not count:
        raise ConfigError(f"id2label names no label; {config.architectures[0]} needs one or more")
    return tuple(str(names.get(i, f"LABEL_{i}")) for i in range(count))


def _scores(config: Any) -> Literal["softmax", "sigmoid", "identity"]:
    if config.problem_type == "multi_label_classification":
        return "sigmoid"
    return "identity" if config.problem_type == "regression" or config.num_labels == 1 else "softmax"


def with_stored_heads(spec: TransformerSpec, stored: Callable[[str], bool]) -> TransformerSpec:
    """`spec` without its classifier, where a checkpoint does not hold it and the model is of use without.

    That is a bare encoder saved without its pooler, and a language model whose classifier was for pre-training only.

    Args:
        spec: of the checkpoint's config.
        stored: whether the checkpoint holds a parameter, by its dotted path.
    """
    if spec.classifier is None or (spec.head is None and spec.classifier.labels is not None):
        return spec
    names = ["dense"] if spec.classifier.labels is None else ["dense", "out"]
    whole = all(stored(f"classifier.{name}.weight") for name in names)
    return spec if whole else dataclasses.replace(spec, classifier=None)


def exported_config(config: Mapping[str, Any], spec: TransformerSpec) -> dict[str, Any]:
    """`config.json` to go with the weights of a model; its class is a lesser one if the model lacks one of its heads.

    Raises:
        ConfigError: the model has a head that the class does not have.
    """
    names = config.get("architectures")
    if not names:
        return dict(config)
    name = str(names[0])
    suffix = next((s for s in (*_DECODER_HEADS, "ForMaskedLM", _PRE_TRAINING, _CLASSIFIER) if name.endswith(s)), _BARE)
    said = {_PRE_TRAINING: (True, True), _CLASSIFIER: (False, True), _BARE: (False, False)}.get(suffix, (True, False))
    has = spec.head is not None, spec.classifier is not None and spec.classifier.labels is not None
    if has == said:
        return dict(config)
    lesser = {(False, False): _BARE, (True, False): "ForMaskedLM"}.get(has)
    if lesser is None or any(own and not other for own, other in zip(has, said, strict=True)):
        kinds = [what for own, what in zip(has, ("a language-model head", "a classifier"), strict=True) if own]
        raise ConfigError(f"architectures says {name!r}, and the model to write has {' and '.join(kinds)}")
    return {**config, "architectures": [name.removesuffix(suffix) + lesser]}


def head_weight(
    spec: TransformerSpec, embedding: str, theirs: str = "lm_head.weight"
) -> tuple[list[Entry], tuple[tuple[str, str], ...]]:
    """The vocabulary projection's part of a table: its entry, or what it is tied to; a bare model has neither.

    Args:
        spec: the model.
        embedding, theirs: names of the token embedding and of the projection.
    """
    if spec.head is None:
        return [tensor("classifier.out.weight", "score.weight")] if spec.classifier else [], ()
    return ([], ((theirs, embedding),)) if spec.head.tied else ([tensor("head.weight", theirs)], ())


def _suffix(config: Any, heads: Sequence[str]) -> str | None:
    """How the class name ends: one of `heads`, or `Model`; `None` when the config names no class."""
    if not config.architectures:
        return None
    name, family = config.architectures[0], type(config).__name__.removesuffix("Config")
    # Remote code renames classes (`RWForCausalLM`), so any name will do for a head, but not for the bare model:
    # `GPT2DoubleHeadsModel` has heads.
    known = [family + suffix for suffix in (*heads, _BARE)]
    if name.lower() == known[-1].lower():
        return _BARE
    for suffix in heads:
        if name.endswith(suffix):
            return suffix
    for suffix, what in _NOT_SUPPORTED.items():
        if name.endswith(suffix):
            raise ConfigError(f"architecture {name!r} {what}, which is not supported; supported: {', '.join(known)}")
    raise ConfigError(f"unknown architecture {name!r}{nearest(name, known)}; supported: {', '.join(known)}")
