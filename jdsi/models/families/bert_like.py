"""What BERT and the encoders made after it share: the spec, and a checkpoint table given the names."""

import dataclasses
import re
from typing import Any

from jdsi.errors import ConfigError
from jdsi.models.spec import (
    AttentionSpec,
    EmbeddingSpec,
    HeadSpec,
    HeadTransform,
    LayerNormSpec,
    LayerSpec,
    LearnedPositions,
    MlpSpec,
    PostNorm,
    TransformerSpec,
)
from jdsi.models.weight_map import Entry, WeightMap, fused_linear, linear, tensor

from .architecture import EncoderHeads, encoder_heads
from .heads import even_head_dim


def bert_like_spec(
    config: Any,
    feed_forward: MlpSpec,
    norm: LayerNormSpec,
    heads: EncoderHeads,
    *,
    causal: bool = False,
    padding_id: int | None = None,
    token_types: int = 0,
) -> TransformerSpec:
    """An encoder with norms behind the residual additions.

    Args:
        config: a `transformers` config.
        feed_forward, norm: of every layer.
        heads: what the family's classes end in, and the activations of the heads.
        causal: whether it is used as a decoder.
        padding_id: positions start behind it; see `LearnedPositions`.
        token_types: entries of the segment table; 0 for none.
    """
    if (kind := getattr(config, "position_embedding_type", "absolute")) != "absolute":
        raise ConfigError(f"position_embedding_type {kind!r} is unknown; known: absolute")
    head_dim, entries = even_head_dim(config), config.max_position_embeddings
    first_position = 0 if padding_id is None else padding_id + 1
    head = HeadSpec(config.tie_word_embeddings, bias=True, transform=HeadTransform(heads.transform, norm))
    language_model, classifier = encoder_heads(config, heads, head, causal=causal)
    layer = LayerSpec(
        (
            AttentionSpec(
                num_heads=config.num_attention_heads,
                num_kv_heads=config.num_attention_heads,
                head_dim=head_dim,
                scale=head_dim**-0.5,
                causal=causal,
                qkv_bias=True,
                out_bias=True,
            ),
            feed_forward,
        ),
        residual=PostNorm(norm),
    )
    return TransformerSpec(
        family=config.model_type,
        vocab_size=config.vocab_size,
        width=config.hidden_size,
        max_positions=entries - first_position,
        embedding=EmbeddingSpec(LearnedPositions(entries, first_position, padding_id), token_types, norm=norm),
        layers=(layer,) * config.num_hidden_layers,
        norm=None,
        head=language_model,
        classifier=classifier,
    )


@dataclasses.dataclass(frozen=True)
class EncoderNames:
    """A family's checkpoint names.

    Attributes:
        model: the backbone.
        layers: the list of layers within it.
        qkv, attention_out, attention_norm, up, down, feed_forward_norm: within a layer.
        transform, transform_norm, projection: of the language-model head.
        tied_bias: the head's bias where the projection is tied; an untied one has its own, `{projection}.bias`.
        classifier: its two linear layers.
        pooler: of the bare model.
        next_sentence: what stands behind the pooler in pre-training.
    """

    model: str
    layers: str
    qkv: tuple[str, str, str]
    attention_out: str
    attention_norm: str
    up: str
    down: str
    feed_forward_norm: str
    transform: str
    transform_norm: str
    projection: str
    tied_bias: str
    classifier: tuple[str, str]
    pooler: str = ""
    next_sentence: str = ""


def bert_like_weight_map(spec: TransformerSpec, names: EncoderNames) -> WeightMap:
    """The table of an encoder with the given names."""
    embeddings = f"{names.model}.embeddings"
    entries: list[Entry] = [
        tensor("embedding.tokens.weight", f"{embeddings}.word_embeddings.weight"),
        tensor("embedding.positions.weight", f"{embeddings}.position_embeddings.weight"),
    ]
    if spec.embedding.token_types:
        entries.append(tensor("embedding.token_types.weight", f"{embeddings}.token_type_embeddings.weight"))
    entries += linear("embedding.norm", f"{embeddings}.LayerNorm", bias=True)
    for i, layer in enumerate(spec.layers):
        ours, theirs = f"layers.{i}", f"{names.model}.{names.layers}.{i}"
        qkv = [f"{theirs}.{name}" for name in names.qkv]
        entries += fused_linear(f"{ours}.attention.qkv", qkv, layer.of(AttentionSpec).qkv_rows, bias=True)
        entries += linear(f"{ours}.attention.out", f"{theirs}.{names.attention_out}", bias=True)
        entries += linear(f"{ours}.attention_norm", f"{theirs}.{names.attention_norm}", bias=True)
        entries += linear(f"{ours}.feed_forward.up", f"{theirs}.{names.up}", bias=True)
        entries += linear(f"{ours}.feed_forward.down", f"{theirs}.{names.down}", bias=True)
        entries += linear(f"{ours}.feed_forward_norm", f"{theirs}.{names.feed_forward_norm}", bias=True)
    ignored: tuple[str, ...] = (rf"{names.model}\.embeddings\.(position_ids|token_type_ids)",)
    tied: tuple[tuple[str, str], ...] = ()
    idle: tuple[tuple[str, str], ...] = ()
    if spec.head is not None:
        entries += linear("head.transform.dense", names.transform, bias=True)
        entries += linear("head.transform.norm", names.transform_norm, bias=True)
        weight, bias = f"{names.projection}.weight", f"{names.projection}.bias"
        if spec.head.tied:
            entries.append(tensor("head.bias", names.tied_bias))
            tied = ((weight, f"{embeddings}.word_embeddings.weight"),)
            if bias != names.tied_bias:
                tied += ((bias, names.tied_bias),)
        else:
            entries += [tensor("head.bias", bias), tensor("head.weight", weight)]
            if bias != names.tied_bias:
                ignored += (re.escape(names.tied_bias),)
                idle = ((names.tied_bias, bias),)
    if spec.classifier is not None:
        pooled = spec.head is not None or spec.classifier.labels is None
        dense, out = (names.pooler, names.next_sentence) if pooled else names.classifier
        entries += linear("classifier.dense", dense, bias=True)
        if spec.classifier.labels is not None:
            entries += linear("classifier.out", out, bias=True)
    renamed = ((r"(.*)LayerNorm\.gamma", r"\1LayerNorm.weight"), (r"(.*)LayerNorm\.beta", r"\1LayerNorm.bias"))
    return WeightMap(tuple(entries), f"{names.model}.", ignored, renamed, tied, idle)
