"""RoBERTa (Liu et al. 2019): BERT's layers, with positions that start behind the padding id."""

import dataclasses
from typing import Any

from jdsi.errors import ConfigError
from jdsi.models.spec import LayerNormSpec, MlpSpec, TransformerSpec
from jdsi.models.weight_map import WeightMap

from . import bert
from .architecture import EncoderHeads
from .bert_like import bert_like_spec, bert_like_weight_map
from .family import Family

_NAMES = dataclasses.replace(
    bert.NAMES,
    model="roberta",
    transform="lm_head.dense",
    transform_norm="lm_head.layer_norm",
    projection="lm_head.decoder",
    tied_bias="lm_head.bias",
    classifier=("classifier.dense", "classifier.out_proj"),
    pooler="roberta.pooler.dense",
    next_sentence="",
)


def spec(config: Any) -> TransformerSpec:
    """The spec of a `RobertaConfig`.

    `transformers` also gives every padding id inside a sequence the position of padding; in `forward` each token of a
    sequence counts, and what is padding is said by the lengths alone. `classify` and `pool` refuse such ids.
    """
    if config.pad_token_id is None:
        raise ConfigError("pad_token_id is missing: positions start behind it")
    return bert_like_spec(
        config,
        MlpSpec(config.intermediate_size, config.hidden_act, bias=True),
        LayerNormSpec(config.layer_norm_eps),
        EncoderHeads(("ForMaskedLM", "ForCausalLM"), transform="gelu", classifier="tanh", pooler="tanh"),
        causal=config.is_decoder,
        padding_id=config.pad_token_id,
        token_types=config.type_vocab_size,
    )


def weight_map(spec: TransformerSpec) -> WeightMap:
    """Names of RoBERTa's classes."""
    return bert_like_weight_map(spec, _NAMES)


FAMILY = Family("roberta", spec, weight_map)
