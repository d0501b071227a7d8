"""What is decoded together, as rows of the model and of the sampler."""

import dataclasses
from collections.abc import Sequence
from typing import Self

import numpy as np

from jdsi.generation import SamplerFeatures, SamplingParams, guidance, pad_rows
from jdsi.generation.requests import Request
from jdsi.generation.sampler_state import seed_of_choice

from .executor import Executor
from .shapes import batch_bucket, token_bucket


@dataclasses.dataclass(frozen=True)
class Batch:
    """Requests decoded together.

    Attributes:
        prompts: token ids.
        params: one per prompt; all have the same `n`.
        negatives: the prompts of the rows beside them where they are guided; then all of them are.
    """

    prompts: Sequence[Sequence[int]]
    params: Sequence[SamplingParams]
    negatives: Sequence[Sequence[int]] = ()

    @classmethod
    def of(cls, requests: Sequence[Request]) -> Self:
        """Requests of one kind."""
        negatives = [request.negative for request in requests if request.guided]
        return cls([request.prompt for request in requests], [request.params for request in requests], negatives)

    @property
    def group(self) -> int:
        """Rows of the model for each result."""
        return guidance.ROWS if self.negatives else 1

    @property
    def choices(self) -> int:
        """Results for each prompt."""
        return self.params[0].n

    def rows(self) -> list[Sequence[int]]:
        """The prompts of the model's rows, those of a request side by side."""
        if not self.negatives:
            return list(self.prompts)
        return [row for pair in zip(self.prompts, self.negatives, strict=True) for row in pair]

    def results(self, idle: int) -> tuple[list[SamplingParams | None], list[Sequence[int]]]:
        """Parameters and prompts of the sampler's rows, and behind them those of so many requests that are none."""
        params: list[SamplingParams | None] = [
            own if choice == 0 else dataclasses.replace(own, seed=seed_of_choice(own.seed, choice))
            for own in self.params
            for choice in range(self.choices)
        ]
        prompts = [prompt for prompt in self.prompts for _ in range(self.choices)]
        return [*params, *[None] * (idle * self.choices)], [*prompts, *[()] * (idle * self.choices)]


def spread_rows(rows: int, choices: int, features: SamplerFeatures) -> np.ndarray:
    """Which row each of the rows of `choices` results begins as; what belongs to one result lies side by side."""
    group = guidance.ROWS if features.guidance else 1
    return np.repeat(np.arange(rows, dtype=np.int32).reshape(-1, group), choices, axis=0).reshape(-1)


@dataclasses.dataclass(frozen=True)
class PaddedPrompts:
    """Prompts as one right-padded batch; rows past the real ones repeat the first prompt.

    Attributes:
        tokens: `[B * S]`, row by row.
        lengths: `[B]`.
        last: `[B]`, index in `tokens` of each row's last token.
        width: S.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    last: np.ndarray
    width: int

    @classmethod
    def of(cls, prompts: Sequence[Sequence[int]], rows: int) -> "PaddedPrompts":
        """Pads to `rows` rows and the bucket of the longest prompt."""
        filled = [*prompts, *[prompts[0]] * (rows - len(prompts))]
        lengths = np.array([len(p) for p in filled], np.int32)
        width = token_bucket(int(lengths.max()))
        tokens = pad_rows(filled, width)
        last = np.arange(rows, dtype=np.int32) * width + lengths - 1
        return cls(tokens.reshape(-1), lengths, last, width)

    def part(self, rows: slice) -> "PaddedPrompts":
        """Some of the rows."""
        lengths = self.lengths[rows]
        last = np.arange(len(lengths), dtype=np.int32) * self.width + lengths - 1
        return PaddedPrompts(self.tokens.reshape(-1, self.width)[rows].reshape(-1), lengths, last, self.width)


def padded_rows(executor: Executor, prompts: int, max_rows: int) -> int:
    """Rows that a batch of so many prompts is padded to."""
    rows, multiple = min(batch_bucket(prompts), max(prompts, max_rows)), executor.row_multiple
    return -(-rows // multiple) * multiple
