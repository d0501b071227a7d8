"""What a forward pass is given."""

import dataclasses
from typing import Self

from jdsi.models.spec import AttentionSpec


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

    def pairs(self, attention: AttentionSpec) -> int:
        """How many keys all queries of one head see together."""
        if not attention.causal:
            return self.rows * self.new_tokens * self.context
        before = self.context - self.new_tokens
        window = attention.window or self.context
        whole = min(self.new_tokens, max(0, window - before))  # queries that see all tokens up to their own
        return self.rows * (whole * before + whole * (whole + 1) // 2 + (self.new_tokens - whole) * window)

    def slots(self, attention: AttentionSpec) -> int:
        """How many tokens' keys are read, each once for all queries of its sequence."""
        window = (attention.window or self.context) + self.new_tokens - 1 if attention.causal else self.context
        return self.rows * min(self.context, window)
