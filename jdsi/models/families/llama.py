"""Llama 1 to 3 (Touvron et al. 2023; Grattafiori et al. 2024)."""

from typing import Any

from jdsi.models.spec import AttentionSpec, EmbeddingSpec, HeadSpec, LayerSpec, MlpSpec, PreNorm, RmsNormSpec
from jdsi.models.spec import TransformerSpec
from jdsi.models.weight_map import Entry, WeightMap, fused_linear, linear, tensor

from .family import Family
from .rope import rotary


def spec(config: Any) -> TransformerSpec:
    """The spec of a `LlamaConfig`."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    layer = LayerSpec(
        attention=AttentionSpec(
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            head_dim=head_dim,
            scale=head_dim**-0.5,
            rotary=rotary(config, head_dim),
            qkv_bias=config.attention_bias,
            out_bias=config.attention_bias,
        ),
        feed_forward=MlpSpec(config.intermediate_size, config.hidden_act, gated=True, bias=config.mlp_bias),
        residual=PreNorm(RmsNormSpec(config.rms_norm_eps)),
    )
    return TransformerSpec(
        family=config.model_type,
        vocab_size=config.vocab_size,
        width=config.hidden_size,
        max_positions=config.max_position_embeddings,
        embedding=EmbeddingSpec(),
        layers=(layer,) * config.num_hidden_layers,
        norm=RmsNormSpec(config.rms_norm_eps),
        head=HeadSpec(tied=config.tie_word_embeddings),
    )


def weight_map(spec: TransformerSpec) -> WeightMap:
    """Names of `LlamaForCausalLM`."""
    entries: list[Entry] = [tensor("embedding.tokens.weight", "model.embed_tokens.weight")]
    for i, layer in enumerate(spec.layers):
        ours, theirs = f"layers.{i}", f"model.layers.{i}"
        attention, mlp = layer.attention, layer.feed_forward
        qkv = [f"{theirs}.self_attn.{x}_proj" for x in "qkv"]
        gate_up = [f"{theirs}.mlp.gate_proj", f"{theirs}.mlp.up_proj"]
        entries += linear(f"{ours}.attention_norm", f"{theirs}.input_layernorm", bias=False)
        entries += fused_linear(f"{ours}.attention.qkv", qkv, attention.qkv_rows, bias=attention.qkv_bias)
        entries += linear(f"{ours}.attention.out", f"{theirs}.self_attn.o_proj", bias=attention.out_bias)
        entries += linear(f"{ours}.feed_forward_norm", f"{theirs}.post_attention_layernorm", bias=False)
        entries += fused_linear(f"{ours}.feed_forward.up", gate_up, [mlp.width] * 2, bias=mlp.bias)
        entries += linear(f"{ours}.feed_forward.down", f"{theirs}.mlp.down_proj", bias=mlp.bias)
    entries += linear("norm", "model.norm", bias=False)
    ignored = (r".*rotary_emb\.inv_freq",)
    if spec.head is not None and spec.head.tied:
        ignored += (r"lm_head\.weight",)
    else:
        entries.append(tensor("head.weight", "lm_head.weight"))
    return WeightMap(tuple(entries), prefix="model.", ignored=ignored)


FAMILY = Family("llama", spec, weight_map)
