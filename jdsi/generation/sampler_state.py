"""The arrays that carry a batch of requests from one sampling step to the next.

Every leaf has one row per request.
"""

import dataclasses
import enum
import secrets
from collections.abc import Sequence
from typing import Self

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float32, Int32, UInt32

from jdsi.errors import ConfigError
from jdsi.generation.padding import pad_rows, power_of_two
from jdsi.generation.sampling_params import SamplingParams, check_vocabulary

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
        live = [p.filled() for p in params if p is not None]
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
            top_logprobs=power_of_two(top),
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
    rows = [(p or SamplingParams()).filled() for p in params]
    for p in rows:
        check_vocabulary(p, vocab_size)
    idle = np.array([p is None for p in params])

    def column(name: str, dtype: type) -> jax.Array:
        return jnp.asarray(np.array([getattr(p, name) for p in rows], dtype))

    state = SamplerState(
        temperature=jnp.asarray(_temperatures([p.temperature for p in rows])),
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
        stop_tokens=jnp.asarray(stop_rows(rows, eos_token_ids)),
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
        state.history = jnp.asarray(pad_rows(tokens, 256 * max(1, -(-max(lengths) // 256))))
        state.history_length = jnp.asarray(np.array([len(t) for t in tokens], np.int32))
    return state


def stop_rows(params: Sequence[SamplingParams], eos_token_ids: Sequence[int]) -> np.ndarray:
    """`[B, N]`: tokens that end each request, then `NO_TOKEN`. N is a power of two from 4 on, to compile rarely."""
    stops = [(*p.stop_token_ids, *(() if p.ignore_eos else eos_token_ids)) for p in params]
    return pad_rows(stops, power_of_two(max(4, *map(len, stops))), NO_TOKEN)


def _temperatures(values: Sequence[float]) -> np.ndarray:
    """In float32, where none may become 0 that is not: 0 is greedy."""
    least = np.finfo(np.float32).tiny
    return np.array([max(value, least) if value else 0.0 for value in values], np.float32)


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
