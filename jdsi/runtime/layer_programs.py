"""A model compiled in pieces: one program per kind of layer, not per layer, each inside one `jax.shard_map`."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from jdsi.kv_cache import AttentionContext
from jdsi.models import Part, TransformerSpec, layer_group
from jdsi.models.spec import LayerSpec
from jdsi.pallas_kernels.operator import Implementation
from jdsi.sharding import DATA, TENSOR

from .body import Body
from .epilogue import Epilogue, carry_specs, left_for_another, result_specs, unchanged
from .placement import Streamed, Weights

_ROWS, _WHOLE, _EACH = PartitionSpec(DATA), PartitionSpec(), PartitionSpec((DATA, TENSOR))
_NOTHING = None, (), unchanged, False  # is wanted of a part that is not the last


class LayerPrograms:
    """Makes the programs of a model on a mesh with the axes "data" and "tensor".

    What a program returns is given away to the next one or the caller, so each also returns one number per device that
    tells when that is done. Hidden states lie divided over "data".

    Attributes:
        dtype: of activations, and of parameters as they are used.
    """

    def __init__(self, spec: TransformerSpec, mesh: Mesh, dtype: Any, implementation: Implementation | None) -> None:
        self._spec, self._mesh, self.dtype = spec, mesh, jnp.dtype(dtype)
        self._implementation: Implementation | None = implementation
        self._made: dict[Any, Any] = {}

    def keep(self, weights: Streamed, kept: Weights) -> Any:
        """`(arrays, into) -> (parameters, done)`: what `kept` describes, out of what `weights` does.

        They are written over `into`, such parameters which nobody needs any more, or `None`. The same program for equal
        weights.
        """
        if weights in self._made:
            return self._made[weights]

        def body(arrays: Any) -> tuple[dict[str, Array], Array]:
            parameters = weights.parameters(arrays, self.dtype)
            return parameters, next(iter(parameters.values())).reshape(-1)[:1]

        @partial(jax.jit, donate_argnames="into", keep_unused=True)
        def run(arrays: Any, into: dict[str, Array] | None) -> tuple[dict[str, Array], Array]:
            return self._mapped(body, (weights.specs,), (kept.specs, _EACH))(arrays)

        return self._made.setdefault(weights, run)

    def embed(self, weights: Weights) -> Any:
        """`(arrays, tokens, frame, token_types) -> (hidden, done)`; the frame is a context without memory."""
        part = self._body(Part.embedding())

        def body(arrays: Any, tokens: Array, frame: AttentionContext, token_types: Array | None) -> Any:
            hidden, _, _ = part(self._pick(part, [weights], [arrays]), tokens, frame, token_types, *_NOTHING)
            return hidden, hidden[:1, 0]

        def run(arrays: Any, tokens: Array, frame: AttentionContext, token_types: Array | None) -> Any:
            specs = (weights.specs, _ROWS, frame.partition(), _ROWS)
            return self._mapped(body, specs, (_ROWS, _EACH))(arrays, tokens, frame, token_types)

        return jax.jit(run)

    def layer(self, weights: Weights, layer: LayerSpec) -> Any:
        """`(arrays, hidden, memory, frame) -> (hidden, memory, done)`, where `hidden` and `memory` are donated.

        The same program for equal weights and layers.
        """
        if (weights, layer) in self._made:
            return self._made[weights, layer]
        index = self._spec.layers.index(layer)
        part = self._body(Part.layer(index))

        def body(arrays: Any, hidden: Array, memory: Any, frame: AttentionContext) -> Any:
            leaves = self._pick(part, [weights], [arrays], f"{layer_group(index)}.")
            hidden, context, _ = part(leaves, hidden, frame.only(memory), None, *_NOTHING)
            return hidden, context.memory(0), hidden[:1, 0]

        @partial(jax.jit, donate_argnames=("hidden", "memory"))
        def run(arrays: Any, hidden: Array, memory: Any, frame: AttentionContext) -> Any:
            held = frame.only(memory).partition().memory(0)
            specs = (weights.specs, _ROWS, held, frame.partition())
            return self._mapped(body, specs, (_ROWS, held, _EACH))(arrays, hidden, memory, frame)

        return self._made.setdefault((weights, layer), run)

    def top(self, weights: Sequence[Weights]) -> Any:
        """`(arrays, hidden, frame, wanted, epilogue, carry, classify) -> (result, carry, done)`.

        Norm, heads and epilogue.

        Args:
            weights: of the blocks that have them; `arrays` has an item for each.
        """
        part = self._body(Part.top())

        def run(
            arrays: Any,
            hidden: Array,
            frame: AttentionContext,
            wanted: Array | None,
            epilogue: Epilogue,
            carry: Any,
            classify: bool,
        ) -> Any:
            def body(arrays: Any, hidden: Array, frame: AttentionContext, wanted: Array | None, carry: Any) -> Any:
                leaves = self._pick(part, weights, arrays)

                def telling(outputs: Array, carry: Any) -> tuple[Any, Any]:
                    result, carry = epilogue(outputs, carry)
                    return (result, outputs[:1, 0]), carry

                (result, done), _, carry = part(leaves, hidden, frame, None, wanted, carry, telling, classify)
                return result, carry, done

            carried = carry_specs(carry)
            specs = ([w.specs for w in weights], _ROWS, frame.partition(), _ROWS, carried)
            results = result_specs(epilogue, divided=self._spec.head is not None)
            mapped = self._mapped(body, specs, (results, carried, _EACH))
            result, carry, done = mapped(arrays, hidden, frame, wanted, carry)
            if epilogue is left_for_another:
                return result, carry, done
            return lax.with_sharding_constraint(result, NamedSharding(self._mesh, _WHOLE)), carry, done

        return jax.jit(run, static_argnames=("epilogue", "classify"), donate_argnames="carry")

    def _body(self, part: Part) -> Body:
        return Body.of(
            self._spec,
            part,
            self.dtype,
            self._mesh.shape[TENSOR],
            implementation=self._implementation,
            sequence_parallel=False,
        )

    def _pick(self, part: Body, weights: Sequence[Weights], arrays: Any, prefix: str = "") -> list[Array]:
        """A part's parameters out of blocks, which call them without the prefix."""
        found: dict[str, Array] = {}
        for one, own in zip(weights, arrays, strict=True):
            found |= {f"{prefix}{name}": array for name, array in one.parameters(own, self.dtype).items()}
        return part.pick(found)

    def _mapped(self, body: Any, in_specs: Any, out_specs: Any) -> Any:
        return jax.shard_map(body, mesh=self._mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
