"""BERT (Devlin et al. 2018), as masked or causal language model, sequence classifier, for pre-training, or bare."""

from typing import Any

from jdsi.models.spec import LayerNormSpec, MlpSpec, TransformerSpec
from jdsi.models.weight_map import WeightMap

from .architecture import EncoderHeads
from .bert_like import EncoderNames, bert_like_spec, bert_like_weight_map
from .family import Family

NAMES = EncoderNames(
    model="bert",
    layers="encoder.layer",
    qkv=("attention.self.query", "attention.self.key", "attention.self.value"),
    attention_out="attention.output.dense",
    attention_norm="attention.output.LayerNorm",
    up="intermediate.dense",
    down="output.dense",
    feed_forward_norm="output.LayerNorm",
    transform="cls.predictions.transform.dense",
    transform_norm="cls.predictions.transform.LayerNorm",
    projection="cls.predictions.decoder",
    tied_bias="cls.predictions.bias",
    classifier=("bert.pooler.dense", "classifier"),
    pooler="bert.pooler.dense",
    next_sentence="cls.seq_relationship",
)


def spec(config: Any) -> TransformerSpec:
    """The spec of a `BertConfig`."""
    heads = EncoderHeads(("ForMaskedLM", "ForPreTraining", "LMHeadModel"), config.hidden_act, "tanh", pooler="tanh")
    return bert_like_spec(
        config,
        MlpSpec(config.intermediate_size, config.hidden_act, bias=True),
        LayerNormSpec(config.layer_norm_eps),
        heads,
        causal=config.is_decoder,
        token_types=config.type_vocab_size,
    )


def weight_map(spec: TransformerSpec) -> WeightMap:
    """Names of BERT's classes."""
    return bert_like_weight_map(spec, NAMES)


FAMILY = Family("bert", spec, weight_map)
