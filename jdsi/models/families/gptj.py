"""GPT-J (Wang and Komatsuzaki 2021): interleaved rotary embedding, attention and MLP side by side behind one norm."""

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
    TransformerSpec,
)
from jdsi.models.weight_map import Entry, WeightMap, fused_linear, linear, tensor
from jdsi.pallas_kernels import Rotary

from .architecture import decoder_classifier, decoder_head, head_weight
from .family import Family
from .heads import even_head_dim


def spec(config: Any) -> TransformerSpec:
    """The spec of a `GPTJConfig`."""
    head_dim, norm = even_head_dim(config), LayerNormSpec(config.layer_norm_epsilon)
    rotary_dim = config.rotary_dim
    if not rotary_dim or rotary_dim % 2 or rotary_dim > head_dim:
        raise ConfigError(f"rotary_dim must be even and from 2 to the head width {head_dim}, got {rotary_dim}")
    layer = LayerSpec(
        (
            AttentionSpec(
                num_heads=config.n_head,
                num_kv_heads=config.n_head,
                head_dim=head_dim,
                scale=head_dim**-0.5,
                rotary=Rotary(dim=rotary_dim, interleaved=True),
            ),
            MlpSpec(config.n_inner or 4 * config.n_embd, config.activation_function, bias=True),
        ),
        residual=ParallelResidual(norm, shared_norm=True),
    )
    return TransformerSpec(
        family=config.model_type,
        vocab_size=config.vocab_size,
        width=config.n_embd,
        max_positions=config.n_positions,
        embedding=EmbeddingSpec(),
        layers=(layer,) * config.n_layer,
        norm=norm,
        head=decoder_head(config, HeadSpec(tied=config.tie_word_embeddings, bias=True)),
        classifier=decoder_classifier(config),
    )


def weight_map(spec: TransformerSpec) -> WeightMap:
    """Names of `GPTJForCausalLM`."""
    entries: list[Entry] = [tensor("embedding.tokens.weight", "transformer.wte.weight")]
    for i, layer in enumerate(spec.layers):
        ours, theirs = f"layers.{i}", f"transformer.h.{i}"
        qkv = [f"{theirs}.attn.{x}_proj" for x in "qkv"]
        entries += linear(f"{ours}.attention_norm", f"{theirs}.ln_1", bias=True)
        entries += fused_linear(f"{ours}.attention.qkv", qkv, layer.of(AttentionSpec).qkv_rows, bias=False)
        entries += linear(f"{ours}.attention.out", f"{theirs}.attn.out_proj", bias=False)
        entries += linear(f"{ours}.feed_forward.up", f"{theirs}.mlp.fc_in", bias=True)
        entries += linear(f"{ours}.feed_forward.down", f"{theirs}.mlp.fc_out", bias=True)
    entries += linear("norm", "transformer.ln_f", bias=True)
    if spec.head is not None:
        entries.append(tensor("head.bias", "lm_head.bias"))
    projection, tied = head_weight(spec, "transformer.wte.weight")
    ignored = (r"(.*\.)?attn\.(bias|masked_bias|embed_positions)",)
    return WeightMap((*entries, *projection), prefix="transformer.", ignored=ignored, tied=tied)


FAMILY = Family("gptj", spec, weight_map)
