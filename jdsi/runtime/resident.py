"""The executor for models that fit: all layers in one compiled step."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jdsi.converters import MemoryParameters, ParameterSource
from jdsi.errors import ConfigError
from jdsi.kv_cache import Cache, CacheSpec, Contiguous
from jdsi.models import Part, Skeleton, Transformer, TransformerSpec, parameters
from jdsi.pallas_kernels.operator import Implementation

from .body import Body
from .epilogue import Epilogue, EpilogueProgram, left_for_another, stands_apart
from .executor import Step
from .one_process import OneProcess

_CONTIGUOUS = Contiguous()


class ResidentExecutor(OneProcess):
    """See `Executor`. The model is taken apart once; steps are jitted over its arrays, not over the module.

    Args:
        model: its arrays are used where they are.
        implementation: what operators run, see `default_implementation`.
        cache: the kind of KV memory.
    """

    def __init__(
        self, model: Transformer, implementation: Implementation | None = None, cache: CacheSpec = _CONTIGUOUS
    ) -> None:
        self._cache = cache
        whole = Part.whole(model.spec)
        self._body = Body(Skeleton.around(model), whole, model.spec, implementation)
        self._leaves, self._epilogues = list(parameters(model).values()), EpilogueProgram()
        self._step = jax.jit(self._body, static_argnames=("epilogue", "classify"), donate_argnames=("context", "carry"))

    @property
    def spec(self) -> TransformerSpec:
        """The model's."""
        return self._body.spec

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

    def new_cache(self, rows: int, tokens: int) -> Cache:
        """See `Executor.new_cache`."""
        return self._cache.create(self.spec.kv_shapes, rows, tokens, self.dtype)

    def steps(self, batches: Sequence[Step]) -> list[tuple[Any, Any, Any]]:
        """See `Executor.steps`."""
        return [self._one(batch) for batch in batches]

    def _one(self, b: Step) -> tuple[Any, Any, Any]:
        if not stands_apart(b.epilogue):
            return self._run(b, b.carry, b.epilogue)
        outputs, context, _ = self._run(b, (), left_for_another)
        result, carry = self._epilogues(outputs, b.carry, b.epilogue)
        return result, context, carry

    def _run(self, b: Step, carry: Any, epilogue: Epilogue) -> tuple[Any, Any, Any]:
        return self._step(self._leaves, b.tokens, b.context, b.token_types, b.wanted, carry, epilogue, b.classify)

    def program(self, batch: Step) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        """What a step runs, to be compiled or looked into elsewhere: a function that is not jitted, and its arguments.

        Arguments 2 and 5, context and carry, are donated in `steps`; the results are those that `steps` gives.
        """
        step = partial(self._body, epilogue=batch.epilogue, classify=batch.classify)
        return step, (self._leaves, batch.tokens, batch.context, batch.token_types, batch.wanted, batch.carry)

    def with_parameters(self, use: Callable[[ParameterSource], object]) -> None:
        """See `Executor.with_parameters`; every process calls `use`, for it runs a model of its own."""
        arrays = dict(zip(self._body.names, self._leaves, strict=True))
        if not all(array.is_fully_addressable or array.is_fully_replicated for array in arrays.values()):
            raise ConfigError("parts of this model lie in other processes; only one on a mesh of ours can be saved")
        use(MemoryParameters(arrays))

    def stream_report(self) -> None:
        """See `Executor.stream_report`."""
        return None

    def close(self) -> None:
        """See `Executor.close`; there is no background work."""
