"""The arrays that carry beam searches from step to step, and what is read from them at the end."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float32, Int32

from jdsi.errors import ConfigError, JdsiError

from .carried import partition
from .completion import FinishReason
from .features import SamplerFeatures
from .padding import pad_rows
from .row_settings import RowSettings, automata
from .sampling_params import SamplingParams
from .token_automaton import joined

NEVER = 2
OUT = -1.0e9  # added to a score that must not win; finite as in transformers, so that banned tokens (-inf) rank below


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class BeamState:
    """`B` searches of `K` beams. `running` and `finished` hold prompt and output, `L` tokens at most.

    `scores` are the running beams' log-probabilities; `finished_scores` are already divided by the length penalty. An
    idle search, there to fill the batch up, is done from the start and has `max_new_tokens` 0.
    """

    settings: RowSettings
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
    length_penalty: Float32[Array, " B"]
    early_stopping: Int32[Array, " B"]
    automaton_state: Int32[Array, "B K"] | None

    def partition(self) -> Any:
        """How it lies on a mesh, see `carried`."""
        return partition(self)


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
    features: SamplerFeatures | None = None,
) -> BeamState:
    """The state before the first step.

    Args:
        params: one per prompt, neutral where something is left out; `None` is an idle search, whose prompt does not
            matter.
        prompts: without padding.
        vocab_size: the `V` of the logits.
        eos_token_ids: end the beams of requests that do not `ignore_eos`.
        features: at least `SamplerFeatures.of(params)`, which is the default.

    Raises:
        ConfigError: the requests differ in `num_beams`, which is the width of the batch, or do not fit the vocabulary.
    """
    beams = {p.filled().num_beams for p in params if p is not None}
    if len(beams) != 1:
        raise ConfigError(f"requests of one beam search have num_beams={sorted(beams)}; all must have the same")
    if len(params) != len(prompts):
        raise ConfigError(f"{len(params)} sampling parameters for {len(prompts)} prompts; give one for each")
    features = SamplerFeatures.of(params) | (features or SamplerFeatures())
    shape = (len(params), beams.pop())
    idle = np.array([p is None for p in params])
    rows = [(p or SamplingParams(max_new_tokens=1)).filled() for p in params]
    prompts = [() if p is None else prompt for p, prompt in zip(params, prompts, strict=True)]
    lengths = [len(t) for t in prompts]
    size = max(n + p.max_new_tokens for n, p in zip(lengths, rows, strict=True))
    size = -(-size // 128) * 128  # few sizes, for the model's step is compiled together with the search
    settings = RowSettings.of(rows, prompts, vocab_size=vocab_size, eos_token_ids=eos_token_ids, features=features)
    settings = dataclasses.replace(settings, max_new_tokens=jnp.where(idle, 0, settings.max_new_tokens))
    starts = joined(automata(rows))[1]
    stopping = [NEVER if p.early_stopping == "never" else int(p.early_stopping) for p in rows]
    return BeamState(
        settings=settings,
        running=jnp.asarray(np.repeat(pad_rows(prompts, size)[:, None], shape[1], axis=1)),
        # All beams start equal; only the first may give candidates, or every beam would find the same.
        scores=jnp.full(shape, OUT, jnp.float32).at[:, 0].set(0.0),
        finished=jnp.zeros((*shape, size), jnp.int32),
        finished_scores=jnp.full(shape, OUT, jnp.float32),
        finished_length=jnp.zeros(shape, jnp.int32),
        is_finished=jnp.zeros(shape, jnp.bool_),
        improvable=jnp.ones(shape[0], jnp.bool_),
        done=jnp.asarray(idle),
        step=jnp.zeros(shape[0], jnp.int32),
        prompt_length=jnp.asarray(np.array(lengths, np.int32)),
        length_penalty=jnp.asarray(np.array([p.length_penalty for p in rows], np.float32)),
        early_stopping=jnp.asarray(np.array(stopping, np.int32)),
        automaton_state=jnp.asarray(np.repeat(starts[:, None], shape[1], axis=1)) if features.automaton else None,
    )


def finish(state: BeamState, names: Sequence[str] | None = None) -> list[list[Hypothesis]]:
    """The hypotheses of every prompt, best first; `num_beams` unless constraints left fewer; none of idle searches.

    Read to the host.

    Args:
        state: every search in it done.
        names: what error messages call the searches; by default their numbers.

    Raises:
        JdsiError: a search is not done, the model's output was not finite, or constraints left no way to an end.
    """
    host: BeamState = jax.device_get(state)
    if not host.done.all():
        raise JdsiError(f"the beam search of {_marked(~host.done, names)} is not done; step until all of state.done")
    live = host.settings.max_new_tokens > 0
    broken = live & ~np.isfinite(host.finished_scores).all(axis=1)
    if broken.any():
        raise JdsiError(f"the beam search of {_marked(broken, names)} met NaN or infinite logits")
    stuck = live & ~host.is_finished.any(axis=1)
    if stuck.any():
        raise JdsiError(
            f"the beam search of {_marked(stuck, names)} came to no end: every sequence is ruled out by what was "
            "asked for, or a penalty put its score out of range"
        )
    found = []
    for row, start in enumerate(host.prompt_length.tolist()):
        hypotheses = []
        for beam in np.flatnonzero(host.is_finished[row] & live[row]):
            tokens = host.finished[row, beam, start : start + host.finished_length[row, beam]].tolist()
            stopped = bool(tokens) and tokens[-1] in host.settings.stop_tokens[row]
            score = float(host.finished_scores[row, beam])
            hypotheses.append(Hypothesis(tokens, score, "stop" if stopped else "length"))
        found.append(hypotheses)
    return found


def _marked(marked: Bool[Array, " B"] | np.ndarray, names: Sequence[str] | None) -> str:
    return ", ".join(f"request {row}" if names is None else names[row] for row in np.flatnonzero(marked).tolist())
