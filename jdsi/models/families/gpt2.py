"""GPT-2 (Radford et al. 2019)."""

from typing import Any

from jdsi.errors import ConfigError
from jdsi.models.spec import (
    AttentionSpec,
    EmbeddingSpec,
    HeadSpec,
    LayerNormSpec,
    LayerSpec,
    LearnedPositions,
    MlpSpec,
    PreNorm,
    TransformerSpec,
)
from jdsi.models.weight_map import Entry, Transpose, WeightMap, linear, tensor

from .architecture import decoder_classifier, decoder_head, head_weight
from .family import Family
from .heads import even_head_dim


def spec(config: Any) -> TransformerSpec:
    """The spec of a `GPT2Config`."""
    if config.add_cross_attention:
        raise ConfigError("add_cross_attention must be false: there is no encoder to attend to")
    head_dim, norm = even_head_dim(config), LayerNormSpec(config.layer_norm_epsilon)
    scale = head_dim**-0.5 if config.scale_attn_weights else 1.0

    def layer(index: int) -> LayerSpec:
        return LayerSpec(
            (
                AttentionSpec(
                    num_heads=config.n_head,
                    num_kv_heads=config.n_head,
                    head_dim=head_dim,
                    scale=scale / (index + 1) if config.scale_attn_by_inverse_layer_idx else scale,
                    qkv_bias=True,
                    out_bias=True,
                ),
                MlpSpec(config.n_inner or 4 * config.n_embd, config.activation_function, bias=True),
            ),
            residual=PreNorm(norm),
        )

    return TransformerSpec(
        family=config.model_type,
        vocab_size=config.vocab_size,
        width=config.n_embd,
        max_positions=config.n_positions,
        embedding=EmbeddingSpec(positions=LearnedPositions(config.n_positions)),
        layers=tuple(layer(i) for i in range(config.n_layer)),
        norm=norm,
        head=decoder_head(config, HeadSpec(tied=config.tie_word_embeddings)),
        classifier=decoder_classifier(config),
    )


def weight_map(spec: TransformerSpec) -> WeightMap:
    """Names of `GPT2LMHeadModel`, whose matrices are stored `[in, out]`."""
    entries: list[Entry] = [
        tensor("embedding.tokens.weight", "transformer.wte.weight"),
        tensor("embedding.positions.weight", "transformer.wpe.weight"),
    ]
    for i in range(len(spec.layers)):
        ours, theirs = f"layers.{i}", f"transformer.h.{i}"
        entries += linear(f"{ours}.attention_norm", f"{theirs}.ln_1", bias=True)
        entries += linear(f"{ours}.attention.qkv", f"{theirs}.attn.c_attn", bias=True, op=Transpose())
        entries += linear(f"{ours}.attention.out", f"{theirs}.attn.c_proj", bias=True, op=Transpose())
        entries += linear(f"{ours}.feed_forward_norm", f"{theirs}.ln_2", bias=True)
        entries += linear(f"{ours}.feed_forward.up", f"{theirs}.mlp.c_fc", bias=True, op=Transpose())
        entries += linear(f"{ours}.feed_forward.down", f"{theirs}.mlp.c_proj", bias=True, op=Transpose())
    entries += linear("norm", "transformer.ln_f", bias=True)
    projection, tied = head_weight(spec, "transformer.wte.weight")
    ignored = (r"(.*\.)?attn\.(bias|masked_bias)",)
    return WeightMap((*entries, *projection), prefix="transformer.", ignored=ignored, tied=tied)


FAMILY = Family("gpt2", spec, weight_map)
