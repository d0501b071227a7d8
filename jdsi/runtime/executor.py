"""Where weights live and how a step reaches them."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
import numpy as np
from jaxtyping import Array, Int

from jdsi.converters import ParameterSource
from jdsi.kv_cache import Cache
from jdsi.models import TransformerSpec
from jdsi.sharding import Parallelism

from .epilogue import Epilogue
from .weight_stream import StreamReport


@dataclasses.dataclass(frozen=True)
class Step:
    """One batch's forward pass and what is done with its logits.

    Attributes:
        tokens: packed ids.
        context: which token belongs where. Donated: use the one returned from here on.
        wanted: index in `tokens` of those whose logits are wanted, one of each row; `None` for all tokens.
        epilogue: applied to the logits, see `Epilogue`.
        carry: its state. Donated.
        token_types: segment ids of families that have them.
        classify: the classifier is applied to the wanted tokens in place of the head.
    """

    tokens: Int[Array | np.ndarray, " T"]
    context: Any
    wanted: Int[Array | np.ndarray, " B"] | None
    epilogue: Epilogue
    carry: Any
    token_types: Int[Array | np.ndarray, " T"] | None = None
    classify: bool = False


class Executor(Protocol):
    """Runs forward passes of one model; callers do not know whether its weights are resident, staged or streamed."""

    @property
    def spec(self) -> TransformerSpec:
        """The model's."""
        ...

    @property
    def dtype(self) -> jax.numpy.dtype:
        """Dtype of weights and activations."""
        ...

    @property
    def parallelism(self) -> Parallelism:
        """Over how many devices the model is spread."""
        ...

    @property
    def choice(self) -> Any:
        """How the degrees of parallelism were chosen, a `jdsi.planning.Choice`; `None` where they were not."""
        ...

    @property
    def runs_ahead(self) -> bool:
        """Whether a step should be issued before the last one's results are read: where a needless step is cheap."""
        ...

    @property
    def batches_per_pass(self) -> int:
        """How many batches should share a pass; one unless weights are fetched for every pass."""
        ...

    @property
    def micro_batches(self) -> int:
        """Into how many batches requests should be cut, if need be smaller ones, because so many run at a time."""
        ...

    @property
    def prompt_pieces(self) -> int:
        """Into how many pieces, passes of their own, a batch is cut while its prompts are read."""
        ...

    @property
    def row_multiple(self) -> int:
        """The rows of a batch must be a multiple of this."""
        ...

    def new_cache(self, rows: int, tokens: int) -> Cache:
        """Empty KV memory for `rows` sequences of up to so many tokens, where the executor wants it."""
        ...

    def steps(self, batches: Sequence[Step]) -> list[tuple[Any, Any, Any]]:
        """One pass for each batch; executors that fetch weights fetch them once for all.

        Returns:
            Per batch the epilogue's result, the context that has seen the tokens, the epilogue's new state.
        """
        ...

    def agree(self, requests: Mapping[str, Any]) -> int | None:
        """Called before a generation, with what is asked of it, for where several processes run the executor together.

        Args:
            requests: by name; must be the same in all of them.

        Returns:
            A random number that they share; `None` where no other process takes part.

        Raises:
            ConfigError: the processes were asked for different things.
            PeerError: a process is lost.
        """
        ...

    def on_host(self, carry: Any) -> Any:
        """An epilogue's state as NumPy arrays, in every process that runs the executor."""
        ...

    def with_parameters(self, use: Callable[[ParameterSource], object]) -> None:
        """Calls `use` with all parameters of the model, plain and of the dtype they have here.

        Where several processes run the executor together, all make this call; it is process 0 that calls `use`.

        Raises:
            CheckpointError, ConfigError: `use` raised it, in every process; or the weights cannot be had.
            PeerError: a process is lost.
        """
        ...

    def stream_report(self) -> StreamReport | None:
        """What fetching weights has taken so far; `None` where all stay on the device."""
        ...

    def close(self) -> None:
        """Ends background work; the executor is of no use afterwards."""
        ...
