"""A model compiled in pieces: one program per kind of layer, not per layer, each inside one `jax.shard_map`."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from jdsi.kv_cache import AttentionContext
from jdsi.models import TransformerSpec
from jdsi.models.parts import embedding_part, layer_part, tied_table, top_part
from jdsi.models.spec import LayerSpec
from jdsi.models.tensor_parallel import local_spec, without_padding
from jdsi.pallas_kernels.operator import Implementation, default_implementation
from jdsi.sharding import DATA, TENSOR, axis_index

from .executor import Epilogue, carry_specs
from .placement import Streamed, Weights

_ROWS, _WHOLE, _EACH = PartitionSpec(DATA), PartitionSpec(), PartitionSpec((DATA, TENSOR))


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
        self._local = local_spec(spec, mesh.shape[TENSOR])
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
        part = embedding_part(self._local, self.dtype)

        def body(arrays: Any, tokens: Array, frame: AttentionContext, token_types: Array | None) -> Any:
            parameters = weights.parameters(arrays, self.dtype)
            with default_implementation(self._implementation):
                x = part.build(part.pick(parameters, "embedding."))(tokens, frame.positions, token_types)
            return x, x[:1, 0]

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
        local = self._local.layers[self._spec.layers.index(layer)]
        part = layer_part(self._local, local, self.dtype)

        def body(arrays: Any, hidden: Array, memory: Any, frame: AttentionContext) -> Any:
            parameters = weights.parameters(arrays, self.dtype)
            with default_implementation(self._implementation):
                hidden, context = part.build(part.pick(parameters, ""))(hidden, frame.only(memory))
            return hidden, context.memory(0), hidden[:1, 0]

        @partial(jax.jit, donate_argnames=("hidden", "memory"))
        def run(arrays: Any, hidden: Array, memory: Any, frame: AttentionContext) -> Any:
            held = frame.only(memory).partition().memory(0)
            specs = (weights.specs, _ROWS, held, frame.partition())
            return self._mapped(body, specs, (_ROWS, held, _EACH))(arrays, hidden, memory, frame)

        return self._made.setdefault((weights, layer), run)

    def top(self, weights: Sequence[Weights]) -> Any:
        """`(arrays, hidden, wanted, epilogue, carry, classify) -> (result, carry, done)`: norm, heads and epilogue.

        Args:
            weights: of the blocks that have them; `arrays` has an item for each.
        """

        def run(
            arrays: Any, hidden: Array, wanted: Array | None, epilogue: Epilogue, carry: Any, classify: bool
        ) -> Any:
            def body(arrays: Any, hidden: Array, wanted: Array | None, carry: Any) -> Any:
                if wanted is not None:
                    wanted = wanted - axis_index(DATA) * hidden.shape[0]
                outputs = self._outputs(weights, arrays, hidden, wanted, classify=classify)
                return *epilogue(outputs, carry), outputs[:1, 0]

            carried = carry_specs(carry)
            specs = ([w.specs for w in weights], _ROWS, _ROWS, carried)
            result, carry, done = self._mapped(body, specs, (_ROWS, carried, _EACH))(arrays, hidden, wanted, carry)
            return lax.with_sharding_constraint(result, NamedSharding(self._mesh, _WHOLE)), carry, done

        return jax.jit(run, static_argnames=("epilogue", "classify"), donate_argnames="carry")

    def logits(self, weights: Sequence[Weights]) -> Any:
        """`(arrays, hidden) -> (logits, done)`: those of every token, or hidden states where there is no head."""

        def run(arrays: Any, hidden: Array) -> Any:
            def body(arrays: Any, hidden: Array) -> Any:
                logits = self._outputs(weights, arrays, hidden, None)
                return logits, logits[:1, 0]

            vocabulary = PartitionSpec(DATA, TENSOR) if self._spec.head else _ROWS
            logits, done = self._mapped(body, ([w.specs for w in weights], _ROWS), (vocabulary, _EACH))(arrays, hidden)
            whole = logits[:, : self._spec.vocab_size] if self._spec.head else logits
            return lax.with_sharding_constraint(whole, NamedSharding(self._mesh, _WHOLE)), done

        return jax.jit(run)

    def _outputs(
        self, weights: Sequence[Weights], arrays: Any, hidden: Array, wanted: Array | None, *, classify: bool = False
    ) -> Array:
        part, table = top_part(self._local, self.dtype), tied_table(self._spec)
        parameters: Mapping[str, Array] = {}
        for one, own in zip(weights, arrays, strict=True):
            parameters = {**parameters, **one.parameters(own, self.dtype)}
        tied = None if table is None else parameters[table]
        with default_implementation(self._implementation):
            outputs = part.build(part.pick(parameters, ""))(hidden, wanted, tied, classify=classify)
        return outputs if classify or self._spec.head is None else without_padding(outputs, self._spec.vocab_size)

    def _mapped(self, body: Any, in_specs: Any, out_specs: Any) -> Any:
        return jax.shard_map(body, mesh=self._mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
