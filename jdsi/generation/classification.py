"""Texts as rows of token ids for a classifier, and what its outputs say of them."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from jdsi.errors import CapacityError, ConfigError, JdsiError, PromptError
from jdsi.models import TransformerSpec
from jdsi.models.spec import ClassifierSpec

from .prompts import Prompt, as_list, encode, encoding

Text = Prompt | tuple[str, str]
"""A text, a pair of texts, token ids, chat messages or a `Chat`."""


@dataclasses.dataclass(frozen=True, eq=False)
class Classification:
    """What a classifier says of a text.

    Attributes:
        label: the one with the highest score.
        labels: all of them.
        scores: of each label, float32: probabilities, which add up to 1 unless the labels do not exclude each other; of
            a regression the values themselves.
        logits: what the scores were made of, float32.
    """

    label: str
    labels: tuple[str, ...]
    scores: Float[np.ndarray, " labels"]
    logits: Float[np.ndarray, " labels"]

    @property
    def score(self) -> float:
        """Of `label`."""
        return float(self.scores[self.labels.index(self.label)])

    @classmethod
    def of(cls, spec: ClassifierSpec, logits: Float[np.ndarray, " labels"]) -> "Classification":
        """What a classifier with labels means by its outputs."""
        assert spec.labels is not None
        if spec.scores == "softmax":
            powers = np.exp(logits - logits.max())
            scores = powers / powers.sum()
        elif spec.scores == "sigmoid":
            scores = np.exp(-np.logaddexp(np.float32(0), -logits))
        else:
            scores = logits
        return cls(spec.labels[int(logits.argmax())], spec.labels, scores, logits)

    def as_dict(self) -> dict[str, Any]:
        """All fields, with lists in place of arrays."""
        arrays = {"scores": self.scores.tolist(), "logits": self.logits.tolist()}
        return {"label": self.label, "score": self.score, "labels": list(self.labels), **arrays}


@dataclasses.dataclass(frozen=True)
class TokenRow:
    """A text as a model takes it.

    Attributes:
        index: which of the caller's texts.
        tokens: its ids.
        token_types: a segment id for each; `None` where all are 0.
    """

    index: int
    tokens: list[int]
    token_types: list[int] | None = None

    @property
    def rows(self) -> int:
        """Rows of a batch that it takes."""
        return 1


@dataclasses.dataclass(frozen=True)
class TextIntake:
    """Makes rows, of a model and within limits.

    Attributes:
        spec: of the model.
        tokenizer: a `transformers` tokenizer, or `None`, which leaves token ids alone.
        max_tokens: of a row.
    """

    spec: TransformerSpec
    tokenizer: Any
    max_tokens: int

    def rows(self, texts: Any, token_types: Any = None) -> list[TokenRow]:
        """A row for each of the texts, see `InferenceEngine.classify`, which also has the errors."""
        items = _items(texts)
        if not items:
            raise PromptError("no text was given")
        names = [f"text {i}" if len(items) > 1 else "text" for i in range(len(items))]
        kinds = [None] * len(items) if token_types is None else self._given_types(token_types, items)
        rows = [self._row(*each) for each in zip(range(len(items)), items, kinds, names, strict=True)]
        for name, row in zip(names, rows, strict=True):
            if len(row.tokens) > self.max_tokens:
                raise CapacityError(
                    f"{name} has {len(row.tokens)} tokens, more than the {self.max_tokens} this engine takes"
                )
        return rows

    def _row(self, index: int, text: Any, types: list[int] | None, name: str) -> TokenRow:
        vocabulary = self.spec.vocab_size
        if parts := _parts(text, name):
            if types is not None:
                raise ConfigError(f"{name} is text, whose token types the tokenizer tells; leave token_types out")
            made = encoding(parts, self.tokenizer, name)
            tokens = encode(made["input_ids"], None, vocabulary, name=name)
            types = self._own_types(made)
        else:
            tokens = encode(text, self.tokenizer, vocabulary, name=name, answer=False)
        positions = self.spec.embedding.positions
        if positions is not None and positions.padding_id in tokens:
            raise PromptError(
                f"{name} has the padding id {positions.padding_id} at {tokens.index(positions.padding_id)}, and what "
                f"{self.spec.family} makes of one within a text is not computed here; leave padding out"
            )
        if types is not None and len(types) != len(tokens):
            raise ConfigError(f"token_types has {len(types)} ids for the {len(tokens)} tokens of {name}")
        kinds = self.spec.embedding.token_types
        if types is not None and not all(0 <= kind < kinds for kind in types):
            have = f"types 0 to {kinds - 1}" if kinds else "no token types"
            raise ConfigError(f"{name} has token types from {min(types)} to {max(types)}; this model has {have}")
        return TokenRow(index, tokens, types)

    def _own_types(self, made: Mapping[str, list[int]]) -> list[int] | None:
        types = made.get("token_type_ids") if self.spec.embedding.token_types else None
        return types if types is not None and any(types) else None

    def _given_types(self, token_types: Any, items: list[Any]) -> list[list[int]]:
        rows = as_list(token_types)
        if len(rows) != len(items):
            raise ConfigError(f"token_types has {len(rows)} rows for {len(items)} rows of token ids")
        types = [np.asarray(row) for row in rows]
        if not all(row.ndim == 1 and np.issubdtype(row.dtype, np.integer) for row in types):
            raise ConfigError("token_types must have a row of integers for each row of token ids")
        return [row.tolist() for row in types]


def _items(texts: Any) -> list[Any]:
    """A list of texts; a single one becomes a list of one."""
    if isinstance(texts, tuple) and texts and all(isinstance(text, str) for text in texts):
        return [texts]
    return as_list(texts)


def _parts(text: Any, name: str) -> tuple[str, ...]:
    """A text or a pair of them; nothing where the text is given otherwise."""
    if isinstance(text, str):
        return (text,)
    if not isinstance(text, tuple) or not any(isinstance(part, str) for part in text):
        return ()
    if len(text) != 2 or not all(isinstance(part, str) for part in text):
        raise PromptError(
            f"{name} is a tuple of {len(text)}; a pair is a tuple of two texts, and many texts are a list"
        )
    return text


def check_finite(rows: Sequence[TokenRow], outputs: Mapping[int, Float[np.ndarray, " outputs"]]) -> None:
    """Raises `JdsiError` if a model gave numbers that mean nothing."""
    broken = [str(row.index) for row in rows if not np.isfinite(outputs[row.index]).all()]
    if broken:
        raise JdsiError(
            f"what the model gives for text {', '.join(broken[:20])} is not finite: a damaged checkpoint, or float16 "
            "where bfloat16 is needed"
        )
