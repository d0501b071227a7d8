"""GPT-Neo (Black et al. 2021): GPT-2 with unscaled scores and sliding windows in some layers."""

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
from jdsi.models.weight_map import Entry, WeightMap, fused_linear, linear, tensor

from .architecture import decoder_classifier, decoder_head, head_weight
from .family import Family
from .heads import even_head_dim


def spec(config: Any) -> TransformerSpec:
    """The spec of a `GPTNeoConfig`."""
    head_dim, norm = even_head_dim(config), LayerNormSpec(config.layer_norm_epsilon)
    windows = {"global": None, "local": config.window_size}
    kinds = config.attention_layers
    if len(kinds) != config.num_layers or not windows.keys() >= set(kinds):
        raise ConfigError(
            f"attention_types must name 'global' or 'local' for each of the {config.num_layers} layers, got {kinds}"
        )

    def layer(window: int | None) -> LayerSpec:
        return LayerSpec(
            (
                AttentionSpec(
                    num_heads=config.num_heads,
                    num_kv_heads=config.num_heads,
                    head_dim=head_dim,
                    scale=1.0,
                    window=window,
                    out_bias=True,
                ),
                MlpSpec(config.intermediate_size or 4 * config.hidden_size, config.activation_function, bias=True),
            ),
            residual=PreNorm(norm),
        )

    return TransformerSpec(
        family=config.model_type,
        vocab_size=config.vocab_size,
        width=config.hidden_size,
        max_positions=config.max_position_embeddings,
        embedding=EmbeddingSpec(positions=LearnedPositions(config.max_position_embeddings)),
        layers=tuple(layer(windows[kind]) for kind in kinds),
        norm=norm,
        head=decoder_head(config, HeadSpec(tied=config.tie_word_embeddings)),
        classifier=decoder_classifier(config),
    )


def weight_map(spec: TransformerSpec) -> WeightMap:
    """Names of `GPTNeoForCausalLM`."""
    entries: list[Entry] = [
        tensor("embedding.tokens.weight", "transformer.wte.weight"),
        tensor("embedding.positions.weight", "transformer.wpe.weight"),
    ]
    for i, layer in enumerate(spec.layers):
        ours, theirs = f"layers.{i}", f"transformer.h.{i}"
        qkv = [f"{theirs}.attn.attention.{x}_proj" for x in "qkv"]
        entries += linear(f"{ours}.attention_norm", f"{theirs}.ln_1", bias=True)
        entries += fused_linear(f"{ours}.attention.qkv", qkv, layer.of(AttentionSpec).qkv_rows, bias=False)
        entries += linear(f"{ours}.attention.out", f"{theirs}.attn.attention.out_proj", bias=True)
        entries += linear(f"{ours}.feed_forward_norm", f"{theirs}.ln_2", bias=True)
        entries += linear(f"{ours}.feed_forward.up", f"{theirs}.mlp.c_fc", bias=True)
        entries += linear(f"{ours}.feed_forward.down", f"{theirs}.mlp.c_proj", bias=True)
    entries += linear("norm", "transformer.ln_f", bias=True)
    projection, tied = head_weight(spec, "transformer.wte.weight")
    ignored = (r"(.*\.)?attn\.attention\.(bias|masked_bias)",)
    return WeightMap((*entries, *projection), prefix="transformer.", ignored=ignored, tied=tied)


FAMILY = Family("gpt_neo", spec, weight_map)
