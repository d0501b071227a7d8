"""The arrays that carry a batch of requests from one sampling step to the next.

Every leaf has one row per request, so rows are moved and replaced without knowing what they mean.
"""

import dataclasses
import enum
import functools
import secrets
from collections.abc import Sequence
from typing import Self

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float32, Int32, UInt32

from jdsi.errors import ConfigError
from jdsi.generation.sampling_params import SamplingParams

NO_TOKEN = -1


class FinishCode(enum.IntEnum):
    """Why a row ended, as the device reports it. `ERROR`: no token has a finite logit, the model's output is broken."""

    RUNNING = 0
    STOP = 1
    LENGTH = 2
    ERROR = 3


@dataclasses.dataclass(frozen=True)
class SamplerFeatures:
    """What is compiled into the sampler. More than a batch needs costs time and changes no token."""

    noise: bool = False
    top_k: bool = False
    top_p: bool = False
    min_p: bool = False
    repetition: bool = False
    counts: bool = False
    ngrams: bool = False
    min_tokens: bool = False
    logprobs: bool = False
    top_logprobs: int = 0

    @classmethod
    def of(cls, params: Sequence[SamplingParams | None]) -> Self:
        """What the requests need together; `top_logprobs` is rounded up to a power of two to compile less often."""
        live = [p for p in params if p is not None]
        top = max((p.logprobs or 0 for p in live), default=0)
        return cls(
            noise=any(not p.greedy for p in live),
            top_k=any(p.top_k > 0 for p in live),
            top_p=any(p.top_p < 1 for p in live),
            min_p=any(p.min_p > 0 for p in live),
            repetition=any(p.repetition_penalty != 1 for p in live),
            counts=any(p.presence_penalty != 0 or p.frequency_penalty != 0 for p in live),
            ngrams=any(p.no_repeat_ngram > 0 for p in live),
            min_tokens=any(p.min_new_tokens > 0 for p in live),
            logprobs=any(p.logprobs is not None for p in live),
            top_logprobs=_power_of_two(top),
        )

    def __or__(self, other: "SamplerFeatures") -> "SamplerFeatures":
        """What both need."""
        both = {f.name: max(getattr(self, f.name), getattr(other, f.name)) for f in dataclasses.fields(self)}
        return SamplerFeatures(**both)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class SamplerState:
    """One row per request. `seen`, `counts` and `history` are `None` where the features do without them."""

    temperature: Float32[Array, " B"]
    top_k: Int32[Array, " B"]
    top_p: Float32[Array, " B"]
    min_p: Float32[Array, " B"]
    repetition_penalty: Float32[Array, " B"]
    presence_penalty: Float32[Array, " B"]
    frequency_penalty: Float32[Array, " B"]
    no_repeat_ngram: Int32[Array, " B"]
    min_new_tokens: Int32[Array, " B"]
    max_new_tokens: Int32[Array, " B"]
    pad_token: Int32[Array, " B"]
    stop_tokens: Int32[Array, "B N"]
    key: UInt32[Array, "B 2"]
    num_generated: Int32[Array, " B"]
    finish: Int32[Array, " B"]
    seen: Bool[Array, "B V"] | None
    counts: Int32[Array, "B V"] | None
    history: Int32[Array, "B L"] | None
    history_length: Int32[Array, " B"]


