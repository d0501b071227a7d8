"""What the families share that differ from Llama by a few options: the spec's shell and the checkpoint's names."""

import dataclasses
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from jdsi.errors import ConfigError
from jdsi.models.spec import (
    AttentionSpec,
    EmbeddingSpec,
    HeadSpec,
    LayerSpec,
    MlpSpec,
    PreNorm,
    RmsNormSpec,
    TransformerSpec,
)
from jdsi.models.weight_map import Entry, WeightMap, fused_linear, linear, tensor
from jdsi.pallas_kernels.activations import known_activation

from .architecture import decoder_classifier, decoder_head, head_weight
from .rope import rotary, rotary_dim

NORMS = MappingProxyType({"attention_norm": "input_layernorm", "feed_forward_norm": "post_attention_layernorm"})


def causal_attention(
    config: Any,
    *,
    qkv_bias: bool = False,
    out_bias: bool = False,
    qk_norm: RmsNormSpec | None = None,
    partial_rotary: bool = False,
) -> AttentionSpec:
    """Grouped-query attention with rotary positions, as the config's common keys describe it.

    Args:
        config: a `transformers` config.
        qkv_bias, out_bias, qk_norm: see `AttentionSpec`.
        partial_rotary: whether the family can rotate only a part of each head.
    """
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    if heads % kv_heads:
        raise ConfigError(f"num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}")
    own = getattr(config, "head_dim", None)
    head_dim = config.hidden_size // heads if own is None else own
    rotated = rotary_dim(config, head_dim)
    if rotated != head_dim and not partial_rotary:
        raise ConfigError(f"partial_rotary_factor must be 1 in a {config.model_type} model: whole heads rotate")
    return AttentionSpec(
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        scale=head_dim**-0.5,
        rotary=rotary(config, rotated),
        qkv_bias=qkv_bias,
        out_bias=out_bias,
        qk_norm=qk_norm,
    )


def windows_by_layer_type(config: Any) -> list[int | None]:
    """Per layer the sliding window, or `None` for full attention, from `config.layer_types`."""
    windows = {"full_attention": None, "sliding_attention": config.sliding_window}
    if unknown := sorted(set(config.layer_types) - windows.keys()):
        raise ConfigError(f"unknown layer_types {', '.join(unknown)}; known: {', '.join(windows)}")
    if len(config.layer_types) != config.num_hidden_layers:
        raise ConfigError(f"layer_types names {len(config.layer_types)} layers of {config.num_hidden_layers}")
    if "sliding_attention" in config.layer_types and config.sliding_window is None:
        raise ConfigError("layer_types has sliding_attention, which needs a sliding_window (and use_sliding_window)")
    return [windows[kind] for kind in config.layer_types]


def with_windows(layer: LayerSpec, windows: Sequence[int | None]) -> tuple[LayerSpec, ...]:
    """One copy of `layer` for each window."""
    return tuple(layer.replaced(dataclasses.replace(layer.of(AttentionSpec), window=window)) for window in windows)


def decoder_spec(
    config: Any, layers: tuple[LayerSpec, ...], norm: RmsNormSpec, *, scale: float = 1.0, softcap: float | None = None
) -> TransformerSpec:
    """A decoder of the given layers; `scale` multiplies the embedding, `softcap` bounds the logits."""
    return TransformerSpec(
        family=config.model_type,
        vocab_size=config.vocab_size,
        width=config.hidden_size,
        max_positions=config.max_position_embeddings,
        embedding=EmbeddingSpec(scale=scale),
        layers=layers,
        norm=norm,
        head=decoder_head(config, HeadSpec(tied=config.tie_word_embeddings, softcap=softcap)),
        classifier=decoder_classifier(config),
    )


def llama_like_spec(
    config: Any, attention: AttentionSpec, windows: Sequence[int | None], *, mlp_bias: bool = False
) -> TransformerSpec:
    """A Llama with the given attention, and a sliding window, or `None`, for each layer."""
    norm = RmsNormSpec(config.rms_norm_eps)
    activation = known_activation(config.hidden_act, "hidden_act")
    mlp = MlpSpec(config.intermediate_size, activation, gated=True, bias=mlp_bias)
    return decoder_spec(config, with_windows(LayerSpec((attention, mlp), PreNorm(norm)), windows), norm)


def llama_like_weight_map(
    spec: TransformerSpec,
    *,
    norms: Mapping[str, str] = NORMS,
    qkv: Sequence[str] = ("q_proj", "k_proj", "v_proj"),
    gate_up: Sequence[str] = ("gate_proj", "up_proj"),
) -> WeightMap:
    """Llama's checkpoint names.

    Args:
        spec: the model.
        norms: our name of each norm of a layer, and theirs.
        qkv, gate_up: the tensors that our fused ones are made of; one each where the checkpoint has them fused.
    """
    entries: list[Entry] = [tensor("embedding.tokens.weight", "model.embed_tokens.weight")]
    for i, layer in enumerate(spec.layers):
        ours, theirs = f"layers.{i}", f"model.layers.{i}"
        attention, mlp = layer.of(AttentionSpec), layer.of(MlpSpec)
        for norm, name in norms.items():
            entries += linear(f"{ours}.{norm}", f"{theirs}.{name}", bias=False)
        names = [f"{theirs}.self_attn.{name}" for name in qkv]
        rows = attention.qkv_rows if len(qkv) > 1 else [sum(attention.qkv_rows)]
        entries += fused_linear(f"{ours}.attention.qkv", names, rows, bias=attention.qkv_bias)
        if attention.qk_norm is not None:
            entries += linear(f"{ours}.attention.q_norm", f"{theirs}.self_attn.q_norm", bias=False)
            entries += linear(f"{ours}.attention.k_norm", f"{theirs}.self_attn.k_norm", bias=False)
        entries += linear(f"{ours}.attention.out", f"{theirs}.self_attn.o_proj", bias=attention.out_bias)
        names = [f"{theirs}.mlp.{name}" for name in gate_up]
        rows = [2 * mlp.width // len(gate_up)] * len(gate_up)
        entries += fused_linear(f"{ours}.feed_forward.up", names, rows, bias=mlp.bias)
        entries += linear(f"{ours}.feed_forward.down", f"{theirs}.mlp.down_proj", bias=mlp.bias)
    entries += linear("norm", "model.norm", bias=False)
    projection, tied = head_weight(spec, "model.embed_tokens.weight")
    ignored = (r".*rotary_emb\.inv_freq",)
    return WeightMap((*entries, *projection), prefix="model.", ignored=ignored, tied=tied)
