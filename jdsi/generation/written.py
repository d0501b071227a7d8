"""What each row of a batch has written so far, as far as the processors look at it."""

import dataclasses
from collections.abc import Sequence
from typing import Self

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int32

from .features import SamplerFeatures
from .padding import pad_rows
from .row_settings import RowSettings, automata, remembers
from .sampling_params import SamplingParams
from .token_automaton import joined


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Written:
    """One entry per row. `None` where the features do without.

    Attributes:
        generated: tokens behind the prompt.
        tokens: prompt and output of the rows that remember; what is past `length` has no meaning.
        length: of `tokens`.
        seen: tokens in prompt or output.
        counts: how often each token is in the output.
        state: of the settings' automaton.
    """

    generated: Int32[Array, " B"]
    tokens: Int32[Array, "B L"] | None = None
    length: Int32[Array, " B"] | None = None
    seen: Bool[Array, "B V"] | None = None
    counts: Int32[Array, "B V"] | None = None
    state: Int32[Array, " B"] | None = None

    @classmethod
    def prompts(
        cls,
        params: Sequence[SamplingParams],
        prompts: Sequence[Sequence[int]],
        vocab_size: int,
        features: SamplerFeatures,
    ) -> Self:
        """Prompts with nothing behind them."""
        written = cls(jnp.zeros(len(prompts), jnp.int32))
        if features.history:
            kept = [prompt if remembers(p) else () for p, prompt in zip(params, prompts, strict=True)]
            room = [len(t) + p.max_new_tokens if remembers(p) else 0 for p, t in zip(params, prompts, strict=True)]
            written.tokens = jnp.asarray(pad_rows(kept, 256 * max(1, -(-max(room) // 256))))
            written.length = jnp.asarray(np.array(list(map(len, kept)), np.int32))
        if features.repetition:
            written.seen = jnp.asarray(_seen(prompts, vocab_size))
        if features.counts:
            written.counts = jnp.zeros((len(prompts), vocab_size), jnp.int32)
        if features.automaton:
            written.state = jnp.asarray(joined(automata(params))[1])
        return written

    @classmethod
    def of_tokens(
        cls,
        tokens: Int32[Array, "B L"],
        prompt_length: Int32[Array, " B"],
        generated: Int32[Array, " B"],
        state: Int32[Array, " B"] | None,
        vocab_size: int,
        features: SamplerFeatures,
    ) -> Self:
        """Found from all tokens anew, for rows that do not go on from their own last ones."""
        position, rows = jnp.arange(tokens.shape[1]), jnp.arange(tokens.shape[0])[:, None]
        length = (prompt_length + generated)[:, None]
        written = cls(generated, tokens, length[:, 0], state=state)
        if features.repetition:
            held = jnp.where(position < length, tokens, vocab_size)
            none = jnp.zeros((tokens.shape[0], vocab_size), jnp.bool_)
            written.seen = none.at[rows, held].set(True, mode="drop")
        if features.counts:
            held = jnp.where((position >= prompt_length[:, None]) & (position < length), tokens, vocab_size)
            zeros = jnp.zeros((tokens.shape[0], vocab_size), jnp.int32)
            written.counts = zeros.at[rows, held].add(1, mode="drop")
        return written

    def followed_by(self, tokens: Int32[Array, " B"], running: Bool[Array, " B"], settings: RowSettings) -> Self:
        """With one token more in the running rows."""
        rows = jnp.arange(tokens.shape[0])
        changes: dict[str, Array] = {"generated": self.generated + running}
        if self.tokens is not None and self.length is not None and settings.remembers is not None:
            recorded = running & settings.remembers
            at = jnp.where(recorded, self.length, self.tokens.shape[1])
            changes["tokens"] = self.tokens.at[rows, at].set(tokens, mode="drop")
            changes["length"] = self.length + recorded
        if self.seen is not None:
            changes["seen"] = self.seen.at[rows, tokens].max(running)
        if self.counts is not None:
            changes["counts"] = self.counts.at[rows, tokens].add(running.astype(jnp.int32))
        if self.state is not None and settings.automaton is not None:
            changes["state"] = jnp.where(running, settings.automaton[self.state, tokens], self.state)
        return dataclasses.replace(self, **changes)


def _seen(prompts: Sequence[Sequence[int]], vocab_size: int) -> np.ndarray:
    seen = np.zeros((len(prompts), vocab_size), np.bool_)
    for row, prompt in zip(seen, prompts, strict=True):
        tokens = np.asarray(prompt, np.int64)
        row[tokens[tokens < vocab_size]] = True
    return seen
