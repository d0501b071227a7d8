"""The work of a forward pass in the terms that specs count it in: what a pass is given, and what a kernel does."""

import dataclasses
from typing import Self


@dataclasses.dataclass(frozen=True)
class Workload:
    """A pass over `rows` sequences with `new_tokens` tokens each, after which each is `context` tokens long."""

    rows: int
    new_tokens: int
    context: int

    @classmethod
    def decode(cls, rows: int, context: int) -> Self:
        """One token for each of `rows` sequences, the last of `context`."""
        return cls(rows, 1, context)

    @classmethod
    def prefill(cls, rows: int, prompt: int) -> Self:
        """`rows` prompts of `prompt` tokens."""
        return cls(rows, prompt, prompt)

    @property
    def tokens(self) -> int:
        """T, the tokens of the pass."""
        return self.rows * self.new_tokens

    def divided(self, parts: int) -> Self:
        """The largest of `parts` parts with whole sequences."""
        return dataclasses.replace(self, rows=-(-self.rows // parts))

    def pairs(self, *, causal: bool = True, window: int | None = None) -> int:
        """How many keys all queries of one head see together, each those of a window or all."""
        if not causal:
            return self.rows * self.new_tokens * self.context
        before = self.context - self.new_tokens
        window = window or self.context
        whole = min(self.new_tokens, max(0, window - before))  # queries that see all tokens up to their own
        return self.rows * (whole * before + whole * (whole + 1) // 2 + (self.new_tokens - whole) * window)

    def slots(self, *, causal: bool = True, window: int | None = None) -> int:
        """How many tokens' keys are read, each once for all queries of its sequence."""
        seen = (window or self.context) + self.new_tokens - 1 if causal else self.context
        return self.rows * min(self.context, seen)


@dataclasses.dataclass(frozen=True)
class Operation:
    """A kernel, or a few that belong together, on one device.

    Attributes:
        name: what it is.
        flops: of matrix products.
        weight_bytes, kv_bytes, activation_bytes: read and written.
        kernels: how many launches.
        count: how often, of equal ones.
    """

    name: str
    flops: int = 0
    weight_bytes: int = 0
    kv_bytes: int = 0
    activation_bytes: int = 0
    kernels: int = 1
    count: int = 1

    @property
    def bytes(self) -> int:
        """All that are read and written by one."""
        return self.weight_bytes + self.kv_bytes + self.activation_bytes


@dataclasses.dataclass(frozen=True)
class Work:
    """What a device is to do of a pass, and in what.

    Attributes:
        load: the sequences.
        item: bytes of a number, of weights as of activations.
        residual: numbers of the residual stream that the last product of a sublayer adds to its own; none where ranks
            first add up what they computed.
    """

    load: Workload
    item: int
    residual: int = 0

    def product(
        self, name: str, rows: int, columns: int, *, bias: bool, tokens: int, gated: bool = False, residual: int = 0
    ) -> Operation:
        """A product with a matrix of so many rows and columns, and what is fused with it."""
        written = rows // 2 if gated else rows
        return Operation(
            name,
            flops=2 * tokens * rows * columns,
            weight_bytes=(rows * columns + (rows if bias else 0)) * self.item,
            activation_bytes=(tokens * (columns + written) + residual) * self.item,
        )

    def elementwise(self, name: str, elements: int, kernels: int = 1) -> Operation:
        """Something that reads and writes so many numbers, and computes next to nothing."""
        return Operation(name, activation_bytes=elements * self.item, kernels=kernels)
