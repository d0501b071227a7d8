"""What is done with a model's outputs, at the end of its program or in one of its own."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from jdsi.sharding import DATA, TENSOR

Epilogue = Callable[[Float[Array, "B V"], Any], tuple[Any, Any]]
"""`(logits, carry) -> (result, carry)`: pure, hashable by value, traced behind the model so that it costs no launch.

One with a true attribute `apart` is a program of its own, see `stands_apart`.
"""


def unchanged(outputs: Float[Array, "B V"], carry: Any) -> tuple[Float[Array, "B V"], Any]:
    """The `Epilogue` that gives what it is given."""
    return outputs, carry


def left_for_another(outputs: Float[Array, "B V"], carry: Any) -> tuple[Float[Array, "B V"], Any]:
    """As `unchanged`, for a program of its own to go on with: on a mesh every rank's share stays where it is."""
    return outputs, carry


def stands_apart(epilogue: Epilogue) -> bool:
    """Whether it is a program of its own, because there are many of its kind and a model takes long to compile."""
    return bool(getattr(epilogue, "apart", False))


def carry_specs(carry: Any) -> Any:
    """How an epilogue's state lies on a mesh: its first dimension over "data", unless it says otherwise."""
    return carry.partition() if hasattr(carry, "partition") else PartitionSpec(DATA)


def result_specs(epilogue: Epilogue, *, divided: bool) -> PartitionSpec:
    """How results lie on a mesh where the outputs' columns are `divided` among ranks, or not."""
    return PartitionSpec(DATA, TENSOR) if divided and epilogue is left_for_another else PartitionSpec(DATA)


class EpilogueProgram:
    """Runs epilogues that stand apart, `(outputs, carry, epilogue) -> (result, carry)`; the carry is donated.

    Args:
        mesh: on which the outputs lie, if they lie on one.
        divided: whether their columns are divided over "tensor".
    """

    def __init__(self, mesh: Mesh | None = None, *, divided: bool = False) -> None:
        self._mesh, self._outputs = mesh, PartitionSpec(DATA, TENSOR) if divided else PartitionSpec(DATA)
        self._run = jax.jit(self._traced, static_argnames="epilogue", donate_argnames="carry")

    def __call__(self, outputs: Float[Array, "B V"], carry: Any, epilogue: Epilogue) -> tuple[Any, Any]:
        return self._run(outputs, carry, epilogue=epilogue)

    def _traced(self, outputs: Array, carry: Any, *, epilogue: Epilogue) -> tuple[Any, Any]:
        if self._mesh is None:
            return epilogue(outputs, carry)
        carried, rows = carry_specs(carry), PartitionSpec(DATA)
        mapped = partial(jax.shard_map, mesh=self._mesh, check_vma=False)
        run = mapped(epilogue, in_specs=(self._outputs, carried), out_specs=(rows, carried))
        result, carry = run(outputs, carry)
        # What is read by the host, and by every device of the first stage of a pipeline.
        return lax.with_sharding_constraint(result, NamedSharding(self._mesh, PartitionSpec())), carry
