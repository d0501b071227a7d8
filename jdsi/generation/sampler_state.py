"""The arrays that carry a batch of requests from one sampling step to the next.

Every leaf has one row per request, but for what `carried` says.
"""

import dataclasses
import enum
import hashlib
import secrets
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int32, UInt32

from jdsi.errors import ConfigError

from .carried import partition
from .features import SamplerFeatures
from .row_settings import RowSettings
from .sampling_params import SamplingParams
from .written import Written


class FinishCode(enum.IntEnum):
    """Why a row ended, as the device reports it. `ERROR`: no token has a finite logit, the model's output is broken."""

    RUNNING = 0
    STOP = 1
    LENGTH = 2
    ERROR = 3


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class SamplerState:
    """One row per request. `key`, of the noise, is `None` where the features do without it."""

    settings: RowSettings
    written: Written
    pad_token: Int32[Array, " B"]
    finish: Int32[Array, " B"]
    key: UInt32[Array, "B 2"] | None

    def partition(self) -> Any:
        """How it lies on a mesh, see `carried`."""
        return partition(self)


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
        params: one per row, neutral where something is left out; `None` is an idle row, finished from the start.
        prompts: each row's prompt, without padding; read by what looks at tokens only.
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
    idle = np.array([p is None for p in params])
    return SamplerState(
        settings=RowSettings.of(rows, prompts, vocab_size=vocab_size, eos_token_ids=eos_token_ids, features=features),
        written=Written.prompts(rows, prompts, vocab_size, features),
        pad_token=jnp.full(len(rows), pad_token_id, jnp.int32),
        finish=jnp.asarray(np.where(idle, FinishCode.STOP, FinishCode.RUNNING).astype(np.int32)),
        key=jnp.asarray(np.array([_key(p.seed) for p in rows], np.uint32)) if features.noise else None,
    )


def seed_of_choice(seed: int | None, choice: int) -> int | None:
    """The seed of one of several results of a request; the first is the request's own."""
    if seed is None or choice == 0:
        return seed
    return int.from_bytes(hashlib.blake2b(f"{seed} {choice}".encode(), digest_size=8).digest())


def _key(seed: int | None) -> tuple[int, int]:
    """The threefry key that `jax.random.key(seed)` has, for seeds of 64 bits."""
    seed = secrets.randbits(64) if seed is None else seed
    return seed >> 32, seed & 0xFFFFFFFF