def init_state(
    params: Sequence[SamplingParams | None],
    prompts: Sequence[Sequence[int]],
    *,
    vocab_size: int,
    eos_token_ids: Sequence[int] = (),
    pad_token_id: int = 0,
    features: SamplerFeatures | None = None,
) -> SamplerState:
    """The state before the first token of every request.

    Args:
        params: one per row; `None` is an idle row, finished from the start.
        prompts: each row's prompt, without padding; read by the repetition penalty and `no_repeat_ngram` only.
        vocab_size: the `V` of the logits.
        eos_token_ids: end the requests that do not `ignore_eos`.
        pad_token_id: what a finished row emits.
        features: at least `SamplerFeatures.of(params)`, which is the default.

    Raises:
        ConfigError: a parameter does not fit the vocabulary.
    """
    if len(params) != len(prompts):
        raise ConfigError(f"{len(params)} sampling parameters for {len(prompts)} prompts; give one for each")
    features = SamplerFeatures.of(params) | (features or SamplerFeatures())
    rows = [p or SamplingParams() for p in params]
    for p in rows:
        _check_vocabulary(p, vocab_size)
    stops = [(*p.stop_token_ids, *(() if p.ignore_eos else eos_token_ids)) for p in rows]
    idle = np.array([p is None for p in params])

    def column(name: str, dtype: type) -> jax.Array:
        return jnp.asarray(np.array([getattr(p, name) for p in rows], dtype))

    state = SamplerState(
        temperature=column("temperature", np.float32),
        top_k=column("top_k", np.int32),
        top_p=column("top_p", np.float32),
        min_p=column("min_p", np.float32),
        repetition_penalty=column("repetition_penalty", np.float32),
        presence_penalty=column("presence_penalty", np.float32),
        frequency_penalty=column("frequency_penalty", np.float32),
        no_repeat_ngram=column("no_repeat_ngram", np.int32),
        min_new_tokens=column("min_new_tokens", np.int32),
        max_new_tokens=column("max_new_tokens", np.int32),
        pad_token=jnp.full(len(rows), pad_token_id, jnp.int32),
        stop_tokens=jnp.asarray(_padded(stops, NO_TOKEN, _power_of_two(max(4, *map(len, stops))))),
        key=jnp.asarray(np.array([_key(p.seed) for p in rows], np.uint32)),
        num_generated=jnp.zeros(len(rows), jnp.int32),
        finish=jnp.asarray(np.where(idle, FinishCode.STOP, FinishCode.RUNNING).astype(np.int32)),
        seen=None,
        counts=None,
        history=None,
        history_length=jnp.zeros(len(rows), jnp.int32),
    )
    if features.repetition:
        state.seen = jnp.asarray(_seen(prompts, vocab_size))
    if features.counts:
        state.counts = jnp.zeros((len(rows), vocab_size), jnp.int32)
    if features.ngrams:
        lengths = [len(t) + p.max_new_tokens if p.no_repeat_ngram else 0 for t, p in zip(prompts, rows, strict=True)]
        tokens = [t if p.no_repeat_ngram else () for t, p in zip(prompts, rows, strict=True)]
        state.history = jnp.asarray(_padded(tokens, 0, 256 * max(1, -(-max(lengths) // 256))))
        state.history_length = jnp.asarray(np.array([len(t) for t in tokens], np.int32))
    return state


@jax.jit
def take_rows(state: SamplerState, rows: Int32[Array, " R"]) -> SamplerState:
    """The state of `rows`, in that order: to shrink, reorder or (repeating rows) grow a batch."""
    return jax.tree.map(lambda leaf: leaf[rows], state)


def replace_rows(state: SamplerState, rows: Int32[Array, " R"], fresh: SamplerState) -> SamplerState:
    """Puts the requests of `fresh` into `rows` of `state`; row numbers past the end are dropped.

    A leaf that only one of them has, or that is wider in one, is widened in the other: the rows it is missing from have
    no use for it. `state` is donated.
    """
    widened = [_widened(field.name, state, fresh) for field in dataclasses.fields(SamplerState)]
    old, new = (SamplerState(*leaves) for leaves in zip(*widened, strict=True))
    return _put_rows(old, rows, new)


@functools.partial(jax.jit, donate_argnums=0)
def _put_rows(state: SamplerState, rows: Int32[Array, " R"], fresh: SamplerState) -> SamplerState:
    return jax.tree.map(lambda old, new: old.at[rows].set(new, mode="drop"), state, fresh)


def _widened(name: str, state: SamplerState, fresh: SamplerState) -> tuple[jax.Array | None, jax.Array | None]:
    old, new = getattr(state, name), getattr(fresh, name)
    if old is None and new is None:
        return None, None
    like = new if old is None else old
    old, new = (
        jnp.zeros((s.finish.shape[0], *like.shape[1:]), like.dtype) if leaf is None else leaf
        for s, leaf in ((state, old), (fresh, new))
    )
    if old.shape[1:] != new.shape[1:]:
        width = max(old.shape[1], new.shape[1])
        fill = NO_TOKEN if name == "stop_tokens" else 0
        old, new = (jnp.pad(x, ((0, 0), (0, width - x.shape[1])), constant_values=fill) for x in (old, new))
    return old, new


@functools.partial(jax.jit, donate_argnums=0)
def finish_rows(state: SamplerState, rows: Bool[Array, " B"]) -> SamplerState:
    """Ends the marked rows, as the host does for stop strings and cancelled requests."""
    ended = jnp.where(rows & (state.finish == FinishCode.RUNNING), jnp.int32(FinishCode.STOP), state.finish)
    return dataclasses.replace(state, finish=ended)


def _check_vocabulary(params: SamplingParams, vocab_size: int) -> None:
    if (params.logprobs or 0) > vocab_size:
        raise ConfigError(
            f"sampling parameter logprobs={params.logprobs} must be at most the {vocab_size} tokens there are"
        )
    for token in params.stop_token_ids:
        if token >= vocab_size:
            raise ConfigError(f"sampling parameter stop_token_ids has {token}; the vocabulary ends at {vocab_size - 1}")


def _key(seed: int | None) -> tuple[int, int]:
    """The threefry key that `jax.random.key(seed)` has, for seeds of 64 bits."""
    seed = secrets.randbits(64) if seed is None else seed
    return seed >> 32, seed & 0xFFFFFFFF


def _seen(prompts: Sequence[Sequence[int]], vocab_size: int) -> np.ndarray:
    seen = np.zeros((len(prompts), vocab_size), np.bool_)
    for row, prompt in zip(seen, prompts, strict=True):
        tokens = np.asarray(prompt, np.int64)
        row[tokens[tokens < vocab_size]] = True
    return seen


def _padded(rows: Sequence[Sequence[int]], fill: int, width: int) -> np.ndarray:
    out = np.full((len(rows), width), fill, np.int32)
    for line, row in zip(out, rows, strict=True):
        line[: len(row)] = row
    return out


def _power_of_two(n: int) -> int:
    """The smallest power of two that is at least `n`; 0 for 0."""
    return 1 << (n - 1).bit_length() if n else 0
