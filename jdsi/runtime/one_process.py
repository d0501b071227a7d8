"""What executors have in common that run in one process and without a pipeline."""

import abc
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jdsi.models import TransformerSpec
from jdsi.sharding import Parallelism


class OneProcess(abc.ABC):
    """The members of `Executor` that have one answer without other processes and stages; a base for such executors.

    As they stand here they are for a model that nothing of ours spreads over devices.
    """

    @property
    @abc.abstractmethod
    def spec(self) -> TransformerSpec:
        """The model's."""

    @property
    @abc.abstractmethod
    def dtype(self) -> jnp.dtype:
        """Dtype of activations."""

    @property
    def parallelism(self) -> Parallelism:
        """See `Executor.parallelism`; a model whose arrays are spread is split by XLA, not by us."""
        return Parallelism()

    @property
    def choice(self) -> None:
        """See `Executor.choice`."""
        return None

    @property
    def micro_batches(self) -> int:
        """See `Executor.micro_batches`."""
        return 1

    @property
    def prompt_pieces(self) -> int:
        """See `Executor.prompt_pieces`."""
        return 1

    @property
    def row_multiple(self) -> int:
        """See `Executor.row_multiple`."""
        return 1

    def agree(self, requests: Mapping[str, Any]) -> None:
        """See `Executor.agree`; other processes, if there are any, run models of their own."""
        return None

    def on_host(self, carry: Any) -> Any:
        """See `Executor.on_host`."""
        return jax.device_get(carry)
