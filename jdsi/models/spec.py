"""What a model is, as data: one frozen description per layer, so that heterogeneous stacks need no flags."""

import dataclasses
import numbers
from typing import Literal

from jdsi.errors import ConfigError
from jdsi.kv_cache import KVShape
from jdsi.pallas_kernels import Alibi, Rotary
from jdsi.pallas_kernels.activations import known_activation
from jdsi.pallas_kernels.rotary.scaling import LongRopeScaling


def _check_sizes(**sizes: int) -> None:
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, numbers.Integral) or not 1 <= size < 2**31:
            raise ConfigError(f"{name} is {size!r}; it must be an integer from 1 to {2**31 - 1}")


@dataclasses.dataclass(frozen=True)
class RmsNormSpec:
    """RMSNorm; the effective weight is `weight + weight_offset`."""

    eps: float
    weight_offset: float = 0.0


@dataclasses.dataclass(frozen=True)
class LayerNormSpec:
    """LayerNorm with or without weight and bias."""

    eps: float
    bias: bool = True
    weight: bool = True


NormSpec = RmsNormSpec | LayerNormSpec


@dataclasses.dataclass(frozen=True)
class AttentionSpec:
    """Multi-head attention with grouped key/value heads.

    Attributes:
        num_heads, num_kv_heads, head_dim: H, K, D.
        scale: multiplies the scores, usually `head_dim ** -0.5`.
        causal, window, softcap, alibi, rotary: see `jdsi.pallas_kernels.AttentionForm`.
        qkv_bias, out_bias: whether the projections have a bias.
        qk_norm: norm of every query and key head (over D) before the rotary embedding.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    causal: bool = True
    window: int | None = None
    softcap: float | None = None
    alibi: Alibi | None = None
    rotary: Rotary | None = None
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: RmsNormSpec | None = None

    def __post_init__(self) -> None:
        _check_sizes(num_heads=self.num_heads, num_kv_heads=self.num_kv_heads, head_dim=self.head_dim)
        if self.window is not None:
            _check_sizes(sliding_window=self.window)

    @property
    def qkv_rows(self) -> tuple[int, int, int]:
        """Rows of q, k and v inside the fused projection."""
        kv = self.num_kv_heads * self.head_dim
        return self.num_heads * self.head_dim, kv, kv


@dataclasses.dataclass(frozen=True)
class MlpSpec:
    """Feed-forward network: `down(act(up(x)))`, or `down(act(gate(x)) * up(x))` when gated.

    When gated, our `up` weight holds the rows of gate, then those of up.
    """

    width: int
    activation: str
    gated: bool = False
    bias: bool = False

    def __post_init__(self) -> None:
        known_activation(self.activation)
        _check_sizes(width=self.width)


@dataclasses.dataclass(frozen=True)
class PreNorm:
    """`x += attention(norm(x)); x += feed_forward(norm(x))`; with `from_norm`, the norm's output is the residual."""

    norm: NormSpec
    from_norm: bool = False


@dataclasses.dataclass(frozen=True)
class PostNorm:
    """`x = norm(x + attention(x)); x = norm(x + feed_forward(x))`."""

    norm: NormSpec


@dataclasses.dataclass(frozen=True)
class SandwichNorm:
    """`x += norm(attention(norm(x))); x += norm(feed_forward(norm(x)))`."""

    norm: NormSpec


@dataclasses.dataclass(frozen=True)
class ParallelResidual:
    """`x += attention(norm(x)) + feed_forward(norm'(x))`; with `shared_norm`, both read the same norm."""

    norm: NormSpec
    shared_norm: bool = False


ResidualSpec = PreNorm | PostNorm | SandwichNorm | ParallelResidual


@dataclasses.dataclass(frozen=True)
class LayerSpec:
    """One layer of the stack."""

    attention: AttentionSpec
    feed_forward: MlpSpec
    residual: ResidualSpec


@dataclasses.dataclass(frozen=True)
class LearnedPositions:
    """A learned table with `entries` rows; position p reads row `p + offset`.

    Attributes:
        entries, offset: as said.
        padding_id: tokens of this id have no position in `transformers`, wherever they are, and do not count for the
            positions of others; so a text that is the same everywhere has none.
    """

    entries: int
    offset: int = 0
    padding_id: int | None = None

    def __post_init__(self) -> None:
        _check_sizes(entries=self.entries)


@dataclasses.dataclass(frozen=True)
class EmbeddingSpec:
    """Token embedding and what is added to it.

    Attributes:
        positions: learned absolute positions.
        token_types: entries of the segment table (BERT); 0 for none.
        scale: multiplies the token embedding.
        norm: applied to the sum.
        width: of the tables, if it differs from the model's; the sum is then projected to the model's width.
    """

    positions: LearnedPositions | None = None
    token_types: int = 0
    scale: float = 1.0
    norm: NormSpec | None = None
    width: int | None = None


