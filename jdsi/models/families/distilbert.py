"""DistilBERT (Sanh et al. 2019): BERT without token types."""

from typing import Any

from jdsi.models.spec import LayerNormSpec, MlpSpec, TransformerSpec
from jdsi.models.weight_map import WeightMap

from .architecture import EncoderHeads
from .bert_like import EncoderNames, bert_like_spec, bert_like_weight_map
from .family import Family

_NAMES = EncoderNames(
    model="distilbert",
    layers="transformer.layer",
    qkv=("attention.q_lin", "attention.k_lin", "attention.v_lin"),
    attention_out="attention.out_lin",
    attention_norm="sa_layer_norm",
    up="ffn.lin1",
    down="ffn.lin2",
    feed_forward_norm="output_layer_norm",
    transform="vocab_transform",
    transform_norm="vocab_layer_norm",
    projection="vocab_projector",
    tied_bias="vocab_projector.bias",
    classifier=("pre_classifier", "classifier"),
)


def spec(config: Any) -> TransformerSpec:
    """The spec of a `DistilBertConfig`; `sinusoidal_pos_embds` only says how the position table began."""
    return bert_like_spec(
        config,
        MlpSpec(config.hidden_dim, config.activation, bias=True),
        LayerNormSpec(eps=1e-12),
        EncoderHeads(("ForMaskedLM",), transform=config.activation, classifier="relu"),
    )


def weight_map(spec: TransformerSpec) -> WeightMap:
    """Names of DistilBERT's classes."""
    return bert_like_weight_map(spec, _NAMES)


FAMILY = Family("distilbert", spec, weight_map)
