"""Beam search inside `jit`, step by step as `transformers` does it.

A batch of `B` prompts with `K` beams runs as `B * K` rows of the model, the beams of a prompt side by side. Every
prompt ends on its own: what one request returns does not depend on the others.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float32, Int32

from jdsi.errors import ConfigError, JdsiError
from jdsi.generation import processors
from jdsi.generation.completion import FinishReason
from jdsi.generation.padding import pad_rows
from jdsi.generation.sampler_state import stop_rows
from jdsi.generation.sampling_params import SamplingParams, check_vocabulary
from jdsi.sharding import TENSOR, all_gather, is_split

_NEVER = 2
_OUT = -1.0e9  # added to a score that must not win; finite as in transformers, so that banned tokens (-inf) rank below


@dataclasses.dataclass(frozen=True)
class BeamFeatures:
    """What is compiled into `step`; more than needed changes no result."""

    repetition: bool = False
    ngrams: bool = False
    min_tokens: bool = False

    @classmethod
    def of(cls, params: Sequence[SamplingParams | None]) -> "BeamFeatures":
        """What the requests need together."""
        live = [p.filled() for p in params if p is not None]
        return cls(
            repetition=any(p.repetition_penalty != 1 for p in live),
            ngrams=any(p.no_repeat_ngram > 0 for p in live),
            min_tokens=any(p.min_new_tokens > 0 for p in live),
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class BeamState:
    """`B` searches of `K` beams. `running` and `finished` hold prompt and output, `L` tokens at most.

    `scores` are the running beams' log-probabilities; `finished_scores` are already divided by the length penalty. An
    idle search, there to fill the batch up, is done from the start and has `max_new_tokens` 0.

    Attributes:
        vocab_size: tokens there are, without what pads the logits where they are divided over devices.
    """

    running: Int32[Array, "B K L"]
    scores: Float32[Array, "B K"]
    finished: Int32[Array, "B K L"]
    finished_scores: Float32[Array, "B K"]
    finished_length: Int32[Array, "B K"]
    is_finished: Bool[Array, "B K"]
    improvable: Bool[Array, " B"]
    done: Bool[Array, " B"]
    step: Int32[Array, " B"]
    prompt_length: Int32[Array, " B"]
    max_new_tokens: Int32[Array, " B"]
    min_new_tokens: Int32[Array, " B"]
    length_penalty: Float32[Array, " B"]
    early_stopping: Int32[Array, " B"]
    repetition_penalty: Float32[Array, " B"]
    no_repeat_ngram: Int32[Array, " B"]
    stop_tokens: Int32[Array, "B N"]
    vocab_size: int = dataclasses.field(metadata={"static": True})


@dataclasses.dataclass(frozen=True)
class Hypothesis:
    """A finished beam: its output (with the token that ended it) and its length-penalised log-probability."""

    token_ids: list[int]
    score: float
    finish_reason: FinishReason


def init(
    params: Sequence[SamplingParams | None],
    prompts: Sequence[Sequence[int]],
    *,
    vocab_size: int,
    eos_token_ids: Sequence[int] = (),
) -> BeamState:
    """The state before the first step.

    Args:
        params: one per prompt; `None` is an idle search, whose prompt does not matter.
        prompts: without padding.
        vocab_size: the `V` of the logits.
        eos_token_ids: end the beams of requests that do not `ignore_eos`.

    Raises:
        ConfigError: the requests differ in `num_beams`, which is the width of the batch, or do not fit the vocabulary.
    """
    beams = {p.filled().num_beams for p in params if p is not None}
    if len(beams) != 1:
        raise ConfigError(f"requests of one beam search have num_beams={sorted(beams)}; all must have the same")
    if len(params) != len(prompts):
        raise ConfigError(f"{len(params)} sampling parameters for {len(prompts)} prompts; give one for each")
    shape = (len(params), beams.pop())
    idle = np.array([p is None for p in params])
    rows = [(p or SamplingParams(max_new_tokens=1)).filled() for p in params]
    prompts = [() if p is None else prompt for p, prompt in zip(params, prompts, strict=True)]
    for p in rows:
        check_vocabulary(p, vocab_size)
    lengths = [len(t) for t in prompts]
    size = max(n + p.max_new_tokens for n, p in zip(lengths, rows, strict=True))
    size = -(-size // 128) * 128  # few sizes, for the model's step is compiled together with the search

    def column(name: str, dtype: type) -> jax.Array:
        return jnp.asarray(np.array([getattr(p, name) for p in rows], dtype))

    return BeamState(
        running=jnp.asarray(np.repeat(pad_rows(prompts, size)[:, None], shape[1], axis=1)),
        # All beams start equal; only the first may give candidates, or every beam would find the same.
        scores=jnp.full(shape, _OUT, jnp.float32).at[:, 0].set(0.0),
        finished=jnp.zeros((*shape, size), jnp.int32),
        finished_scores=jnp.full(shape, _OUT, jnp.float32),
        finished_length=jnp.zeros(shape, jnp.int32),
        is_finished=jnp.zeros(shape, jnp.bool_),
        improvable=jnp.ones(shape[0], jnp.bool_),
        done=jnp.asarray(idle),
        step=jnp.zeros(shape[0], jnp.int32),
        prompt_length=jnp.asarray(np.array(lengths, np.int32)),
        max_new_tokens=jnp.where(idle, 0, column("max_new_tokens", np.int32)),
        min_new_tokens=column("min_new_tokens", np.int32),
        length_penalty=column("length_penalty", np.float32),
        early_stopping=jnp.asarray(
            np.array([_NEVER if p.early_stopping == "never" else int(p.early_stopping) for p in rows], np.int32)
        ),
        repetition_penalty=column("repetition_penalty", np.float32),
        no_repeat_ngram=column("no_repeat_ngram", np.int32),
        stop_tokens=jnp.asarray(stop_rows(rows, eos_token_ids)),
        vocab_size=vocab_size,
    )


def step(
    logits: Float32[Array, "R V"], state: BeamState, features: BeamFeatures
) -> tuple[Int32[Array, " R"], Int32[Array, " R"], BeamState]:
    """Extends every running beam by one token. Pure; `features` is static, `state` donatable.

    Args:
        logits: `[B * K, V]`, the model's output at the last token of each beam. Before the first step all beams of a
            prompt are equal, so a prefill of `B` rows gives `jnp.repeat(logits, K, axis=0)`. Inside `jax.shard_map`
            over the mesh axis "tensor" each rank's share of them, see `vocabulary`; all ranks then return the same.
        state: from `init` or the previous step.
        features: what to compile in.

    Returns:
        The next token of each row, the row whose KV cache it continues, and the new state. Stop when all of
        `state.done`; a prompt that is done no longer changes, its rows go on with meaningless tokens.
    """
    batch, beams, _ = state.running.shape
    if is_split(TENSOR):
        # Everything below, ranks of equals and roundings included, is then as if the vocabulary were not divided.
        logits = all_gather(logits, TENSOR, dim=1)[:, : state.vocab_size]
    vocab_size = logits.shape[-1]
    log_probs = _processed(jax.nn.log_softmax(logits.astype(jnp.float32)), state, features)
    totals = log_probs.reshape(batch, beams, vocab_size) + state.scores[:, :, None]

    # Of (stop tokens + 1) * K candidates at least K do not end: each beam has one candidate per stop token.
    kept = min(max(2, 1 + state.stop_tokens.shape[1]), vocab_size) * beams
    totals, index = lax.top_k(totals.reshape(batch, beams * vocab_size), kept)
    parent, token = index // vocab_size, index % vocab_size
    length = state.step + 1
    position = jnp.arange(state.running.shape[2]) == (state.prompt_length + state.step)[:, None]
    extended = jnp.take_along_axis(state.running, parent[:, :, None], axis=1)
    extended = jnp.where(position[:, None], token[:, :, None], extended)
    stops = jnp.any(token[:, :, None] == state.stop_tokens[:, None], axis=2)
    ends = stops | (length >= state.max_new_tokens)[:, None]

    scores, best = lax.top_k(totals + ends * _OUT, beams)
    running, next_token, next_parent = (_pick(x, best) for x in (extended, token, parent))
    state = dataclasses.replace(
        _collect(state, extended, totals, ends),
        running=running,
        scores=scores,
        step=jnp.where(state.done, state.step, length),
    )
    state = _judge(state, jnp.all(ends, axis=1))
    rows = next_parent + beams * jnp.arange(batch)[:, None]
    return next_token.reshape(-1), rows.reshape(-1), state


def finish(state: BeamState, names: Sequence[str] | None = None) -> list[list[Hypothesis]]:
    """The `num_beams` best hypotheses of every prompt, best first; none of idle searches. Read to the host.

    Args:
        state: every search in it done.
        names: what error messages call the searches; by default their numbers.

    Raises:
        JdsiError: a search is not done, or the model's output was not finite.
    """
    host: BeamState = jax.device_get(state)
    if not host.done.all():
        raise JdsiError(f"the beam search of {_marked(~host.done, names)} is not done; step until all of state.done")
    live = host.max_new_tokens > 0
    broken = live & ~np.isfinite(host.finished_scores).all(axis=1)
    if broken.any():
        raise JdsiError(f"the beam search of {_marked(broken, names)} met NaN or infinite logits")
    found = []
    for row, start in enumerate(host.prompt_length.tolist()):
        hypotheses = []
        for beam, length in enumerate(host.finished_length[row].tolist() if live[row] else ()):
            tokens = host.finished[row, beam, start : start + length].tolist()
            stopped = bool(tokens) and tokens[-1] in host.stop_tokens[row]
            score = float(host.finished_scores[row, beam])
            hypotheses.append(Hypothesis(tokens, score, "stop" if stopped else "length"))
        found.append(hypotheses)
    return found


def _marked(marked: Bool[Array, " B"] | np.ndarray, names: Sequence[str] | None) -> str:
    return ", ".join(f"request {row}" if names is None else names[row] for row in np.flatnonzero(marked).tolist())


def _processed(log_probs: Float32[Array, "R V"], state: BeamState, features: BeamFeatures) -> Float32[Array, "R V"]:
    """The processors that apply to beams; like `transformers`, on log-probabilities and without normalising again."""
    batch, beams, size = state.running.shape
    tokens = state.running.reshape(batch * beams, size)
    length = _per_beam(state.prompt_length + state.step, beams)
    if features.repetition:
        held = jnp.where(jnp.arange(size) < length[:, None], tokens, log_probs.shape[1])
        rows = jnp.arange(batch * beams)[:, None]
        seen = jnp.zeros(log_probs.shape, jnp.bool_).at[rows, held].set(True, mode="drop")
        log_probs = processors.penalise_repetition(log_probs, seen, _per_beam(state.repetition_penalty, beams))
    if features.ngrams:
        log_probs = processors.ban_ngrams(log_probs, tokens, length, _per_beam(state.no_repeat_ngram, beams))
    if features.min_tokens:
        early = _per_beam(state.step < state.min_new_tokens, beams)
        log_probs = processors.ban_tokens(log_probs, _per_beam(state.stop_tokens, beams), early)
    return log_probs


def _collect(
    state: BeamState, extended: Int32[Array, "B C L"], totals: Float32[Array, "B C"], ends: Bool[Array, "B C"]
) -> BeamState:
    """Merges the candidates that end into the pool of finished hypotheses, which keeps its `K` best.

    Only the `K` best candidates may enter; those behind them are there to keep `K` beams running.
    """
    beams = state.scores.shape[1]
    enters = ends & (jnp.arange(totals.shape[1]) < beams)
    full = jnp.all(state.is_finished, axis=1) & (state.early_stopping == 1)
    closed = full | ~state.improvable | state.done
    length = (state.step + 1)[:, None]
    scores = totals / length ** state.length_penalty[:, None]
    scores += (closed[:, None] + (~enters).astype(jnp.float32)) * _OUT

    merged, best = lax.top_k(jnp.concatenate([state.finished_scores, scores], axis=1), beams)

    def merge(old: jax.Array, new: jax.Array) -> jax.Array:
        return _pick(jnp.concatenate([old, new], axis=1), best)

    return dataclasses.replace(
        state,
        finished=merge(state.finished, extended),
        finished_scores=merged,
        finished_length=merge(state.finished_length, jnp.broadcast_to(length, totals.shape)),
        is_finished=merge(state.is_finished, enters),
    )


def _judge(state: BeamState, stuck: Bool[Array, " B"]) -> BeamState:
    """Decides which searches are done: nothing better can come, the pool is full and that suffices, or no beam goes on.

    "Better" is judged by the best running beam at the present length, or, for `"never"` and a penalty that favours
    length, at the greatest.
    """
    longest = (state.early_stopping == _NEVER) & (state.length_penalty > 0)
    length = jnp.where(longest, state.max_new_tokens, state.step).astype(jnp.float32)
    hopeful = state.scores[:, 0] / length**state.length_penalty
    worst = jnp.where(state.is_finished, jnp.min(state.finished_scores, axis=1, keepdims=True), _OUT)
    improvable = state.improvable & jnp.any(hopeful[:, None] > worst, axis=1)
    full = jnp.all(state.is_finished, axis=1) & (state.early_stopping == 1)
    return dataclasses.replace(state, improvable=improvable, done=state.done | ~improvable | full | stuck)


def _pick(array: jax.Array, index: Int32[Array, "B K"]) -> jax.Array:
    """Rows `index` along axis 1 of every batch entry."""
    return jnp.take_along_axis(array, index.reshape(index.shape + (1,) * (array.ndim - 2)), axis=1)


def _per_beam(array: jax.Array, beams: int) -> jax.Array:
    return jnp.repeat(array, beams, axis=0)
