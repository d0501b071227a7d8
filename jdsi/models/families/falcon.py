"""Falcon (Almazrouei et al. 2023): the forms of its 1B (ALiBi), 7B (multi-query) and 11B to 180B (grouped) members."""

from typing import Any

from jdsi.errors import ConfigError
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
from jdsi.models.weight_map import Entry, WeightMap, linear, norm, split_query_groups, tensor
from jdsi.pallas_kernels import RoundedAlibi

from .alibi import alibi_slopes
from .architecture import decoder_classifier, decoder_head, head_weight
from .family import Family
from .heads import even_head_dim
from .rope import rotary


def spec(config: Any) -> TransformerSpec:
    """The spec of a `FalconConfig`."""
    heads, head_dim = config.num_attention_heads, even_head_dim(config)
    scale, layer_norm = head_dim**-0.5, LayerNormSpec(config.layer_norm_epsilon)
    layer = LayerSpec(
        (
            AttentionSpec(
                num_heads=heads,
                num_kv_heads=_kv_heads(config),
                head_dim=head_dim,
                scale=scale,
                alibi=RoundedAlibi(alibi_slopes(heads), scale) if config.alibi else None,
                rotary=None if config.alibi else rotary(config, head_dim),
                qkv_bias=config.bias,
                out_bias=config.bias,
            ),
            MlpSpec(config.ffn_hidden_size, config.activation, bias=config.bias),
        ),
        residual=_residual(config, layer_norm),
    )
    return TransformerSpec(
        family=config.model_type,
        vocab_size=config.vocab_size,
        width=config.hidden_size,
        max_positions=config.max_position_embeddings,
        embedding=EmbeddingSpec(),
        layers=(layer,) * config.num_hidden_layers,
        norm=layer_norm,
        head=decoder_head(config, HeadSpec(tied=config.tie_word_embeddings)),
        classifier=decoder_classifier(config),
    )


def _kv_heads(config: Any) -> int:
    heads, kv_heads = config.num_attention_heads, config.num_kv_heads
    if not config.new_decoder_architecture:
        return 1 if config.multi_query else heads
    if heads % kv_heads:
        raise ConfigError(f"num_attention_heads {heads} is not a multiple of num_kv_heads {kv_heads}")
    return kv_heads


def _residual(config: Any, layer_norm: LayerNormSpec) -> PreNorm | ParallelResidual:
    new, norms = config.new_decoder_architecture, config.num_ln_in_parallel_attn
    if not config.parallel_attn:
        if new:
            raise ConfigError("parallel_attn=False: the new_decoder_architecture is always parallel")
        return PreNorm(layer_norm)
    norms = norms or (2 if new else 1)
    if norms not in (1, 2 if new else 1):
        raise ConfigError(f"num_ln_in_parallel_attn must be 1, or 2 with new_decoder_architecture, got {norms}")
    return ParallelResidual(layer_norm, shared_norm=norms == 1)


def weight_map(spec: TransformerSpec) -> WeightMap:
    """Names of `FalconForCausalLM`."""
    entries: list[Entry] = [tensor("embedding.tokens.weight", "transformer.word_embeddings.weight")]
    for i, layer in enumerate(spec.layers):
        ours, theirs = f"layers.{i}", f"transformer.h.{i}"
        attention, mlp = layer.of(AttentionSpec), layer.of(MlpSpec)
        rows = split_query_groups(attention.num_heads, attention.num_kv_heads, attention.head_dim)
        qkv = f"{theirs}.self_attention.query_key_value"
        names = ["input_layernorm", "post_attention_layernorm"]
        if isinstance(layer.residual, ParallelResidual):
            names = ["input_layernorm"] if layer.residual.shared_norm else ["ln_attn", "ln_mlp"]
        for (our_norm, norm_spec), name in zip(layer.norms.items(), names, strict=True):
            entries += norm(f"{ours}.{our_norm}", f"{theirs}.{name}", norm_spec)
        entries += linear(f"{ours}.attention.qkv", qkv, bias=attention.qkv_bias, op=rows, bias_op=rows)
        entries += linear(f"{ours}.attention.out", f"{theirs}.self_attention.dense", bias=attention.out_bias)
        entries += linear(f"{ours}.feed_forward.up", f"{theirs}.mlp.dense_h_to_4h", bias=mlp.bias)
        entries += linear(f"{ours}.feed_forward.down", f"{theirs}.mlp.dense_4h_to_h", bias=mlp.bias)
    if spec.norm is not None:
        entries += norm("norm", "transformer.ln_f", spec.norm)
    projection, tied = head_weight(spec, "transformer.word_embeddings.weight")
    ignored = (r"(.*\.)?rotary_emb\.inv_freq",)
    return WeightMap((*entries, *projection), "transformer.", ignored, tied=tied)


FAMILY = Family("falcon", spec, weight_map)
