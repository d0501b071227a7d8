"""BLOOM (Scao et al. 2022): ALiBi and a norm of the embedding.

`slow_but_exact` is not read: it is meant to change the order of float additions only. (Together with `pretraining_tp`
above 1, `transformers` also loses two biases.)
"""

from typing import Any

from jdsi.models.spec import (
    AttentionSpec,
    EmbeddingSpec,
    HeadSpec,
    LayerNormSpec,
    LayerSpec,
    MlpSpec,
    PreNorm,
    TransformerSpec,
)
from jdsi.models.weight_map import Entry, WeightMap, linear, norm, split_heads_last, tensor
from jdsi.pallas_kernels import Alibi

from .alibi import UNBOUNDED, alibi_slopes
from .architecture import decoder_classifier, decoder_head, head_weight
from .family import Family
from .heads import even_head_dim


def spec(config: Any) -> TransformerSpec:
    """The spec of a `BloomConfig`."""
    heads, head_dim = config.num_attention_heads, even_head_dim(config)
    layer_norm = LayerNormSpec(config.layer_norm_epsilon)
    layer = LayerSpec(
        (
            AttentionSpec(
                num_heads=heads,
                num_kv_heads=heads,
                head_dim=head_dim,
                scale=head_dim**-0.5,
                alibi=Alibi(alibi_slopes(heads)),
                qkv_bias=True,
                out_bias=True,
            ),
            MlpSpec(4 * config.hidden_size, "gelu_new", bias=True),
        ),
        residual=PreNorm(layer_norm, from_norm=config.apply_residual_connection_post_layernorm),
    )
    return TransformerSpec(
        family=config.model_type,
        vocab_size=config.vocab_size,
        width=config.hidden_size,
        max_positions=UNBOUNDED,
        embedding=EmbeddingSpec(norm=layer_norm),
        layers=(layer,) * config.num_hidden_layers,
        norm=layer_norm,
        head=decoder_head(config, HeadSpec(tied=config.tie_word_embeddings)),
        classifier=decoder_classifier(config),
    )


def weight_map(spec: TransformerSpec) -> WeightMap:
    """Names of `BloomForCausalLM`."""
    entries: list[Entry] = [tensor("embedding.tokens.weight", "transformer.word_embeddings.weight")]
    if spec.embedding.norm is not None:
        entries += norm("embedding.norm", "transformer.word_embeddings_layernorm", spec.embedding.norm)
    for i, layer in enumerate(spec.layers):
        ours, theirs = f"layers.{i}", f"transformer.h.{i}"
        attention, layer_norm = layer.of(AttentionSpec), layer.norms["attention_norm"]
        rows = split_heads_last(attention.num_heads, 3, attention.head_dim)
        qkv = f"{theirs}.self_attention.query_key_value"
        entries += norm(f"{ours}.attention_norm", f"{theirs}.input_layernorm", layer_norm)
        entries += linear(f"{ours}.attention.qkv", qkv, bias=True, op=rows, bias_op=rows)
        entries += linear(f"{ours}.attention.out", f"{theirs}.self_attention.dense", bias=True)
        entries += norm(f"{ours}.feed_forward_norm", f"{theirs}.post_attention_layernorm", layer_norm)
        entries += linear(f"{ours}.feed_forward.up", f"{theirs}.mlp.dense_h_to_4h", bias=True)
        entries += linear(f"{ours}.feed_forward.down", f"{theirs}.mlp.dense_4h_to_h", bias=True)
    if spec.norm is not None:
        entries += norm("norm", "transformer.ln_f", spec.norm)
    projection, tied = head_weight(spec, "transformer.word_embeddings.weight")
    return WeightMap((*entries, *projection), prefix="transformer.", tied=tied)


FAMILY = Family("bloom", spec, weight_map)
