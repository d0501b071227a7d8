"""The executor for models that fit: all layers in one compiled step."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jdsi.converters import MemoryParameters, ParameterSource
from jdsi.errors import ConfigError
from jdsi.kv_cache import AttentionContext
from jdsi.models import Transformer, TransformerSpec, parameters
from jdsi.pallas_kernels.operator import Implementation, default_implementation

from .executor import Epilogue, Step
from .one_process import OneProcess


class ResidentExecutor(OneProcess):
    """See `Executor`. The module is taken apart once; steps are jitted over its flat leaves, not over the module.

    Args:
        model: its arrays are used where they are.
        implementation: what operators run, see `default_implementation`.
    """

    def __init__(self, model: Transformer, implementation: Implementation | None = None) -> None:
        self._spec = model.spec
        graph, state = nnx.split(model)
        self._leaves, structure = jax.tree.flatten(state)

        def rebuild(leaves: list[Array]) -> Transformer:
            return nnx.merge(graph, jax.tree.unflatten(structure, leaves))

        def step(
            leaves: list[Array],
            tokens: Array,
            context: AttentionContext,
            token_types: Array | None,
            wanted: Array | None,
            epilogue: Epilogue,
            carry: Any,
            classify: bool,
        ) -> tuple[Any, AttentionContext, Any]:
            model = rebuild(leaves)
            with default_implementation(implementation):
                hidden, context = model.forward(tokens, context, token_types)
                if wanted is not None:
                    hidden = hidden[wanted]
                if classify:
                    assert model.classifier is not None
                    outputs = model.classifier(hidden)
                else:
                    outputs = model.logits(hidden)
                result, carry = epilogue(outputs, carry)
            return result, context, carry

        @jax.jit
        def logits(leaves: list[Array], tokens: Array, lengths: Array, token_types: Array | None) -> Array:
            with default_implementation(implementation):
                return rebuild(leaves)(tokens, lengths, token_types)

        statics, donated = ("epilogue", "classify"), ("context", "carry")
        self._step = jax.jit(step, static_argnames=statics, donate_argnames=donated)
        self._plain_step, self._logits, self._rebuild = step, logits, rebuild

    @property
    def spec(self) -> TransformerSpec:
        """The model's."""
        return self._spec

    @property
    def dtype(self) -> jnp.dtype:
        """Dtype of weights and activations."""
        return self._leaves[0].dtype

    @property
    def runs_ahead(self) -> bool:
        """See `Executor.runs_ahead`."""
        return True

    @property
    def batches_per_pass(self) -> int:
        """See `Executor.batches_per_pass`."""
        return 1

    def steps(self, batches: Sequence[Step]) -> list[tuple[Any, Any, Any]]:
        """See `Executor.steps`."""
        return [
            self._step(self._leaves, b.tokens, b.context, b.token_types, b.wanted, b.epilogue, b.carry, b.classify)
            for b in batches
        ]

    def program(self, batch: Step) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        """What a step runs, to be compiled or looked into elsewhere: a function that is not jitted, and its arguments.

        Arguments 2 and 5, context and carry, are donated in `steps`; the results are those that `steps` gives.
        """

        def step(leaves: list[Array], tokens: Any, context: Any, types: Any, wanted: Any, carry: Any) -> Any:
            return self._plain_step(leaves, tokens, context, types, wanted, batch.epilogue, carry, batch.classify)

        return step, (self._leaves, batch.tokens, batch.context, batch.token_types, batch.wanted, batch.carry)

    def logits(
        self, tokens: Int[Array, "B S"], lengths: Int[Array, " B"], token_types: Int[Array, "B S"] | None = None
    ) -> Float[Array, "B S V"]:
        """See `Executor.logits`."""
        return self._logits(self._leaves, tokens, lengths, token_types)

    def with_parameters(self, use: Callable[[ParameterSource], object]) -> None:
        """See `Executor.with_parameters`; every process calls `use`, for it runs a model of its own."""
        arrays = parameters(self._rebuild(self._leaves))
        if not all(array.is_fully_addressable or array.is_fully_replicated for array in arrays.values()):
            raise ConfigError("parts of this model lie in other processes; only one on a mesh of ours can be saved")
        use(MemoryParameters(arrays))

    def stream_report(self) -> None:
        """See `Executor.stream_report`."""
        return None

    def close(self) -> None:
        """See `Executor.close`; there is no background work."""
