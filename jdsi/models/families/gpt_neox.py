"""GPT-NeoX and Pythia (Black et al. 2022; Biderman et al. 2023)."""

from typing import Any

from jdsi.models.spec import (
    AttentionSpec,
    EmbeddingSpec,
    HeadSpec,
    LayerNormSpec,
    LayerSpec,
    MlpSpec,
    ParallelResidual,
    PreNorm,
    TransformerSpec,
)
from jdsi.models.weight_map import Entry, WeightMap, linear, split_heads_last, tensor

from .architecture import decoder_classifier, decoder_head, head_weight
from .family import Family
from .heads import even_head_dim
from .rope import rotary, rotary_dim


def spec(config: Any) -> TransformerSpec:
    """The spec of a `GPTNeoXConfig`."""
    head_dim, norm = even_head_dim(config), LayerNormSpec(config.layer_norm_eps)
    layer = LayerSpec(
        (
            AttentionSpec(
                num_heads=config.num_attention_heads,
                num_kv_heads=config.num_attention_heads,
                head_dim=head_dim,
                scale=head_dim**-0.5,
                rotary=rotary(config, rotary_dim(config, head_dim)),
                qkv_bias=config.attention_bias,
                out_bias=config.attention_bias,
            ),
            MlpSpec(config.intermediate_size, config.hidden_act, bias=True),
        ),
        residual=ParallelResidual(norm) if config.use_parallel_residual else PreNorm(norm),
    )
    return TransformerSpec(
        family=config.model_type,
        vocab_size=config.vocab_size,
        width=config.hidden_size,
        max_positions=config.max_position_embeddings,
        embedding=EmbeddingSpec(),
        layers=(layer,) * config.num_hidden_layers,
        norm=norm,
        head=decoder_head(config, HeadSpec(tied=config.tie_word_embeddings)),
        classifier=decoder_classifier(config),
    )


def weight_map(spec: TransformerSpec) -> WeightMap:
    """Names of `GPTNeoXForCausalLM` on disk, where the head is `embed_out`."""
    entries: list[Entry] = [tensor("embedding.tokens.weight", "gpt_neox.embed_in.weight")]
    for i, layer in enumerate(spec.layers):
        ours, theirs = f"layers.{i}", f"gpt_neox.layers.{i}"
        attention = layer.of(AttentionSpec)
        heads = split_heads_last(attention.num_heads, 3, attention.head_dim)
        entries += linear(f"{ours}.attention_norm", f"{theirs}.input_layernorm", bias=True)
        entries += linear(
            f"{ours}.attention.qkv",
            f"{theirs}.attention.query_key_value",
            bias=attention.qkv_bias,
            op=heads,
            bias_op=heads,
        )
        entries += linear(f"{ours}.attention.out", f"{theirs}.attention.dense", bias=attention.out_bias)
        entries += linear(f"{ours}.feed_forward_norm", f"{theirs}.post_attention_layernorm", bias=True)
        entries += linear(f"{ours}.feed_forward.up", f"{theirs}.mlp.dense_h_to_4h", bias=True)
        entries += linear(f"{ours}.feed_forward.down", f"{theirs}.mlp.dense_4h_to_h", bias=True)
    entries += linear("norm", "gpt_neox.final_layer_norm", bias=True)
    projection, tied = head_weight(spec, "gpt_neox.embed_in.weight", "embed_out.weight")
    ignored = (r"(.*\.)?attention\.(bias|masked_bias)", r"(.*\.)?rotary_emb\.inv_freq")
    # In memory transformers calls the projection as other families do, on disk as GPT-NeoX did.
    renamed = ((r"lm_head\.weight", "embed_out.weight"),)
    return WeightMap((*entries, *projection), "gpt_neox.", ignored, renamed, tied)


FAMILY = Family("gpt_neox", spec, weight_map)
