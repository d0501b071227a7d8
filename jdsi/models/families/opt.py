"""OPT (Zhang et al. 2022), with the post-norm and projected embeddings of its 350M member."""

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
    PostNorm,
    PreNorm,
    TransformerSpec,
)
from jdsi.models.weight_map import Entry, WeightMap, fused_linear, linear, norm, tensor

from .architecture import decoder_classifier, decoder_head, head_weight
from .family import Family
from .heads import even_head_dim

_OFFSET = 2  # the first two rows of the position table are never read


def spec(config: Any) -> TransformerSpec:
    """The spec of an `OPTConfig`."""
    head_dim, affine = even_head_dim(config), config.layer_norm_elementwise_affine
    layer_norm = LayerNormSpec(eps=1e-5, weight=affine, bias=affine)
    layer = LayerSpec(
        (
            AttentionSpec(
                num_heads=config.num_attention_heads,
                num_kv_heads=config.num_attention_heads,
                head_dim=head_dim,
                scale=head_dim**-0.5,
                qkv_bias=config.enable_bias,
                out_bias=config.enable_bias,
            ),
            MlpSpec(config.ffn_dim, config.activation_function, bias=config.enable_bias),
        ),
        residual=PreNorm(layer_norm) if config.do_layer_norm_before else PostNorm(layer_norm),
    )
    entries = config.max_position_embeddings + _OFFSET
    table = config.word_embed_proj_dim
    head = decoder_head(config, HeadSpec(tied=config.tie_word_embeddings))
    if head is None and table != config.hidden_size:
        raise ConfigError(
            f"word_embed_proj_dim {table} differs from hidden_size {config.hidden_size} in an "
            f"{config.architectures[0]}; the projection back belongs to the language-model head of an OPTForCausalLM"
        )
    return TransformerSpec(
        family=config.model_type,
        vocab_size=config.vocab_size,
        width=config.hidden_size,
        max_positions=config.max_position_embeddings,
        embedding=EmbeddingSpec(
            positions=LearnedPositions(entries, _OFFSET), width=table if table != config.hidden_size else None
        ),
        layers=(layer,) * config.num_hidden_layers,
        norm=layer_norm if config.do_layer_norm_before and not config._remove_final_layer_norm else None,
        head=head,
        classifier=decoder_classifier(config),
    )


def weight_map(spec: TransformerSpec) -> WeightMap:
    """Names of `OPTForCausalLM`."""
    model = "model.decoder"
    entries: list[Entry] = [
        tensor("embedding.tokens.weight", f"{model}.embed_tokens.weight"),
        tensor("embedding.positions.weight", f"{model}.embed_positions.weight"),
    ]
    if spec.embedding.width is not None:
        entries.append(tensor("embedding.project.weight", f"{model}.project_in.weight"))
    if spec.embedding.width is not None and spec.head is not None:
        entries.append(tensor("head.project.weight", f"{model}.project_out.weight"))
    for i, layer in enumerate(spec.layers):
        ours, theirs = f"layers.{i}", f"{model}.layers.{i}"
        attention, mlp = layer.of(AttentionSpec), layer.of(MlpSpec)
        qkv = [f"{theirs}.self_attn.{x}_proj" for x in "qkv"]
        entries += norm(f"{ours}.attention_norm", f"{theirs}.self_attn_layer_norm", layer.norms["attention_norm"])
        entries += fused_linear(f"{ours}.attention.qkv", qkv, attention.qkv_rows, bias=attention.qkv_bias)
        entries += linear(f"{ours}.attention.out", f"{theirs}.self_attn.out_proj", bias=attention.out_bias)
        entries += norm(f"{ours}.feed_forward_norm", f"{theirs}.final_layer_norm", layer.norms["feed_forward_norm"])
        entries += linear(f"{ours}.feed_forward.up", f"{theirs}.fc1", bias=mlp.bias)
        entries += linear(f"{ours}.feed_forward.down", f"{theirs}.fc2", bias=mlp.bias)
    if spec.norm is not None:
        entries += norm("norm", f"{model}.final_layer_norm", spec.norm)
    projection, tied = head_weight(spec, f"{model}.embed_tokens.weight")
    return WeightMap((*entries, *projection), prefix="model.", tied=tied)


FAMILY = Family("opt", spec, weight_map)
