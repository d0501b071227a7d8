"""What a model is, as data: one frozen description per layer, so that heterogeneous stacks need no flags."""

import dataclasses
from typing import Literal

from jdsi.errors import ConfigError
from jdsi.kv_cache import KVShape
from jdsi.layers import WeightForm
from jdsi.pallas_kernels.activations import known_activation
from jdsi.pallas_kernels.rotary.scaling import LongRopeScaling

from .attention import AttentionSpec
from .checks import check_sizes
from .layer import LayerSpec
from .mlp import MlpSpec
from .norms import LayerNormSpec, NormSpec, RmsNormSpec
from .residual import ParallelResidual, PostNorm, PreNorm, ResidualSpec, SandwichNorm
from .sublayer import SublayerSpec

__all__ = [
    "AttentionSpec",
    "ClassifierSpec",
    "EmbeddingSpec",
    "HeadSpec",
    "HeadTransform",
    "LayerNormSpec",
    "LayerSpec",
    "LearnedPositions",
    "MlpSpec",
    "NormSpec",
    "ParallelResidual",
    "PostNorm",
    "PreNorm",
    "ResidualSpec",
    "RmsNormSpec",
    "SandwichNorm",
    "SublayerSpec",
    "TransformerSpec",
]


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
        check_sizes(entries=self.entries)


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
        form: of the projection, if it is not an array; a tied one is.
    """

    tied: bool
    bias: bool = False
    softcap: float | None = None
    transform: HeadTransform | None = None
    form: WeightForm | None = None

    def __post_init__(self) -> None:
        if self.tied and self.form is not None:
            raise ConfigError("a tied head is the table of token embeddings, an array: it has no form of its own")


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
        check_sizes(vocab_size=self.vocab_size, width=self.width, max_positions=self.max_positions)

    @property
    def causal(self) -> bool:
        """Whether every layer looks only backwards."""
        return all(layer.causal for layer in self.layers)

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
        return [KVShape(*layer.kv_heads) for layer in self.layers] if self.generates else []

    @property
    def recomputed_beyond(self) -> int | None:
        """Length at which `transformers` computes all keys of a sequence anew; `None` where it keeps what it has.

        Its Phi-3 does so where a sequence passes from LongRoPE's short factors to the long ones.
        """
        attention = [one for layer in self.layers for one in layer.sublayers if isinstance(one, AttentionSpec)]
        scalings = {one.rotary.scaling for one in attention if one.rotary is not None}
        lengths = [one.original_length for one in scalings if isinstance(one, LongRopeScaling)]
        return min(lengths) if self.family == "phi3" and lengths else None