@dataclasses.dataclass(frozen=True)
class HeadTransform:
    """`norm(act(linear(hidden)))` before the vocabulary projection (BERT)."""

    activation: str
    norm: NormSpec

    def __post_init__(self) -> None:
        known_activation(self.activation)


@dataclasses.dataclass(frozen=True)
class HeadSpec:
    """Language-model head.

    Attributes:
        tied: the projection is the token embedding table.
        bias: the projection has a bias.
        softcap: logits become `softcap * tanh(logits / softcap)`.
        transform: a dense layer in front.
    """

    tied: bool
    bias: bool = False
    softcap: float | None = None
    transform: HeadTransform | None = None


@dataclasses.dataclass(frozen=True)
class ClassifierSpec:
    """What is said of a whole sequence from the hidden state of one of its tokens: `out(act(dense(hidden)))`.

    Attributes:
        labels: names of the scores, one for each row of `out`; `None` where there is no `out`, and what the dense layer
            gives is a vector for the sequence (BERT's pooler).
        activation: behind the dense layer; `None` where there is none, and `out` reads the hidden state.
        token: which token's hidden state.
        padding_id: tokens at the end of a sequence that have this id are not its last one.
        bias: `out` has a bias.
        scores: what makes scores of the outputs, its logits: "identity" for regression.
    """

    labels: tuple[str, ...] | None
    activation: str | None
    token: Literal["first", "last"] = "first"
    padding_id: int | None = None
    bias: bool = True
    scores: Literal["softmax", "sigmoid", "identity"] = "softmax"

    def __post_init__(self) -> None:
        if self.activation is not None:
            known_activation(self.activation)
        if (self.labels is None and self.activation is None) or self.labels == ():
            raise ValueError("a classifier needs labels, a dense layer with an activation, or both")


@dataclasses.dataclass(frozen=True)
class TransformerSpec:
    """A whole model.

    Attributes:
        family: name of the family that made the spec (`config.json`'s `model_type`).
        vocab_size: V.
        width: E.
        max_positions: longest sequence the model takes.
        embedding, layers, norm, head: the parts in order; no `norm` or no `head` leaves that part out.
        classifier: head of a sequence classifier, or the pooler of a bare encoder.
    """

    family: str
    vocab_size: int
    width: int
    max_positions: int
    embedding: EmbeddingSpec
    layers: tuple[LayerSpec, ...]
    norm: NormSpec | None
    head: HeadSpec | None
    classifier: ClassifierSpec | None = None

    def __post_init__(self) -> None:
        _check_sizes(vocab_size=self.vocab_size, width=self.width, max_positions=self.max_positions)

    @property
    def causal(self) -> bool:
        """Whether every layer looks only backwards."""
        return all(layer.attention.causal for layer in self.layers)

    @property
    def generates(self) -> bool:
        """Whether the model continues texts, and so keeps keys and values: neither encoder nor classifier, nor bare."""
        return self.causal and self.head is not None

    @property
    def classifier_outputs(self) -> int:
        """Numbers that the classifier gives for a sequence."""
        labels = None if self.classifier is None else self.classifier.labels
        return self.width if labels is None else len(labels)

    @property
    def main_call(self) -> str:
        """The method of an engine that a model of this kind is made for, as messages name it."""
        if self.head is None and self.classifier is not None:
            return "pool()" if self.classifier.labels is None else "classify()"
        return "generate()" if self.generates else "forward()"

    @property
    def position_table(self) -> int | None:
        """Positions that a learned table has; `None` where positions are computed and have no end."""
        learned = self.embedding.positions
        return None if learned is None else learned.entries - learned.offset

    @property
    def kv_shapes(self) -> list[KVShape]:
        """What each layer remembers of a token, if the model generates."""
        attention = [layer.attention for layer in self.layers] if self.generates else []
        return [KVShape(a.num_kv_heads, a.head_dim, a.head_dim) for a in attention]

    @property
    def recomputed_beyond(self) -> int | None:
        """Length at which `transformers` computes all keys of a sequence anew; `None` where it keeps what it has.

        Its Phi-3 does so where a sequence passes from LongRoPE's short factors to the long ones.
        """
        scalings = {layer.attention.rotary.scaling for layer in self.layers if layer.attention.rotary is not None}
        lengths = [one.original_length for one in scalings if isinstance(one, LongRopeScaling)]
        return min(lengths) if self.family == "phi3" and lengths else None
